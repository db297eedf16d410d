"""verifiers environments (the API of 0.1.x): their own rollout loop runs, and the model it asks is rft's.

So every environment class, stop condition, rubric and clean-up means what it means there. verifiers is not a
dependency: it is imported when a run uses it. Not bridged: rubrics that compare the rollouts of a group,
environments that rewrite what was said, and 0.4, which has no `load_environment` any more.
"""

from __future__ import annotations

import asyncio
import signal
import time
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from rft.envs.base import Session, ToolSpecs
from rft.envs.bridges.foreign import as_json, clean, facts, load_object, result_of
from rft.envs.bridges.thread import ForeignThread
from rft.envs.outage import Outages
from rft.errors import ToolError, UserError
from rft.types import Item, Message, ToolCall, ToolResult

if TYPE_CHECKING:
    from rft.envs.bridges.verifiers_client import Dialogue

_WHERE = "environment.env_id"
_INSTALL = "pip install verifiers==0.1.14"
_RFT_COLUMNS = ("messages", "tools", "parallel_tool_calls")
_FACTS = ("reward", "metrics", "stop_condition", "is_truncated")


class VerifiersEnvironmentConfig(BaseModel):
    """`env_id`: an installed environment, as `vf.load_environment` takes it, or `package.module:load_environment`.

    Rows are those that `export_rows` writes: they carry the dataset's columns, which reward functions ask for.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["verifiers"] = "verifiers"
    env_id: str = Field(min_length=1)
    env_args: dict[str, Any] = Field(default_factory=dict)
    timeout_s: float = Field(default=600.0, gt=0, description="for each answer of the environment, and for scoring")


class VerifiersEnvironment:
    """One environment and one thread for all rollouts: environments share clients and connections among theirs."""

    def __init__(self, config: VerifiersEnvironmentConfig) -> None:
        self._config = config
        self._thread = ForeignThread(f"verifiers {config.env_id}")
        self._loaded: Any = None
        self.outages = Outages()  # of which code in this process has none

    async def discover(self) -> ToolSpecs:
        """The tools of the environment, and of its parts when it is a group."""
        environment = self._environment()
        if environment.requires_group_rollouts:
            problem = "its rubric compares the rollouts of a group, and rft grades each by itself"
            raise UserError(problem, where=_WHERE, cure="use reward functions of one rollout")
        return {tool["function"]["name"]: tool for tool in _tools(environment)}

    async def check(self) -> None:
        """Load the environment."""
        self._environment()

    async def open(self, item: Item, rollout_id: str) -> VerifiersSession:
        """Start the environment's rollout of the row. Raises ToolError when it fails before it asks the model."""
        from rft.envs.bridges.verifiers_client import Dialogue

        session = VerifiersSession(Dialogue(self._environment(), _input(item)), self._thread, self._config)
        try:
            await session.start(item)
        except BaseException:
            await session.close()
            raise
        return session

    async def close(self) -> None:
        """Tear the environment down as it does at exit, and end its thread."""
        loaded = self._loaded
        await self._thread.end(self._config.env_id, loaded._teardown if loaded is not None else None)
        if loaded is not None:  # not again when the process exits
            loaded._teardown_handlers = []

    def _environment(self) -> Any:
        if self._loaded is None:
            self._loaded = load(self._config.env_id, self._config.env_args)
        return self._loaded


