"""The rule that keeps a completion on one policy version: many requests or one load, never both."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from rft.errors import EngineError


class Gate:
    """Any number of requests, or one load, never both."""

    def __init__(self) -> None:
        self._num_requests, self._is_loading = 0, False
        self._changed, self._one_load = asyncio.Condition(), asyncio.Lock()

    @asynccontextmanager
    async def request(self) -> AsyncIterator[None]:
        async with self._changed:
            await self._changed.wait_for(lambda: not self._is_loading)
            self._num_requests += 1
        try:
            yield
        finally:
            async with self._changed:
                self._num_requests -= 1
                self._changed.notify_all()

    @asynccontextmanager
    async def load(self, timeout_s: float) -> AsyncIterator[None]:
        """Raises EngineError when requests are still in flight after `timeout_s`."""
        async with self._one_load:
            self._is_loading = True
            try:
                await self._drain(timeout_s)
                yield
            finally:
                async with self._changed:
                    self._is_loading = False
                    self._changed.notify_all()

    async def _drain(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(lambda: self._num_requests == 0)
        except TimeoutError:
            problem = f"{self._num_requests} requests were still in flight {timeout_s:.0f} s after a load was asked for"
            raise EngineError(problem, cure="raise engine.request_timeout_s") from None
