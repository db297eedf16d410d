"""Fakes with behaviour: servers and engines that do on purpose what real ones do by accident."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any, Self

_REASONS = {200: "OK", 302: "Found", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found", 413: "Too Large"}
_REASONS |= {429: "Too Many Requests", 500: "Internal Server Error", 503: "Service Unavailable"}


class LoopbackServer:
    """A real HTTP server on loopback, in a thread of its own; `_respond` says what it does with a request.

    Every request body is kept in `requests`, its headers in `headers`, its path in `paths`. `port`: 0 lets the system
    choose; a server that comes back takes the one it had.
    """

    port = 0

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.max_concurrent = 0
        self.base_url = ""
        self._num_open = 0
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(10), "the fake server did not start"
        return self

    def __exit__(self, *_: object) -> None:
        """End it, with all its connections; safe to call twice."""
        if not self._thread.is_alive():
            return
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    async def _respond(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        raise NotImplementedError

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._connections: set[asyncio.Task[None]] = set()
        server = await asyncio.start_server(self._accept, "127.0.0.1", self.port, backlog=512)
        self.port = server.sockets[0].getsockname()[1]
        self.base_url = f"http://127.0.0.1:{self.port}"
        self._ready.set()
        await self._stop.wait()
        server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        self._num_open += 1
        self.max_concurrent = max(self.max_concurrent, self._num_open)
        try:
            await self._answer(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client hung up, as clients with a deadline do; or the server ends
        finally:
            self._num_open -= 1
            self._connections.discard(task)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {key.lower(): value for key, _, value in (line.partition(": ") for line in head[1:] if line)}
        body = json.loads(await reader.readexactly(int(headers["content-length"])))
        self.requests.append(body)
        self.headers.append(headers)
        self.paths.append(head[0].split()[1])
        await self._respond(body, writer)
        await writer.drain()


class FaultyToolServer(LoopbackServer):
    """A tool server whose behaviour is scripted by tool: `behaviours[name]` is one word of these.

    ok, slow:SECONDS, hang, 400, 404, 4xx_output, 500_once, 500, half_closed, drop_once, invalid_json, no_output,
    too_large, too_large_400, redirect, surrogate, wrong_call_id, 413.
    """

    def __init__(self, behaviours: dict[str, str]) -> None:
        super().__init__()
        self.behaviours = behaviours
        self._num_seen: Counter[str] = Counter()

    def requests_for(self, name: str) -> list[dict[str, Any]]:
        return [request for request in self.requests if request["name"] == name]

    async def _respond(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        name = body["name"]
        self._num_seen[name] += 1
        await self._behave(self.behaviours[name], self._num_seen[name] == 1, body, writer)

    async def _behave(self, behaviour: str, is_first: bool, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        kind, _, value = behaviour.partition(":")
        ok = {"type": "function_call_output", "call_id": body["call_id"], "id": body["id"], "output": body["arguments"]}
        if kind == "hang":
            await asyncio.Event().wait()
        elif kind == "slow":
            await asyncio.sleep(float(value))
            _write(writer, 200, ok)
        elif kind == "half_closed" or (kind == "drop_once" and is_first):
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n{")
        elif kind == "500" or (kind == "500_once" and is_first):
            _write(writer, 500, {"error": "the database is gone"})
        elif kind in ("400", "404", "413"):
            _write(writer, int(kind), {"error": f"refused with {kind}"})
        elif kind == "wrong_call_id":
            _write(writer, 200, {**ok, "call_id": "call_of_another", "output": "an answer to another call"})
        elif kind == "redirect":
            _write(writer, 302, {}, "location: http://127.0.0.1:1/elsewhere\r\n")
        elif kind == "invalid_json":
            _write(writer, 200, b"<html>welcome</html>")
        else:
            status, payload = _PAYLOADS.get(kind, (200, ok))
            _write(writer, status, payload)


_PAYLOADS: dict[str, tuple[int, Any]] = {
    "4xx_output": (400, {"output": "Error: no such document"}),
    "no_output": (200, {"result": 1}),
    "too_large": (200, {"output": "x" * 2_000_000}),
    "too_large_400": (400, {"error": "x" * 2_000_000}),
    "surrogate": (200, b'{"output": "half \\ud83d"}'),
}


def _write(writer: asyncio.StreamWriter, status: int, payload: Any, extra: str = "") -> None:
    body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    head = f"HTTP/1.1 {status} {_REASONS[status]}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n{extra}\r\n"
    writer.write(head.encode() + body)


class ScriptedServer(LoopbackServer):
    """Answers the n-th request (from 0) with `script(n, body)`: (status, payload), or None to hang up mid-answer."""

    def __init__(self, script: Callable[[int, dict[str, Any]], tuple[int, Any] | None], delay_s: float = 0.0) -> None:
        super().__init__()
        self.script, self.delay_s, self._num_answered = script, delay_s, 0

    async def _respond(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        number, self._num_answered = self._num_answered, self._num_answered + 1
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        answer = self.script(number, body)
        if answer is None:
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n{")
        else:
            _write(writer, *answer)


def verdict(answer: Any, finish_reason: str = "stop", refusal: str | None = None) -> tuple[int, dict[str, Any]]:
    """A judge's chat completion that says `answer` (a string as it is, anything else as JSON)."""
    content = answer if isinstance(answer, str) else json.dumps(answer)
    message = {"role": "assistant", "content": content, "refusal": refusal}
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 3}}
    return 200, {"choices": [{"index": 0, "message": message, "finish_reason": finish_reason}], "usage": usage}
