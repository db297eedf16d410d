"""Rollouts worth reading: the best, the median and the worst of the last evaluation, and one that was discarded."""

from __future__ import annotations

from dataclasses import dataclass

from rft.report.numbers import SPLITS, evaluation_rows
from rft.salvage import salvaged
from rft.store import RunStore
from rft.types import Rollout

_MAX_STEPS = 20  # files that are read through for a discarded rollout


@dataclass(frozen=True, slots=True)
class Example:
    why: str
    rollout: Rollout


def examples(store: RunStore) -> list[Example]:
    """Those that the run has. Without an evaluation they are of the last step."""
    rows = evaluation_rows(store)
    split = next((split for split in SPLITS if rows.get(split)), None)
    steps = store.rollout_steps()
    step = rows[split][-1]["step"] if split else max(steps, default=None)
    if step is None:
        return []
    rollouts = salvaged(store, step, split).rollouts
    scored = ((rollout.grade.score, rollout.id, rollout) for rollout in rollouts if rollout.grade is not None)
    graded = sorted(scored, key=lambda entry: entry[:2])
    where = f"of {split or 'the rollouts'} at step {step}"
    places = {len(graded) - 1: "the best", len(graded) // 2: "the median", 0: "the worst"} if graded else {}
    found = [Example(f"{word} {where}", graded[place][2]) for place, word in places.items()]
    discarded = _discarded(store, steps)
    if discarded is not None:
        found.append(Example(f"discarded, {discarded.split} at step {discarded.step}", discarded))
    return found


def _discarded(store: RunStore, steps: list[int]) -> Rollout | None:
    """The last one, among the last steps."""
    for step in reversed(steps[-_MAX_STEPS:]):
        for rollout in reversed(salvaged(store, step).rollouts):
            if rollout.stop_reason.is_discarded:
                return rollout
    return None
