"""The routes of responses: created through chat completions, kept, read again."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response

from rft.server.errors import ApiError
from rft.server.ids import new_id
from rft.server.inference import sse
from rft.server.inference.response_objects import finished, output_items, response_body
from rft.server.inference.response_request import ResponseRequest
from rft.server.inference.responses import chat_body
from rft.server.inference.service import check
from rft.server.inference.streaming import ResponseEvents
from rft.server.inference.streams import event_stream, while_connected
from rft.server.keys import Caller
from rft.server.services import CallerDep, Services, ServicesDep
from rft.server.settings import RemoteModel

router = APIRouter(tags=["responses"])


@router.post("/responses", response_model=None)
async def create_response(
    body: ResponseRequest, request: Request, services: ServicesDep, caller: CallerDep
) -> Response:
    target = services.models.target(body.model, caller.project)
    history = services.responses.history(body.previous_response_id, caller.project)
    asked = chat_body(body, history, is_local=not isinstance(target.base, RemoteModel))
    check(target, asked)
    if body.stream:
        chunks = await while_connected(request, services.inference.stream(target, asked))
        return event_stream(_events(body, chunks, services, caller))
    created_at = int(time.time())
    answer = await while_connected(request, services.inference.chat(target, asked))
    assert isinstance(answer, dict)
    try:
        choice = answer["choices"][0]
        is_cut = choice.get("finish_reason") == "length"
        output = output_items(body, choice["message"], is_cut=is_cut)
    except (LookupError, TypeError, AttributeError):
        message = f"The model {body.model} did not answer with a chat completion."
        raise ApiError(message, status=503, code="server_error") from None
    start = response_body(body, new_id("resp_"), created_at)
    response = finished(start, output, choice.get("finish_reason"), answer.get("usage"))
    _keep(body, response, services, caller)
    return JSONResponse(response)


@router.get("/responses/{response_id}", response_model=None)
async def retrieve_response(
    response_id: str, services: ServicesDep, caller: CallerDep, stream: bool = False
) -> dict[str, Any]:
    if stream:
        message = "Responses are streamed only while they are made: use stream with POST /responses."
        raise ApiError(message, code="unsupported_value", param="stream")
    return services.responses.get(response_id, caller.project)


@router.delete("/responses/{response_id}")
async def delete_response(response_id: str, services: ServicesDep, caller: CallerDep) -> dict[str, Any]:
    services.responses.delete(response_id, caller.project)
    return {"id": response_id, "object": "response", "deleted": True}


@router.get("/responses/{response_id}/input_items")
async def list_input_items(
    response_id: str,
    services: ServicesDep,
    caller: CallerDep,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: str | None = None,
    order: Literal["asc", "desc"] = "desc",
) -> dict[str, Any]:
    page = services.responses.input_items(response_id, caller.project, limit=limit, after=after, order=order)
    return page.body()


@router.post("/responses/{response_id}/cancel")
async def cancel_response(response_id: str, services: ServicesDep, caller: CallerDep) -> dict[str, Any]:
    services.responses.get(response_id, caller.project)
    raise ApiError("Cannot cancel a synchronous response.", code="invalid_request", param="response_id")


async def _events(
    body: ResponseRequest, chunks: AsyncGenerator[bytes], services: Services, caller: Caller
) -> AsyncGenerator[bytes]:
    """The events of a response; it is kept before its last one is sent."""
    making = ResponseEvents(body)
    for event in making.begin():
        yield event
    try:
        async with aclosing(chunks):
            async for chunk in sse.payloads(chunks):
                for event in making.feed(chunk):
                    yield event
        last = list(making.end())
        _keep(body, making.response, services, caller)
    except (ApiError, ValueError) as error:  # ValueError: an upstream that streams something else
        problem = error if isinstance(error, ApiError) else ApiError("The model's answer cannot be read.", status=500)
        last = list(making.fail(problem))
    for event in last:
        yield event


def _keep(body: ResponseRequest, response: dict[str, Any], services: Services, caller: Caller) -> None:
    if body.store is not False:
        services.responses.add(response, body.items, caller.project)
