"""The rule that keeps a completion on one policy version: many requests or one load, never both."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from rft.errors import EngineError


class Gate:
    """Any number of requests, or one load, never both. A request costs the same however many wait for a load."""

    def __init__(self) -> None:
        self._num_requests = 0
        self._open, self._empty, self._one_load = asyncio.Event(), asyncio.Event(), asyncio.Lock()
        self._open.set()
        self._empty.set()

    @asynccontextmanager
    async def request(self) -> AsyncIterator[None]:
        while not self._open.is_set():  # the next load may have closed it before we wake
            await self._open.wait()
        self._num_requests += 1
        self._empty.clear()
        try:
            yield
        finally:
            self._num_requests -= 1
            if not self._num_requests:
                self._empty.set()

    @asynccontextmanager
    async def load(self, timeout_s: float) -> AsyncIterator[None]:
        """Raises EngineError when requests are still in flight after `timeout_s`."""
        async with self._one_load:
            self._open.clear()
            try:
                await self._drain(timeout_s)
                yield
            finally:
                self._open.set()

    async def _drain(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await self._empty.wait()
        except TimeoutError:
            problem = f"{self._num_requests} requests were still in flight {timeout_s:.0f} s after a load was asked for"
            raise EngineError(problem, cure="raise engine.request_timeout_s") from None
