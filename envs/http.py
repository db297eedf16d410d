"""The HTTP environment: every tool call is a POST to the tool's URL, as hosted Agent RFT sends it.

Guarantees: the model sees answers and 4xx; a server's failure (5xx, transport, timeout, an answer without `output`)
is retried with the same call id and then raised as `ToolError`. Header values never appear in a text.
Does not start servers: with `serve` the run does, and sets `base_url`.
"""

from __future__ import annotations

import asyncio
import json
from functools import partial
from typing import Any, Literal
from urllib.parse import urljoin, urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from rft.envs.base import Session, ToolSpecs
from rft.envs.outage import Outages
from rft.envs.tasks import load_task
from rft.errors import ToolError, UserError
from rft.types import Item, ToolCall, ToolResult
from rft.wire import (
    MAX_BODY_BYTES,
    Client,
    Reply,
    RetryPolicy,
    WireError,
    connection_problem,
    post_json,
    rate_limiter,
    safe_url,
)

_MAX_OUTAGES = 20  # that one call waits for


def check_headers(headers: dict[str, SecretStr]) -> dict[str, SecretStr]:
    """The headers as they are; ValueError when HTTP cannot send one."""
    for name, value in headers.items():
        if not (name + value.get_secret_value()).isprintable() or not name.isascii():
            raise ValueError(f"header {name!r} contains characters that HTTP cannot send")
    return headers


class HttpToolConfig(BaseModel):
    """One tool and its endpoint; several tools may share a URL. `headers` are sent as they are and never shown."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    name: str = Field(min_length=1)
    server_url: str = Field(min_length=1)
    headers: dict[str, SecretStr] = Field(default_factory=dict)
    timeout_s: float = Field(default=600.0, gt=0, description="per attempt")
    max_attempts: int = Field(default=4, ge=1, description="the first and its retries")
    rate_limit: float | None = Field(default=None, gt=0, description="requests per second, retries included")
    function: dict[str, Any] | None = Field(default=None, description="its entry in `tools` for rows that have none")
    extra: dict[str, Any] = Field(default_factory=dict, description="further keys of every request")

    _sendable = field_validator("headers")(check_headers)


class HttpEnvironmentConfig(BaseModel):
    """Tools behind URLs. With `serve` the run serves a Python task itself, for as long as it lasts.

    Then a `server_url` may be a path like `/search_codes`, and without `tools` all tools of the task are used.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    type: Literal["http"] = "http"
    serve: str | None = None
    tools: tuple[HttpToolConfig, ...] = ()
    max_connections: int = Field(default=1024, ge=1, description="calls in flight at once; the others wait")
    outage_limit_s: float = Field(default=600.0, gt=0, description="how long a server may be down before the run ends")

    @model_validator(mode="after")
    def _coherent(self) -> HttpEnvironmentConfig:
        names = [tool.name for tool in self.tools]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"tools: {', '.join(repeated)} appears twice")
        if not self.tools and self.serve is None:
            raise ValueError("tools: at least one is needed, or `serve` with the name of a task")
        for tool in self.tools:
            if not is_absolute(tool.server_url) and not (self.serve and tool.server_url.startswith("/")):
                raise ValueError(f"tools: the server_url of {tool.name} must start with http:// or https://")
        return self


def is_absolute(url: str) -> bool:
    """Whether it is a complete http or https URL."""
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:  # a port that is no number
        return False


