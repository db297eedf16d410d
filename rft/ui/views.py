"""What one application keeps of the runs it shows: their indexes, numbers and tokenizers. All of it can be made again.

Used from several threads. `views_of` is what routes ask for.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from fastapi import Request

from rft.errors import StorageError, UserError
from rft.store import RunStore
from rft.ui.catalog import Catalog, Place
from rft.ui.catalog.entries import line_of
from rft.ui.charts import build_charts
from rft.ui.columns import Columns
from rft.ui.data_rows import find_row
from rft.ui.detokenizing import Tokenizers, text_of
from rft.ui.errors import Missing
from rft.ui.overview import Grades, grades_of
from rft.ui.record import RolloutRow, decoded, read_row
from rft.ui.schema import Charts, RolloutLine, TextPart, Tokens, Trace
from rft.ui.tokens import tokens_of
from rft.ui.trace import Sources, text_part, trace_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

T = TypeVar("T")
_MAX_RUNS = 64  # whose index is at hand: little is kept of one
_MAX_COLUMNS = 32  # runs whose numbers are in memory, a few MB each
_MAX_CHARTS = 8
_MAX_GRADES = 1_000  # lines of the list of runs


class Kept(Generic[T]):
    """The values that were asked for last, made when they are missing. `drop` is called with what is given up."""

    def __init__(self, size: int, drop: Callable[[T], None] = lambda _: None) -> None:
        self._size, self._drop = size, drop
        self._lock = threading.Lock()
        self._values: OrderedDict[object, T] = OrderedDict()

    def get(self, key: object, make: Callable[[], T]) -> T:
        with self._lock:
            if key not in self._values:
                self._values[key] = make()
            self._values.move_to_end(key)
            dropped = [self._values.popitem(last=False)[1] for _ in range(len(self._values) - self._size)]
            found = self._values[key]
        for value in dropped:
            self._drop(value)
        return found

    def clear(self) -> None:
        with self._lock:
            dropped = list(self._values.values())
            self._values.clear()
        for value in dropped:
            self._drop(value)


@dataclass(frozen=True, slots=True)
class Found:
    """A rollout that was read. `step` is that of its file."""

    row: RolloutRow
    step: int

    @property
    def line(self) -> RolloutLine:
        return line_of(self.step, self.row)


class Views:
    """Of one application."""

    def __init__(self) -> None:
        self._catalogs = Kept[Catalog](_MAX_RUNS, lambda catalog: catalog.close())
        self._columns = Kept[Columns](_MAX_COLUMNS)
        self._charts = Kept[Charts](_MAX_CHARTS)
        self._grades = Kept[Grades](_MAX_GRADES)
        self._tokenizers = Tokenizers()

    def close(self) -> None:
        """Let the threads end that index rollouts."""
        self._catalogs.clear()

    def catalog(self, store: RunStore) -> Catalog:
        return self._catalogs.get(store.path, lambda: Catalog(store))

    def columns(self, store: RunStore) -> Columns:
        return self._columns.get(store.path, lambda: Columns(store.path / "metrics.jsonl"))

    def grades(self, store: RunStore) -> Grades:
        """For the list of runs, which may be longer than what is kept of numbers."""
        path = store.path / "metrics.jsonl"
        try:
            found = path.stat()
        except OSError:
            return Grades("unknown", None, [])
        key = (path, found.st_ino, found.st_size, found.st_mtime_ns)
        return self._grades.get(key, lambda: self.columns(store).read(grades_of))

    def charts(self, store: RunStore, points: int) -> Charts:
        def build(columns: Columns) -> Charts:
            key = (store.path, columns.revision, points)
            return self._charts.get(key, lambda: build_charts(columns, points))

        return self.columns(store).read(build)

    def find(self, store: RunStore, rollout_id: str) -> Found:
        """Raises Missing."""
        place = self.catalog(store).find(rollout_id) or _place_in_indexes(store, rollout_id)
        row = _read(store, place) if place is not None else None
        if place is None or row is None or row.id != rollout_id:
            raise Missing("there is no such rollout in this run", where=rollout_id[:80], cure="choose one of the table")
        return Found(row, place.step)

    def trace(self, run_id: str, store: RunStore, rollout_id: str) -> Trace:
        """Raises Missing."""
        found = self.find(store, rollout_id)
        return trace_of(run_id, found.row, found.line, self._group(store, found), self._sources(store))

    def tokens(self, store: RunStore, rollout_id: str, offset: int, limit: int) -> Tokens:
        """Raises Missing."""
        found, config = self.find(store, rollout_id), _config(store)
        load = partial(self._tokenizers.of_run, store, config)
        return tokens_of(found.row, self._group(store, found), config, load, slice(offset, offset + limit))

    def text(self, store: RunStore, rollout_id: str, ref: str, offset: int) -> TextPart:
        """Raises Missing."""
        return text_part(self.find(store, rollout_id).row, ref, offset, self._sources(store))

    def warm(self, store: RunStore) -> None:
        """Load the tokenizer that traces of the run need; where that fails, they say it."""
        with contextlib.suppress(UserError, OSError):
            self._tokenizers.of_run(store, _config(store))

    def _group(self, store: RunStore, found: Found) -> list[RolloutLine]:
        line = found.line
        return self.catalog(store).group(found.step, line.split, line.item_id)

    def _sources(self, store: RunStore) -> Sources:
        config = _config(store)
        load = partial(self._tokenizers.of_run, store, config)
        return Sources(prompt=lambda row: _prompt(row, load), item=lambda row: find_row(store, config, row.item_id))


def views_of(request: Request) -> Views:
    """The one of the application that serves the request."""
    found: Views = request.app.state.views
    return found


def _prompt(row: RolloutRow, load: Callable[[], Tokenizer]) -> str:
    if not row.turns:
        return "(nothing was sampled)"
    ids = decoded(row.turns[0].input_ids)
    try:
        return text_of(load(), ids)
    except UserError as error:
        return f"({len(ids)} tokens; {error})"


def _config(store: RunStore) -> dict[str, Any]:
    try:
        return store.config()
    except StorageError:  # the run's page says so
        return {}


def _read(store: RunStore, place: Place) -> RolloutRow | None:
    try:
        with store.rollout_path(place.step).open("rb") as file:
            file.seek(place.offset)
            return read_row(file.readline())
    except OSError:  # moved aside meanwhile
        return None


def _place_in_indexes(store: RunStore, rollout_id: str) -> Place | None:
    """Through the .idx files that the run writes: for what is not indexed yet."""
    if not rollout_id.isascii() or not rollout_id.isprintable():
        return None
    for path in sorted(store.rollout_folder.glob("step_*.idx"), reverse=True):
        offset = _offset_in(path, rollout_id)
        if offset is not None and path.stem.removeprefix("step_").isdecimal():
            return Place(int(path.stem.removeprefix("step_")), offset)
    return None


def _offset_in(path: Path, rollout_id: str) -> int | None:
    """Where the last row of that id starts."""
    needle = f"{rollout_id} ".encode()
    try:
        data = path.read_bytes()
    except OSError:
        return None
    found = [line for line in data.split(b"\n") if line.startswith(needle)] if needle in data else []
    offset = found[-1].removeprefix(needle) if found else b""
    return int(offset) if offset.isdigit() else None
