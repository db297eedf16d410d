"""The routes of `fine_tuning.jobs`: create, retrieve, list, cancel, pause, resume, events, checkpoints."""

from __future__ import annotations

import asyncio
import re
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from rft.server.errors import ApiError
from rft.server.index import Page
from rft.server.jobs import actions
from rft.server.jobs.bodies import JobBody
from rft.server.jobs.store import JOB
from rft.server.jobs.submission import create_job
from rft.server.services import CallerDep, Services, ServicesDep
from rft.server.views.checkpoints import checkpoint_objects
from rft.store import RunStore

router = APIRouter(prefix="/fine_tuning/jobs", tags=["Fine-tuning"])
Limit = Annotated[int, Query(ge=1, le=1000)]
After = Annotated[str | None, Query(max_length=256)]
_FILTER = re.compile(r"metadata\[(.*)\]", re.DOTALL)
_PLAIN_KEY = re.compile(r'[^"\\\x00-\x1f\x7f-\U0010ffff]+')  # what SQLite's paths can name


@router.post("")
async def create(body: JobBody, services: ServicesDep, caller: CallerDep) -> dict[str, Any]:
    return await create_job(services, caller, body)


@router.get("")
async def list_jobs(
    request: Request, services: ServicesDep, caller: CallerDep, limit: Limit = 20, after: After = None
) -> dict[str, Any]:
    """Newest first. `metadata[k]=v` keeps the jobs with that value, `metadata=null` those without metadata."""
    wanted = _metadata_filter(request)
    if wanted and not all(_PLAIN_KEY.fullmatch(key) for key in wanted):
        return _matching(services, caller.project, wanted, limit, after).body()
    where: dict[str, str | None] | None = {"$.metadata": None} if wanted is None else None
    if wanted:
        where = {f'$.metadata."{key}"': value for key, value in wanted.items()}
    return services.index.page(JOB, project=caller.project, limit=limit, after=after, where=where).body()


@router.get("/{job_id}")
async def retrieve(job_id: str, services: ServicesDep, caller: CallerDep) -> dict[str, Any]:
    return services.jobs.get(job_id, caller.project)


@router.post("/{job_id}/cancel")
async def cancel(job_id: str, services: ServicesDep, caller: CallerDep) -> dict[str, Any]:
    """The job: cancelled, or still running until its process has ended."""
    return actions.cancel(services, job_id, caller.project)


@router.post("/{job_id}/pause")
async def pause(job_id: str, services: ServicesDep, caller: CallerDep) -> dict[str, Any]:
    """The job: paused, or still running until the step it is in has ended and a snapshot is made."""
    return actions.pause(services, job_id, caller.project)


@router.post("/{job_id}/resume")
async def resume(job_id: str, services: ServicesDep, caller: CallerDep) -> dict[str, Any]:
    """The job, queued again; it goes on from its snapshot."""
    return actions.resume(services, job_id, caller.project)


@router.get("/{job_id}/events")
async def list_events(
    job_id: str, services: ServicesDep, caller: CallerDep, limit: Limit = 20, after: After = None
) -> dict[str, Any]:
    """Newest first."""
    services.jobs.get(job_id, caller.project)
    return services.jobs.events(job_id, limit=limit, after=after).body()


@router.get("/{job_id}/checkpoints")
async def list_checkpoints(
    job_id: str, services: ServicesDep, caller: CallerDep, limit: Limit = 10, after: After = None
) -> dict[str, Any]:
    """The highest step first."""
    job = services.jobs.get(job_id, caller.project)
    found = await asyncio.to_thread(_checkpoints, services, job)
    return page_of(found, limit, after).body()


def page_of(objects: list[dict[str, Any]], limit: int, after: str | None) -> Page:
    """A page of a list that is short enough to be made whole. An unknown `after` gives nothing."""
    start = 0
    if after is not None:
        places = [index for index, found in enumerate(objects) if found["id"] == after]
        start = places[0] + 1 if places else len(objects)
    return Page(objects[start : start + limit], len(objects) > start + limit)


def _checkpoints(services: Services, job: dict[str, Any]) -> list[dict[str, Any]]:
    folder = services.jobs.folder(job["id"])
    if not (folder / "config.json").is_file():
        return []  # it has not run yet
    return checkpoint_objects(RunStore.open(folder), job, services.config.organization)


def _metadata_filter(request: Request) -> dict[str, str] | None:
    """Wanted values by key; None for jobs without metadata. Raises ApiError for another form."""
    wanted: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        match = _FILTER.fullmatch(name)
        if match:
            wanted[match[1]] = value
        elif name == "metadata":
            if value != "null":
                raise ApiError("Write metadata[key]=value, or metadata=null.", code="invalid_value", param="metadata")
            return None
    return wanted


def _matching(services: Services, project: str, wanted: dict[str, str], limit: int, after: str | None) -> Page:
    """As the index filters, for keys that it cannot name: page by page, in here."""
    found: list[dict[str, Any]] = []
    more = True
    while more and len(found) <= limit:
        page = services.index.page(JOB, project=project, limit=1000, after=after)
        found += [job for job in page.data if wanted.items() <= (job["metadata"] or {}).items()]
        more, after = page.has_more, page.data[-1]["id"] if page.data else None
    return Page(found[:limit], len(found) > limit)
