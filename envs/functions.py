"""Plain Python functions and classes as tools: hints and docstrings are the schema, nothing of rft is imported.

Guarantees: what is no tool is a UserError before anything runs; of a class every rollout has an instance of its own,
made from its row, asked one call at a time and closed at the end. Functions keep what their module keeps, for all.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import logging
from dataclasses import dataclass
from types import MethodType, ModuleType
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rft.envs.base import Session, ToolSpecs
from rft.envs.outage import Outages
from rft.envs.tasks import Tool, import_from_here
from rft.envs.toolbox import DeadlineError, Toolbox, within
from rft.errors import ToolError, UserError
from rft.types import Item, ToolCall, ToolResult

logger = logging.getLogger(__name__)

_WHERE = "environment.functions"
_CLOSERS = ("aclose", "close")


class FunctionsEnvironmentConfig(BaseModel):
    """`package.module:NAME` of functions and classes, or a `module` of which all public functions are taken."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["functions"] = "functions"
    functions: tuple[str, ...] = ()
    module: str | None = Field(default=None, min_length=1)
    timeout_s: float = Field(default=600.0, gt=0, description="per call; also to make an instance and to close it")

    @model_validator(mode="after")
    def _names_something(self) -> FunctionsEnvironmentConfig:
        if not self.functions and self.module is None:
            raise ValueError("functions: at least one package.module:NAME is needed, or `module`")
        return self


@dataclass(frozen=True, slots=True)
class Toolset:
    """A class whose public methods are tools; its `tools` carry the schemas, `bound_to` gives those of an instance."""

    kind: type
    tools: tuple[Tool, ...]

    async def make(self, item: Item, timeout_s: float) -> Any:
        """A new instance, with a copy of the row when its __init__ takes `item`. Raises ToolError.

        Cancelled, it leaves an instance that is still being made to itself.
        """
        takes_item = "item" in inspect.signature(self.kind).parameters
        arguments = {"item": copy.deepcopy(item.row)} if takes_item else {}
        try:
            return await within(timeout_s, self.kind, **arguments)
        except DeadlineError:
            raise ToolError(f"{self.kind.__name__} was not made within {timeout_s:g} s") from None
        except Exception as error:  # code from outside: whatever it raises is its failure, not a bug of ours
            raise ToolError(f"{self.kind.__name__} cannot be made: {type(error).__name__}: {error}") from error


class FunctionsEnvironment:
    """Serves functions to all rollouts, and to each its own instance of the classes."""

    def __init__(self, config: FunctionsEnvironmentConfig) -> None:
        self._timeout_s = config.timeout_s
        found = [_load(name) for name in config.functions] + (_public(config.module) if config.module else [])
        self._functions = [_checked(Tool(part)) for part in found if not isinstance(part, type)]
        self._toolsets = [_toolset(part) for part in found if isinstance(part, type)]
        self._tools = [*self._functions, *(tool for toolset in self._toolsets for tool in toolset.tools)]
        names = [tool.name for tool in self._tools]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"there are two tools {repeated[0]}", where=_WHERE, cure="rename one, or leave it out")
        self.outages = Outages()  # of which functions in this process have none

    async def discover(self) -> ToolSpecs:
        return {tool.name: tool.spec() for tool in self._tools}

    async def check(self) -> None:
        """Nothing to do: everything was imported and looked at when this was made."""

    async def open(self, item: Item, rollout_id: str) -> FunctionsSession:
        """Raises ToolError when a class cannot be instantiated."""
        session = FunctionsSession(item, self._functions, self._timeout_s)
        try:
            for toolset in self._toolsets:
                session.add(await toolset.make(item, self._timeout_s), toolset.tools)
        except BaseException:  # also cancellation: what was made must be closed
            await session.close()
            raise
        return session

    async def close(self) -> None:
        """Nothing to release: threads end with their calls."""


