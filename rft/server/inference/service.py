"""Who answers a chat completion: the host of a local model, or another server. Translates nothing.

A request is checked before its model is loaded. Closing what `chat` streams, or cancelling it, cancels the sampling.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from rft.graders.judge import Place
from rft.server.errors import ApiError
from rft.server.inference import sse
from rft.server.inference.hosts import Host, Hosts
from rft.server.inference.remote import Remotes
from rft.server.inference.request import parse
from rft.server.models import Target
from rft.server.settings import InferenceConfig, RemoteModel

_MAX_ANSWER_BYTES = 64_000_000
_MAX_ATTEMPTS = 2  # a host that was killed is found out by the first


class Inference:
    """The models of a running server. `logs`: a folder for what host processes print."""

    def __init__(self, config: InferenceConfig, logs: Path) -> None:
        self._config = config
        self.hosts = Hosts(config, logs)
        self._remotes = Remotes()

    async def chat(self, target: Target, body: dict[str, Any]) -> dict[str, Any] | AsyncGenerator[bytes]:
        """The completion, or with `stream: true` its server-sent events. Raises ApiError, before any event."""
        if body.get("stream"):
            return await self.stream(target, body)
        check(target, body)
        async with self._exchange(target, body) as response:
            content = await _whole(response)
        try:
            answer = json.loads(content)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise _broken(target)
        return answer

    async def stream(self, target: Target, body: dict[str, Any]) -> AsyncGenerator[bytes]:
        """The answer's server-sent events as they come."""
        check(target, body)
        events = self._events(target, body)
        await anext(events)  # the answer has begun, or the error is ours to answer
        return events

    @asynccontextmanager
    async def place(self, target: Target) -> AsyncIterator[Place]:
        """Where a judge reaches the model, loaded and kept until the block ends."""
        if isinstance(target.base, RemoteModel):
            yield Place(target.base.url, target.base.model or target.name)
            return
        async with self.hosts.held(target) as (host, plan):
            yield Place(f"http://host/{plan.path}", target.name, host.socket)

    async def close(self) -> None:
        await self.hosts.close()
        await self._remotes.close()

    async def _events(self, target: Target, body: dict[str, Any]) -> AsyncGenerator[bytes]:
        has_begun = False
        try:
            async with self._exchange(target, body) as response:
                has_begun = True
                yield b""
                async for chunk in response.content.iter_any():
                    yield chunk
        except ApiError as error:
            if not has_begun:
                raise
            yield sse.event(error.body())

    @asynccontextmanager
    async def _exchange(self, target: Target, body: dict[str, Any]) -> AsyncIterator[aiohttp.ClientResponse]:
        if isinstance(target.base, RemoteModel):
            async with self._remotes.exchange(target.base, target.name, body) as response:
                yield response
            return
        async with self._asked(target, body) as response:
            try:
                yield response
            except (aiohttp.ClientError, OSError):
                raise _broken(target) from None

    @asynccontextmanager
    async def _asked(self, target: Target, body: dict[str, Any]) -> AsyncIterator[aiohttp.ClientResponse]:
        """The successful answer of the target's host, which is held until the block ends. Raises ApiError."""
        for attempt in range(1, _MAX_ATTEMPTS + 1):
            async with self.hosts.held(target) as (host, plan):
                url = f"{plan.path}/chat/completions"
                response = await self._post(target, host, url, body | {"model": target.name})
                if response is not None:
                    async with response:
                        if response.status != 200:
                            raise _error(response.status, await response.read())
                        yield response
                    return
            if attempt < _MAX_ATTEMPTS:
                await self.hosts.discard(host)
        raise _broken(target)

    async def _post(self, target: Target, host: Host, url: str, body: dict[str, Any]) -> aiohttp.ClientResponse | None:
        """None when the host is gone, or went before it answered anything."""
        assert host.http is not None
        timeout = aiohttp.ClientTimeout(total=self._config.request_timeout_s)
        try:
            return await host.http.post(url, json=body, timeout=timeout)
        except TimeoutError:
            message = f"The model {target.name} did not answer within {self._config.request_timeout_s:g} s."
            raise ApiError(message, status=503, code="request_timeout") from None
        except (aiohttp.ClientError, OSError):
            return None


def check(target: Target, body: dict[str, Any]) -> None:
    """Raises ApiError (400) for what a local model cannot do; another server judges for itself."""
    if not isinstance(target.base, RemoteModel):
        parse({**body, "model": target.name})


async def _whole(response: aiohttp.ClientResponse) -> bytes:
    content = bytearray()
    async for chunk in response.content.iter_any():
        content += chunk
        if len(content) > _MAX_ANSWER_BYTES:
            raise ApiError("The model's answer is too large.", status=500, code="server_error")
    return bytes(content)


def _error(status: int, content: bytes) -> ApiError:
    """The host's own error, in whose form it already is."""
    try:
        error = json.loads(content)["error"]
        return ApiError(str(error["message"]), status=status, code=error["code"], param=error["param"])
    except (ValueError, LookupError, TypeError):
        return ApiError("The model's process failed; its log says why.", status=500, code="server_error")


def _broken(target: Target) -> ApiError:
    message = f"The model {target.name} broke off while answering. Send the request again."
    return ApiError(message, status=503, code="server_error")
