"""The routes of models and chat completions."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from rft.server.inference.streams import event_stream, while_connected
from rft.server.services import CallerDep, ServicesDep

router = APIRouter(tags=["models"])


class ChatRequest(BaseModel):
    """A chat completion; further fields are checked by whoever answers it (request.py for local models)."""

    model_config = ConfigDict(extra="allow")

    model: str
    messages: list[dict[str, Any]] = Field(min_length=1)
    stream: bool | None = None


@router.get("/models")
async def list_models(services: ServicesDep, caller: CallerDep) -> dict[str, Any]:
    return {"object": "list", "data": services.models.every(caller.project)}


@router.get("/models/{name:path}")
async def retrieve_model(name: str, services: ServicesDep, caller: CallerDep) -> dict[str, Any]:
    return services.models.describe(name, caller.project)


@router.delete("/models/{name:path}")
async def delete_model(name: str, services: ServicesDep, caller: CallerDep) -> dict[str, Any]:
    services.models.remove_tuned(name, caller.project)
    return {"id": name, "object": "model", "deleted": True}


@router.post("/chat/completions", response_model=None)
async def create_chat_completion(
    body: ChatRequest, request: Request, services: ServicesDep, caller: CallerDep
) -> Response:
    target = services.models.target(body.model, caller.project)
    asked = body.model_dump(exclude_unset=True)
    answer = await while_connected(request, services.inference.chat(target, asked))
    return JSONResponse(answer) if isinstance(answer, dict) else event_stream(answer)