class FunctionsSession(Session):
    """The tools of one rollout. Methods are called one at a time, in the order of the calls; functions at once."""

    def __init__(self, item: Item, functions: list[Tool], timeout_s: float) -> None:
        self._item, self._timeout_s = item, timeout_s
        self._functions = Toolbox(functions, timeout_s)
        self._methods = Toolbox([], timeout_s)
        self._instances: list[Any] = []
        self._one_at_a_time = asyncio.Lock()

    def add(self, instance: Any, tools: tuple[Tool, ...]) -> None:
        self._instances.append(instance)
        self._methods.tools |= {tool.name: tool.bound_to(instance) for tool in tools}

    async def call(self, call: ToolCall) -> ToolResult:
        """The tool's answer; raises ToolError when the rollout must be discarded."""
        if call.name not in self._methods.tools:
            return await self._functions.call(call, self._item)
        async with self._one_at_a_time:
            return await self._methods.call(call, self._item)

    async def close(self) -> None:
        """Close the instances, last one first; one that fails costs a warning."""
        while self._instances:
            instance = self._instances.pop()
            closer = next((name for name in _CLOSERS if callable(getattr(instance, name, None))), None)
            if closer is None:
                continue
            try:
                await within(self._timeout_s, getattr(instance, closer))
            except Exception as error:  # code from outside; the rollout is over, and its grade must not be lost
                logger.warning("%s.%s failed: %s", type(instance).__name__, closer, type(error).__name__)


def _load(name: str) -> Any:
    """The function or class that `package.module:NAME` names. Raises UserError."""
    module_name, colon, attribute = name.partition(":")
    if not colon:
        raise UserError(f"{name} has no colon", where=_WHERE, cure="write package.module:NAME")
    found = getattr(_import(module_name), attribute, None)
    if not inspect.isroutine(found) and not isinstance(found, type):
        problem = f"{module_name} has no {attribute}" if found is None else f"{name} is neither function nor class"
        raise UserError(problem, where=_WHERE, cure="check the name")
    return found


def _import(name: str) -> ModuleType:
    try:
        return import_from_here(name)
    except Exception as error:  # a module is code from outside: whatever it raises, it cannot be used
        cure = "check the name, and that the module can be imported from here"
        raise UserError(
            f"{name} cannot be imported: {type(error).__name__}: {error}", where=_WHERE, cure=cure
        ) from None


def _public(name: str) -> list[Any]:
    """What `__all__` names, or else the public functions that the module itself defines."""
    module = _import(name)
    if hasattr(module, "__all__"):
        return [_load(f"{name}:{attribute}") for attribute in module.__all__]
    found = [
        value
        for attribute, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not attribute.startswith("_")
    ]
    if not found:
        raise UserError(f"{name} defines no public function", where="environment.module", cure="check the module")
    return found


def _toolset(kind: type) -> Toolset:
    names = dict.fromkeys(name for base in reversed(kind.__mro__) for name in vars(base))
    tools = []
    for name in names:
        method = inspect.getattr_static(kind, name)
        if inspect.isfunction(method) and not name.startswith("_") and name not in _CLOSERS:
            tool = Tool(MethodType(method, object()))  # no instance yet: only the signature without `self` matters
            tool.name = name
            tools.append(_checked(tool))
    if not tools:
        raise UserError(f"the class {kind.__name__} has no public method", where=_WHERE, cure="check the name")
    return Toolset(kind, tuple(tools))


def _checked(tool: Tool) -> Tool:
    """The tool itself when it has a schema. Raises UserError naming function and parameter."""
    try:
        tool.spec()
    except Exception as error:  # hints are code from outside: names that do not exist, types without a schema
        cure = "give every parameter a type hint that JSON can express, and no *args or **kwargs"
        problem = str(error) if isinstance(error, TypeError) else f"{tool.name}: {type(error).__name__}: {error}"
        raise UserError(problem, where=_WHERE, cure=cure) from None
    return tool
