"""The in-process environment: a Python task's tools run in a thread, without HTTP.

Guarantees: the event loop never blocks; what the model got wrong comes back as an error it can read; an exception
inside a tool is the world's failure (`ToolError`), as a 5xx would be. State a tool keeps is shared by all rollouts.
"""

from __future__ import annotations

import asyncio
import time
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from rft.envs.base import Session, ToolSpecs
from rft.envs.outage import Outages
from rft.envs.tasks import ArgumentError, Task, Tool, load_task
from rft.errors import ToolError
from rft.types import Item, ToolCall, ToolResult
from rft.wire import MAX_BODY_BYTES


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
        self._timeout_s = config.timeout_s
        self.outages = Outages()  # of which a task in this process has none

    async def discover(self) -> ToolSpecs:
        return dict(self.task.specs)

    async def check(self) -> None:
        """Load what the tools need, so that the first call is not the slow one."""
        await asyncio.to_thread(self.task.prepare)

    async def open(self, item: Item, rollout_id: str) -> PythonSession:
        return PythonSession(self.task, self._timeout_s)

    async def close(self) -> None:
        """Nothing to release: threads end with their calls."""


class PythonSession(Session):
    """The tools of one rollout."""

    def __init__(self, task: Task, timeout_s: float) -> None:
        self._task, self._timeout_s = task, timeout_s

    async def call(self, call: ToolCall) -> ToolResult:
        """Run the tool in a thread; a call that outlives its deadline discards the rollout."""
        started = time.monotonic()
        tool = self._task.tool(call.name)
        if tool is None:
            names = ", ".join(sorted(self._task.tool_names))
            output, is_error = f"there is no tool {call.name}; the tools are: {names}", True
        else:
            output, is_error = await self._run(tool, call.arguments)
        latency_s = time.monotonic() - started
        return ToolResult(call_id=call.call_id, output=output, is_error=is_error, latency_s=latency_s)

    async def close(self) -> None:
        """Nothing to release."""

    async def _run(self, tool: Tool, arguments: str) -> tuple[str, bool]:
        try:
            async with asyncio.timeout(self._timeout_s):
                output = await asyncio.to_thread(tool.run, arguments)
        except ArgumentError as error:
            return str(error), True
        except TimeoutError:
            raise ToolError(f"tool {tool.name}: no answer within {self._timeout_s:g} s") from None
        except Exception as error:  # a tool is code from outside: whatever it raises is its failure, not a bug of ours
            raise ToolError(f"tool {tool.name} raised {type(error).__name__}: {error}") from error
        if not isinstance(output, str):
            raise ToolError(f"tool {tool.name} returned {type(output).__name__}, not text")
        text = output.encode("utf-8", errors="replace")  # half a surrogate pair could not be written anywhere
        if len(text) > MAX_BODY_BYTES:
            return f"413: the answer of {tool.name} is larger than {MAX_BODY_BYTES:,} bytes", True
        return text.decode(), False
