"""A server that speaks OpenEnv's protocol, for tests that cannot install it.

Written after openenv-core 0.3.0, core/env_server/http_server.py: `websocket_endpoint` (/ws), `_create_session`
(capacity), `get_schemas` (/schema), and core/env_server/serialization.py (`serialize_observation`). One environment
per connection; errors carry the codes of core/env_server/types.py (`WSErrorCode`).
"""

from __future__ import annotations

import asyncio
import threading
from typing import Any, Self

from aiohttp import WSMsgType, web
from pydantic import BaseModel, ConfigDict, Field, ValidationError


class EchoAction(BaseModel):
    """What OpenEnv's own Action is: no unknown keys, `metadata` on every action."""

    model_config = ConfigDict(extra="forbid")
    metadata: dict[str, Any] = Field(default_factory=dict, description="Additional metadata for the action")
    text: str = Field(min_length=1, description="What to say")
    times: int = 1


class CallToolAction(BaseModel):
    """core/env_server/mcp_types.py."""

    model_config = ConfigDict(extra="forbid")
    metadata: dict[str, Any] = Field(default_factory=dict)
    type: str = "call_tool"
    tool_name: str
    arguments: dict[str, Any] = Field(default_factory=dict)


class EchoWorld:
    """Repeats what is said; three words end it. Texts that it obeys: explode, hang, vanish, nan."""

    action_class: type[BaseModel] = EchoAction

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.reset_with: dict[str, Any] = {}

    def reset(self, data: dict[str, Any]) -> dict[str, Any]:
        self.heard, self.reset_with = [], data
        if data.get("refuse"):
            raise RuntimeError("no such level")
        observation = {"metadata": {"level": 1}, "text": f"Say something, {data.get('name', 'you')}."}  # as 0.10.0 does
        return {"observation": observation, "reward": None, "done": False}

    def step(self, data: dict[str, Any]) -> dict[str, Any]:
        action = EchoAction.model_validate(data)
        if action.text == "explode":
            raise KeyError("row 7")
        self.heard.append(action.text)
        reward: Any = "much" if action.text == "nan" else 0.5
        observation = {"text": " ".join([action.text] * action.times), "num": len(self.heard)}
        return {"observation": observation, "reward": reward, "done": len(self.heard) == 3}

    def state(self) -> dict[str, Any]:
        return {"episode_id": self.reset_with.get("episode_id"), "step_count": len(self.heard), "heard": self.heard}


class ToolWorld(EchoWorld):
    """An MCP environment: its actions are tool calls (core/env_server/mcp_environment.py)."""

    action_class = CallToolAction

    def step(self, data: dict[str, Any]) -> dict[str, Any]:
        if data.get("type") == "list_tools":
            schema = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
            tools = [{"name": "shout", "description": "Shout.", "input_schema": schema}]
            return {"observation": {"tools": tools}, "reward": None, "done": False}
        action = CallToolAction.model_validate(data)
        answer: dict[str, Any] = {"tool_name": action.tool_name, "result": None, "error": None}
        if "text" not in action.arguments:
            answer["error"] = {"error_type": "invalid_args", "message": "text: Field required"}
        elif action.arguments["text"] == "slow":
            answer["error"] = {"error_type": "timeout", "message": "timed out after 30.0 seconds"}
        else:
            self.heard.append(action.arguments["text"])
            text = action.arguments["text"].upper()
            answer["result"] = {"content": [{"type": "text", "text": text}], "data": text, "is_error": text == "BAD"}
        return {"observation": answer, "reward": float(len(self.heard)), "done": len(self.heard) == 3}


class OpenEnvServer:
    """In a thread of its own; `num_open` sessions now, `worlds` of all sessions in order."""

    def __init__(self, world: type[EchoWorld] = EchoWorld, max_sessions: int = 8, has_schema: bool = True) -> None:
        self._world, self._max_sessions, self._has_schema = world, max_sessions, has_schema
        self.worlds: list[EchoWorld] = []
        self.headers: list[str | None] = []
        self.num_open = 0
        self.max_open = 0
        self.url = ""
        self._ready, self._all_gone = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(10), "the server did not start"
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    def wait_until_empty(self) -> bool:
        return self._all_gone.wait(10)

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application()
        app.add_routes([web.get("/ws", self._session), *([web.get("/schema", self._schema)] * self._has_schema)])
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        self._ready.set()
        await self._stop.wait()
        await runner.cleanup()

    async def _schema(self, request: web.Request) -> web.Response:
        self.headers.append(request.headers.get("authorization"))
        schema = self._world.action_class.model_json_schema()
        return web.json_response({"action": schema, "observation": {}, "state": {}})

    async def _session(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        self.headers.append(request.headers.get("authorization"))
        if self.num_open >= self._max_sessions:
            message = f"Server at capacity: {self.num_open}/{self._max_sessions} sessions active"
            await socket.send_json(_error(message, "CAPACITY_REACHED", active_sessions=self.num_open))
            await socket.close()
            return socket
        self._all_gone.clear()
        self.num_open += 1
        self.max_open = max(self.max_open, self.num_open)
        world = self._world()
        self.worlds.append(world)
        try:
            async for message in socket:
                if message.type is not WSMsgType.TEXT or (answer := await _answer(world, message.json())) is None:
                    break
                await socket.send_json(answer)
        finally:
            self.num_open -= 1
            if self.num_open == 0:
                self._all_gone.set()
            await socket.close()
        return socket


async def _answer(world: EchoWorld, message: dict[str, Any]) -> dict[str, Any] | None:
    """The answer to one message; None ends the session."""
    data = message.get("data", {})
    if data.get("text") == "hang":
        await asyncio.Event().wait()
    try:
        match message["type"]:
            case "reset":
                return {"type": "observation", "data": world.reset(data)}
            case "step":
                return None if data.get("text") == "vanish" else {"type": "observation", "data": world.step(data)}
            case "state":
                return {"type": "state", "data": world.state()}
            case "close":
                return None
        return _error(f"Unknown message type: {message['type']}", "UNKNOWN_TYPE")
    except ValidationError as error:
        return _error("Invalid message", "VALIDATION_ERROR", errors=error.errors(include_url=False))
    except Exception as error:  # as OpenEnv does: the environment's code may raise anything
        return _error(str(error), "EXECUTION_ERROR")


def _error(message: str, code: str, **more: Any) -> dict[str, Any]:
    return {"type": "error", "data": {"message": message, "code": code, **more}}
