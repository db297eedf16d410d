"""Jobs as the wire shows them: the object, its status, its events. The run folder of a job has the job's own id.

Guarantees: every change is in the index and in `job.json` of the run folder before the call returns, so that a lost
index is made again from the folders; a status only moves along `TRANSITIONS`. Runs nothing: that is the worker's.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Literal

from rft.files import read_json, replace
from rft.server.errors import ApiError
from rft.server.ids import new_id
from rft.server.index import Index, Page

Status = Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
Level = Literal["info", "warn", "error"]
TRANSITIONS: dict[Status, frozenset[Status]] = {
    "validating_files": frozenset({"queued", "failed", "cancelled"}),
    "queued": frozenset({"running", "paused", "failed", "cancelled"}),
    "running": frozenset({"queued", "paused", "succeeded", "failed", "cancelled"}),  # queued: its server went away
    "paused": frozenset({"queued", "cancelled"}),
    "succeeded": frozenset(),
    "failed": frozenset(),
    "cancelled": frozenset(),
}
ENDED = frozenset(status for status, later in TRANSITIONS.items() if not later)
JOB, EVENT = "job", "event"  # kinds in the index
_JOB_FILE = "job.json"


class Jobs:
    """The jobs of a data folder. One thread: the server's event loop."""

    def __init__(self, index: Index, runs: Path) -> None:
        self.index, self.runs = index, runs
        runs.mkdir(mode=0o700, parents=True, exist_ok=True)

    def folder(self, job_id: str) -> Path:
        """The job's run folder. Ids are ours, never a client's text: read the job first."""
        return self.runs / job_id

    def add(self, body: dict[str, Any], project: str) -> dict[str, Any]:
        """A new job from its complete wire object without `id`, `created_at` and `status`; with its first event."""
        job = {"id": new_id("ftjob-"), "object": "fine_tuning.job", "created_at": int(time.time()), **body}
        job["status"] = "validating_files"
        self.folder(job["id"]).mkdir(mode=0o700)
        self._write(job, project)
        self.add_event(job["id"], f"Created fine-tuning job: {job['id']}", data={})
        return job

    def get(self, job_id: str, project: str | None = None) -> dict[str, Any]:
        """Raises ApiError (404) when there is none, or none in that project (None: any)."""
        job = self.index.get(JOB, job_id, project=project)
        if job is None:
            message = f"Could not find fine tune: {job_id}"
            raise ApiError(message, status=404, code="fine_tune_not_found", param="fine_tuning_job_id")
        return job

    def project_of(self, job_id: str) -> str:
        return self.index.project_of(JOB, job_id) or ""

    def with_status(self, *statuses: Status) -> list[dict[str, Any]]:
        """Of every project, oldest first; those of one status in order of making, whatever the clock did."""
        found = (self.index.page(JOB, limit=2**31, order="asc", where={"$.status": status}).data for status in statuses)
        jobs = [job for jobs in found for job in jobs]
        return jobs if len(statuses) == 1 else sorted(jobs, key=lambda job: job["created_at"])

    def update(self, job_id: str, **fields: Any) -> dict[str, Any]:
        """The job with some fields replaced. Raises ApiError (400) for a status that cannot follow the present one."""
        job = self.get(job_id)
        status = fields.get("status", job["status"])
        if status != job["status"] and status not in TRANSITIONS[job["status"]]:
            raise ApiError(
                f"Job {job_id} is {job['status']} and cannot become {status}.",
                code="job_already_terminal" if job["status"] in ENDED else "invalid_job_status",
            )
        if status in ENDED and job["status"] not in ENDED:
            fields.setdefault("finished_at", int(time.time()))
        job |= fields
        self._write(job, self.project_of(job_id))
        return job

    def add_event(
        self,
        job_id: str,
        message: str,
        *,
        level: Level = "info",
        kind: Literal["message", "metrics"] = "message",
        data: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        event = {
            "object": "fine_tuning.job.event",
            "id": new_id("ftevent-"),
            "created_at": int(time.time()),
            "level": level,
            "message": message,
            "data": data,
            "type": kind,
        }
        self.index.put(EVENT, event, parent=job_id)
        return event

    def events(self, job_id: str, *, limit: int, after: str | None) -> Page:
        """Newest first."""
        return self.index.page(EVENT, parent=job_id, limit=limit, after=after)

    def adopt(self) -> list[str]:
        """Take in the run folders that the index does not know, as after its loss; their ids."""
        found: list[str] = []
        for path in sorted(self.runs.glob(f"*/{_JOB_FILE}")):
            stored = read_json(path)
            job = stored["job"]
            if job["id"] == path.parent.name and self.index.get(JOB, job["id"]) is None:
                self.index.put(JOB, job, project=stored["project"])
                found.append(job["id"])
        return found

    def _write(self, job: dict[str, Any], project: str) -> None:
        """The folder first: what the index knows can be found."""
        text = json.dumps({"project": project, "job": job}, indent=2, allow_nan=False)
        self.folder(job["id"]).mkdir(mode=0o700, exist_ok=True)  # somebody may have deleted it: the job must say so
        replace(self.folder(job["id"]) / _JOB_FILE, text.encode())
        self.index.put(JOB, job, project=project)
