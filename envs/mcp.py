"""The MCP environment: tools from servers that speak the Model Context Protocol, started for us or behind a URL.

Guarantees: a rollout has its own session with every `per_rollout` server, opened at its first call there and closed
with it, and its own folder: what a server keeps per session or process never passes from one rollout to another (over
HTTP a session is what the server makes of it). What the model got wrong comes back to it; a server that fails, hangs or
dies discards the rollout. No call is repeated; opening a session is, once a server behind a URL is back.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Coroutine
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import to_json

from rft.envs.base import Session, ToolSpecs
from rft.envs.mcp_server import FOLDER, McpServerConfig, RolloutFolder, target
from rft.envs.outage import Outages
from rft.envs.tasks import ArgumentError, without_titles
from rft.errors import ToolError, UserError
from rft.types import Item, ToolCall, ToolResult
from rft.wire import MAX_BODY_BYTES, connection_problem, safe_url

if TYPE_CHECKING:
    from mcp_types import Tool

    from rft.envs.mcp_client import McpClient  # imports the SDK: only when a session is opened

_MAX_OUTAGES = 20  # that one session waits for


class McpEnvironmentConfig(BaseModel):
    """Tools of MCP servers, by name of the server."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    type: Literal["mcp"] = "mcp"
    servers: dict[str, McpServerConfig] = Field(min_length=1)
    template_dir: Path | None = Field(default=None, description="what a rollout's folder is a copy of; null: empty")
    max_processes: int = Field(
        default=16, ge=1, description="of per_rollout commands at once; rollouts wait for a place, on their time limit"
    )
    outage_limit_s: float = Field(default=600.0, gt=0, description="how long a url may be down before the run ends")

    @model_validator(mode="after")
    def _coherent(self) -> McpEnvironmentConfig:
        if self.num_private > self.max_processes:
            raise ValueError(f"max_processes: one rollout may need {self.num_private} processes")
        if self.template_dir is not None and not any(server.wants_folder for server in self.servers.values()):
            raise ValueError(f"template_dir: no server uses {FOLDER}")
        return self

    @property
    def num_private(self) -> int:
        """Processes that one rollout may start."""
        return sum(server.is_private_process for server in self.servers.values())


class _Route(NamedTuple):
    """Where a tool is served, and under which name."""

    server: str
    tool: str


