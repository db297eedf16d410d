"""What happens around every request: an id, and an end to bodies that are too large.

Plain ASGI, so that streams stay streams.
"""

from __future__ import annotations

import re

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rft.server.errors import ApiError
from rft.server.ids import new_id

_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
UPLOADS = re.compile(r"/v1/files|/v1/uploads/[^/]+/parts")  # limit their own bodies, and stream them to disk


class RequestIds:
    """Gives every answer `x-request-id`: the client's own, or a new one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _ID.fullmatch(given) else new_id("req_")
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)
        return None


class Limits:
    """Refuses bodies above a size, by what they say of themselves and by what arrives."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app, self._max_body_bytes = app, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or UPLOADS.fullmatch(scope["path"]):
            return await self._app(scope, receive, send)
        said = Headers(scope=scope).get("content-length", "")
        if said.isdigit() and int(said) > self._max_body_bytes:
            return await self._refusal()(scope, receive, send)
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_body_bytes:
                raise self._error()
            return message

        await self._app(scope, counted, send)
        return None

    def _error(self) -> ApiError:
        message = f"The request body is larger than {self._max_body_bytes:,} bytes."
        return ApiError(message, status=413, code="request_too_large")

    def _refusal(self) -> JSONResponse:
        error = self._error()
        return JSONResponse(error.body(), status_code=error.status, headers=error.headers)
