"""What becomes of a job when its run has ended: its status, its last events, its model and its result file.

Guarantees: status, events, names and the answered request are written together; doing it again after a server was
killed in the middle changes nothing twice. A run that fails after a checkpoint succeeds with it, and says so.
"""

from __future__ import annotations

import asyncio

from rft import checkpoints
from rft.errors import StorageError
from rft.server.errors import ApiError
from rft.server.models import checkpoint_name, tuned_name
from rft.server.work.endings import Ending, blackened
from rft.server.work.follower import shown
from rft.server.work.process import CONFIG
from rft.server.work.records import Json, Parts
from rft.store import RunStore

_RESULTS = "step_metrics.csv"


async def conclude(parts: Parts, job_id: str, ending: Ending) -> None:
    """Raises StorageError when the disk refuses; nothing has happened then."""
    message = blackened(ending.message, parts.jobs.folder(job_id) / CONFIG)
    step = last_step(parts, job_id)
    if ending.kind == "succeeded":
        await _succeed(parts, job_id)
    elif ending.kind == "paused":
        pause(parts, job_id, message)
    elif ending.kind == "cancelled":
        cancel(parts, job_id)
    elif step:
        await _succeed(parts, job_id, f"The training ended after step {step} of an error: {message}")
    else:
        fail(parts, job_id, {"code": ending.code, "message": message, "param": ending.param})


def last_step(parts: Parts, job_id: str) -> int:
    """Of the newest checkpoint; 0 without one."""
    found = checkpoints.latest(RunStore(parts.jobs.folder(job_id)).checkpoints)
    return checkpoints.step_of(found) if found is not None else 0


def pause(parts: Parts, job_id: str, why: str = "") -> None:
    """The job is paused; its newest checkpoint answers as the tuned model and under its own name."""
    jobs = parts.jobs
    job, step = jobs.get(job_id), last_step(parts, job_id)
    why = why or parts.works.get(job_id).why
    name = tuned_name(job, parts.config.organization)
    where = f"after step {step}; its snapshot is {checkpoint_name(name, step)}" if step else "before its first step"
    with jobs.index.transaction():
        if step:
            _name(parts, job, name, step)
        jobs.update(job_id, status="paused", fine_tuned_model=name if step else None, estimated_finish=None)
        text = f"Fine-tuning job paused {where}" + (f". Reason: {why}" if why else "")
        jobs.add_event(job_id, text, level="warn" if why else "info")
        parts.works.update(job_id, ask=None, why="", num_restarts=0, ran_s=0.0)


def cancel(parts: Parts, job_id: str) -> None:
    """The job is cancelled; its checkpoints stay, and can be called by their names."""
    jobs = parts.jobs
    with jobs.index.transaction():
        job = jobs.update(job_id, status="cancelled", estimated_finish=None)
        jobs.add_event(job_id, "Fine-tuning job cancelled")
        parts.works.update(job_id, ask=None)
        parts.seams.job_ended(job, jobs.project_of(job_id))


def fail(parts: Parts, job_id: str, error: Json) -> None:
    """The job has failed, and says why."""
    jobs = parts.jobs
    with jobs.index.transaction():
        job = jobs.update(job_id, status="failed", error=error, estimated_finish=None)
        jobs.add_event(job_id, error["message"], level="error", data={"code": error["code"], "param": error["param"]})
        parts.works.update(job_id, ask=None)
        parts.seams.job_ended(job, jobs.project_of(job_id))


async def _succeed(parts: Parts, job_id: str, warning: str | None = None) -> None:
    result_files = await _result_files(parts, job_id)
    jobs, step = parts.jobs, last_step(parts, job_id)
    job = jobs.get(job_id)
    name, status = tuned_name(job, parts.config.organization), job["status"]
    with jobs.index.transaction():
        if status == "queued":  # it ended before it said anything, as after a restart of the server
            jobs.update(job_id, status="running")
        if warning:
            jobs.add_event(job_id, f"{warning}\nThe job succeeds with its latest checkpoint.", level="warn")
        _name(parts, job, name, step)
        jobs.add_event(job_id, f"New fine-tuned model created: {name}")
        jobs.add_event(job_id, "The job has successfully completed")
        fields = {"fine_tuned_model": name, "result_files": result_files, "estimated_finish": None}
        job = jobs.update(job_id, status="succeeded", **fields)
        parts.works.update(job_id, ask=None)
        parts.seams.job_ended(job, jobs.project_of(job_id))


def _name(parts: Parts, job: Json, name: str, step: int) -> None:
    project = parts.jobs.project_of(job["id"])
    parts.models.add_tuned(job, name, step=None, project=project)
    if step:
        parts.models.add_tuned(job, checkpoint_name(name, step), step=step, project=project)


async def _result_files(parts: Parts, job_id: str) -> list[str]:
    """The job's CSV among the project's files; made once."""
    work, job = parts.works.get(job_id), parts.jobs.get(job_id)
    if work.result_file is not None:
        return [work.result_file]
    store = RunStore(parts.jobs.folder(job_id))
    text = await asyncio.to_thread(shown, lambda: parts.seams.result_csv(store, job))
    if text is None:
        return []
    try:
        file = parts.seams.add_file(text.encode(), _RESULTS, "fine-tune-results", parts.jobs.project_of(job_id))
    except ApiError as error:
        raise StorageError(error.message) from error
    parts.works.update(job_id, result_file=file["id"])
    return [file["id"]]
