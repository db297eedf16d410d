"""The routes of eval runs and their items. The runs of a job's eval come from its run folder; nobody can write them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Literal, TypeVar

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict

from rft.redaction import redacted
from rft.server.errors import ApiError, not_found
from rft.server.evals.routes import Limit, Metadata
from rft.server.evals.runs import Assignment
from rft.server.evals.sources import question_of, rows_of, shown
from rft.server.evals.store import ITEM, RUN
from rft.server.index import Order, Page
from rft.server.json_bodies import SoundObject, SoundText
from rft.server.keys import Caller
from rft.server.services import CallerDep, Services, ServicesDep
from rft.store import RunStore

router = APIRouter(prefix="/evals", tags=["evals"])
T = TypeVar("T")
RunStatus = Literal["queued", "in_progress", "completed", "canceled", "failed"]
_STATUSES = {"passed": "pass", "failed": "fail"}  # as the SDK's documentation spells them, and as its type does


class RunCreate(BaseModel):
    """One run of an eval over data."""

    model_config = ConfigDict(extra="allow", hide_input_in_errors=True)

    name: SoundText | None = None
    metadata: Metadata | None = None
    data_source: SoundObject


@router.post("/{eval_id}/runs", status_code=201)
async def create_run(eval_id: str, request: RunCreate, services: ServicesDep, caller: CallerDep) -> dict[str, Any]:
    if services.evals.job_of(services.evals.get(eval_id, caller.project)) is not None:
        message = "The runs of a fine-tuning job's eval are its evaluations; create an eval of your own."
        raise ApiError(message, code="eval_not_writable", param="eval_id")
    question = question_of(request.data_source)
    if question is not None:
        services.models.target(question.model, caller.project)
    rows = await rows_of(services, request.data_source, caller.project)
    trees = services.evals.criteria(eval_id)
    body = {
        "name": request.name or "",
        "model": question.model if question is not None else "",
        "data_source": redacted(shown(request.data_source)),
        "metadata": request.metadata or {},
    }
    return services.eval_runs.start(services, eval_id, body, Assignment(rows, question, trees, caller.project))


@router.get("/{eval_id}/runs")
async def list_runs(
    eval_id: str,
    services: ServicesDep,
    caller: CallerDep,
    after: str | None = None,
    limit: Limit = 20,
    order: Order = "asc",
    status: RunStatus | None = None,
) -> dict[str, Any]:
    found = await _of_job(services, caller, eval_id, services.job_runs.every)
    if found is None:
        where = {"$.status": status} if status is not None else None
        return services.index.page(RUN, parent=eval_id, limit=limit, after=after, order=order, where=where).body()
    return _page_of(found, limit=limit, after=after, order=order, status=status).body()


@router.get("/{eval_id}/runs/{run_id}")
async def retrieve_run(eval_id: str, run_id: str, services: ServicesDep, caller: CallerDep) -> dict[str, Any]:
    if services.evals.job_of(services.evals.get(eval_id, caller.project)) is None:
        return _own_run(services, caller, eval_id, run_id)
    found = await _of_job(services, caller, eval_id, lambda store, job: services.job_runs.get(store, job, run_id))
    return _there(found, "eval run", run_id)


@router.post("/{eval_id}/runs/{run_id}")
@router.post("/{eval_id}/runs/{run_id}/cancel")
async def cancel_run(eval_id: str, run_id: str, services: ServicesDep, caller: CallerDep) -> dict[str, Any]:
    return services.eval_runs.cancel(_own_run(services, caller, eval_id, run_id))


@router.delete("/{eval_id}/runs/{run_id}")
async def delete_run(eval_id: str, run_id: str, services: ServicesDep, caller: CallerDep) -> dict[str, Any]:
    services.eval_runs.remove(_own_run(services, caller, eval_id, run_id))
    return {"object": "eval.run.deleted", "deleted": True, "run_id": run_id}


@router.get("/{eval_id}/runs/{run_id}/output_items")
async def list_items(
    eval_id: str,
    run_id: str,
    services: ServicesDep,
    caller: CallerDep,
    after: str | None = None,
    limit: Limit = 20,
    order: Order = "asc",
    status: Literal["pass", "fail", "passed", "failed", "error"] | None = None,
) -> dict[str, Any]:
    wanted = _STATUSES.get(status, status) if status is not None else None
    if services.evals.job_of(services.evals.get(eval_id, caller.project)) is None:
        _own_run(services, caller, eval_id, run_id)
        where = {"$.status": wanted} if wanted is not None else None
        return services.index.page(ITEM, parent=run_id, limit=limit, after=after, order=order, where=where).body()

    def page(store: RunStore, job: dict[str, Any]) -> Page | None:
        return services.job_runs.items(store, job, run_id, limit=limit, after=after, order=order, status=wanted)

    return _there(await _of_job(services, caller, eval_id, page), "eval run", run_id).body()


@router.get("/{eval_id}/runs/{run_id}/output_items/{item_id}")
async def retrieve_item(
    eval_id: str, run_id: str, item_id: str, services: ServicesDep, caller: CallerDep
) -> dict[str, Any]:
    if services.evals.job_of(services.evals.get(eval_id, caller.project)) is None:
        _own_run(services, caller, eval_id, run_id)
        found = services.index.get(ITEM, item_id, project=caller.project)
        return _there(found if found and found["run_id"] == run_id else None, "output item", item_id)
    found = await _of_job(
        services, caller, eval_id, lambda store, job: services.job_runs.item(store, job, run_id, item_id)
    )
    return _there(found, "output item", item_id)


async def _of_job(
    services: Services, caller: Caller, eval_id: str, read: Callable[[RunStore, dict[str, Any]], T]
) -> T | None:
    """What `read` finds in the run folder of a job's eval, off the event loop; None for an eval of a client."""
    job = services.evals.job_of(services.evals.get(eval_id, caller.project))
    if job is None:
        return None
    return await asyncio.to_thread(read, RunStore(services.jobs.folder(job["id"])), job)


def _own_run(services: Services, caller: Caller, eval_id: str, run_id: str) -> dict[str, Any]:
    """A run that a client started. Raises ApiError: 404, or 400 for one of a job."""
    if services.evals.job_of(services.evals.get(eval_id, caller.project)) is not None:
        message = "The runs of a fine-tuning job's eval are its evaluations: they cannot be changed."
        raise ApiError(message, code="eval_not_writable", param="eval_id")
    found = services.index.get(RUN, run_id, project=caller.project)
    return _there(found if found and found["eval_id"] == eval_id else None, "eval run", run_id)


def _there(found: T | None, kind: str, object_id: str) -> T:
    if found is None:
        raise not_found(kind, object_id)
    return found


def _page_of(found: list[dict[str, Any]], *, limit: int, after: str | None, order: Order, status: str | None) -> Page:
    """Of a short list, oldest first."""
    rest = [entry for entry in found if status in (None, entry["status"])]
    if order == "desc":
        rest.reverse()
    if after is not None:
        places = [place for place, entry in enumerate(rest) if entry["id"] == after]
        rest = rest[places[0] + 1 :] if places else []
    return Page(rest[:limit], len(rest) > limit)
