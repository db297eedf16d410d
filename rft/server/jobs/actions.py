"""What can be asked of a job, by the API and by the page: cancel, pause, resume. Each returns the job as it is then.

Runs in the server's event loop, and asks only: the worker does it. Raises ApiError: 404 for a job that the project does
not have, 400 where it cannot be asked now (and not 409, which clients would send again).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rft.server.errors import ApiError
from rft.server.jobs.store import ENDED

if TYPE_CHECKING:
    from rft.server.services import Services


def cancel(services: Services, job_id: str, project: str) -> dict[str, Any]:
    """The job: cancelled, or still running until its process has ended."""
    _not_ended(services.jobs.get(job_id, project), "cancelled")
    services.worker.ask(job_id, "cancel")
    return services.jobs.get(job_id)


def pause(services: Services, job_id: str, project: str) -> dict[str, Any]:
    """The job: paused, or still running until the step it is in has ended and a snapshot is made."""
    job = services.jobs.get(job_id, project)
    _not_ended(job, "paused")
    if job["status"] == "validating_files":
        message = f"Job {job_id} is still validating its files; pause it when it is queued or running."
        raise ApiError(message, code="invalid_job_status")
    if job["status"] != "paused":
        services.worker.ask(job_id, "pause")
    return services.jobs.get(job_id)


def resume(services: Services, job_id: str, project: str) -> dict[str, Any]:
    """The job, queued again; it goes on from its snapshot."""
    job = services.jobs.get(job_id, project)
    _not_ended(job, "resumed")
    if job["status"] != "paused":
        message = f"Job {job_id} is {job['status']}; only a paused job can be resumed."
        raise ApiError(message, code="invalid_job_status")
    job = services.jobs.update(job_id, status="queued")
    services.jobs.add_event(job_id, "Fine-tuning job resumed, moving job to queued state")
    services.worker.wake()
    return job


def _not_ended(job: dict[str, Any], what: str) -> None:
    if job["status"] in ENDED:
        message = f"Job {job['id']} has already ended ({job['status']}) and cannot be {what}."
        raise ApiError(message, code="job_already_terminal")
