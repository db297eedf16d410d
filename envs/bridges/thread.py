"""A thread for code that is not ours: it may block, fail or never return without stopping the event loop.

Guarantees: every wait ends by its deadline; nothing that is started here keeps the process alive. What runs in one
thread runs on one event loop, so that clients and connections a coroutine made can be used by the next.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
from collections.abc import Callable
from typing import Any

from rft.errors import ToolError

logger = logging.getLogger(__name__)

_CLOSE_TIMEOUT_S = 10.0


class ForeignThread:
    """One daemon thread with an event loop of its own; it starts with the first call and is used up by `stop`.

    Plain functions run one after another; coroutines share the loop as they do in any program.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._loop: asyncio.AbstractEventLoop | None = None
        self.is_stuck = False  # something outlived its deadline and may still be running

    async def run(self, what: str, function: Callable[[], Any], timeout_s: float) -> Any:
        """What the function returns, awaited when it is a coroutine.

        Its exceptions are raised as they are; ToolError, naming `what`, when it takes longer than `timeout_s`.
        """
        future = asyncio.run_coroutine_threadsafe(_call(function), self._started())
        try:
            async with asyncio.timeout(timeout_s) as timer:
                return await asyncio.wrap_future(future)
        except TimeoutError:
            if not timer.expired():
                raise  # the function's own
            self.is_stuck = True
            raise ToolError(f"{what}: no answer within {timeout_s:g} s") from None

    async def end(self, what: str, close: Callable[[], Any] | None) -> None:
        """Run `close` in the thread, and stop it; see `settle`."""
        try:
            if close is not None:
                await self.settle(what, close)
        finally:
            self.stop()

    async def settle(self, what: str, close: Callable[[], Any]) -> None:
        """Run `close` in the thread. What hangs or fails costs a warning: the rollout is over."""
        try:
            if self.is_stuck:  # it will run when what is stuck ever ends
                asyncio.run_coroutine_threadsafe(_call(close), self._started())
            else:
                await self.run(f"{what}: close", close, _CLOSE_TIMEOUT_S)
        except Exception as error:  # foreign code: it may raise anything
            logger.warning("%s did not close: %s", what, type(error).__name__)

    def stop(self) -> None:
        """End the thread once what runs in it now has ended; waits for nothing."""
        if self._loop is not None:
            asyncio.run_coroutine_threadsafe(_stop(), self._loop)
            self._loop = None

    def _started(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=_serve, args=(self._loop,), name=self._name, daemon=True).start()
        return self._loop


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    with asyncio.Runner(loop_factory=lambda: loop) as runner:  # cancels what is left when it ends
        runner.get_loop().run_forever()


async def _call(function: Callable[[], Any]) -> Any:
    result = function()
    return await result if inspect.isawaitable(result) else result


async def _stop() -> None:
    asyncio.get_running_loop().call_soon(asyncio.get_running_loop().stop)
