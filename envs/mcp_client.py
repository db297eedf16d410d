"""One session with one MCP server: opened, used by many calls at once, closed; every failure is a ToolError in words.

Guarantees: a task of its own enters and leaves the SDK's contexts, as their cancel scopes ask for; opening, calls and
closing have deadlines; a cancelled call leaves nothing behind; a server that we start dies with us, however we die;
neither headers nor environment values appear in an error. Never sends a call twice: a tool may have had its effect.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import anyio
import httpx2
from mcp import Client, MCPError, StdioServerParameters
from mcp.client import Transport
from mcp.client.stdio import stdio_client
from mcp.client.streamable_http import streamable_http_client
from mcp_types import CONNECTION_CLOSED, INVALID_PARAMS, CallToolResult, ContentBlock, TextContent, Tool
from pydantic import ValidationError

from rft.envs.mcp_server import Process, Remote
from rft.errors import ToolError
from rft.supervise import supervised
from rft.wire import MAX_BODY_BYTES, safe_url, without_secrets

_GRACE_S = 0.8  # for SIGTERM, then for SIGKILL: both end within the 2 s after which the SDK kills the supervisor
_CLOSE_S = 10.0  # the SDK itself gives a process 6.5 s
_CONNECT_S = 5.0
_MAX_PAGES = 100
_ENDED = "ended before it answered"
_MAX_EVENT_BYTES = 16 * MAX_BODY_BYTES  # escapes and structured copies make an answer larger than its text
_TAIL_BYTES, _TAIL_LINES = 8192, 5
_MIN_SECRET = 6  # characters of an environment value that is hidden: a 1 or a yes is no secret and stands everywhere


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model sees of a call."""

    output: str
    is_error: bool


