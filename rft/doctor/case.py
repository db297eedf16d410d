"""The evidence about a run, read once: config, rows, events, and a bounded sample of its rollouts.

Whatever cannot be read (cut off, of another version) is left out and named in `problems`; nothing here raises for it.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import ValidationError

from rft.errors import StorageError
from rft.files import finite, parsed
from rft.plain import plain
from rft.store import RunStore
from rft.types import Rollout

MAX_ROLLOUTS = 2_000  # enough for shares of 1%; a few seconds of reading with rollouts of thousands of tokens
MAX_BYTES = 96 * 2**20  # about a second of JSON
_FIRST_ROLLOUTS = 256  # of the first step, which the untrained model sampled: what the others are compared with
_MIN_WINDOW, _MAX_WINDOW = 4, 16  # steps that are "now", and as many that are "at first"

_STEPS = ("training", "sampling")  # rows of steps; a run that only samples has groups, calls and grades to look at

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Case:
    """What the checks look at. Rows are those of steps in order, of a step that was made again the last."""

    run_id: str = ""
    config: Row = field(default_factory=dict)
    state: Row = field(default_factory=dict)
    status: str = "unknown"
    training: list[Row] = field(default_factory=list)
    evaluations: list[Row] = field(default_factory=list)
    events: list[Row] = field(default_factory=list)
    rollouts: list[Rollout] = field(default_factory=list)  # of the newest steps
    first: list[Rollout] = field(default_factory=list)  # graded training rollouts of the first step
    problems: list[str] = field(default_factory=list)

    @property
    def window(self) -> int:
        """How many steps are looked at as one: a tenth of the run, at least 4; of a short run half."""
        num = len(self.training)
        return max(1, min(num // 2, max(_MIN_WINDOW, min(num // 10, _MAX_WINDOW))))

    @property
    def early(self) -> list[Row]:
        return self.training[: self.window]

    @property
    def recent(self) -> list[Row]:
        return self.training[-self.window :]

    @property
    def steps(self) -> tuple[int, int] | None:
        """The first and the last step of `recent`."""
        return span(self.recent)

    @property
    def train(self) -> list[Rollout]:
        """The training rollouts of the sample, discarded ones too; before the first step those of the evaluations."""
        return [rollout for rollout in self.rollouts if rollout.split == "train"] or self.rollouts

    @property
    def latest(self) -> list[Rollout]:
        """Those of the steps of `recent`, and of a step that has no row yet."""
        first = self.recent[0]["step"] if self.recent else 0
        return [rollout for rollout in self.train if rollout.step >= first]

    @property
    def graded(self) -> list[Rollout]:
        return [rollout for rollout in self.train if rollout.grade is not None]

    @property
    def latest_graded(self) -> list[Rollout]:
        return [rollout for rollout in self.latest if rollout.grade is not None]

    @property
    def groups(self) -> list[list[Rollout]]:
        """The latest graded rollouts of each item at each step, where there are at least two."""
        return grouped(self.latest_graded)

    def setting(self, path: str) -> Any:
        """A value of the config, e.g. `training.learning_rate`; None where the config does not have it."""
        node: Any = self.config
        for key in path.split("."):
            node = node.get(key) if isinstance(node, dict) else None
        return node

    def number(self, path: str, default: float) -> float:
        """The same as a number."""
        value = self.setting(path)
        return float(value) if isinstance(value, int | float) else default


def read_case(store: RunStore) -> Case:
    """Everything the checks need. Reads while the run writes; takes no lock."""
    problems: list[str] = []
    rows = list(_readable(store.metrics, "metrics.jsonl", problems))
    rollouts, first = _sample(store, problems)
    return Case(
        run_id=store.run_id,
        config=_object(store.config, problems),
        state=_object(store.read_state, problems),
        status=_status(store),
        training=_by_step([row for row in rows if row.get("kind") in _STEPS]),
        evaluations=[row for row in rows if row.get("kind") == "evaluation"],
        events=list(_readable(store.events, "events.jsonl", problems)),
        rollouts=rollouts,
        first=first,
        problems=problems,
    )


def _status(store: RunStore) -> str:
    try:
        return store.status
    except StorageError:
        return "unknown"


def _object(read: Callable[[], Row], problems: list[str]) -> Row:
    try:
        return read()
    except StorageError as error:
        problems.append(error.problem)
        return {}


def _readable(read: Callable[[], Iterable[Row]], name: str, problems: list[str]) -> Iterable[Row]:
    try:
        yield from read()
    except OSError as error:
        problems.append(f"{name} cannot be read: {error.strerror}")


def _by_step(rows: list[Row]) -> list[Row]:
    found = {row["step"]: finite(row) for row in rows if isinstance(row.get("step"), int)}
    return [found[step] for step in sorted(found)]


# --- the sample of rollouts ---


def _sample(store: RunStore, problems: list[str]) -> tuple[list[Rollout], list[Rollout]]:
    """Rollouts of the newest steps, whole steps as long as the limits allow; and the first step's."""
    reader = _Reader()
    steps = store.rollout_steps()
    newest: list[Rollout] = []
    for step in reversed(steps):
        newest += reader.read(store.rollout_path(step), MAX_ROLLOUTS - len(newest))
        if len(newest) >= MAX_ROLLOUTS or reader.left_bytes <= 0:
            break
    first: list[Rollout] = []
    first_step = next((step for step in steps if step > 0), None)
    if first_step is not None:
        reader.left_bytes = MAX_BYTES // 8
        found = reader.read(store.rollout_path(first_step), _FIRST_ROLLOUTS)
        first = [rollout for rollout in found if rollout.split == "train" and rollout.grade is not None]
    problems += [f"{num} rollouts of {name} cannot be read: {why}" for (name, why), num in reader.unread.items()]
    return newest, first