class HttpEnvironment:
    """Serves any number of rollouts through one connection pool; `base_url` completes URLs that are paths."""

    def __init__(
        self, config: HttpEnvironmentConfig, base_url: str | None = None, retry: RetryPolicy | None = None
    ) -> None:
        self.config, self.base_url = config, base_url
        self.outages = Outages(config.outage_limit_s)
        self._retry = retry or RetryPolicy()
        tools = config.tools or _tools_of(config.serve or "")
        self._tools = {tool.name: tool for tool in tools}
        self._rates = {tool.name: rate_limiter(tool.rate_limit) for tool in tools}
        self._http = Client(max_connections=config.max_connections)

    async def discover(self) -> ToolSpecs:
        """The configured names, with the specs that the config or a task that the run serves knows."""
        specs = load_task(self.config.serve).specs if self.config.serve else {}
        return {name: tool.function or specs.get(name) for name, tool in self._tools.items()}

    async def check(self) -> None:
        """Every host and port accepts a connection within 5 s, or UserError names tool, URL and cure."""
        places: dict[str, HttpToolConfig] = {}
        for tool in self._tools.values():
            places.setdefault(urlsplit(self._url(tool)).netloc, tool)
        await asyncio.gather(*(self._connect(tool) for tool in places.values()))

    async def open(self, item: Item, rollout_id: str) -> HttpSession:
        return HttpSession(self, item, rollout_id)

    async def close(self) -> None:
        await self.outages.close()
        await self._http.close()

    async def post(self, tool: HttpToolConfig, call_id: str, body: bytes) -> Reply:
        """Send one call; the same again, once the server is back, when it cannot be reached any more.

        Raises ToolError when the server failed for good, NoProgressError when it stays away too long.
        """
        url = self._url(tool)
        for _ in range(_MAX_OUTAGES):
            await self.outages.over(safe_url(url))
            num_outages = self.outages.num_reported
            try:
                return await self._send(tool, call_id, body)
            except WireError as error:
                failure, was_unreachable = ToolError(f"tool {tool.name}: {error.problem}"), error.is_unreachable
            # whatever the last attempt met: a server that is gone, or cut off, in the middle of a call gives no answer
            if await connection_problem(url) is not None:
                self.outages.report(safe_url(url), partial(connection_problem, url))
            elif not was_unreachable and self.outages.num_reported == num_outages:  # else it came back while we gave up
                break
        raise failure

    async def _send(self, tool: HttpToolConfig, call_id: str, body: bytes) -> Reply:
        """One call with its retries. Raises WireError when all failed."""
        retry = RetryPolicy(tool.max_attempts, self._retry.first_wait_s, self._retry.max_wait_s)
        headers = {name: value.get_secret_value() for name, value in tool.headers.items()}
        reply = await post_json(
            self._http,
            self._url(tool),
            body,
            headers=headers,
            timeout_s=tool.timeout_s,
            retry=retry,
            problem_of=partial(problem_of, call_id),
            before_attempt=self._rates[tool.name],
        )
        if 300 <= reply.status < 400:
            where = safe_url(self._url(tool))
            cure = "set server_url to the final address; redirects are not followed"
            raise ToolError(f"tool {tool.name}: {where} answered with a redirect (HTTP {reply.status})", cure=cure)
        return reply

    def tool(self, name: str) -> HttpToolConfig | None:
        return self._tools.get(name)

    def _url(self, tool: HttpToolConfig) -> str:
        if is_absolute(tool.server_url):
            return tool.server_url
        if self.base_url is None:
            raise RuntimeError(f"tool {tool.name}: base_url must be set before a task that the run serves is used")
        return urljoin(self.base_url, tool.server_url)

    async def _connect(self, tool: HttpToolConfig) -> None:
        problem = await connection_problem(self._url(tool))
        if problem:
            raise UserError(
                f"tool {tool.name}: {problem}",
                where="environment.tools",
                cure=f"start it, e.g. `rft tools icd10 --port {urlsplit(self._url(tool)).port}`, or correct server_url",
            )


class HttpSession(Session):
    """The tools of one rollout; calls may run at once."""

    def __init__(self, environment: HttpEnvironment, item: Item, rollout_id: str) -> None:
        self._environment, self._item, self._rollout_id = environment, item, rollout_id

    async def call(self, call: ToolCall) -> ToolResult:
        """The server's answer as the model sees it; raises ToolError when the rollout must be discarded."""
        tool = self._environment.tool(call.name)
        if tool is None or call.name not in self._item.tool_names:
            names = ", ".join(self._item.tool_names)
            return ToolResult(
                call_id=call.call_id, output=f"there is no tool {call.name}; the tools are: {names}", is_error=True
            )
        body = json.dumps({**tool.extra, **self._request(call)}, ensure_ascii=False).encode("utf-8", errors="replace")
        if len(body) > MAX_BODY_BYTES:
            return ToolResult(call_id=call.call_id, output=too_large("request", call.name), is_error=True)
        reply = await self._environment.post(tool, call.call_id, body)
        output, is_error = read_reply(reply, call.name)
        return ToolResult(
            call_id=call.call_id,
            output=output,
            is_error=is_error,
            latency_s=reply.latency_s,
            num_attempts=reply.num_attempts,
        )

    async def close(self) -> None:
        """Nothing to release: connections belong to the environment."""

    def _request(self, call: ToolCall) -> dict[str, Any]:
        return {
            "type": "function_call",
            "id": call.id,
            "call_id": call.call_id,
            "name": call.name,
            "arguments": call.arguments,
            "trace_id": self._rollout_id,
            "item": self._item.row,
        }


def _tools_of(task_name: str) -> tuple[HttpToolConfig, ...]:
    names = [tool.name for tool in load_task(task_name).tools]
    return tuple(HttpToolConfig(name=name, server_url=f"/{name}") for name in names)


def too_large(what: str, name: str) -> str:
    return f"413: the {what} of {name} is larger than {MAX_BODY_BYTES:,} bytes"


def _output_of(reply: Reply) -> str | None:
    payload = reply.json()
    output = payload.get("output") if isinstance(payload, dict) else None
    if not isinstance(output, str):
        return None
    return output.encode("utf-8", errors="replace").decode()  # half a surrogate pair could not be written anywhere


def problem_of(call_id: str, reply: Reply) -> str | None:
    """Why a success is none: only a string `output` is an answer, and not one that says it belongs to another call."""
    if reply.is_too_large or not 200 <= reply.status < 300:
        return None
    if _output_of(reply) is None:
        kind = "is not JSON" if reply.json() is None else 'has no string "output"'
        return f"the answer (HTTP {reply.status}) {kind}"
    if reply.json().get("call_id", call_id) not in (call_id, None):
        return f"the answer (HTTP {reply.status}) is to another call (its call_id is not the one that was sent)"
    return None


def read_reply(reply: Reply, name: str) -> tuple[str, bool]:
    """What the model sees of a reply, and whether it is an error: 4xx payloads are shown as they came."""
    if reply.is_too_large:
        return too_large("answer", name), True
    is_error = reply.status >= 400
    output = _output_of(reply)
    if output is None:
        output = reply.text.strip() or f"HTTP {reply.status}"
    return output, is_error
