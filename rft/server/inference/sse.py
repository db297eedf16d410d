"""Server-sent events, both ways: what a server streams as payloads, and payloads as what we stream."""

from __future__ import annotations

import json
from collections.abc import AsyncIterable, AsyncIterator
from typing import Any

DONE = b"data: [DONE]\n\n"
_MAX_EVENT_BYTES = 32_000_000


def event(payload: dict[str, Any], name: str | None = None) -> bytes:
    """One event; `name` where the protocol gives events one."""
    head = f"event: {name}\n" if name is not None else ""
    return f"{head}data: {json.dumps(payload, ensure_ascii=False, separators=(',', ':'))}\n\n".encode(
        "utf-8", "replace"
    )


async def payloads(stream: AsyncIterable[bytes]) -> AsyncIterator[dict[str, Any]]:
    """The JSON objects of a stream until its end or `[DONE]`. Raises ValueError for what is no such stream."""
    buffer = bytearray()
    async for chunk in stream:
        buffer += chunk
        while (end := buffer.find(b"\n")) >= 0:
            line = bytes(buffer[:end]).strip()
            del buffer[: end + 1]
            if not line.startswith(b"data:"):
                continue
            text = line[5:].strip()
            if text == b"[DONE]":
                return
            payload = json.loads(text)
            if not isinstance(payload, dict):
                raise ValueError("an event is not a JSON object")
            yield payload
        if len(buffer) > _MAX_EVENT_BYTES:
            raise ValueError("an event is too large")