def read_step(store: RunStore, step: int, limit: int) -> list[Rollout]:
    """At most so many rollouts of one step, discarded ones too; what cannot be read is left out."""
    return _Reader(MAX_BYTES // 8).read(store.rollout_path(step), limit)


class _Reader:
    """Reads rollouts line by line within a number of bytes; of one id the row written last."""

    def __init__(self, left_bytes: int = MAX_BYTES) -> None:
        self.left_bytes = left_bytes
        self.unread: Counter[tuple[str, str]] = Counter()

    def read(self, path: Path, limit: int) -> list[Rollout]:
        found: dict[str, Rollout] = {}
        try:
            with path.open("rb") as file:
                for line in file:
                    if len(found) >= limit or self.left_bytes <= 0:
                        break
                    self.left_bytes -= len(line)
                    rollout = self._rollout(line, path.name)
                    if rollout is not None:
                        found[rollout.id] = rollout
        except OSError as error:
            self.unread[path.name, str(error.strerror)] += 1
        return list(found.values())

    def _rollout(self, line: bytes, name: str) -> Rollout | None:
        row = parsed(line)
        if row is None:
            if line.endswith(b"\n") and line.strip():
                self.unread[name, "cut off when they were written"] += 1
            return None
        try:
            return Rollout.model_validate(row)
        except ValidationError as error:
            return self._of_another_version(row, error, name)

    def _of_another_version(self, row: Row, error: ValidationError, name: str) -> Rollout | None:
        """The rollout without the keys that this version does not know."""
        for problem in error.errors(include_url=False, include_input=False, include_context=False):
            if problem["type"] != "extra_forbidden":
                self.unread[name, "written by another version of rft"] += 1
                return None
            _remove(row, problem["loc"])
        try:
            return Rollout.model_validate(row)
        except ValidationError:
            self.unread[name, "written by another version of rft"] += 1
            return None


def _remove(row: Any, place: Sequence[int | str]) -> None:
    for key in place[:-1]:
        row = row[key]
    row.pop(place[-1], None)


# --- what the checks compute with ---


def grouped(rollouts: Iterable[Rollout]) -> list[list[Rollout]]:
    """By step and item, without those that stand alone."""
    found: dict[tuple[int, str], list[Rollout]] = defaultdict(list)
    for rollout in rollouts:
        found[rollout.step, rollout.item_id].append(rollout)
    return [group for group in found.values() if len(group) > 1]


def score_of(rollout: Rollout) -> float:
    """Of a graded rollout."""
    return rollout.grade.score if rollout.grade is not None else 0.0


def numbers(rows: Iterable[Row], name: str) -> list[float]:
    """The values that rows have under a name; those that are missing or no finite numbers are left out."""
    found = (row.get(name) for row in rows)
    return [float(value) for value in found if isinstance(value, int | float) and math.isfinite(value)]


def mean(rows: Iterable[Row], name: str) -> float | None:
    """None when no row has it."""
    values = numbers(rows, name)
    return fmean(values) if values else None


def total(rows: Iterable[Row], name: str) -> float:
    return math.fsum(numbers(rows, name))


def interval(rows: Sequence[Row], name: str) -> float:
    """Half-width of the 95% interval of the mean of a measure over rows, from the rows' own; inf when one lacks it."""
    widths = numbers(rows, f"{name}_ci95")
    return math.hypot(*widths) / len(widths) if widths and len(widths) == len(rows) else math.inf


def words(text: object, max_chars: int) -> str:
    """A text of somebody else's on one line, harmless and cut."""
    return plain(" ".join(str(text).split()), max_chars=max_chars)


def span(rows: Sequence[Row]) -> tuple[int, int] | None:
    return (int(rows[0]["step"]), int(rows[-1]["step"])) if rows else None


def ids_of(rollouts: Iterable[Rollout]) -> list[str]:
    """Examples for a finding: at most five, of different items where there are."""
    by_item: dict[str, str] = {}
    others: list[str] = []
    for rollout in rollouts:
        if rollout.item_id in by_item:
            others.append(rollout.id)
        else:
            by_item[rollout.item_id] = rollout.id
    return [*by_item.values(), *others][:5]
