"""TRL's `environment_factory` classes: one instance per rollout, its public methods are the tools.

As trl 1.16 does it (trainer/grpo_trainer.py): `reset` gets the row's columns and what it returns is added to the last
message; methods are tools unless they are `reset`, `get_reward` or begin with "_"; what a method raises is shown to
the model as {'error': ...}; `get_reward` is called once at the end. Unlike there an instance is not used again, its
methods run one after another, and `close` or `aclose` is called at the end and is no tool.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from rft.envs.base import Session, ToolSpecs
from rft.envs.bridges.foreign import arguments_of, as_text, clean, facts, load_object, no_such_tool, result_of
from rft.envs.bridges.thread import ForeignThread
from rft.envs.outage import Outages
from rft.envs.tasks import ArgumentError
from rft.errors import ToolError, UserError
from rft.types import Item, ToolCall, ToolResult

_NO_TOOLS = ("reset", "get_reward", "close", "aclose")
_WHERE = "environment.factory"
_RFT_COLUMNS = ("messages", "tools", "parallel_tool_calls")


class TrlEnvironmentConfig(BaseModel):
    """`factory` is a class, or a function without parameters, as given to GRPOTrainer's `environment_factory`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["trl"] = "trl"
    factory: str = Field(min_length=1, description="package.module:NAME")
    exceptions: Literal["show", "discard"] = Field(
        "show", description="what a tool raises is shown to the model, as trl does, or discards the rollout"
    )
    timeout_s: float = Field(default=600.0, gt=0, description="per method")


class TrlEnvironment:
    """Opens one instance per rollout, each in a thread of its own."""

    def __init__(self, config: TrlEnvironmentConfig) -> None:
        self._config = config
        self._factory = load_object(config.factory, _WHERE)
        if not callable(self._factory):
            kind = type(self._factory).__name__
            cure = "name one class or function; several environments in a dictionary are not supported"
            raise UserError(f"{config.factory} is a {kind}, not callable", where=_WHERE, cure=cure)
        self.outages = Outages()  # of which code in this process has none

    async def discover(self) -> ToolSpecs:
        """The methods' schemas, read from the class; a function is called once to see what it makes."""
        if isinstance(self._factory, type):
            return _specs(self._factory)
        session = TrlSession(self._factory, self._config, None)
        try:
            await session.create()
            return _specs(type(session.instance))
        except ToolError as error:
            raise UserError(error.problem, where=_WHERE, cure="repair the environment") from error
        finally:
            await session.close()

    async def check(self) -> None:
        """Nothing to reach: the class is loaded."""

    async def open(self, item: Item, rollout_id: str) -> TrlSession:
        """A new instance, reset with the row. Raises ToolError when that fails."""
        session = TrlSession(self._factory, self._config, item)
        try:
            await session.create()
            await session.reset(item)
        except BaseException:
            await session.close()
            raise
        return session

    async def close(self) -> None:
        """Nothing to release: instances belong to their sessions."""


