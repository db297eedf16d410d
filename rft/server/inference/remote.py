"""Models behind another OpenAI-compatible URL: requests go there as they are, under the model's name there.

Guarantees: every request ends within its deadline, no redirect is followed, and no key reaches an error or a log.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from rft.server.errors import ApiError
from rft.server.settings import RemoteModel
from rft.wire import safe_url, without_secrets

_CONNECT_TIMEOUT_S = 10.0
_MAX_ERROR_BYTES = 65_536
_MAX_ERROR_CHARS = 500


class Remotes:
    """One pool of connections for all of them; each has a limit of its own."""

    def __init__(self) -> None:
        self._http: aiohttp.ClientSession | None = None  # belongs to a running loop: made when used
        self._slots: dict[str, asyncio.Semaphore] = {}

    @asynccontextmanager
    async def exchange(
        self, model: RemoteModel, name: str, body: dict[str, Any]
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The upstream's successful answer to a chat completion; the block reads it. Raises ApiError."""
        headers = _headers(model, name)
        slots = self._slots.setdefault(model.url, asyncio.Semaphore(model.max_concurrent))
        timeout = aiohttp.ClientTimeout(total=model.timeout_s, sock_connect=_CONNECT_TIMEOUT_S)
        data = json.dumps(body | {"model": model.model or name}).encode()
        async with slots:
            try:
                async with self._session().post(
                    f"{model.url}/chat/completions", data=data, headers=headers, timeout=timeout, allow_redirects=False
                ) as response:
                    if response.status != 200:
                        raise await _refusal(response, name, headers)
                    yield response
            except (aiohttp.ClientError, OSError) as error:  # their texts can quote header values
                raise _failure(model, name, error) from None

    async def close(self) -> None:
        if self._http is not None:
            await self._http.close()

    def _session(self) -> aiohttp.ClientSession:
        if self._http is None:
            self._http = aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar(), headers={"user-agent": "rft"})
        return self._http


def _headers(model: RemoteModel, name: str) -> dict[str, str]:
    headers = {"content-type": "application/json", "accept-encoding": "identity"}
    if model.api_key_env is not None:
        key = os.environ.get(model.api_key_env)
        if not key:
            message = f"The model {name} needs a key that this server does not have: set {model.api_key_env} there."
            raise ApiError(message, status=500, code="model_not_available", param="model")
        headers["authorization"] = f"Bearer {key}"
    return headers


async def _refusal(response: aiohttp.ClientResponse, name: str, headers: dict[str, str]) -> ApiError:
    """The upstream's error under the status it has for our caller, whose key and quota are others."""
    content = await response.content.read(_MAX_ERROR_BYTES)
    try:
        error = json.loads(content)["error"]
        said, code, param = str(error.get("message", "")), error.get("code"), error.get("param")
    except (ValueError, LookupError, TypeError, AttributeError):
        said, code, param = content.decode(errors="replace"), None, None
    said = without_secrets(said, {"authorization": headers.get("authorization", "")})[:_MAX_ERROR_CHARS]
    if response.status in (400, 413, 422):
        return ApiError(said, code=_text(code), param=_text(param))
    if response.status == 429:
        return ApiError(f"The model {name} is busy: {said}", status=429, code="rate_limit_exceeded")
    if response.status >= 500:
        return ApiError(f"The model {name} failed: HTTP {response.status}: {said}", status=503, code="server_error")
    message = f"The model {name} cannot be used: its server answered HTTP {response.status}: {said}"
    return ApiError(message, status=500, code="model_not_available", param="model")


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _failure(model: RemoteModel, name: str, error: Exception) -> ApiError:
    what = "did not answer in time" if isinstance(error, TimeoutError) else "cannot be reached, or broke off"
    return ApiError(f"The model {name} {what} ({safe_url(model.url)}).", status=503, code="server_error")
