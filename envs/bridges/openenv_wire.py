"""One WebSocket to an OpenEnv server: a question, then its answer, and nothing after an answer that did not come.

The messages are those of openenv-core 0.3.0 and openenv 0.10.0 (core/env_server/http_server.py,
`websocket_endpoint`, and the error codes of core/env_server/types.py).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from rft.envs.bridges.foreign import as_text, clean
from rft.envs.tasks import ArgumentError
from rft.errors import ToolError

if TYPE_CHECKING:
    import aiohttp

_GOODBYE_TIMEOUT_S = 10.0
_REPAIRABLE = ("invalid_args", "tool_not_found", "execution_error")  # errors of an MCP tool that the model is shown


class Connection:
    """Ask one thing at a time: an answer carries no number, it belongs to the last question.

    `place` names the server in errors; `on_lost` is awaited when the connection breaks.
    """

    def __init__(
        self,
        socket: aiohttp.ClientWebSocketResponse,
        place: str,
        timeout_s: float,
        on_lost: Callable[[], Awaitable[None]],
    ) -> None:
        self._socket, self._place, self._timeout_s, self._on_lost = socket, place, timeout_s, on_lost
        self.is_broken = False

    async def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """Send one message and return the `data` of its answer.

        Raises ArgumentError for a message whose content the server refuses, ToolError for everything else.
        """
        if self.is_broken:
            raise ToolError(f"{self._place}: the session is lost")
        self.is_broken = True  # until the answer is here: without it the next one would be taken for it
        answer = await self._exchange(message)
        data = answer.get("data") if isinstance(answer, dict) else None
        if not isinstance(data, dict):
            raise ToolError(f"{self._place}: the answer to {message['type']} is not of OpenEnv's form")
        if answer["type"] != "error":
            self.is_broken = False
            return data
        code, text = data.get("code"), data.get("message")
        if code == "VALIDATION_ERROR":
            self.is_broken = False
            raise ArgumentError(_explained(data.get("errors"), str(text)))
        cure = ""
        if code == "CAPACITY_REACHED":
            cure = "start the server with a larger max_concurrent_envs, or set environment.max_sessions to its limit"
        raise ToolError(f"{self._place}: {message['type']} failed: {text} ({code})", cure=cure)

    async def _exchange(self, message: dict[str, Any]) -> Any:
        import aiohttp

        try:
            async with asyncio.timeout(self._timeout_s):
                await self._socket.send_str(clean(json.dumps(message, ensure_ascii=False)))
                received = await self._socket.receive()
        except TimeoutError:
            raise ToolError(f"{self._place}: no answer to {message['type']} within {self._timeout_s:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            await self._on_lost()
            raise ToolError(f"{self._place}: the connection broke: {described(error)}") from None
        if received.type is not aiohttp.WSMsgType.TEXT:
            await self._on_lost()
            raise ToolError(f"{self._place}: the server closed the session")
        try:
            return json.loads(received.data)
        except (ValueError, RecursionError):
            return None

    async def end(self) -> None:
        """Say goodbye; the server closes the environment, makes room for another, and then hangs up."""
        try:
            async with asyncio.timeout(_GOODBYE_TIMEOUT_S):
                if not (self._socket.closed or self.is_broken):
                    await self._socket.send_json({"type": "close"})
                    await self._socket.receive()
                await self._socket.close()
        except OSError:  # it is gone already, or does not answer (TimeoutError)
            self.is_broken = True


def tool_answer(observation: Any) -> tuple[str, bool]:
    """The result of an MCP tool as text. Raises ToolError where the tool could not be run."""
    if not isinstance(observation, dict):
        return as_text(observation), False
    error, result = observation.get("error"), observation.get("result")
    if isinstance(error, dict):
        text = str(error.get("message"))
        if error.get("error_type") not in _REPAIRABLE:
            raise ToolError(f"tool {observation.get('tool_name')}: {text} ({error.get('error_type')})")
        return text, True
    if not isinstance(result, dict) or not isinstance(content := result.get("content"), list):
        return as_text(result), False
    parts = [part.get("text", "") for part in content if isinstance(part, dict)]
    return "\n".join(as_text(part) for part in parts), result.get("is_error") is True


def described(error: Exception) -> str:
    return type(error).__name__ if not isinstance(error, OSError) else "cannot connect"


def _explained(errors: Any, otherwise: str) -> str:
    """One line per thing that is wrong with an action, as pydantic found it on the server."""
    if not isinstance(errors, list) or not all(isinstance(error, dict) for error in errors) or not errors:
        return otherwise
    return "; ".join(
        f"{'.'.join(['arguments', *map(str, error.get('loc', []))])}: {error.get('msg')}" for error in errors
    )
