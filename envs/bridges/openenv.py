"""OpenEnv servers: one WebSocket session per rollout, the model acts through `step` or through the server's MCP tools.

The protocol is that of openenv-core 0.3.0 and openenv 0.10.0 (core/env_server/http_server.py, core/env_client.py),
spoken directly: their packages are not needed. What the server calls a VALIDATION_ERROR is the model's to repair;
every other error discards the rollout. A session that is lost cannot be resumed: its state is on the server.
"""

from __future__ import annotations

import asyncio
import json
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator

from rft.envs.base import Session, ToolSpecs
from rft.envs.bridges.foreign import arguments_of, as_text, clean, facts, no_such_tool, result_of, seed_of
from rft.envs.bridges.openenv_wire import Connection, described, tool_answer
from rft.envs.outage import Outages
from rft.envs.tasks import ArgumentError
from rft.errors import ToolError, UserError
from rft.types import Item, ToolCall, ToolResult
from rft.wire import connection_problem, safe_url

if TYPE_CHECKING:
    import aiohttp

_TOOL = "step"
_WHERE = "environment.url"
_CONNECT_TIMEOUT_S = 10.0
_MAX_OUTAGES = 20  # that one rollout waits for
_MAX_MESSAGE_BYTES = 100_000_000  # as OpenEnv's own client; what the model sees is bounded below
_MCP_ACTIONS = ("CallToolAction", "ListToolsAction", "Action")  # titles of action classes that carry MCP calls


