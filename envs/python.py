"""The in-process environment: a Python task's tools run in this process, without HTTP.

State a tool keeps is shared by all rollouts; `type: functions` gives each rollout its own. Calls: see toolbox.py.
"""

from __future__ import annotations

import asyncio
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from rft.envs.base import Session, ToolSpecs
from rft.envs.outage import Outages
from rft.envs.tasks import Task, load_task
from rft.envs.toolbox import Toolbox
from rft.types import Item, ToolCall, ToolResult


class PythonEnvironmentConfig(BaseModel):
    """The tools of a Python task: one of rft's, or `package.module:NAME`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["python"] = "python"
    task: str = Field(min_length=1)
    timeout_s: float = Field(default=600.0, gt=0, description="per tool call")


class PythonEnvironment:
    """Serves the task's tools to any number of rollouts at once."""

    def __init__(self, config: PythonEnvironmentConfig) -> None:
        self.task: Task = load_task(config.task)
        self._toolbox = Toolbox(self.task.tools, config.timeout_s)
        self.outages = Outages()  # of which a task in this process has none

    async def discover(self) -> ToolSpecs:
        return dict(self.task.specs)

    async def check(self) -> None:
        """Load what the tools need, so that the first call is not the slow one."""
        await asyncio.to_thread(self.task.prepare)

    async def open(self, item: Item, rollout_id: str) -> PythonSession:
        return PythonSession(self._toolbox, item)

    async def close(self) -> None:
        """Nothing to release: threads end with their calls."""


class PythonSession(Session):
    """The tools of one rollout."""

    def __init__(self, toolbox: Toolbox, item: Item) -> None:
        self._toolbox, self._item = toolbox, item

    async def call(self, call: ToolCall) -> ToolResult:
        """The tool's answer; a call that outlives its deadline discards the rollout."""
        return await self._toolbox.call(call, self._item)

    async def close(self) -> None:
        """Nothing to release."""
