"""The numbers of metrics.jsonl by name, kept in memory and read on as the file grows.

One array of doubles per name, so that 10,000 rows of 80 numbers take 6 MB. A rewound file is read anew.
"""

from __future__ import annotations

import math
import threading
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import msgspec

from rft.files import parsed
from rft.ui.catalog.files import MAX_STEP
from rft.ui.growing import Mark, lines, mark_at, resume

T = TypeVar("T")
NAN = math.nan
_MAX_NAMES = 2_000  # of one kind of row: tools and error flags can have many names
_BLOCK_ROWS = 500  # in memory as rows at a time
_KINDS = ("training", "sampling", "evaluation", "warmup")


@dataclass(slots=True)
class Table:
    """Rows of one kind (and split) by step; a row that was made again replaces the first. NaN: not in that row."""

    steps: array[int] = field(default_factory=lambda: array("q"))
    values: dict[str, array[float]] = field(default_factory=dict)
    places: dict[int, int] = field(default_factory=dict)  # step -> where
    is_ordered: bool = True  # by step

    def extend(self, rows: list[dict[str, Any]]) -> None:
        """Add rows with steps, a column at a time: ten times as fast as a row at a time."""
        fresh: list[dict[str, Any]] = []
        for row in rows:
            if row["step"] in self.places:
                self._extend(fresh)
                fresh = []
                self._replace(self.places[row["step"]], row)
            else:
                self.places[row["step"]] = len(self.places)
                fresh.append(row)
        self._extend(fresh)

    def _extend(self, rows: list[dict[str, Any]]) -> None:
        names = dict.fromkeys(name for row in rows for name in row if name not in self.values)
        for name in list(names)[: max(0, _MAX_NAMES - len(self.values))]:
            self.values[name] = array("d", [NAN]) * len(self.steps)
        for name, column in self.values.items():
            found = [row.get(name, NAN) for row in rows]
            try:
                column.extend(array("d", found))
            except (TypeError, OverflowError):  # null, text, or hundreds of digits
                column.extend(map(_number, found))
        steps = [row["step"] for row in rows]
        self.is_ordered = self.is_ordered and all(a < b for a, b in pairwise([*self.steps[-1:], *steps]))
        self.steps.extend(steps)

    def _replace(self, index: int, row: dict[str, Any]) -> None:
        for name, column in self.values.items():
            column[index] = _number(row.get(name, NAN))

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values by step; empty where no row has the name."""
        if name not in self.values:
            return [], []
        column = self.values[name]
        if self.is_ordered:
            return list(self.steps), list(column)
        order = sorted(range(len(self.steps)), key=self.steps.__getitem__)
        return [self.steps[index] for index in order], [column[index] for index in order]


class Columns:
    """Of one run. Used from several threads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._mark = Mark()
        self._tables: dict[tuple[str, str], Table] = {}
        self.num_unreadable = 0

    def read(self, build: Callable[[Columns], T]) -> T:
        """What `build` makes of the numbers as they are now; it alone may look at them meanwhile."""
        with self._lock:
            try:
                with self._path.open("rb") as file:
                    self._read_on(file)
            except FileNotFoundError:
                self._mark, self._tables = Mark(), {}
            return build(self)

    @property
    def revision(self) -> str:
        """Changes with the numbers."""
        return f"{self._mark.inode:x}-{self._mark.offset:x}"

    def _read_on(self, file: BinaryIO) -> None:
        start = resume(file, self._mark)
        if start != self._mark:
            self._tables, self.num_unreadable = {}, 0
        offset, rows = start.offset, dict[tuple[str, str], list[dict[str, Any]]]()
        for at, line in lines(file, start.offset):
            if not line.endswith(b"\n"):
                break  # it is being written
            self._sort(line, rows)
            offset = at + len(line)
            if sum(map(len, rows.values())) >= _BLOCK_ROWS:
                self._flush(rows)
        self._flush(rows)
        self._mark = mark_at(file, offset)

    def _flush(self, rows: dict[tuple[str, str], list[dict[str, Any]]]) -> None:
        for key, found in rows.items():
            self._tables.setdefault(key, Table()).extend(found)
        rows.clear()

    def table(self, kind: str, split: str = "") -> Table:
        return self._tables.get((kind, split)) or Table()

    def kinds(self) -> set[str]:
        """The kinds of rows that were seen."""
        return {kind for kind, _ in self._tables}

    def splits(self) -> list[str]:
        """That were evaluated."""
        return sorted(split for kind, split in self._tables if kind == "evaluation")

    def _sort(self, line: bytes, rows: dict[tuple[str, str], list[dict[str, Any]]]) -> None:
        row = _read(line)
        step = row.get("step") if row is not None else None
        if row is None or not isinstance(step, int) or not 0 <= step < MAX_STEP:
            self.num_unreadable += bool(line.strip())
        elif (kind := row.get("kind")) in _KINDS:
            key = (str(kind), str(row.get("split")) if kind == "evaluation" else "")
            rows.setdefault(key, []).append(row)


def _number(value: Any) -> float:
    try:
        return float(value) if isinstance(value, int | float) else NAN
    except OverflowError:  # a whole number with hundreds of digits
        return NAN


def _read(line: bytes) -> dict[str, Any] | None:
    try:
        row = msgspec.json.decode(line)
    except (msgspec.MsgspecError, RecursionError):  # numbers that are not finite, half surrogate pairs
        row = parsed(line)
    return row if isinstance(row, dict) else None
