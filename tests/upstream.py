"""A scripted OpenAI-compatible server, for models that answer elsewhere."""

from __future__ import annotations

import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

USAGE = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}


class Upstream:
    """Answers the n-th request with the n-th message, the last one again; an int is a status to fail with."""

    def __init__(self, *script: dict[str, Any] | int) -> None:
        self.script, self.bodies, self.keys = list(script), list[dict[str, Any]](), list[str]()
        self.app = Starlette(routes=[Route("/v1/chat/completions", self._answer, methods=["POST"])])

    async def _answer(self, request: Request) -> Response:
        self.bodies.append(body := await request.json())
        self.keys.append(request.headers.get("authorization", ""))
        said = self.script[min(len(self.bodies), len(self.script)) - 1]
        if isinstance(said, int):
            error = {"message": f"no, {self.keys[-1]}", "type": "x", "param": "messages", "code": "some_code"}
            return JSONResponse({"error": error}, status_code=said)
        head = {"id": "chatcmpl-1", "created": 1, "model": body["model"]}
        finish = "tool_calls" if said.get("tool_calls") else "stop"
        if body.get("stream"):
            return StreamingResponse(self._chunks(head, said, finish), media_type="text/event-stream")
        choice = {"index": 0, "message": {"role": "assistant"} | said, "finish_reason": finish}
        return JSONResponse(head | {"object": "chat.completion", "choices": [choice], "usage": USAGE})

    async def _chunks(self, head: dict[str, Any], said: dict[str, Any], finish: str) -> AsyncIterator[str]:
        calls = [{"index": i, **call} for i, call in enumerate(said.get("tool_calls", []))]
        deltas: list[dict[str, Any]] = [{"role": "assistant"}]
        for key in ("reasoning_content", "content"):
            deltas += [{key: said[key][i : i + 4]} for i in range(0, len(said.get(key) or ""), 4)]
        deltas += [{"tool_calls": [call]} for call in calls]
        for delta in deltas:
            choice = {"index": 0, "delta": delta, "finish_reason": None}
            yield _event(head | {"object": "chat.completion.chunk", "choices": [choice]})
        end = {"index": 0, "delta": {}, "finish_reason": finish}
        yield _event(head | {"object": "chat.completion.chunk", "choices": [end]})
        yield _event(head | {"object": "chat.completion.chunk", "choices": [], "usage": USAGE})
        yield "data: [DONE]\n\n"


@contextmanager
def answering(upstream: Upstream) -> Iterator[str]:
    """Its base URL."""
    started = threading.Event()

    class Server(uvicorn.Server):
        async def startup(self, sockets: list | None = None) -> None:
            await super().startup(sockets)
            started.set()

    server = Server(uvicorn.Config(upstream.app, host="127.0.0.1", port=0, log_config=None))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        assert started.wait(30)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        thread.join(30)


def a_call(name: str, call_id: str, **arguments: Any) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}


def _event(payload: dict[str, Any]) -> str:
    return f"data: {json.dumps(payload)}\n\n"
