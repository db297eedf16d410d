"""The one HTTP client: deadlines, retries with jitter, size caps, and no secret in any text it produces.

Guarantees: every attempt ends within its deadline, the number of attempts is bounded, a body larger than the cap is
not read to its end, nothing a server sets (cookies) travels from one request to another, and neither header values nor
credentials in URLs reach an error or a log. Does not know what a reply means: the caller decides which replies count as
failures of the server.

aiohttp and not httpx: 1,024 requests at once cost 0.4 ms of CPU time each against 3 ms. It takes a fifth of a second to
import, which who only reads a config is spared: functions that need it import it.
"""

from __future__ import annotations

import asyncio
import json
import random
import resource
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from aiolimiter import AsyncLimiter

from rft.errors import WorldError

if TYPE_CHECKING:
    import aiohttp

MAX_BODY_BYTES = 1_000_000
_CONNECT_TIMEOUT_S = 5.0
_SILENCE_S = 15  # of a peer's machine, not of its program, after which a connection counts as broken
_KEEPALIVE_S = 4.0  # dropped before a server with default settings (5 s) closes it under us
_OTHER_FILES = 256  # that the process has open besides
_BURST_S = 0.1
_CANNOT_CONNECT = "cannot connect"


class WireError(WorldError):
    """No usable reply after all attempts; `num_attempts` were made. `is_unreachable`: the last found nobody there."""

    def __init__(self, problem: str, *, num_attempts: int, is_unreachable: bool = False) -> None:
        super().__init__(problem, retryable=True)
        self.num_attempts, self.is_unreachable = num_attempts, is_unreachable


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often, and how long to wait in between: a random share of `first_wait_s` doubled per attempt."""

    max_attempts: int = 4
    first_wait_s: float = 0.5
    max_wait_s: float = 8.0

    def wait_s(self, attempt: int) -> float:
        """Seconds before the attempt after the 1-based `attempt`; jitter keeps a burst from returning as a burst."""
        ceiling: float = min(self.max_wait_s, self.first_wait_s * 2 ** (attempt - 1))
        return ceiling * random.uniform(0.5, 1.0)


@dataclass(frozen=True, slots=True)
class Reply:
    """What a server answered. With `is_too_large` the body was cut at the cap and means nothing."""

    status: int
    body: bytes
    is_too_large: bool = False
    num_attempts: int = 1
    latency_s: float = 0.0  # of the last attempt

    @property
    def text(self) -> str:
        return self.body.decode("utf-8", errors="replace")

    def json(self) -> Any:
        """The decoded body, or None when it is not JSON."""
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            return None


class Client:
    """One pool of connections. Follows no redirects, keeps no cookies, ignores the environment's proxies.

    max_connections: at once; who wants one more waits in `slots`.
    socket: a Unix socket to which all traffic goes, whatever the URL says.
    """

    def __init__(self, *, max_connections: int, socket: Path | None = None) -> None:
        self._limit, self._socket = available_connections(max_connections), socket
        self.slots = asyncio.Semaphore(self._limit)
        self._session: aiohttp.ClientSession | None = None  # belongs to a running loop: made when used

    async def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> tuple[int, bytes, bool]:
        """Status, body, and whether the body was cut at the cap; no deadline of its own but for the connection."""
        if self._session is None:
            self._session = self._open()
        all_headers = {"content-type": "application/json", "accept-encoding": "identity", **headers}
        content = bytearray()
        async with self._session.post(url, data=body, headers=all_headers, allow_redirects=False) as response:
            async for chunk in response.content.iter_any():
                content += chunk
                if len(content) > MAX_BODY_BYTES:
                    return response.status, b"", True
        return response.status, bytes(content), False

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    def _open(self) -> aiohttp.ClientSession:
        import aiohttp

        connector: aiohttp.BaseConnector
        if self._socket is not None:
            connector = aiohttp.UnixConnector(str(self._socket), limit=self._limit, keepalive_timeout=_KEEPALIVE_S)
        else:
            connector = aiohttp.TCPConnector(
                limit=self._limit, keepalive_timeout=_KEEPALIVE_S, socket_factory=watched_socket
            )
        return aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S),
            headers={"user-agent": "rft"},
        )


def available_connections(wanted: int) -> int:
    """How many of the `wanted` sockets this process may have open; its limit of open files is raised where it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(hard, needed)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return wanted if soft == resource.RLIM_INFINITY else max(1, min(wanted, soft - _OTHER_FILES))


