"""Evals: those that clients make, and one per reinforcement job, whose runs are its evaluations (job_runs.py).

An eval's graders, which may hold header values, are in a private file of its folder; the index has them redacted.
A job's eval enters the index when it is first asked for or listed.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rft.files import read_json, replace
from rft.redaction import redacted
from rft.server.errors import not_found
from rft.server.evals.job_runs import criteria_of
from rft.server.ids import new_id
from rft.server.index import Index, Order, Page
from rft.server.jobs.store import JOB, Jobs

EVAL, RUN, ITEM = "eval", "eval_run", "eval_item"  # kinds in the index
_JOB_KEY = "fine_tuning_job_id"
_PAGE = 100
_CRITERIA = "criteria.json"
Spec = dict[str, Any]


class Evals:
    """The evals of a data folder. One thread: the server's event loop."""

    def __init__(self, index: Index, jobs: Jobs, root: Path) -> None:
        self._index, self._jobs, self._root = index, jobs, root

    def add(self, body: dict[str, Any], criteria: list[Spec], project: str) -> dict[str, Any]:
        """A new eval from its wire object without `id`, `created_at` and `testing_criteria`."""
        eval_id = new_id("eval_")
        folder = self._root / eval_id
        folder.mkdir(mode=0o700, parents=True)
        replace(folder / _CRITERIA, json.dumps({"testing_criteria": criteria}).encode()).chmod(0o600)
        created = {"object": "eval", "id": eval_id, "created_at": int(time.time()), **body}
        created["testing_criteria"] = [redacted(spec) for spec in criteria]
        self._index.put(EVAL, created, project=project)
        return created

    def get(self, eval_id: str, project: str) -> dict[str, Any]:
        """Raises ApiError (404)."""
        found = self._index.get(EVAL, eval_id, project=project)
        if found is None:
            self._adopt(project)
            found = self._index.get(EVAL, eval_id, project=project)
        if found is None or found.get("deleted"):
            raise not_found("eval", eval_id, param="eval_id")
        return found

    def page(self, project: str, *, limit: int, after: str | None, order: Order) -> Page:
        self._adopt(project)
        return self._index.page(EVAL, project=project, limit=limit, after=after, order=order, where={"$.deleted": None})

    def update(self, eval_id: str, project: str, **fields: Any) -> dict[str, Any]:
        """The eval with some fields replaced. Raises ApiError (404)."""
        found = self.get(eval_id, project) | fields
        self._index.put(EVAL, found, project=project)
        return found

    def remove(self, eval_id: str, project: str) -> None:
        """Its runs with it; a job's run folder stays as it is. Raises ApiError (404)."""
        self.get(eval_id, project)
        self._index.put(EVAL, {"id": eval_id, "deleted": True}, project=project)  # a job's would come back

    def job_of(self, found: dict[str, Any]) -> dict[str, Any] | None:
        """The job whose eval this is; None for one that a client made."""
        job_id = found.get(_JOB_KEY)
        return self._jobs.get(job_id) if job_id else None

    def criteria(self, eval_id: str) -> list[Spec]:
        """With the header values. The eval must be one that a client made."""
        specs: list[Spec] = read_json(self._root / eval_id / _CRITERIA)["testing_criteria"]
        return specs

    def _adopt(self, project: str) -> None:
        """Take in the evals of jobs, newest first until one is known: jobs and their evals have the same order."""
        fresh: list[dict[str, Any]] = []
        after: str | None = None
        while True:
            page = self._index.page(JOB, project=project, limit=_PAGE, after=after)
            with_eval = [job for job in page.data if job.get("eval_id")]
            unknown = [job for job in with_eval if self._index.get(EVAL, job["eval_id"]) is None]
            fresh += unknown
            if len(unknown) < len(with_eval) or not page.has_more:
                break
            after = page.data[-1]["id"]
        with self._index.transaction():
            for job in reversed(fresh):
                self._index.put(EVAL, _of_job(job), project=project)


def _of_job(job: dict[str, Any]) -> dict[str, Any]:
    items = {"type": "object", "properties": {"messages": {"type": "array"}}, "additionalProperties": True}
    schema = {"type": "object", "properties": {"item": items, "sample": {"type": "object"}}, "required": ["item"]}
    specs = job["method"]["reinforcement"]["grader"] if criteria_of(job) else {}
    parts = {None: specs, **(specs.get("graders") or {})}
    return {
        "object": "eval",
        "id": job["eval_id"],
        "created_at": job["created_at"],
        "name": f"Reinforcement Fine Tuning validation runs for {job['id']}",
        "data_source_config": {"type": "custom", "schema": schema},
        "testing_criteria": [
            {**redacted(parts[criterion.view.part]), "name": criterion.view.name, "id": criterion.name}
            for criterion in criteria_of(job)
        ],
        "metadata": {},
        _JOB_KEY: job["id"],
    }
