"""Gymnasium environments: reset and step, the model acts through one tool `step(action)`.

Guarantees: one environment per rollout, in a thread of its own, never two steps at once; an action outside the
action space is explained to the model and not executed; rewards are summed, NaN is the environment's failure.
Does not show images: an environment speaks through its observations or through `render_mode="ansi"`.
"""

from __future__ import annotations

import copy
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from rft.envs.base import Session, ToolSpecs
from rft.envs.bridges.foreign import (
    arguments_of,
    as_json,
    as_text,
    clean,
    facts,
    load_object,
    no_such_tool,
    result_of,
    seed_of,
)
from rft.envs.bridges.thread import ForeignThread
from rft.envs.outage import Outages
from rft.envs.tasks import ArgumentError
from rft.errors import ToolError, UserError
from rft.types import Item, ToolCall, ToolResult

_TOOL = "step"
_WHERE = "environment.env"


class GymnasiumEnvironmentConfig(BaseModel):
    """`env`: an id like FrozenLake-v1 or `module:Name-v0`, or `package.module:function` that makes one.

    The seed of an episode is the row's `seed`; without one it follows from the item, so that all rollouts of a group
    begin alike, or from the rollout. The row's `options` go to `reset`, as Gymnasium means them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["gymnasium"] = "gymnasium"
    env: str = Field(min_length=1)
    kwargs: dict[str, Any] = Field(default_factory=dict, description="e.g. {map_name: 4x4, render_mode: ansi}")
    description: str = Field("Act in the environment.", description="what the model reads about the tool step")
    render: Literal["text", "json"] = Field(
        "text", description="text: env.render() in ansi mode, else the observation; json: reward and ending too"
    )
    seed: Literal["item", "rollout"] = "item"
    timeout_s: float = Field(default=600.0, gt=0, description="per reset and per step")


class GymnasiumEnvironment:
    """Makes one environment per rollout."""

    def __init__(self, config: GymnasiumEnvironmentConfig) -> None:
        self._config, self._make = config, _maker(config)
        self.outages = Outages()  # of which code in this process has none

    async def discover(self) -> ToolSpecs:
        """The tool `step`, its schema from the action space. Makes an environment to see it."""
        from rft.envs.bridges.spaces import schema_of

        session = GymnasiumSession(self._make, self._config)
        try:
            await session.create()
            schema = schema_of(session.env.action_space)
        except ToolError as error:
            raise UserError(error.problem, where=_WHERE, cure="check the name and environment.kwargs") from error
        finally:
            await session.close()
        parameters = {"type": "object", "properties": {"action": schema}, "required": ["action"]}
        function = {"name": _TOOL, "description": self._config.description, "parameters": parameters}
        return {_TOOL: {"type": "function", "function": function}}

    async def check(self) -> None:
        """Nothing to reach."""

    async def open(self, item: Item, rollout_id: str) -> GymnasiumSession:
        """A new environment, reset with its seed. Raises ToolError when that fails."""
        session = GymnasiumSession(self._make, self._config)
        try:
            await session.create()
            await session.reset(seed_of(item, rollout_id, self._config.seed), item.row.get("options"))
        except BaseException:
            await session.close()
            raise
        return session

    async def close(self) -> None:
        """Nothing to release: environments belong to their sessions."""


@dataclass(slots=True)
class _Episode:
    """How it went so far."""

    reward: float = 0.0
    num_steps: int = 0
    is_terminated: bool = False
    is_truncated: bool = False
    info: dict[str, Any] = field(default_factory=dict)  # of the last step


class GymnasiumSession(Session):
    """One environment and its thread."""

    def __init__(self, make: Callable[[], Any], config: GymnasiumEnvironmentConfig) -> None:
        self._make, self._config = make, config
        self._thread = ForeignThread(f"gymnasium {config.env}")
        self._episode = _Episode()
        self.env: Any = None

    async def create(self) -> None:
        """Make the environment; raises ToolError when that fails."""
        self.env = await self._run("make", self._make)

    async def reset(self, seed: int, options: dict[str, Any] | None = None) -> None:
        self.opening = await self._run("reset", lambda: self._reset(seed, options))

    async def call(self, call: ToolCall) -> ToolResult:
        """One step; an action that the space does not hold is an error for the model."""
        started, is_error = time.monotonic(), False
        try:
            if call.name != _TOOL:
                raise no_such_tool(call.name, [_TOOL])
            arguments = arguments_of(call)
            if set(arguments) != {"action"}:
                raise ArgumentError("arguments: exactly one is expected, action")
            output = await self._run(_TOOL, lambda: self._step(arguments["action"]))
        except ArgumentError as error:
            output, is_error = str(error), True
        return result_of(call, output, time.monotonic() - started, is_error)

    @property
    def is_over(self) -> bool:  # type: ignore[override]
        return self._episode.is_terminated or self._episode.is_truncated

    def outcome(self) -> dict[str, Any]:
        """reward (the sum), num_steps, terminated, truncated, and the last step's info where it is JSON."""
        episode = self._episode
        ending = {"terminated": episode.is_terminated, "truncated": episode.is_truncated}
        return {"reward": episode.reward, "num_steps": episode.num_steps, **ending, "info": episode.info}

    async def close(self) -> None:
        """Close the environment in its thread, and end that."""
        await self._thread.end(self._config.env, self.env.close if self.env is not None else None)

    async def _run(self, what: str, function: Callable[[], Any]) -> Any:
        where = f"{self._config.env}: {what}"
        try:
            return await self._thread.run(where, function, self._config.timeout_s)
        except (ArgumentError, ToolError, UserError):
            raise
        except Exception as error:  # foreign code: whatever it raises is its failure, not a bug of ours
            raise ToolError(f"{where} raised {type(error).__name__}: {error}") from error

    def _reset(self, seed: int, options: dict[str, Any] | None) -> str:
        given = {} if options is None else {"options": copy.deepcopy(options)}  # some environments know no options
        observation, info = self.env.reset(seed=seed, **given)
        self._episode.info = facts(info)
        return self._rendered(observation, None)

    def _step(self, action: Any) -> str:
        """In the thread: the whole of a step, so that two calls of a turn cannot interleave."""
        from rft.envs.bridges.spaces import action_of

        episode = self._episode
        if self.is_over:
            raise ArgumentError("the episode is over")
        observation, reward, terminated, truncated, info = self.env.step(action_of(action, self.env.action_space))
        number = as_json(float(reward))
        if number is None:
            raise ValueError(f"the reward is {reward}")
        episode.reward, episode.num_steps, episode.info = episode.reward + number, episode.num_steps + 1, facts(info)
        episode.is_terminated, episode.is_truncated = bool(terminated), bool(truncated)
        return self._rendered(observation, number)

    def _rendered(self, observation: Any, reward: float | None) -> str:
        is_ansi = self._config.render == "text" and self.env.render_mode == "ansi"
        shown = self.env.render() if is_ansi else observation
        if self._config.render == "text":
            return clean(_uncoloured(as_text(shown)))
        ending = {"terminated": self._episode.is_terminated, "truncated": self._episode.is_truncated}
        return json.dumps({"observation": as_json(shown), "reward": reward, **ending}, ensure_ascii=False)


def _maker(config: GymnasiumEnvironmentConfig) -> Callable[[], Any]:
    """What makes the environment. Raises UserError where gymnasium or the function is missing."""
    name = config.env.rpartition(":")[2]
    if ":" in config.env and not re.search(r"-v\d+$", name):
        function = load_object(config.env, _WHERE)
        return lambda: function(**config.kwargs)
    try:
        import gymnasium
    except ImportError:
        raise UserError("gymnasium is not installed", where=_WHERE, cure="pip install gymnasium") from None
    return lambda: gymnasium.make(config.env, **config.kwargs)


def _uncoloured(text: str) -> str:
    """The text without a terminal's colours, which say the position of a player: it is put in brackets instead."""
    text = re.sub(r"\x1b\[[0-9;]*[1-9][0-9;]*m(.*?)\x1b\[0m", r"[\1]", text, flags=re.DOTALL)
    return re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text)