class McpClient:
    """One session; `open` makes it. `is_alive` is False once the session is over, whoever ended it."""

    def __init__(self, name: str, target: Process | Remote, start_timeout_s: float) -> None:
        self._name, self._target, self._start_timeout_s = name, target, start_timeout_s
        self._client: Client | None = None
        self._problem = ""  # why the session ended
        self._last_words = b""  # of the process's standard error
        self._bad_status: int | None = None  # the last HTTP status that was an error
        self._opened, self._over = asyncio.Event(), asyncio.Event()
        self._owner = asyncio.create_task(self._live())

    @classmethod
    async def open(cls, name: str, target: Process | Remote, start_timeout_s: float) -> McpClient:
        """Start or reach the server and shake hands. Raises ToolError; whatever was started is gone then."""
        client = cls(name, target, start_timeout_s)
        try:
            await client._opened.wait()
        except asyncio.CancelledError:
            await client.close()
            raise
        if client._client is None:
            await client.close()
            raise client._error(client._problem or "the session ended while it was opened")
        return client

    @property
    def is_alive(self) -> bool:
        return self._client is not None and not self._over.is_set() and not self._owner.done()

    async def tools(self) -> list[Tool]:
        """All tools that the server lists. Raises ToolError."""
        tools: list[Tool] = []
        cursor: str | None = None
        for _ in range(_MAX_PAGES):
            with self._failures(self._start_timeout_s):
                async with asyncio.timeout(self._start_timeout_s):
                    page = await self._connected.list_tools(cursor=cursor)
            tools += page.tools
            cursor = page.next_cursor
            if not cursor:
                return tools
        raise self._error(f"its list of tools has more than {_MAX_PAGES} pages")

    async def call(self, tool: str, arguments: dict[str, Any], timeout_s: float) -> Answer:
        """Call a tool once. What the model did wrong is an answer; ToolError when the server failed or hung."""
        try:
            with self._failures(timeout_s):
                async with asyncio.timeout(timeout_s):
                    return _answer(tool, await self._connected.call_tool(tool, arguments))
        except _RefusedError as refusal:
            return Answer(_as_text(str(refusal)), is_error=True)
        except _SessionOverError as end:
            self._over.set()
            await asyncio.wait({self._owner}, timeout=_CLOSE_S)  # then its last words are known
            raise self._error(f"tool {tool}: {self._problem or end}") from None

    async def close(self) -> None:
        """End the session and the process; when interrupted, the owner goes on to do so."""
        self._over.set()
        if not (await asyncio.wait({self._owner}, timeout=_CLOSE_S))[0]:
            self._owner.cancel()
            await asyncio.wait({self._owner}, timeout=_CLOSE_S)

    @property
    def _connected(self) -> Client:
        if self._client is None or not self.is_alive:
            raise _SessionOverError("the session is over")
        return self._client

    async def _live(self) -> None:
        """The whole life of the session, in one task."""
        try:
            async with AsyncExitStack() as stack:
                async with asyncio.timeout(self._start_timeout_s):
                    transport = await self._transport(stack)
                    client = Client(transport, mode="legacy", cache=None, message_handler=self._on_message)
                    self._client = await stack.enter_async_context(client)
                self._opened.set()
                await self._over.wait()
        except TimeoutError:
            self._problem = f"did not start within {self._start_timeout_s:g} s"
        except Exception as error:  # whatever breaks a session from below is the server's failure, not a bug of ours
            self._problem = self._problem or self._reason(error)
        finally:
            self._over.set()
            self._opened.set()

    async def _transport(self, stack: AsyncExitStack) -> Transport:
        _quieten()
        if isinstance(self._target, Remote):
            http = await stack.enter_async_context(self._http(self._target))
            return streamable_http_client(self._target.url, http_client=http, max_sse_event_size=_MAX_EVENT_BYTES)
        errors = stack.enter_context(self._listening())
        command, *arguments = supervised(self._target.command, self._target.folder, "parent", _GRACE_S)
        parameters = StdioServerParameters(
            command=command,
            args=arguments,
            env=self._target.env,
            cwd=self._target.cwd,
            encoding_error_handler="replace",
        )
        return stdio_client(parameters, errlog=errors)

    def _http(self, remote: Remote) -> httpx2.AsyncClient:
        """A client of this session alone (cookies are state); deadlines are set by who calls."""

        async def note(response: httpx2.Response) -> None:
            self._bad_status = response.status_code if response.status_code >= 400 else self._bad_status

        return httpx2.AsyncClient(
            headers=remote.headers,
            timeout=httpx2.Timeout(None, connect=_CONNECT_S),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=8),
            trust_env=False,
            event_hooks={"response": [note]},
        )

    @contextlib.contextmanager
    def _listening(self) -> Iterator[Any]:
        """The writing end of a pipe for the process's standard error; its last words are kept."""
        loop = asyncio.get_running_loop()
        reader, writer = os.pipe()
        os.set_blocking(reader, False)

        def read() -> None:
            with contextlib.suppress(BlockingIOError):
                if data := os.read(reader, 65536):
                    self._last_words = (self._last_words + data)[-_TAIL_BYTES:]
                else:
                    loop.remove_reader(reader)

        loop.add_reader(reader, read)
        try:
            with os.fdopen(writer, "w") as file:
                yield file
        finally:
            read()
            loop.remove_reader(reader)
            os.close(reader)

    async def _on_message(self, message: object) -> None:
        """An answer that the SDK cannot read (half a surrogate pair) never arrives: its call would wait for it."""
        if isinstance(message, ValidationError) and '"jsonrpc"' in str(message.errors()[0]["input"]):
            self._problem = "sent a message that is no JSON, or holds half a surrogate pair"
            self._over.set()

    @contextlib.contextmanager
    def _failures(self, timeout_s: float) -> Iterator[None]:
        """What the SDK raises, in our words."""
        try:
            yield
        except TimeoutError:
            raise self._error(f"no answer within {timeout_s:g} s") from None
        except MCPError as error:
            if error.code == CONNECTION_CLOSED:
                raise _SessionOverError(_ENDED if error.message == "Connection closed" else error.message) from None
            if error.code == INVALID_PARAMS:
                raise _RefusedError(error.message) from None
            raise self._error(f"{error.message}{self._status}", is_quoted=False) from None
        except (ValidationError, RuntimeError, anyio.ClosedResourceError, anyio.BrokenResourceError) as error:
            raise self._error(f"its answer cannot be used: {str(error)[:300]}") from None

    @property
    def _status(self) -> str:
        return f" (HTTP {self._bad_status})" if self._bad_status is not None else ""

    def _reason(self, error: BaseException) -> str:
        """What ended the session; texts of the HTTP library are not used, they can quote header values."""
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout):
            return "cannot be reached"
        if isinstance(error, httpx2.HTTPError | httpx2.InvalidURL):
            return f"the connection broke ({type(error).__name__})"
        if isinstance(error, MCPError) and error.code == CONNECTION_CLOSED:
            return _ENDED
        return f"{error}{self._status}"

    def _error(self, problem: str, is_quoted: bool = True) -> ToolError:
        """The failure, with the server's last words where they may say why, and without secrets."""
        where = f" at {safe_url(self._target.url)}" if isinstance(self._target, Remote) else ""
        lines = (self._last_words if is_quoted else b"").decode("utf-8", errors="replace").splitlines()
        words = "\n    ".join(line.rstrip()[:300] for line in [line for line in lines if line.strip()][-_TAIL_LINES:])
        text = f"MCP server {self._name}{where}: {problem}" + (f"; it last said:\n    {words}" if words else "")
        return ToolError(_as_text(without_secrets(text, self._secrets)))

    @property
    def _secrets(self) -> dict[str, str]:
        if isinstance(self._target, Remote):
            return self._target.headers
        return {name: value for name, value in self._target.env.items() if len(value) >= _MIN_SECRET}


class _RefusedError(Exception):
    """The server says that the call itself is wrong."""


class _SessionOverError(Exception):
    """There is no session any more."""


def _answer(tool: str, result: CallToolResult) -> Answer:
    """Texts joined; without any, the structured content; other blocks are named and left out."""
    parts = [_block_text(block) for block in result.content]
    has_text = any(isinstance(block, TextContent) for block in result.content)
    if not has_text and result.structured_content is not None:
        parts.insert(0, json.dumps(result.structured_content, ensure_ascii=False))
    data = "\n".join(parts).encode("utf-8", errors="replace")  # half a surrogate pair could not be written anywhere
    if len(data) > MAX_BODY_BYTES:
        return Answer(f"413: the answer of {tool} is larger than {MAX_BODY_BYTES:,} bytes", is_error=True)
    return Answer(data.decode(), bool(result.is_error))


def _block_text(block: ContentBlock) -> str:
    if isinstance(block, TextContent):
        return block.text
    return f"[a block of type {block.type} was left out: only text can be shown]"


def _as_text(text: str) -> str:
    return text[:4000].encode("utf-8", errors="replace").decode()


def _quieten() -> None:
    """The libraries' own lines quote URLs, session ids and what servers wrote; what matters reaches us as an error."""
    logging.getLogger("mcp").setLevel(logging.CRITICAL)
    logging.getLogger("httpx2").setLevel(logging.WARNING)
