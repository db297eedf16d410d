"""HTTP around an answer: work that ends when its client goes away, and a stream of server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from rft.server.errors import ApiError

Answer = TypeVar("Answer")


async def while_connected(request: Request, work: Coroutine[Any, Any, Answer]) -> Answer:
    """What `work` returns; it is cancelled when the client closes the connection."""
    task, gone = asyncio.create_task(work), asyncio.create_task(_gone(request))
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ApiError("The client closed the connection.", status=499)  # which nobody reads
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.wait([task, gone])


class _EventStream(StreamingResponse):
    """Closes its events, and so cancels the sampling, however it ends."""

    def __init__(self, events: AsyncGenerator[bytes], **options: Any) -> None:
        super().__init__(events, **options)
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events):
            await super().__call__(scope, receive, send)


def event_stream(events: AsyncGenerator[bytes]) -> StreamingResponse:
    return _EventStream(events, media_type="text/event-stream", headers={"cache-control": "no-store"})


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
