"""The routes of evals themselves; those of their runs are in eval_run_routes.py."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field

from rft.server.errors import ApiError
from rft.server.grading.judging import contract_form, grader_tools, wire_grader
from rft.server.index import Order
from rft.server.json_bodies import SoundJson, SoundObject, SoundText
from rft.server.services import CallerDep, ServicesDep

router = APIRouter(prefix="/evals", tags=["evals"])
Limit = Annotated[int, Query(ge=1, le=100)]
Metadata = Annotated[
    dict[Annotated[SoundText, Field(max_length=64)], Annotated[SoundText, Field(max_length=512)]], Field(max_length=16)
]


class EvalCreate(BaseModel):
    """Graders, and what the data they grade looks like."""

    model_config = ConfigDict(extra="allow", hide_input_in_errors=True)

    name: SoundText | None = None
    metadata: Metadata | None = None
    data_source_config: SoundObject
    testing_criteria: list[SoundJson] = Field(min_length=1, max_length=64)


class EvalUpdate(BaseModel):
    """What may change of an eval."""

    model_config = ConfigDict(extra="allow")

    name: SoundText | None = None
    metadata: Metadata | None = None


@router.post("", status_code=201)
async def create_eval(request: EvalCreate, services: ServicesDep, caller: CallerDep) -> dict[str, Any]:
    trees: list[dict[str, Any]] = []
    for index, tree in enumerate(request.testing_criteria):
        spec = await asyncio.to_thread(wire_grader, services, tree, f"testing_criteria.{index}")
        grader_tools(services, spec, caller.project)  # unknown models are refused now, not in every run
        trees.append({**contract_form(tree, spec), "name": _free(spec.name, trees)})
    body = {
        "name": request.name or "",
        "data_source_config": _data_source_config(request.data_source_config),
        "metadata": request.metadata or {},
    }
    return services.evals.add(body, trees, caller.project)


@router.get("")
async def list_evals(
    services: ServicesDep,
    caller: CallerDep,
    after: str | None = None,
    limit: Limit = 20,
    order: Order = "asc",
    order_by: Literal["created_at"] = "created_at",
) -> dict[str, Any]:
    return services.evals.page(caller.project, limit=limit, after=after, order=order).body()


@router.get("/{eval_id}")
async def retrieve_eval(eval_id: str, services: ServicesDep, caller: CallerDep) -> dict[str, Any]:
    return services.evals.get(eval_id, caller.project)


@router.post("/{eval_id}")
async def update_eval(eval_id: str, request: EvalUpdate, services: ServicesDep, caller: CallerDep) -> dict[str, Any]:
    fields = request.model_dump(include={"name", "metadata"}, exclude_none=True)
    return services.evals.update(eval_id, caller.project, **fields)


@router.delete("/{eval_id}")
async def delete_eval(eval_id: str, services: ServicesDep, caller: CallerDep) -> dict[str, Any]:
    services.evals.remove(eval_id, caller.project)
    services.eval_runs.remove_all(eval_id)
    return {"object": "eval.deleted", "deleted": True, "eval_id": eval_id}


def _free(name: str, taken: list[dict[str, Any]]) -> str:
    """The name, or with a number behind it where a grader before has it: results are told apart by it."""
    names, number, free = {tree["name"] for tree in taken}, 1, name
    while free in names:
        number += 1
        free = f"{name}-{number}"
    return free


def _data_source_config(given: dict[str, Any]) -> dict[str, Any]:
    """As the wire gives it back. Raises ApiError (400)."""
    kind = given.get("type")
    if kind in ("logs", "stored_completions"):
        return {**given, "schema": {"type": "object", "properties": {}}}
    schema = given.get("item_schema")
    if kind != "custom" or not isinstance(schema, dict):
        message = "data_source_config is of type custom (with item_schema), logs or stored_completions."
        raise ApiError(message, code="invalid_value", param="data_source_config")
    properties = {"item": schema} | ({"sample": {"type": "object"}} if given.get("include_sample_schema") else {})
    return {"type": "custom", "schema": {"type": "object", "properties": properties, "required": ["item"]}}
