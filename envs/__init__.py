"""Environments: where a rollout's tool calls are executed. One file per adapter, `build_environment` picks it.

An Environment is opened once per rollout; the Session it returns belongs to that rollout alone and is closed
with it, also on cancellation.
"""

from __future__ import annotations

if __name__ != "rft.envs":
    raise ImportError("this folder is the package rft.envs: `import rft.envs`, not `import envs`")

from typing import Annotated, Protocol

from pydantic import Field

from rft.envs.http import HttpEnvironmentConfig
from rft.envs.outage import Outages
from rft.envs.python import PythonEnvironmentConfig
from rft.types import Item, ToolCall, ToolResult

EnvironmentConfig = Annotated[HttpEnvironmentConfig | PythonEnvironmentConfig, Field(discriminator="type")]


class Session(Protocol):
    """The tools of one rollout."""

    async def call(self, call: ToolCall) -> ToolResult:
        """Execute one well-formed call; what the model should see comes back, `ToolError` means discard."""
        ...

    async def close(self) -> None: ...


class Environment(Protocol):
    """A source of Sessions. `tool_names` are the tools it can serve; a row may use only these."""

    tool_names: frozenset[str]
    outages: Outages  # rollouts wait for the end of one, on the run's time and not on theirs

    async def check(self) -> None:
        """Fail with a `UserError` naming the cure when the environment cannot be reached."""
        ...

    async def open(self, item: Item, rollout_id: str) -> Session: ...

    async def close(self) -> None: ...


def build_environment(config: EnvironmentConfig) -> Environment:
    """The adapter that `config.type` names, imported when used."""
    if isinstance(config, HttpEnvironmentConfig):
        from rft.envs.http import HttpEnvironment

        return HttpEnvironment(config)
    from rft.envs.python import PythonEnvironment

    return PythonEnvironment(config)
