"""Tools that are Python functions, called for the model: arguments checked, a deadline kept, the result made text.

Guarantees: the event loop never blocks; what the model got wrong comes back as an error it can read; whatever else
goes wrong in a tool is the world's failure (`ToolError`). Does not end a sync function that outlives its deadline: its
thread goes on until it returns, and never keeps the program from ending.
"""

from __future__ import annotations

import asyncio
import contextvars
import json
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from pydantic import BaseModel

from rft.envs.tasks import ArgumentError, Tool
from rft.errors import ToolError
from rft.types import Item, ToolCall, ToolResult
from rft.wire import MAX_BODY_BYTES


class Toolbox:
    """The tools of one rollout, or of all where they keep nothing. `timeout_s` None: the tools end by themselves."""

    def __init__(self, tools: Iterable[Tool], timeout_s: float | None) -> None:
        self.tools = {tool.name: tool for tool in tools}
        self._timeout_s = timeout_s

    async def call(self, call: ToolCall, item: Item) -> ToolResult:
        """The tool's answer as the model sees it; raises ToolError when the rollout must be discarded."""
        started = time.monotonic()
        tool = self.tools.get(call.name)
        offered = item.tool_names or list(self.tools)
        if tool is None or tool.name not in offered:
            output, is_error = f"there is no tool {call.name}; the tools are: {', '.join(sorted(offered))}", True
        else:
            output, is_error = await self._run(tool, call.arguments)
        output = output.encode("utf-8", errors="replace").decode()  # half a surrogate pair could be written nowhere
        latency_s = time.monotonic() - started
        return ToolResult(call_id=call.call_id, output=output, is_error=is_error, latency_s=latency_s)

    async def _run(self, tool: Tool, arguments: str) -> tuple[str, bool]:
        try:
            checked = tool.arguments(arguments)
            output = text_of(await within(self._timeout_s, tool.function, **checked))
        except ArgumentError as error:
            return str(error), True
        except DeadlineError:
            raise ToolError(f"tool {tool.name}: no answer within {self._timeout_s:g} s") from None
        except ToolError:
            raise
        except Exception as error:  # a tool is code from outside: whatever it raises is its failure, not a bug of ours
            raise ToolError(f"tool {tool.name} raised {type(error).__name__}: {error}") from error
        if len(output.encode("utf-8", errors="replace")) > MAX_BODY_BYTES:
            return f"413: the answer of {tool.name} is larger than {MAX_BODY_BYTES:,} bytes", True
        return output, False


class DeadlineError(Exception):
    """Our deadline passed; a TimeoutError would not tell it from one that the function raised."""


async def within(timeout_s: float | None, function: Callable[..., Any], /, **arguments: Any) -> Any:
    """The function's result, from a thread or, when it is async, from this loop. Raises DeadlineError."""
    is_async = asyncio.iscoroutinefunction(function)
    running = asyncio.ensure_future(function(**arguments) if is_async else in_thread(function, **arguments))
    try:
        done, _ = await asyncio.wait([running], timeout=timeout_s)
    finally:
        if not running.done():
            running.cancel()
    if not done:
        raise DeadlineError
    return running.result()


async def in_thread(function: Callable[..., Any], /, **arguments: Any) -> Any:
    """Run in a thread of its own: a pool's few threads would make one rollout wait for the slow tools of others.

    A daemon, so that one which never returns does not keep the program from ending.
    """
    loop, context = asyncio.get_running_loop(), contextvars.copy_context()
    future: asyncio.Future[Any] = loop.create_future()

    def work() -> None:
        try:
            result, error = context.run(function, **arguments), None
        except BaseException as caught:  # also SystemExit: it belongs to whoever waits, and a lost one waits for ever
            result, error = None, RuntimeError(repr(caught)) if isinstance(caught, StopIteration) else caught
        with suppress(RuntimeError):  # the loop was closed: nobody waits any more
            loop.call_soon_threadsafe(_settle, future, result, error)

    threading.Thread(target=work, daemon=True, name=f"tool {getattr(function, '__name__', '')}").start()
    return await future


def _settle(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.cancelled():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error if isinstance(error, Exception) else RuntimeError(repr(error)))


def text_of(value: Any) -> str:
    """What the model reads of a result: text as it is, nothing as "", anything else as JSON. Raises TypeError."""
    if isinstance(value, str):
        return value
    if isinstance(value, BaseModel):
        return value.model_dump_json()
    return "" if value is None else json.dumps(value, ensure_ascii=False)