class TrlSession(Session):
    """One instance and its thread."""

    def __init__(self, factory: Callable[[], Any], config: TrlEnvironmentConfig, item: Item | None) -> None:
        self._factory, self._config, self._item = factory, config, item
        self._thread = ForeignThread(f"trl {config.factory}")
        self.instance: Any = None
        self._outcome: dict[str, Any] = {}

    async def create(self) -> None:
        """Make the instance; raises ToolError when the factory fails."""
        self.instance = await self._run("the factory", self._factory)

    async def reset(self, item: Item) -> None:
        columns = _columns(item, self.instance.reset)
        observation = await self._run("reset", lambda: self.instance.reset(**columns))
        self.opening = "" if observation is None else clean(_text(observation))

    async def call(self, call: ToolCall) -> ToolResult:
        """Run the method; what it returns is shown as text, what it raises as `exceptions` says."""
        started, is_error = time.monotonic(), False
        try:
            method, arguments = self._method(call)
            output = _text(await self._run(call.name, lambda: method(**arguments), is_shown=self._is_shown))
        except (ArgumentError, _Shown) as error:
            output, is_error = str({"error": str(error)}), True
        return result_of(call, output, time.monotonic() - started, is_error)

    async def finish(self) -> None:
        """Ask for the reward, where the class has one, and note the instance's public JSON values."""
        if not self._thread.is_stuck:
            self._outcome = await self._run("the outcome", self._read)

    def outcome(self) -> dict[str, Any]:
        return self._outcome

    async def close(self) -> None:
        """Close the instance in its thread, and end that; what outlives its deadline is left to end by itself."""
        close = getattr(self.instance, "aclose", None) or getattr(self.instance, "close", None)
        await self._thread.end(self._config.factory, close)

    @property
    def _is_shown(self) -> bool:
        return self._config.exceptions == "show"

    def _method(self, call: ToolCall) -> tuple[Callable[..., Any], dict[str, Any]]:
        names = [name for name in tool_names(type(self.instance)) if self._item and name in self._item.tool_names]
        if call.name not in names:
            raise no_such_tool(call.name, names)
        method, arguments = getattr(self.instance, call.name), arguments_of(call)
        try:
            inspect.signature(method).bind(**arguments)
        except TypeError as error:
            raise ArgumentError(f"arguments: {error}") from None
        return method, arguments

    async def _run(self, what: str, function: Callable[[], Any], is_shown: bool = False) -> Any:
        where = f"{self._config.factory}: {what}"
        try:
            return await self._thread.run(where, function, self._config.timeout_s)
        except ToolError:
            raise
        except Exception as error:  # foreign code: whatever it raises is its failure, not a bug of ours
            if is_shown:
                raise _Shown(str(error)) from error
            raise ToolError(f"{where} raised {type(error).__name__}: {error}") from error

    async def _read(self) -> dict[str, Any]:
        values = {
            name: value for name, value in getattr(self.instance, "__dict__", {}).items() if not name.startswith("_")
        }
        for name in ("reward", "done"):  # which a class may have as a default or a property
            if hasattr(self.instance, name):
                values[name] = getattr(self.instance, name)
        if inspect.isfunction(getattr(type(self.instance), "get_reward", None)):
            reward = self.instance.get_reward()
            values["reward"] = await reward if inspect.isawaitable(reward) else reward
        return facts(values)


class _Shown(Exception):
    """What a tool raised, for the model to read."""


def tool_names(kind: type) -> list[str]:
    """The methods that are tools, by trl's rule."""
    names = [name for name, _ in inspect.getmembers(kind, inspect.isfunction)]
    return [name for name in names if name not in _NO_TOOLS and not name.startswith("_")]


def _specs(kind: type) -> ToolSpecs:
    """The tools' entries as transformers makes them. Raises UserError naming the method that has no schema."""
    from transformers.utils.chat_template_utils import get_json_schema

    if not inspect.isfunction(getattr(kind, "reset", None)):
        cure = "define `def reset(self, **row)`; it may return what the environment says first"
        raise UserError(f"{kind.__name__} has no method reset", where=_WHERE, cure=cure)
    specs: dict[str, dict[str, Any] | None] = {}
    for name in tool_names(kind):
        try:
            specs[name] = get_json_schema(getattr(kind, name))
        except Exception as error:  # transformers' errors share no base beside Exception
            cure = "give every parameter a type and a line under `Args:`, or begin the name with _ if it is no tool"
            raise UserError(f"{kind.__name__}.{name} cannot be a tool: {error}", where=_WHERE, cure=cure) from None
    return specs


def _columns(item: Item, reset: Callable[..., Any]) -> dict[str, Any]:
    """The row as trl's reset gets it: `prompt` for the messages; only what it names when it takes no **kwargs."""
    columns = {name: value for name, value in item.row.items() if name not in _RFT_COLUMNS}
    columns.setdefault("prompt", item.row.get("messages", []))
    parameters = inspect.signature(reset).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return columns
    names = {parameter.name for parameter in parameters}
    return {name: value for name, value in columns.items() if name in names}


def _text(value: Any) -> str:
    """What trl shows of a value: text blocks joined, anything else as Python prints it."""
    if isinstance(value, list) and value and all(isinstance(part, dict) and "type" in part for part in value):
        if any(part["type"] != "text" for part in value):
            raise ToolError("the environment answered with an image; only text can be shown to the model")
        return "".join(as_text(part.get("text", "")) for part in value)
    return str(value)
