"""The eval runs of a job: one per evaluation of its run, named `Step N`, made from the run folder each time.

Nothing is stored: ids derive from the eval and the step, an item's from its rollout. Discarded rollouts, which were
replaced, are no items. Reads files: not for the event loop.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rft.errors import DataError
from rft.server.evals.output_items import Graded, RowCache, output_item, rollout_id_of
from rft.server.evals.step_items import Place, StepItems, Table
from rft.server.evals.verdicts import count_results, criterion_id, model_usage, threshold_of
from rft.server.index import Order, Page
from rft.server.views.grader_numbers import GraderView, graders_of
from rft.server.views.steps import Row, Step, number, steps_of, suffixes
from rft.store import RunStore


@dataclass(frozen=True, slots=True)
class Criterion:
    """A grader of a job as its eval has it."""

    view: GraderView
    id: str
    threshold: float

    def score(self, place: Place) -> float | None:
        return place.score if self.view.part is None else place.parts.get(self.view.part)

    @property
    def name(self) -> str:
        return f"{self.view.name}-{self.id}"


def criteria_of(job: Mapping[str, Any]) -> list[Criterion]:
    """The job's grader first: it decides whether an item passes. Then the parts of a multi grader."""
    method = job.get("method") or {}
    spec = (method.get("reinforcement") or {}).get("grader") or {}
    specs = {None: spec, **(spec.get("graders") or {})}
    return [
        Criterion(view, criterion_id(job["eval_id"], view.part or ""), threshold_of(specs.get(view.part) or {}))
        for view in graders_of(job)
    ]


class JobRuns:
    """Reads run folders for eval routes; keeps what is costly to find again."""

    def __init__(self) -> None:
        self._items, self._rows = StepItems(), RowCache()

    def every(self, store: RunStore, job: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Oldest first."""
        return [self._run(store, job, step) for step in _evaluated(store)]

    def get(self, store: RunStore, job: Mapping[str, Any], run_id: str) -> dict[str, Any] | None:
        step = _step(store, job, run_id)
        return self._run(store, job, step) if step is not None else None

    def items(
        self,
        store: RunStore,
        job: Mapping[str, Any],
        run_id: str,
        *,
        limit: int,
        after: str | None,
        order: Order,
        status: str | None,
    ) -> Page | None:
        """A page of a run's output items; None for an unknown run. An unknown `after` gives nothing."""
        step = _step(store, job, run_id)
        if step is None:
            return None
        table, criteria = self._items.table(store, step.number), criteria_of(job)
        places = iter(reversed(table.places.values()) if order == "desc" else table.places.values())
        if after is not None:
            wanted = rollout_id_of(after)
            any(place.id == wanted for place in places)  # goes up to it, or to the end
        wanted_ones = (place for place in places if status is None or _status(place, criteria) == status)
        chosen = list(islice(wanted_ones, limit + 1))
        return Page(self._objects(store, job, run_id, table, chosen[:limit]), len(chosen) > limit)

    def item(self, store: RunStore, job: Mapping[str, Any], run_id: str, item_id: str) -> dict[str, Any] | None:
        step = _step(store, job, run_id)
        if step is None:
            return None
        table = self._items.table(store, step.number)
        place = table.places.get(rollout_id_of(item_id))
        found = self._objects(store, job, run_id, table, [place]) if place is not None else []
        return found[0] if found else None

    def _objects(
        self, store: RunStore, job: Mapping[str, Any], run_id: str, table: Table, places: list[Place]
    ) -> list[dict[str, Any]]:
        rows = self._item_rows(store)
        criteria = criteria_of(job)
        by_id = {place.id: place for place in places}
        objects = []
        for rollout in table.read(places):
            results = _results(by_id[rollout.id], criteria)
            graded = Graded(job["eval_id"], run_id, _status(by_id[rollout.id], criteria), results, str(job["model"]))
            objects.append(output_item(rollout, rows.get(rollout.item_id, {}), graded))
        return objects

    def _item_rows(self, store: RunStore) -> dict[str, dict[str, Any]]:
        """{} where the data file is gone: rollouts do not need it."""
        path = (store.config().get("data") or {}).get("validation")
        try:
            return self._rows.rows(Path(path)) if path else {}
        except DataError:
            return {}

    def _run(self, store: RunStore, job: Mapping[str, Any], step: Step) -> dict[str, Any]:
        table, criteria = self._items.table(store, step.number), criteria_of(job)
        places = list(table.places.values())
        return {
            "object": "eval.run",
            "id": run_id_of(job["eval_id"], step.number),
            "eval_id": job["eval_id"],
            "created_at": int(min((place.started_at for place in places), default=job["created_at"])),
            "name": f"Step {step.number}",
            "status": "completed",
            "model": job["model"],
            "data_source": {"type": "jsonl", "source": {"type": "file_id", "id": job.get("validation_file")}},
            "error": None,
            "metadata": {},
            "report_url": "",
            "result_counts": count_results(_status(place, criteria) for place in places),
            "per_testing_criteria_results": [_criterion_result(criterion, places) for criterion in criteria],
            "per_model_usage": _usage(job, step.evaluation),
        }


def run_id_of(eval_id: str, step: int) -> str:
    return "evalrun_" + hashlib.sha256(f"{eval_id}\x1f{step}".encode()).hexdigest()[:32]


def _evaluated(store: RunStore) -> list[Step]:
    return [step for step in steps_of(store.metrics()) if step.evaluation]


def _step(store: RunStore, job: Mapping[str, Any], run_id: str) -> Step | None:
    return next((step for step in _evaluated(store) if run_id_of(job["eval_id"], step.number) == run_id), None)


def _status(place: Place, criteria: list[Criterion]) -> str:
    """Of the job's own grader."""
    threshold = criteria[0].threshold if criteria else threshold_of({})
    return "pass" if place.score >= threshold else "fail"


def _results(place: Place, criteria: list[Criterion]) -> list[dict[str, Any]]:
    return [
        {
            "name": criterion.name,
            "type": criterion.view.type,
            "score": score,
            "passed": score >= criterion.threshold,
            "sample": None,
        }
        for criterion in criteria
        if (score := criterion.score(place)) is not None
    ]


def _criterion_result(criterion: Criterion, places: list[Place]) -> dict[str, Any]:
    scores = [score for place in places if (score := criterion.score(place)) is not None]
    num_passed = sum(score >= criterion.threshold for score in scores)
    return {"testing_criteria": criterion.name, "passed": num_passed, "failed": len(scores) - num_passed}


def _usage(job: Mapping[str, Any], row: Row) -> list[dict[str, Any]]:
    """Of the model that was evaluated, then of the judges. A prompt's tokens count once, not again for each turn."""

    def of(key: str) -> int:
        return int(number(row, key) or 0)

    own = model_usage(str(job["model"]), of("num_rollouts"), of("num_prompt_tokens"), of("num_sampled_tokens"), 0)
    judges = [
        model_usage(
            model,
            of(f"judge_num/{model}"),
            of(f"judge_prompt_tokens/{model}"),
            of(f"judge_completion_tokens/{model}"),
            of(f"judge_cached_tokens/{model}"),
        )
        for model in suffixes(row, "judge_num/")
    ]
    return [own, *judges]