def watched_socket(address: aiohttp.AddrInfoType) -> socket.socket:
    """A TCP socket that breaks when the other machine, or the way to it, is gone: nobody says so, and a request that
    waits for its answer would wait for its whole deadline. A machine that answers slowly is waited for.
    """
    family, kind, protocol = address[:3]
    watched = socket.socket(family, kind, protocol)
    watched.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        for option, value in (
            (socket.TCP_KEEPIDLE, _SILENCE_S - 9),
            (socket.TCP_KEEPINTVL, 3),
            (socket.TCP_KEEPCNT, 3),
            (socket.TCP_USER_TIMEOUT, _SILENCE_S * 1000),
        ):
            watched.setsockopt(socket.IPPROTO_TCP, option, value)
    return watched


def rate_limiter(rate_limit: float | None) -> Callable[[], Awaitable[None]] | None:
    """What to await before a request so that no more than `rate_limit` leave per second; None without a limit.

    A leaky bucket: a tenth of a second's requests may leave together, at least one.
    """
    if rate_limit is None:
        return None
    burst = max(1.0, rate_limit * _BURST_S)
    return AsyncLimiter(burst, burst / rate_limit).acquire


async def post_json(
    http: Client,
    url: str,
    body: bytes,
    *,
    headers: Mapping[str, str],
    timeout_s: float,
    retry: RetryPolicy,
    problem_of: Callable[[Reply], str | None] | None = None,
    before_attempt: Callable[[], Awaitable[None]] | None = None,
) -> Reply:
    """POST a JSON body, the same bytes on every attempt; each attempt has `timeout_s`.

    before_attempt: awaited before each, outside its deadline (a rate limit).

    Retried: transport errors, timeouts, status 5xx, and replies for which `problem_of` returns a text.
    Raises WireError with the last problem when all attempts failed.
    """
    import aiohttp

    problem = ""
    for attempt in range(1, retry.max_attempts + 1):
        if before_attempt is not None:
            await before_attempt()
        started = time.monotonic()
        try:
            async with http.slots, asyncio.timeout(timeout_s):  # waiting for a slot is not the server's time
                status, content, is_too_large = await http.post(url, body, headers)
        except (OSError, aiohttp.ClientError, ValueError) as error:  # TimeoutError is an OSError
            problem = _describe(error, timeout_s)
        else:
            reply = Reply(status, content, is_too_large, attempt, time.monotonic() - started)
            problem = _server_problem(reply, problem_of)
            if not problem:
                return reply
        if attempt < retry.max_attempts:
            await asyncio.sleep(retry.wait_s(attempt))
    problem = without_secrets(problem, headers)
    raise WireError(
        f"{safe_url(url)} failed {retry.max_attempts} times: {problem}",
        num_attempts=retry.max_attempts,
        is_unreachable=problem == _CANNOT_CONNECT,
    )


async def connection_problem(url: str) -> str | None:
    """Why nothing accepts connections at the URL's host and port; None when something does."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            _, writer = await asyncio.open_connection(parts.hostname, port)
    except (OSError, TimeoutError) as error:
        reason = getattr(error, "strerror", None) or f"no connection within {_CONNECT_TIMEOUT_S:g} s"
        return f"{safe_url(url)} cannot be reached ({reason})"
    writer.close()
    return None


def without_secrets(text: str, headers: Mapping[str, str]) -> str:
    """The text of a server, which may quote what we sent, without header values and the keys in them (`Bearer KEY`)."""
    for value in filter(None, headers.values()):
        for secret in (value, value.split()[-1] if value.split() else value):
            text = text.replace(secret, "***")
    return text


def redact(headers: Mapping[str, str]) -> dict[str, str]:
    """Header names with their values hidden, for logs and errors."""
    return dict.fromkeys(headers, "***")


def safe_url(url: str) -> str:
    """A URL without user, password, query and fragment, for logs and errors."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _server_problem(reply: Reply, problem_of: Callable[[Reply], str | None] | None) -> str:
    if reply.status >= 500:
        return f"HTTP {reply.status}: {reply.text[:200]}" if reply.body else f"HTTP {reply.status}"
    return (problem_of(reply) or "") if problem_of else ""


def _describe(error: Exception, timeout_s: float) -> str:
    """What went wrong, in words of our own: texts of the HTTP library can quote header values."""
    import aiohttp

    if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
        return _CANNOT_CONNECT
    if isinstance(error, TimeoutError):
        return f"no answer within {timeout_s:g} s"
    if isinstance(error, OSError | aiohttp.ServerConnectionError | aiohttp.ClientPayloadError):
        return "the connection broke before the answer was complete"
    if isinstance(error, aiohttp.ClientResponseError):
        return "the answer is not HTTP"
    return f"the request cannot be sent ({type(error).__name__})"
