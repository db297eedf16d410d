"""The page of a server: the jobs of the caller's project, and graders by the server's rules.

Guarantees: another project's job is as if it did not exist; what a run folder is called comes from the index, never
from a request. Everything the page shows of a run is rft/ui's.
"""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import FastAPI, Request

from rft.errors import ConfigError
from rft.graders.judge import Judges
from rft.server.errors import ApiError
from rft.server.grading.judging import grader_tools, wire_grader
from rft.server.index import Index
from rft.server.jobs import actions
from rft.server.jobs.store import JOB
from rft.server.services import Services, caller, services
from rft.store import RunStore
from rft.ui import app as ui
from rft.ui.errors import Missing
from rft.ui.runs import Known, Page
from rft.ui.schema import Action, JobLine

_ACTIONS: dict[str, list[Action]] = {
    "validating_files": ["cancel"],
    "queued": ["pause", "cancel"],
    "running": ["pause", "cancel"],
    "paused": ["resume", "cancel"],
}
_ACTS = {"cancel": actions.cancel, "pause": actions.pause, "resume": actions.resume}


def mount_page(app: FastAPI, *, needs_key: bool) -> None:
    """The page at /ui, for callers with the keys of /v1."""
    page = Page("server", needs_key, runs_of=lambda request: JobRuns(services(request), caller(request).project))
    ui.mount(app, page, ServerJudging())


class JobRuns:
    """The jobs of a project as runs."""

    def __init__(self, services: Services, project: str) -> None:
        self._services, self._project = services, project

    def all(self) -> list[Known]:
        """Newest first; jobs that have not run yet among them."""
        return [self._known(job) for job in reversed(self._index.every(JOB, project=self._project))]

    def get(self, run_id: str) -> Known:
        """Raises Missing."""
        job = self._index.get(JOB, run_id, project=self._project)
        if job is None:
            raise Missing("there is no such run", where=run_id[:80], cure="choose one of the list")
        return self._known(job)

    def actions(self, known: Known) -> list[Action]:
        return _ACTIONS.get(known.job.status, []) if known.job is not None else []

    def act(self, known: Known, action: Action) -> None:
        """As the routes of /v1 do it, in the event loop. Raises ApiError."""
        _ACTS[action](self._services, known.id, self._project)

    @property
    def _index(self) -> Index:
        return self._services.index

    def _known(self, job: dict[str, Any]) -> Known:
        folder = self._services.jobs.folder(job["id"])
        store = RunStore(folder) if (folder / "config.json").is_file() else None
        line = JobLine(
            id=job["id"],
            status=job["status"],
            model=job["model"],
            fine_tuned_model=job["fine_tuned_model"],
            created_at=job["created_at"],
            error=(job["error"] or {}).get("message"),
        )
        return Known(job["id"], store, line)


class ServerJudging:
    """Graders as /v1/fine_tuning/alpha/graders/run takes them; the models of the server's table judge."""

    def owner(self, request: Request) -> str:
        return caller(request).project

    async def judges(self, request: Request, known: Known, grader: dict[str, Any]) -> Judges:
        """Raises ConfigError naming the field."""
        found = services(request)
        try:
            spec = await asyncio.to_thread(wire_grader, found, grader, "grader")
            return grader_tools(found, spec, self.owner(request)).judges
        except ApiError as error:
            raise ConfigError(error.message, where=error.param or "grader") from None
