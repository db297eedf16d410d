"""What the routes of fine-tuning need of other parts of the server, by name and signature.

`No...` is what stands there without that part: nothing is uploaded, every URL is allowed, nothing runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Protocol

from rft.server.errors import ApiError
from rft.server.jobs import Jobs


class Files(Protocol):
    """Uploaded files."""

    def path(self, file_id: str, project: str, *, purpose: str | None = None, param: str = "file_id") -> Path:
        """Raises ApiError: 404 file_not_found, 400 invalid_file_purpose."""
        ...


class Outgoing(Protocol):
    """Which URLs the server and its jobs may call."""

    def check(self, url: str, param: str) -> None:
        """Raises ApiError (400 url_not_allowed). May resolve names: call it in a thread."""
        ...


class Worker(Protocol):
    """Runs what is queued."""

    def wake(self) -> None: ...

    def ask(self, job_id: str, what: Literal["pause", "cancel"]) -> None: ...


class Webhooks(Protocol):
    """Tells others that a job has ended."""

    def job_ended(self, job: dict[str, Any], project: str) -> None: ...


class NoFiles:
    def path(self, file_id: str, project: str, *, purpose: str | None = None, param: str = "file_id") -> Path:
        raise ApiError(f"No such File object: {file_id}", status=404, code="file_not_found", param=param)


class AnyUrl:
    def check(self, url: str, param: str) -> None:
        """Every host is allowed."""


class NoWorker:
    """Jobs stay queued; pausing and cancelling happen at once."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs

    def wake(self) -> None:
        """Nothing runs."""

    def ask(self, job_id: str, what: Literal["pause", "cancel"]) -> None:
        self._jobs.update(job_id, status="paused" if what == "pause" else "cancelled")
