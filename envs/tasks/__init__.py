"""Tasks: named sets of tools written as Python functions, and the registry that finds them.

A Task serves both ways: in the rollout's process (`environment.type: python`) and over HTTP (`rft tools NAME`).
Arguments are validated before a tool runs; what the model got wrong comes back as an ArgumentError whose text is
written for the model.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from types import ModuleType
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from rft.errors import UserError

_BUILTIN = {name: f"rft.envs.tasks.{name}:TASK" for name in ("finance", "icd10", "icd10_notes")}


class ArgumentError(Exception):
    """The model's call is wrong in a way it can repair; the text tells it how."""


class Tool:
    """A Python function, sync or async, as a tool: type hints and docstring are its schema.

    Parameters take `Annotated[T, Field(description=...)]`, or are described in the docstring (Google, numpy or reST
    style). The function may raise ArgumentError; anything else it raises is a failure of the tool.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.name: str = function.__name__

    @property
    def is_async(self) -> bool:
        return inspect.iscoroutinefunction(self.function)

    @cached_property
    def _parameters(self) -> dict[str, inspect.Parameter]:
        """By name. Raises TypeError for a function whose calls have no schema."""
        parameters = inspect.signature(self.function, eval_str=True).parameters
        for parameter in parameters.values():
            if parameter.kind not in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY):
                raise TypeError(f"{self.name}: {parameter} cannot be a parameter of a tool")
            if parameter.annotation is inspect.Parameter.empty:
                raise TypeError(f"{self.name}: the parameter {parameter.name} has no type hint")
        return dict(parameters)

    @cached_property
    def _arguments(self) -> type[BaseModel]:
        fields: dict[str, Any] = {}
        for index, (name, parameter) in enumerate(self._parameters.items()):
            default = ... if parameter.default is inspect.Parameter.empty else parameter.default
            # under a name of ours: pydantic keeps some (`copy`, `_x`) for itself
            fields[f"argument_{index}"] = (Annotated[parameter.annotation, Field(alias=name)], default)
        return create_model(self.name, __config__=ConfigDict(extra="forbid"), **fields)

    def spec(self) -> dict[str, Any]:
        """The tool as a dataset row carries it in `tools`."""
        from docstring_parser import parse

        doc = parse(inspect.getdoc(self.function) or "")
        parameters = without_titles(self._arguments.model_json_schema())
        for described in doc.params:
            schema = parameters["properties"].get(described.arg_name)
            if schema is not None and described.description:
                schema.setdefault("description", " ".join(described.description.split()))
        function = {
            "name": self.name,
            "description": " ".join(f"{doc.short_description or ''} {doc.long_description or ''}".split()),
            "parameters": parameters,
            "strict": True,
        }
        return {"type": "function", "function": function}

    def arguments(self, arguments_json: str) -> dict[str, Any]:
        """The validated keyword arguments. Raises ArgumentError for what the model must repair."""
        try:
            arguments = json.loads(arguments_json)
        except (ValueError, RecursionError) as error:
            raise ArgumentError(f"arguments: not valid JSON: {error}") from None
        if not isinstance(arguments, dict):
            raise ArgumentError("arguments: must be a JSON object")
        try:
            checked = self._arguments.model_validate(arguments)
        except ValidationError as error:
            raise ArgumentError(_explain(error)) from None
        return {name: getattr(checked, f"argument_{index}") for index, name in enumerate(self._parameters)}

    def run(self, arguments_json: str) -> Any:
        """Validate the arguments and run the function, an async one on a loop of its own. Raises ArgumentError."""
        result = self.function(**self.arguments(arguments_json))
        return asyncio.run(result) if inspect.iscoroutine(result) else result

    def bound_to(self, owner: object) -> Tool:
        """This method of a class as the tool of one instance, with the same schema."""
        tool = copy.copy(self)
        tool.function = getattr(owner, self.name)
        return tool


def _nothing() -> None:
    """A task that needs no preparation."""


@dataclass(frozen=True, slots=True)
class Task:
    """A named set of tools; `prepare` loads what they need, so that the first call is not the slow one."""

    name: str
    tools: tuple[Tool, ...]
    prepare: Callable[[], None] = _nothing

    def tool(self, name: str) -> Tool | None:
        return next((tool for tool in self.tools if tool.name == name), None)

    @property
    def tool_names(self) -> frozenset[str]:
        return frozenset(tool.name for tool in self.tools)

    @property
    def specs(self) -> dict[str, dict[str, Any]]:
        """Each tool by its name, as a dataset row carries it."""
        return {tool.name: tool.spec() for tool in self.tools}


def import_from_here(name: str) -> ModuleType:
    """Import a module, also one in the current folder: the `rft` command, unlike `python -m`, does not look there."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that it hides nothing
    return import_module(name)


def load_task(name: str) -> Task:
    """A task of rft by its name, or your own as `package.module:NAME`. Raises UserError naming the cure."""
    module_name, colon, attribute = _BUILTIN.get(name, name).partition(":")
    if not colon:
        known = ", ".join(sorted(_BUILTIN))
        raise UserError(f"there is no task {name}", where="task", cure=f"use {known} or package.module:NAME")
    try:
        task = getattr(import_from_here(module_name), attribute)
    except (ImportError, AttributeError) as error:
        cure = "check the name, and that the module can be imported from here"
        raise UserError(f"cannot be loaded: {error}", where=f"task {name}", cure=cure) from None
    if not isinstance(task, Task):
        cure = f"define {attribute} = Task(name=..., tools=(Tool(function), ...))"
        raise UserError(f"{attribute} is a {type(task).__name__}, not a Task", where=f"task {name}", cure=cure)
    return task


def _explain(error: ValidationError) -> str:
    """One line per wrong argument, e.g. `arguments.query: field required`."""
    lines = []
    for problem in error.errors(include_url=False):
        path = ".".join(["arguments", *map(str, problem["loc"])])
        text = "unknown argument" if problem["type"] == "extra_forbidden" else problem["msg"]
        lines.append(f"{path}: {text[0].lower()}{text[1:]}")
    return "; ".join(lines)


def without_titles(schema: Any) -> Any:
    """A JSON schema without pydantic's titles: they say nothing and cost prompt tokens."""
    if isinstance(schema, list):
        return [without_titles(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    # under "properties" a key is a parameter's name, and a parameter may be called title
    return {
        key: {name: without_titles(part) for name, part in value.items()}
        if key == "properties"
        else without_titles(value)
        for key, value in schema.items()
        if key != "title"
    }