class McpEnvironment:
    """Serves any number of rollouts; knows its tools after `discover` or `check`."""

    def __init__(self, config: McpEnvironmentConfig) -> None:
        self.config = config
        self.outages = Outages(config.outage_limit_s)
        # places are counted in rollouts: two that each held one of the two processes they need would wait for ever
        self.places = asyncio.Semaphore(max(1, config.max_processes // max(1, config.num_private)))
        self._routes: dict[str, _Route] = {}
        self._clients: set[McpClient] = set()
        self._shared: dict[str, McpClient] = {}
        self._sharing = {name: asyncio.Lock() for name in config.servers}
        self._endings: set[asyncio.Task[None]] = set()
        self._folder = RolloutFolder(None)  # of the shared servers: nothing in it, the supervisors ask for one

    async def discover(self) -> ToolSpecs:
        """Start every server, list its tools, end it. Raises UserError naming server and cure."""
        names = list(self.config.servers)
        listings = await asyncio.gather(*(self._list(name) for name in names), return_exceptions=True)
        routes: dict[str, _Route] = {}
        specs: dict[str, dict[str, Any] | None] = {}
        for name, listing in zip(names, listings, strict=True):
            if isinstance(listing, BaseException):
                raise listing
            for tool in _allowed(name, self.config.servers[name], listing):
                served = self.config.servers[name].prefix + tool.name
                if served in routes:
                    raise _clash(served, routes[served].server, name)
                routes[served], specs[served] = _Route(name, tool.name), _spec(served, tool)
        self._routes = routes
        return specs

    async def check(self) -> None:
        """Every server starts or answers and has the tools it should have, or UserError."""
        await self.discover()

    async def open(self, item: Item, rollout_id: str) -> McpSession:
        if not self._routes:
            raise RuntimeError("check or discover comes first: it finds out which server has which tool")
        return McpSession(self, item)

    async def close(self) -> None:
        """End everything that is still open, also of rollouts that were interrupted while they closed."""
        await self.outages.close()
        await asyncio.gather(*self._endings, return_exceptions=True)
        await asyncio.gather(*(client.close() for client in self._clients))
        await self._folder.remove()

    def route(self, name: str) -> _Route | None:
        return self._routes.get(name)

    async def shared_client(self, name: str) -> McpClient:
        """The one session with a shared server; a new one when the last is over. Raises ToolError."""
        async with self._sharing[name]:
            client = self._shared.get(name)
            if client is None or not client.is_alive:
                self._shared[name] = client = await self.connect(name, self._folder)
            return client

    async def connect(self, name: str, folder: RolloutFolder) -> McpClient:
        """A new session, once an outage is over. Raises ToolError, and NoProgressError when it stays away too long."""
        for _ in range(_MAX_OUTAGES):
            if url := self.config.servers[name].url:
                await self.outages.over(safe_url(url))
            try:
                return await self._open(name, folder)
            except ToolError as error:
                failure = error
            if not await self.report_outage(name):
                break
        raise failure

    async def report_outage(self, name: str) -> bool:
        """After a failure: whether the server's host cannot be reached; then rollouts wait for it."""
        url = self.config.servers[name].url
        if url is None or await connection_problem(url) is None:
            return False
        self.outages.report(safe_url(url), partial(connection_problem, url))
        return True

    async def finish(self, ending: Coroutine[Any, Any, None]) -> None:
        """Run it to its end, at the latest before `close` returns, also when who waits for it is cancelled."""
        task = asyncio.create_task(ending)
        self._endings.add(task)
        task.add_done_callback(self._endings.discard)
        await asyncio.shield(task)

    async def end(self, client: McpClient) -> None:
        """Close a session that belongs to a rollout."""
        await client.close()
        self._clients.discard(client)

    async def _open(self, name: str, folder: RolloutFolder) -> McpClient:
        from rft.envs.mcp_client import McpClient

        server = self.config.servers[name]
        client = await McpClient.open(name, await target(name, server, folder), server.start_timeout_s)
        self._clients.add(client)
        return client

    async def _list(self, name: str) -> list[Tool]:
        folder = RolloutFolder(self.config.template_dir)
        try:
            client = await self._open(name, folder)
            try:
                return await client.tools()
            finally:
                await self.end(client)
        except ToolError as error:
            raise UserError(error.problem, where=f"environment.servers.{name}", cure=error.cure or _CURE) from None
        finally:
            await folder.remove()


_CURE = "start it by hand to see what it says, then correct its command or url; or raise its start_timeout_s"


class McpSession(Session):
    """The tools of one rollout; calls may run at once."""

    def __init__(self, environment: McpEnvironment, item: Item) -> None:
        self._environment, self._item = environment, item
        self._folder = RolloutFolder(environment.config.template_dir)
        self._clients: dict[str, McpClient] = {}
        self._opening = {name: asyncio.Lock() for name in environment.config.servers}
        self._taking_place = asyncio.Lock()
        self._has_place = False

    async def call(self, call: ToolCall) -> ToolResult:
        """The server's answer as the model sees it; raises ToolError when the rollout must be discarded."""
        route = self._environment.route(call.name)
        if route is None or call.name not in self._item.tool_names:
            names = ", ".join(self._item.tool_names)
            return _error(call, f"there is no tool {call.name}; the tools are: {names}")
        try:
            arguments = _arguments(call)
        except ArgumentError as error:
            return _error(call, str(error))
        started = time.monotonic()
        output, is_error = await self._ask(route, arguments)
        latency_s = time.monotonic() - started
        return ToolResult(call_id=call.call_id, output=output, is_error=is_error, latency_s=latency_s)

    async def close(self) -> None:
        """End the rollout's sessions and processes, remove its folder and give up its place."""
        await self._environment.finish(self._end())

    async def _end(self) -> None:
        try:
            await asyncio.gather(*(self._environment.end(client) for client in self._clients.values()))
            await self._folder.remove()
        finally:
            if self._has_place:
                self._has_place = False
                self._environment.places.release()

    async def _ask(self, route: _Route, arguments: dict[str, Any]) -> tuple[str, bool]:
        server = self._environment.config.servers[route.server]
        if server.state == "shared":
            client = await self._environment.shared_client(route.server)
        else:
            client = await self._own_client(route.server)
        try:
            answer = await client.call(route.tool, arguments, server.timeout_s)
        except ToolError:
            await self._environment.report_outage(route.server)  # so that what replaces this rollout waits
            raise
        return answer.output, answer.is_error

    async def _own_client(self, name: str) -> McpClient:
        async with self._opening[name]:
            if name not in self._clients:
                if self._environment.config.servers[name].is_private_process:
                    await self._take_place()
                self._clients[name] = await self._environment.connect(name, self._folder)
            return self._clients[name]

    async def _take_place(self) -> None:
        async with self._taking_place:
            if not self._has_place:
                await self._environment.places.acquire()
                self._has_place = True


def _allowed(name: str, server: McpServerConfig, tools: list[Tool]) -> list[Tool]:
    """The tools that the config asks for, in the server's order."""
    known = [tool.name for tool in tools]
    where = f"environment.servers.{name}.tools"
    if missing := sorted(set(server.tools or ()) - set(known)):
        cure = f"its tools are: {', '.join(known)}"
        raise UserError(f"the server has no {', '.join(missing)}", where=where, cure=cure)
    if twice := sorted(tool for tool, count in Counter(known).items() if count > 1):
        raise UserError(f"the server lists {', '.join(twice)} twice", where=where, cure="repair the server")
    return [tool for tool in tools if server.tools is None or tool.name in server.tools]


def _clash(tool: str, first: str, second: str) -> UserError:
    cure = f"set environment.servers.{second}.prefix, e.g. {second}_, or leave it out of one server's `tools`"
    return UserError(
        f"the servers {first} and {second} both have a tool {tool}", where="environment.servers", cure=cure
    )


def _spec(name: str, tool: Tool) -> dict[str, Any]:
    """The tool as a dataset row carries it; titles and `$schema` say nothing to a model and cost prompt tokens."""
    schema = {key: value for key, value in tool.input_schema.items() if key != "$schema"}
    function = {"name": name, "description": tool.description or "", "parameters": without_titles(schema)}
    return {"type": "function", "function": function}


def _arguments(call: ToolCall) -> dict[str, Any]:
    """The arguments as an object that the wire can carry. Raises ArgumentError with a text for the model."""
    data = call.arguments.encode("utf-8", errors="replace")
    if len(data) > MAX_BODY_BYTES:
        raise ArgumentError(f"413: the request of {call.name} is larger than {MAX_BODY_BYTES:,} bytes")
    try:
        arguments = json.loads(data or b"{}")
        # half a surrogate pair may hide in an escape, which no server could be sent
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False).encode("utf-8", errors="replace")
        arguments = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArgumentError(f"arguments: not valid JSON: {error}") from None
    if not isinstance(arguments, dict):
        raise ArgumentError("arguments: must be a JSON object")
    try:
        to_json({"params": {"arguments": arguments}})  # as the SDK does: its failure there would end the session
    except ValueError:
        raise ArgumentError("arguments: nested too deeply") from None
    return arguments


def _error(call: ToolCall, text: str) -> ToolResult:
    return ToolResult(call_id=call.call_id, output=_text(text), is_error=True)


def _text(text: str) -> str:
    return text.encode("utf-8", errors="replace").decode()
