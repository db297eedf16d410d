"""Reading run folders as far as they go: being written, cut off, or of another version of rft. Never raises for that.

What is left out is said in `problems`. Where a run must be read whole or not at all, RunStore is the reader.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pydantic import ValidationError

from rft.errors import StorageError
from rft.files import parsed
from rft.plain import plain
from rft.store import RunStore
from rft.types import Rollout, Split

_MAX_FIELD = 60  # characters of a field's name in a problem


@dataclass(frozen=True, slots=True)
class Salvage:
    """The rollouts that could be read, in the order written, and what could not."""

    rollouts: list[Rollout]
    problems: list[str]


def salvaged(store: RunStore, step: int, split: Split | None = None) -> Salvage:
    """The rollouts of a step; of one id the one written last. Fields that this version does not know are left out."""
    problems: Counter[str] = Counter()
    found: dict[str, Rollout] = {}
    for line in _lines(store, step):
        row = parsed(line)
        if row is None:
            problems["cut off"] += 1
        elif split is None or row.get("split") == split:
            rollout = _rollout(row, problems)
            if rollout is not None:
                found[rollout.id] = rollout
    name = store.rollout_path(step).name
    return Salvage(list(found.values()), [f"{num} x in {name}: {what}" for what, num in problems.items()])


def _lines(store: RunStore, step: int) -> Iterator[bytes]:
    try:
        file = store.rollout_path(step).open("rb")
    except OSError:
        return
    with file:
        yield from (line for line in file if line.strip())


def rollout_of(row: dict[str, Any]) -> tuple[Rollout | None, list[str]]:
    """A rollout from a row, and what of it could not be read; None when a field that it needs is missing or wrong."""
    problems: Counter[str] = Counter()
    return _rollout(row, problems), list(problems)


def _rollout(row: dict[str, Any], problems: Counter[str]) -> Rollout | None:
    try:
        return Rollout.model_validate(row)
    except ValidationError as error:
        unknown = [problem["loc"] for problem in error.errors() if problem["type"] == "extra_forbidden"]
    for place in unknown:
        problems[f"unknown field {_named(place)}, left out"] += 1
        _delete(row, place)
    try:
        return Rollout.model_validate(row)
    except ValidationError as error:
        place = error.errors()[0]["loc"]
        problems[f"a rollout of another version of rft, not shown: {_named(place)} is missing or wrong"] += 1
        return None


def _named(place: tuple[int | str, ...]) -> str:
    return plain(".".join(str(part) for part in place if isinstance(part, str)), max_chars=_MAX_FIELD)


def _delete(row: Any, place: tuple[int | str, ...]) -> None:
    for part in place[:-1]:
        row = row[part]
    del row[place[-1]]


def metric_rows(store: RunStore, kind: Literal["training", "evaluation"]) -> list[dict[str, Any]]:
    """The rows of a kind, sorted by step, those of an evaluation also by split; of what was made again, the last."""
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for row in store.metrics():
        step, split = row.get("step"), row.get("split", "")
        is_whole = isinstance(step, int) and (kind == "training" or split in get_args(Split))
        if row.get("kind") == kind and is_whole:
            found[int(step or 0), str(split)] = row
    return [row for _, row in sorted(found.items(), key=lambda entry: entry[0])]


def number(row: dict[str, Any], name: str) -> float | None:
    """A number of a row; None where it is missing, null, or no finite number."""
    value = row.get(name)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def config_and_state(store: RunStore) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Both, {} where a file cannot be read, and the problems."""
    found: list[dict[str, Any]] = []
    problems: list[str] = []
    for read in (store.config, store.read_state):
        try:
            value: Any = read()
        except StorageError as error:
            value, problems = {}, [*problems, error.problem]
        found.append(value if isinstance(value, dict) else {})
    return found[0], found[1], problems