class OpenEnvEnvironmentConfig(BaseModel):
    """`url`: where the server listens, e.g. http://127.0.0.1:8000. Headers are sent as they are and never shown."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    type: Literal["openenv"] = "openenv"
    url: str = Field(min_length=1)
    headers: dict[str, SecretStr] = Field(default_factory=dict)
    action_schema: dict[str, Any] | None = Field(
        None, description="of one action; null: what the server's /schema says"
    )
    description: str = Field("Act in the environment.", description="what the model reads about the tool step")
    observation_key: str | None = Field(None, description="the field of an observation to show; null: all, as JSON")
    reset: dict[str, Any] = Field(default_factory=dict, description="arguments of every reset")
    reset_columns: tuple[str, ...] = Field((), description="columns of the row that reset gets too")
    seed: Literal["item", "rollout"] = "item"
    max_sessions: int | None = Field(None, ge=1, description="at once; a server's own limit is 1 unless it says more")
    timeout_s: float = Field(default=600.0, gt=0, description="per reset and per step")
    outage_limit_s: float = Field(default=600.0, gt=0, description="how long the server may be down")

    @field_validator("url")
    @classmethod
    def _absolute(cls, url: str) -> str:
        try:
            parts = urlsplit(url)
            is_good = parts.scheme in ("http", "https", "ws", "wss") and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:  # a port that is no number
            is_good = False
        if not is_good:
            raise ValueError("must start with http:// or https://")
        return url.rstrip("/")


class OpenEnvEnvironment:
    """Opens sessions on one server."""

    def __init__(self, config: OpenEnvEnvironmentConfig) -> None:
        self.config = config
        self.outages = Outages(config.outage_limit_s)
        self.http_url = "http" + config.url.removeprefix("http").removeprefix("ws")
        self._slots = asyncio.Semaphore(config.max_sessions) if config.max_sessions else None
        self._headers = {name: value.get_secret_value() for name, value in config.headers.items()}
        self._http: aiohttp.ClientSession | None = None
        self._tools: ToolSpecs = {}

    async def discover(self) -> ToolSpecs:
        """`step`, or the MCP tools of a server whose actions are tool calls. Raises UserError naming the cure."""
        schema = self.config.action_schema or await self._action_schema()
        if self.config.action_schema is None and schema.get("title") in _MCP_ACTIONS:
            self._tools = await self._list_tools()
        else:
            self._tools = {_TOOL: _spec(_TOOL, self.config.description, _without_metadata(schema))}
        return self._tools

    async def check(self) -> None:
        """The server accepts a connection within 5 s, or UserError names the cure."""
        if problem := await connection_problem(self.http_url):
            raise UserError(problem, where=_WHERE, cure="start the OpenEnv server, or correct the address")
        if not self._tools:
            await self.discover()

    async def open(self, item: Item, rollout_id: str) -> OpenEnvSession:
        """A session of its own, reset. Raises ToolError when the server refuses, NoProgressError when it stays away."""
        if not self._tools:
            await self.check()
        if self._slots:
            await self._slots.acquire()
        session = None
        try:
            session = OpenEnvSession(self, await self._connect(), item)
            await session.reset(self._reset_arguments(item, rollout_id))
            return session
        except BaseException:
            await (session.close() if session else self.release())
            raise

    async def close(self) -> None:
        await self.outages.close()
        if self._http is not None:
            await self._http.close()

    @property
    def tool_names(self) -> list[str]:
        return list(self._tools)

    @property
    def is_mcp(self) -> bool:
        return _TOOL not in self._tools  # a name that OpenEnv forbids for MCP tools

    async def release(self) -> None:
        """A session is gone."""
        if self._slots:
            self._slots.release()

    async def report(self) -> None:
        """A connection broke: if nothing listens there any more, all rollouts wait."""
        if await connection_problem(self.http_url) is not None:
            self.outages.report(safe_url(self.http_url), partial(connection_problem, self.http_url))

    def _reset_arguments(self, item: Item, rollout_id: str) -> dict[str, Any]:
        columns = {name: item.row[name] for name in self.config.reset_columns if name in item.row}
        seed = seed_of(item, rollout_id, self.config.seed)
        return {"seed": seed, "episode_id": rollout_id, **self.config.reset, **columns}

    def _client(self) -> aiohttp.ClientSession:
        """One for all sessions, made when used: it belongs to a running loop. Nothing travels between them."""
        import aiohttp

        if self._http is None:
            self._http = aiohttp.ClientSession(headers=self._headers, cookie_jar=aiohttp.DummyCookieJar())
        return self._http

    async def _connect(self) -> Connection:
        import aiohttp

        for _ in range(_MAX_OUTAGES):
            await self.outages.over(safe_url(self.http_url))
            try:
                async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                    socket = await self._client().ws_connect(f"{self.http_url}/ws", max_msg_size=_MAX_MESSAGE_BYTES)
                return Connection(socket, safe_url(self.http_url), self.config.timeout_s, self.report)
            except (aiohttp.ClientError, OSError) as error:  # TimeoutError is an OSError
                failure = ToolError(f"{safe_url(self.http_url)}: no session: {described(error)}")
                if isinstance(error, aiohttp.WSServerHandshakeError):
                    break  # it is up, and refuses
            await self.report()
        raise failure

    async def _action_schema(self) -> dict[str, Any]:
        import aiohttp

        where, cure = safe_url(self.http_url), "start the OpenEnv server, correct the address, or set action_schema"
        try:
            async with (
                asyncio.timeout(_CONNECT_TIMEOUT_S),
                self._client().get(f"{self.http_url}/schema", allow_redirects=False) as reply,
            ):
                status, text = reply.status, await reply.text()
        except (aiohttp.ClientError, OSError) as error:  # TimeoutError is an OSError
            raise UserError(f"{where}/schema: {described(error)}", where=_WHERE, cure=cure) from None
        try:
            schema = json.loads(text)["action"] if status == 200 else None
        except (ValueError, RecursionError, KeyError, TypeError):
            schema = None
        if not isinstance(schema, dict):
            problem = f"{where}/schema (HTTP {status}) does not say what an action is"
            raise UserError(problem, where=_WHERE, cure=cure)
        return schema

    async def _list_tools(self) -> ToolSpecs:
        connection = None
        try:
            connection = await self._connect()
            answer = await connection.ask({"type": "step", "data": {"type": "list_tools"}})
            tools = answer["observation"]["tools"]
            return {tool["name"]: _spec(tool["name"], tool["description"], tool["input_schema"]) for tool in tools}
        except (ToolError, ArgumentError, KeyError, TypeError) as error:
            cure = "set environment.action_schema when the server has no MCP tools"
            raise UserError(f"the server's tools cannot be listed: {error}", where=_WHERE, cure=cure) from error
        finally:
            if connection is not None:
                await connection.end()


class OpenEnvSession(Session):
    """One WebSocket connection: the server gives each an environment of its own."""

    def __init__(self, environment: OpenEnvEnvironment, connection: Connection, item: Item) -> None:
        self._environment, self._connection, self._item = environment, connection, item
        self._turn = asyncio.Lock()
        self._reward, self._num_steps = 0.0, 0
        self._last_reward: float | None = None
        self._state: dict[str, Any] = {}

    async def reset(self, arguments: dict[str, Any]) -> None:
        try:
            answer = await self._connection.ask({"type": "reset", "data": arguments})
        except ArgumentError as error:
            raise ToolError(f"{self._place}: reset was refused: {error}") from None
        self.is_over = answer.get("done") is True
        self.opening = clean(self._shown(answer.get("observation")))

    async def call(self, call: ToolCall) -> ToolResult:
        """One step. What the server finds wrong with the action is shown to the model."""
        started, is_error = time.monotonic(), False
        try:
            async with self._turn:
                if self.is_over:
                    raise ArgumentError("the episode is over")
                output, is_error = self._read(await self._connection.ask({"type": "step", "data": self._action(call)}))
        except ArgumentError as error:
            output, is_error = str(error), True
        return result_of(call, output, time.monotonic() - started, is_error)

    async def finish(self) -> None:
        """Ask for the environment's state; a server that has none to tell is no failure."""
        if self._connection.is_broken:
            return
        try:
            async with self._turn:
                self._state = facts(await self._connection.ask({"type": "state"}))
        except (ToolError, ArgumentError):
            self._state = {}

    def outcome(self) -> dict[str, Any]:
        """reward (the sum), last_reward, num_steps, done, state."""
        rewards = {"reward": self._reward, "last_reward": self._last_reward}
        return {**rewards, "num_steps": self._num_steps, "done": self.is_over, "state": self._state}

    async def close(self) -> None:
        try:
            await self._connection.end()
        finally:
            await self._environment.release()

    @property
    def _place(self) -> str:
        return safe_url(self._environment.http_url)

    def _action(self, call: ToolCall) -> dict[str, Any]:
        names = [name for name in self._environment.tool_names if name in self._item.tool_names]
        if call.name not in names:
            raise no_such_tool(call.name, names)
        arguments = arguments_of(call)
        if self._environment.is_mcp:
            return {"type": "call_tool", "tool_name": call.name, "arguments": arguments}
        return arguments

    def _read(self, answer: dict[str, Any]) -> tuple[str, bool]:
        """Note the reward and the ending; the observation as text, and whether it reports an error."""
        reward = answer.get("reward")
        if reward is not None:
            if not isinstance(reward, int | float) or reward != reward or abs(reward) == float("inf"):
                raise ToolError(f"{self._place}: the reward {reward!r} is not a finite number")
            self._last_reward = float(reward)
            self._reward += float(reward)
        self._num_steps += 1
        self.is_over = answer.get("done") is True
        observation = answer.get("observation")
        return tool_answer(observation) if self._environment.is_mcp else (self._shown(observation), False)

    def _shown(self, observation: Any) -> str:
        key = self._environment.config.observation_key
        if key is None:
            if isinstance(observation, dict):  # 0.10.0 sends metadata among the rest, 0.3.0 keeps it to itself
                observation = {name: value for name, value in observation.items() if name != "metadata"}
            return as_text(observation) if observation else ""
        if not isinstance(observation, dict) or key not in observation:
            problem = f"{self._place}: the observation has no {key}"
            raise ToolError(problem, cure=f"set environment.observation_key to one of: {_keys(observation)}")
        return as_text(observation[key])


def _spec(name: str, description: str, parameters: dict[str, Any]) -> dict[str, Any]:
    function = {"name": name, "description": description, "parameters": {"type": "object", **parameters}}
    return {"type": "function", "function": function}


def _without_metadata(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema without what says nothing to a model: the class's name, and the metadata every action may have."""
    properties = {name: part for name, part in schema.get("properties", {}).items() if name != "metadata"}
    kept = {key: value for key, value in schema.items() if key not in ("title", "description")}
    return {**kept, "properties": properties}


def _keys(observation: Any) -> str:
    return ", ".join(observation) if isinstance(observation, dict) else "none, it is not an object"
