"""A run folder's steps as the wire counts them: a training row, and the evaluation of the weights it made.

Pure functions of what is on disk. Step 0 is the evaluation before any training: it is a run of the job's eval and a
row of its CSV, and no event of a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rft.store import RunStore

Row = Mapping[str, Any]


@dataclass(slots=True)
class Step:
    """What is known of a step. `training` is {} for step 0, `evaluation` {} where none was made (or not yet)."""

    number: int
    training: Row = field(default_factory=dict)
    evaluation: Row = field(default_factory=dict)


def steps_of(rows: Iterable[Row]) -> list[Step]:
    """Every step with a row among those of a run's metrics, in order; of the validation split alone."""
    found: dict[int, Step] = {}
    for row in rows:
        kind, number = row.get("kind"), row.get("step")
        if not isinstance(number, int):
            continue
        if kind == "training":
            found.setdefault(number, Step(number)).training = row
        elif kind == "evaluation" and row.get("split") == "validation":
            found.setdefault(number, Step(number)).evaluation = row
    return [found[number] for number in sorted(found)]


def complete_steps(store: RunStore) -> list[Step]:
    """The training steps whose numbers will not change.

    Where an evaluation is due, its row has to be there, or the row of a later step: that one was never made.
    """
    found = [step for step in steps_of(store.metrics()) if step.training]
    if not found:
        return []
    config, newest = store.config(), found[-1].number
    is_evaluated = bool((config.get("data") or {}).get("validation"))
    every, last = evaluation_every(config), total_steps(config)

    def is_complete(step: Step) -> bool:
        is_due = is_evaluated and (step.number % every == 0 or step.number == last)
        return not is_due or bool(step.evaluation) or step.number < newest

    return [step for step in found if is_complete(step)]


def total_steps(config: Mapping[str, Any]) -> int:
    return int((config.get("training") or {}).get("steps") or 0)


def evaluation_every(config: Mapping[str, Any]) -> int:
    return int((config.get("evaluation") or {}).get("every") or 1)


def number(row: Row, key: str) -> float | None:
    """A number of a row; None where the row does not have it, or had one that is not finite."""
    value = row.get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def share(row: Row, key: str, of: str) -> float | None:
    """A count of a row (0 where it has none) per one of what another key counts; None without any."""
    whole = number(row, of)
    return (number(row, key) or 0.0) / whole if whole else None


def suffixes(row: Row, prefix: str) -> list[str]:
    """What follows a prefix in the keys of a row: names of tools and models, which may hold anything."""
    return [key[len(prefix) :] for key in row if key.startswith(prefix)]
