"""Grading a finished run's stored rollouts again, with another grader: no sampling, every rollout as it was.

The run itself is not changed: the new grades go to `regrades/<name>.jsonl` in its folder.
"""

from __future__ import annotations

import asyncio
import json
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import StatisticsError, correlation, fmean
from typing import Any

from rft.data import load_items
from rft.errors import GraderError, UserError
from rft.graders import Grader
from rft.graders.sample import sample_of
from rft.store import RunStore
from rft.types import Grade, Item, Rollout

_MAX_CONCURRENT = 32
_NUM_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Comparison:
    """The stored grades against the new ones, over the rollouts that have both."""

    num_rollouts: int
    num_failed: int  # the new grader failed: no grade
    num_flagged: int  # graded, with an error flag
    mean_old: float
    mean_new: float
    rank_correlation: float | None  # Spearman's; None where one of the two is constant
    farthest: list[tuple[str, float, float]]  # (rollout id, old, new), the largest differences first
    path: Path

    def as_json(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in self.__slots__ if name not in ("farthest", "path")}
        farthest = [{"rollout": rollout, "old": old, "new": new} for rollout, old, new in self.farthest]
        return {**fields, "farthest": farthest, "path": str(self.path)}


async def regrade(
    store: RunStore, grader: Grader, name: str, on_grade: Callable[[], None] = lambda: None
) -> Comparison:
    """Grade every graded rollout of the run again. Raises UserError when the run has none or its data is gone."""
    items = items_of(store)
    rollouts = [rollout for rollout in store.rollouts() if rollout.grade is not None]
    if not rollouts:
        raise UserError("the run has no graded rollouts", where=str(store.path), cure="choose another run")
    slots = asyncio.Semaphore(_MAX_CONCURRENT)

    async def again(rollout: Rollout) -> Grade | str:
        async with slots:
            try:
                return await grader.grade(item_of(rollout, items), sample_of(rollout), rollout.id)
            except GraderError as error:
                return error.problem
            finally:
                on_grade()

    grades = await asyncio.gather(*(again(rollout) for rollout in rollouts))
    path = _write(store.regrades(name), rollouts, grades)
    return _compare(rollouts, grades, path)


def items_of(store: RunStore) -> dict[str, Item]:
    """The rows of the run's data files by item id, as the run read them. Raises DataError when one is gone."""
    paths = [path for path in store.config().get("data", {}).values() if path]
    files = [next((place for place in store.places(path) if place.exists()), Path(path)) for path in paths]
    return {item.id: item for file in files for item in load_items(file, None)}


def item_of(rollout: Rollout, items: dict[str, Item]) -> Item:
    """The rollout's row. Raises UserError when it is gone."""
    if rollout.item_id not in items:
        raise UserError(
            f"the row of rollout {rollout.id} is gone", where=rollout.item_id, cure="bring back the run's data files"
        )
    return items[rollout.item_id]


def _write(path: Path, rollouts: list[Rollout], grades: list[Grade | str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for rollout, grade in zip(rollouts, grades, strict=True):
            result = {"error": grade} if isinstance(grade, str) else {"grade": grade.model_dump(mode="json")}
            file.write(json.dumps({"id": rollout.id, "step": rollout.step, "split": rollout.split, **result}) + "\n")
    return path


def _ranks(values: list[float]) -> list[float]:
    """Ranks with ties averaged."""
    ordered = sorted(values)
    return [(bisect_left(ordered, value) + bisect_right(ordered, value)) / 2 for value in values]


def _compare(rollouts: list[Rollout], grades: list[Grade | str], path: Path) -> Comparison:
    pairs = [
        (rollout.id, rollout.grade.score, grade.score)
        for rollout, grade in zip(rollouts, grades, strict=True)
        if isinstance(grade, Grade) and rollout.grade is not None
    ]
    old, new = [pair[1] for pair in pairs], [pair[2] for pair in pairs]
    try:
        rank_correlation = correlation(_ranks(old), _ranks(new))
    except StatisticsError:  # fewer than two, or all equal
        rank_correlation = None
    return Comparison(
        num_rollouts=len(pairs),
        num_failed=len(rollouts) - len(pairs),
        num_flagged=sum(1 for grade in grades if isinstance(grade, Grade) and grade.all_errors),
        mean_old=fmean(old) if old else 0.0,
        mean_new=fmean(new) if new else 0.0,
        rank_correlation=rank_correlation,
        farthest=sorted(pairs, key=lambda pair: -abs(pair[1] - pair[2]))[:_NUM_SHOWN],
        path=path,
    )
