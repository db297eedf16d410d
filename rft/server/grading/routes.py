"""The alpha routes of fine-tuning: try a grader, try a tool, before a job uses them. Nothing is stored."""

from __future__ import annotations

import asyncio
import json
import secrets
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator

from rft.envs.http import check_headers, is_absolute, problem_of, read_reply, too_large
from rft.graders.run import run
from rft.redaction import redacted
from rft.server.errors import ApiError
from rft.server.grading.judging import contract_form, grader_tools, wire_grader
from rft.server.ids import new_id
from rft.server.json_bodies import SoundJson, SoundObject, SoundText, cleaned
from rft.server.services import CallerDep, Services, ServicesDep
from rft.wire import MAX_BODY_BYTES, Client, Reply, RetryPolicy, WireError, post_json, safe_url

router = APIRouter(prefix="/fine_tuning/alpha", tags=["fine-tuning"])
_TOOL_TIMEOUT_S = 600.0
_TOOL_ATTEMPTS = 4  # the first and three more, as in a rollout


class ValidateRequest(BaseModel):
    """A grader of any type."""

    model_config = ConfigDict(extra="allow", hide_input_in_errors=True)

    grader: SoundJson


class RunRequest(BaseModel):
    """A grader, the answer it is to grade, and the dataset row."""

    model_config = ConfigDict(extra="allow", hide_input_in_errors=True)

    grader: SoundJson
    model_sample: SoundText
    item: SoundObject = Field(default_factory=dict)
    trace_id: SoundText | None = None


class ToolRequest(BaseModel):
    """A call as a rollout would make it; keys that are not named here travel with it."""

    model_config = ConfigDict(extra="allow", hide_input_in_errors=True)

    type: str = "function_call"
    name: str = Field(min_length=1)
    server_url: str
    headers: dict[str, SecretStr] | None = None
    arguments: str | dict[str, Any] = "{}"
    item: dict[str, Any] | None = None
    trace_id: str | None = None
    id: str | None = None
    call_id: str | None = None

    @field_validator("server_url")
    @classmethod
    def _is_complete(cls, url: str) -> str:
        if not is_absolute(url):
            raise ValueError("must be a complete http or https URL")
        return url

    @field_validator("headers")
    @classmethod
    def _are_sendable(cls, headers: dict[str, SecretStr] | None) -> dict[str, SecretStr] | None:
        return check_headers(headers) if headers else headers


@router.post("/graders/validate")
async def validate_grader(request: ValidateRequest, services: ServicesDep) -> dict[str, Any]:
    """The grader, with a name where it had none; header values are not echoed."""
    spec = await asyncio.to_thread(wire_grader, services, request.grader, "grader")
    return {"grader": redacted(contract_form(request.grader, spec))}


@router.post("/graders/run")
async def run_grader(request: RunRequest, services: ServicesDep, caller: CallerDep) -> dict[str, Any]:
    """One grade. A grader that fails is an answer with its error flag set, not an error."""
    spec = await asyncio.to_thread(wire_grader, services, request.grader, "grader")
    tools = grader_tools(services, spec, caller.project)
    try:
        return await run(spec, request.item, request.model_sample, tools, request.trace_id or new_trace_id())
    finally:
        await tools.judges.close()


@router.post("/tool/run")
async def run_tool(request: ToolRequest, services: ServicesDep) -> dict[str, Any]:
    """The tool's own answer, or `{"result": {"output": ...}}` with what the model would see of an error."""
    return await _run_tool(request, services)


def new_trace_id() -> str:
    return "trace_" + secrets.token_hex(16)


async def _run_tool(request: ToolRequest, services: Services) -> dict[str, Any]:
    await asyncio.to_thread(services.outgoing.check, request.server_url, "server_url")
    call = _call(request)
    body = json.dumps(call, ensure_ascii=False).encode("utf-8", errors="replace")
    if len(body) > MAX_BODY_BYTES:
        return {"result": {"output": too_large("request", request.name)}}
    reply = await _post(request, body, call["call_id"])
    answer = reply.json()
    if reply.status < 300 and not reply.is_too_large and isinstance(answer, dict):
        shown: dict[str, Any] = cleaned(answer)
        return shown
    output, _ = read_reply(reply, request.name)
    return {"result": {"output": cleaned(output)}}


def _call(request: ToolRequest) -> dict[str, Any]:
    arguments = request.arguments if isinstance(request.arguments, str) else json.dumps(request.arguments)
    return {
        **(request.model_extra or {}),
        "type": "function_call",
        "id": request.id or new_id("fc_"),
        "call_id": request.call_id or new_id("call_"),
        "name": request.name,
        "arguments": arguments,
        "trace_id": request.trace_id or new_trace_id(),
        "item": request.item or {},
    }


async def _post(request: ToolRequest, body: bytes, call_id: str) -> Reply:
    """Raises ApiError (400, which no client repeats) for what would discard a rollout."""
    http = Client(max_connections=1)
    try:
        reply = await post_json(
            http,
            request.server_url,
            body,
            headers={name: value.get_secret_value() for name, value in (request.headers or {}).items()},
            timeout_s=_TOOL_TIMEOUT_S,
            retry=RetryPolicy(_TOOL_ATTEMPTS),
            problem_of=lambda reply: problem_of(call_id, reply),
        )
    except WireError as error:
        code = "tool_endpoint_unreachable" if error.is_unreachable else "tool_endpoint_failed"
        raise ApiError(f"tool {request.name}: {error.problem}", code=code, param="server_url") from None
    finally:
        await http.close()
    if 300 <= reply.status < 400:
        message = f"tool {request.name}: {safe_url(request.server_url)} answered with a redirect (HTTP {reply.status})"
        raise ApiError(message + "; redirects are not followed", code="tool_endpoint_failed", param="server_url")
    return reply
