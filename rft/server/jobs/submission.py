"""Making a job: everything that can be known of a request is looked at before the job exists; then it takes its files.

A job keeps its own copies of its files (links, where the disk allows), so that deleting a file later changes nothing.
What the files hold is validation.py's question.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rft.errors import StorageError
from rft.files import storing
from rft.server.errors import ApiError
from rft.server.ids import new_id
from rft.server.jobs.bodies import JobBody
from rft.server.jobs.method import accept, wire_form
from rft.server.jobs.resolve import TRAIN, VALIDATION, JobRequest, run_tree, write_run_config
from rft.server.jobs.store import JOB
from rft.server.jobs.validation import end_failed
from rft.server.keys import Caller

if TYPE_CHECKING:
    from rft.server.services import Services

logger = logging.getLogger("rft.server")
_PURPOSE = "fine-tune"
_MAX_SEED = 2147483647


async def create_job(services: Services, caller: Caller, body: JobBody) -> dict[str, Any]:
    """The new job, its files on their way to be validated. Raises ApiError naming the field that is wrong."""
    _check_queue(services, caller.project)
    target = services.models.target(body.model, caller.project)
    method = await accept(body.method, services.outgoing)
    seed = body.seed if body.seed is not None else secrets.randbelow(_MAX_SEED + 1)
    request = JobRequest(body, method, target, caller.project, seed)
    run_tree(services, "ftjob-new", request)  # refused here, before anything exists
    sources = _sources(services, caller.project, body)
    job = services.jobs.add(_wire(services, request), caller.project)
    try:
        await asyncio.to_thread(_take, services.jobs.folder(job["id"]), sources)
        write_run_config(services, job["id"], request)
    except (StorageError, ApiError) as error:
        logger.error("job %s: %s", job["id"], error)
        return end_failed(services, job["id"], _error_of(error))
    services.validation.submit(job["id"])
    return services.jobs.get(job["id"])


def _check_queue(services: Services, project: str) -> None:
    """Raises ApiError (429) for a project with too many jobs that wait."""
    limit, num_waiting = services.config.limits.max_queued_jobs, 0
    for status in ("validating_files", "queued"):
        page = services.index.page(JOB, project=project, limit=limit, where={"$.status": status})
        num_waiting += len(page.data)
    if num_waiting >= limit:
        message = f"This project has {num_waiting} jobs that wait to run; cancel some, or try again when they have run."
        raise ApiError(message, status=429, code="too_many_queued_jobs")


def _sources(services: Services, project: str, body: JobBody) -> dict[str, Path]:
    """Where the files are now, by their place in the run folder. Raises ApiError."""
    given = {"training_file": (body.training_file, TRAIN), "validation_file": (body.validation_file, VALIDATION)}
    return {
        place: services.files.path(file_id, project, purpose=_PURPOSE, param=param)
        for param, (file_id, place) in given.items()
        if file_id is not None
    }


def _take(folder: Path, sources: dict[str, Path]) -> None:
    """The job's own copies. Raises ApiError when a file was deleted meanwhile, StorageError."""
    for place, source in sources.items():
        copy = folder / place
        with storing(folder):
            copy.parent.mkdir(mode=0o700, exist_ok=True)
            try:
                os.link(source, copy)
            except FileNotFoundError:
                raise ApiError("A file was deleted while the job was made.", code="file_not_found") from None
            except OSError:  # another disk, or one that knows no links
                shutil.copyfile(source, copy)


def _error_of(error: StorageError | ApiError) -> dict[str, Any]:
    if isinstance(error, ApiError):
        return {"code": error.code, "message": error.message, "param": error.param}
    message = "The server could not store the files of this job; ask its administrator to look at the disk."
    return {"code": "storage_error", "message": message, "param": None}


def _wire(services: Services, request: JobRequest) -> dict[str, Any]:
    """The job's object, but for what Jobs.add knows."""
    body, method = request.body, wire_form(request.method)
    is_reinforcement = body.method.type == "reinforcement"
    return {
        "model": body.model,
        "finished_at": None,
        "fine_tuned_model": None,
        "organization_id": services.config.organization,
        "result_files": [],
        "validation_file": body.validation_file,
        "training_file": body.training_file,
        "trained_tokens": None,
        "error": None,
        "user_provided_suffix": body.suffix,
        "seed": request.seed,
        "estimated_finish": None,
        "integrations": [part.model_dump(exclude_unset=True) for part in body.integrations or []],
        "method": method,
        "hyperparameters": method[body.method.type]["hyperparameters"],
        "metadata": body.metadata,
        "usage_metrics": None,
        "shared_with_openai": False,
        "eval_id": new_id("eval_") if is_reinforcement else None,
    }