class VerifiersSession(Session):
    """One rollout of the environment. The calls of a turn are one message there, so they are answered together."""

    def __init__(self, dialogue: Dialogue, thread: ForeignThread, config: VerifiersEnvironmentConfig) -> None:
        self._dialogue, self._thread, self._config = dialogue, thread, config
        self._last: Message | None = None  # heard and not yet passed on
        self._answer: asyncio.Task[list[dict[str, Any]] | None] | None = None
        self._calls: list[ToolCall] = []  # of the message that is being answered
        self._outcome: dict[str, Any] = {}

    async def start(self, item: Item) -> None:
        prompt = await self._run("the first prompt", self._dialogue.start)
        self.opening = _opening(prompt, item)

    def hear(self, message: Message) -> None:
        self._last, self._answer = message, None

    async def call(self, call: ToolCall) -> ToolResult:
        """The environment's answer to this call of the message that was heard."""
        started = time.monotonic()
        if self._answer is None:
            self._answer = asyncio.create_task(self._pass_on())
        said = await asyncio.shield(self._answer)
        if said is None:
            self.is_over = True
            return result_of(call, "the episode is over", time.monotonic() - started)
        own = [message["content"] for message in said if message.get("tool_call_id") == call.call_id]
        if not own:
            raise ToolError(f"{self._config.env_id}: the environment did not answer the call of {call.name}")
        is_last = call.call_id == self._calls[-1].call_id  # who also brings what is said beside the results
        more = [message["content"] for message in said if message["role"] != "tool"] if is_last else []
        return result_of(call, "\n\n".join([*own, *more]), time.monotonic() - started)

    async def reply(self, message: Message) -> list[Message]:
        """What the environment says next; nothing when that was its last turn."""
        self._last = message
        said = await self._pass_on()
        return [Message(role="user", content=clean(each["content"])) for each in said or []]

    async def finish(self) -> None:
        """Let the environment end, and score what was said, also where a limit of rft's ended it."""
        last = self._last
        output = await self._run("the score", lambda: self._dialogue.finish(last))
        if output.get("error"):
            raise ToolError(f"{self._config.env_id}: {_error(output['error'])}")
        self._outcome = facts({name: output.get(name) for name in _FACTS})

    def outcome(self) -> dict[str, Any]:
        """reward and metrics as the rubric gave them, stop_condition, is_truncated."""
        return self._outcome

    async def close(self) -> None:
        """Cancel what still runs; the environment cleans up behind it."""
        if self._answer is not None:
            self._answer.cancel()
        await self._thread.settle(self._config.env_id, self._dialogue.stop)

    async def _pass_on(self) -> list[dict[str, Any]] | None:
        message, self._last = self._last, None
        if message is None:
            raise RuntimeError("a call came before the message that holds it")
        self._calls = [call for call in message.tool_calls if call.error is None]
        said: list[dict[str, Any]] | None = await self._run("its answer", lambda: self._dialogue.say(message))
        return said

    async def _run(self, what: str, function: Any) -> Any:
        where = f"{self._config.env_id}: {what}"
        try:
            return await self._thread.run(where, function, self._config.timeout_s)
        except ToolError:
            raise
        except Exception as error:  # foreign code: whatever it raises is its failure, not a bug of ours
            raise ToolError(f"{where}: {type(error).__name__}: {error}") from error


def load(env_id: str, env_args: dict[str, Any]) -> Any:
    """The environment, with the process's signal handlers as they were: verifiers sets its own.

    Raises UserError naming the cure. Only in the main thread, as verifiers demands.
    """
    try:
        import verifiers
    except ImportError as error:
        raise UserError(f"verifiers cannot be imported: {error}", where=_WHERE, cure=_INSTALL) from None
    if not hasattr(verifiers, "load_environment"):
        problem = f"verifiers {verifiers.__version__} has no load_environment"
        raise UserError(problem, where=_WHERE, cure=_INSTALL)
    make = load_object(env_id, _WHERE) if ":" in env_id else None
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return make(**env_args) if make else verifiers.load_environment(env_id, **env_args)
    except Exception as error:  # loading runs the environment's code: whatever it raises, the user must repair it
        cure = f"install the environment, and check environment.env_args ({', '.join(env_args) or 'empty'})"
        raise UserError(f"cannot be loaded: {error}", where=f"{_WHERE} {env_id}", cure=cure) from error
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler)


def export_rows(environment: Any, split: Literal["train", "eval"] = "train", limit: int = -1) -> list[dict[str, Any]]:
    """The environment's dataset as rows of rft: its prompt is `messages`, its other columns stay, `tools` are added."""
    dataset = environment.get_eval_dataset(limit) if split == "eval" else environment.get_dataset(limit)
    tools, rows = _tools(environment), []
    for example in dataset:
        others = {name: as_json(value) for name, value in example.items() if name != "prompt"}
        rows.append({**others, "messages": [_plain(message) for message in example["prompt"]], "tools": tools})
    return rows


def _tools(environment: Any) -> list[dict[str, Any]]:
    parts = [environment, *getattr(environment, "envs", [])]
    found = {tool.name: tool for part in parts for tool in part.tool_defs or []}
    return [
        {
            "type": "function",
            "function": {"name": name, "description": tool.description, "parameters": as_json(tool.parameters)},
        }
        for name, tool in found.items()
    ]


def _input(item: Item) -> dict[str, Any]:
    """The row as verifiers wants it: with the dataset's columns, and `prompt` for the messages."""
    columns = {name: value for name, value in item.row.items() if name not in _RFT_COLUMNS}
    return {"example_id": 0, **columns, "prompt": [_plain(message.as_chat()) for message in item.messages]}


def _plain(message: Any) -> dict[str, Any]:
    """A message of a dataset, where every column is there and may be null."""
    plain: dict[str, Any] = {name: value for name, value in as_json(dict(message)).items() if value is not None}
    return plain


def _opening(prompt: list[dict[str, Any]] | None, item: Item) -> str:
    """What the environment's first prompt adds to the row's. Raises ToolError when it is another one."""
    if prompt is None:
        raise ToolError("the environment ended before it asked the model")
    own = [message.content for message in item.messages]
    said = [message["content"] for message in prompt]
    if said[: len(own)] != own:
        cure = "export the rows from the environment (rft.envs.bridges.verifiers.export_rows)"
        raise ToolError("the environment's first prompt does not begin with the row's messages", cure=cure)
    return clean("\n\n".join(said[len(own) :]))


def _error(error: Any) -> str:
    return str(error.get("error_chain_repr") or error.get("error")) if isinstance(error, dict) else str(error)
