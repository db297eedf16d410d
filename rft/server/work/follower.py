"""From a run folder that grows to the wire: the status, an event per step, names for checkpoints, the numbers of a job.

Guarantees: every training step gets one metrics event, whoever was killed when: event and cursor are written together.
Looks at modification times first, so that a look at a run where nothing happened costs a few system calls.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean
from typing import Any, TypeVar

from rft import checkpoints
from rft.files import finite
from rft.server.models import checkpoint_name, tuned_name
from rft.server.work.process import Mark, mark_of
from rft.server.work.records import Json, Parts
from rft.store import RunStore

T = TypeVar("T")
logger = logging.getLogger("rft.server")

_NUM_RECENT = 10  # steps whose pace tells when a job ends


@dataclass(frozen=True, slots=True)
class _Numbers:
    """What the metrics of a run come to."""

    events: list[tuple[str, Json]]
    usage: Json | None
    trained_tokens: int | None
    left_s: float | None


class Follower:
    """Follows one job while its process runs, and once more at the end."""

    def __init__(self, parts: Parts, job_id: str) -> None:
        self._parts, self._job_id = parts, job_id
        self._store = RunStore(parts.jobs.folder(job_id))
        self._metrics_mark: Mark | None = None
        self._checkpoints_mark: Mark | None = None

    def begin(self) -> None:
        """The run has begun: the job is running."""
        jobs, works = self._parts.jobs, self._parts.works
        if jobs.get(self._job_id)["status"] == "running":
            return
        has_started = works.get(self._job_id).has_started
        with jobs.index.transaction():
            jobs.update(self._job_id, status="running", fine_tuned_model=None)
            jobs.add_event(self._job_id, f"Fine-tuning job {'resumed' if has_started else 'started'}")
            works.update(self._job_id, has_started=True)

    async def look(self) -> bool:
        """Tell what is new since the last look; whether there were new metrics."""
        self._name_checkpoints()
        mark = mark_of(self._store.path / "metrics.jsonl")
        if mark is None or mark == self._metrics_mark:
            return False
        job, step = self._parts.jobs.get(self._job_id), self._parts.works.get(self._job_id).step
        numbers = await asyncio.to_thread(shown, lambda: self._read(job, step))
        self._metrics_mark = mark
        if numbers is not None:
            self._tell(numbers)
        return True

    def _read(self, job: Json, step: int) -> _Numbers:
        rows, seams = list(self._store.metrics()), self._parts.seams
        return _Numbers(
            events=seams.metrics_events(self._store, job, step),
            usage=seams.usage_metrics(self._store),
            trained_tokens=_trained_tokens(rows),
            left_s=_left_s(rows, self._store.read_state()),
        )

    def _tell(self, numbers: _Numbers) -> None:
        jobs = self._parts.jobs
        is_running = jobs.get(self._job_id)["status"] == "running"
        finish = int(time.time() + numbers.left_s) if is_running and numbers.left_s is not None else None
        with jobs.index.transaction():
            for message, data in numbers.events:
                jobs.add_event(self._job_id, message, kind="metrics", data=finite(data))
                self._parts.works.update(self._job_id, step=data["step"])
            jobs.update(
                self._job_id,
                usage_metrics=finite(numbers.usage),
                trained_tokens=numbers.trained_tokens,
                estimated_finish=finish,
            )

    def _name_checkpoints(self) -> None:
        """Every checkpoint of a step can be called by name from the moment it is there."""
        mark = mark_of(self._store.checkpoints)
        if mark is None or mark == self._checkpoints_mark:
            return
        job, project = self._parts.jobs.get(self._job_id), self._parts.jobs.project_of(self._job_id)
        name = tuned_name(job, self._parts.config.organization)
        for path in checkpoints.complete(self._store.checkpoints):
            step = checkpoints.step_of(path)
            if step > 0:
                self._parts.models.add_tuned(job, checkpoint_name(name, step), step=step, project=project)
        self._checkpoints_mark = mark


def shown(view: Callable[[], T]) -> T | None:
    """What a view makes of a run folder; None, and its traceback in the log, where it fails."""
    try:
        return view()
    except Exception:  # a bug in what is shown must not end a training that goes well
        logger.exception("a run folder cannot be shown")
        return None


def _trained_tokens(rows: list[dict[str, Any]]) -> int | None:
    """The loss-bearing tokens of all steps, or all that a warm-up has seen; None where the run counts none."""
    found = [row["update/num_tokens"] for row in rows if row.get("update/num_tokens") is not None]
    seen = [row["num_tokens"] for row in rows if row.get("kind") == "warmup" and row.get("num_tokens") is not None]
    return int(sum(found) if found else max(seen)) if found or seen else None


def _left_s(rows: list[dict[str, Any]], state: dict[str, Any]) -> float | None:
    """Seconds to the end at the pace of the last steps, evaluations included; None while nothing is known."""
    steps = [row["time/step_s"] for row in rows if row.get("kind") == "training" and row.get("time/step_s")]
    if not steps or "steps" not in state:
        return None
    evaluations = sum(row.get("seconds") or 0.0 for row in rows if row.get("kind") == "evaluation")
    left = max(0, int(state["steps"]) - int(state.get("step", 0)))
    return left * (fmean(steps[-_NUM_RECENT:]) + evaluations / len(steps))
