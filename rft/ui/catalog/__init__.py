"""The index of a run's rollouts: what the table shows, filters, sorts and searches, without reading the rollouts again.

A cache beside the run that can be deleted at any time. Whoever asks brings it up to date, newest steps first and for a
fraction of a second at most; a thread goes on with the rest. The run itself does nothing for it and never waits.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from rft.errors import StorageError
from rft.store import RunStore
from rft.types import Split
from rft.ui.catalog import indexing, query
from rft.ui.catalog.database import OFFSET_BITS, Database, is_busy
from rft.ui.catalog.entries import COLUMNS, as_line
from rft.ui.catalog.files import MAX_STEP, StepFile, StepFiles
from rft.ui.catalog.query import Condition, Filters
from rft.ui.catalog.searching import places_with
from rft.ui.schema import Choices, RolloutLine, RolloutPage

__all__ = ["Catalog", "Filters", "Place"]

T = TypeVar("T")
logger = logging.getLogger("rft.ui")

_BUDGET_S = 0.15  # of a request
_CHUNK_S = 0.1  # of a transaction: so long do other processes wait at most
_LIST_EVERY_S = 1.0
_TIMEOUT_S = 5.0
_BUSY_MS = 100  # that a question waits for another process that writes
_YIELD_S = 0.5  # the longest that the thread lets requests go first at once
_MAX_TOOLS = 100
_LINE = ", ".join(COLUMNS[:-1])


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rollout is: the step of its file, and where its line starts."""

    step: int
    offset: int


class Catalog:
    """Of one run. Used from several threads, and beside other processes that do the same."""

    def __init__(self, store: RunStore) -> None:
        self._folder = store.rollout_folder
        self._files = StepFiles(self._folder)
        self._database = Database(store.path)
        self._writing = threading.Lock()
        self._asking = threading.Condition()
        self._num_asking = 0
        self._thread: threading.Thread | None = None
        self._is_closed = False
        self._searched: tuple[object, str] | None = None

    def close(self) -> None:
        """Let the thread end; the next question starts it again."""
        self._is_closed = True
        if self._thread is not None:
            self._thread.join(_TIMEOUT_S)
        self._is_closed = False

    def page(self, filters: Filters) -> RolloutPage:
        """Raises UserError for an `after` of another table."""

        def ask(database: sqlite3.Connection, share: float) -> RolloutPage:
            found = query.condition(filters)
            if filters.text:
                places = self._search(database, filters.text, filters.steps)
                found.add("place IN (SELECT value FROM json_each(?))", places)
            num_matching = database.execute(f"SELECT count(*) FROM rollouts WHERE {found.sql}", found.values)
            return self._page(database, filters, found, int(num_matching.fetchone()[0]), share)

        return self._answer(ask, filters.steps)

    def choices(self) -> Choices:
        def ask(database: sqlite3.Connection, share: float) -> Choices:
            kinds = database.execute("SELECT split, stop_reason, count(*) FROM rollouts GROUP BY 1, 2").fetchall()
            tools = database.execute(
                "SELECT tool FROM calls WHERE tool <> '' GROUP BY tool ORDER BY count(*) DESC, tool LIMIT ?",
                (_MAX_TOOLS,),
            )
            steps = [file.step for file in self._files.look() if file.size]
            splits: list[Split] = ["train", "validation", "test"]
            return Choices(
                steps=(min(steps), max(steps)) if steps else None,
                splits=[split for split in splits if any(split == kind[0] for kind in kinds)],
                stop_reasons=sorted({kind[1] for kind in kinds}),
                tools=[name for (name,) in tools],
                num_rollouts=sum(kind[2] for kind in kinds),
                indexed_share=share,
            )

        return self._answer(ask)

    def find(self, rollout_id: str) -> Place | None:
        """None where it is not indexed: it may be in a file that is still to be read."""

        def ask(database: sqlite3.Connection, share: float) -> Place | None:
            row = database.execute("SELECT place FROM rollouts WHERE id = ?", (rollout_id,)).fetchone()
            return Place(row[0] >> OFFSET_BITS, row[0] & (1 << OFFSET_BITS) - 1) if row else None

        place = self._answer(ask, (0, 0))
        if place is not None:  # unless that file has changed
            place = self._answer(ask, (place.step, place.step + 1))
        return place or self._answer(ask)

    def group(self, step: int, split: str, item_id: str) -> list[RolloutLine]:
        """The rollouts of an item at a step, by attempt."""
        found = Condition()
        found.add("place >= ? AND place < ?", step << OFFSET_BITS, (step + 1) << OFFSET_BITS)
        found.add("split = ? AND item_id = ?", split, item_id)

        def ask(database: sqlite3.Connection, share: float) -> list[RolloutLine]:
            rows = _lines(database, found, "attempt, place", query.MAX_LIMIT)
            return [as_line(step, values) for step, values, *_ in rows]

        return self._answer(ask, (step, step + 1))

    def unreadable(self) -> dict[int, int]:
        """step -> lines of its file that are no rollouts: cut off, or nothing that any version of rft writes."""

        def ask(database: sqlite3.Connection, share: float) -> dict[int, int]:
            return dict(database.execute("SELECT step, num_unreadable FROM files WHERE num_unreadable > 0"))

        return self._answer(ask)

    # --- questions ---

    def _answer(self, ask: Callable[[sqlite3.Connection, float], T], steps: tuple[int, int] | None = None) -> T:
        """What `ask` finds, once the files of those steps (None: of all) were read as far as the budget goes."""
        with self._going_first():
            for is_last in (False, True):
                try:
                    with self._database.connected(_TIMEOUT_S) as database:
                        return ask(database, self._refresh(database, steps or (0, MAX_STEP)))
                except sqlite3.Error as error:
                    if is_busy(error) or is_last:
                        raise StorageError(f"the index of rollouts cannot be read: {error}", cure="try again") from None
                    logger.warning("the index of rollouts is made anew: %s", error)
                    self._database.discard()
        raise AssertionError("unreachable")

    @contextmanager
    def _going_first(self) -> Iterator[None]:
        with self._asking:
            self._num_asking += 1
        try:
            yield
        finally:
            with self._asking:
                self._num_asking -= 1
                self._asking.notify_all()

    def _page(
        self, database: sqlite3.Connection, filters: Filters, found: Condition, num_matching: int, share: float
    ) -> RolloutPage:
        if filters.after:
            query.add_cursor(found, filters.sort, filters.after)
        rows = _lines(database, found, query.order(filters.sort), filters.limit + 1, query.sort_column(filters.sort))
        has_more, rows = len(rows) > filters.limit, rows[: filters.limit]
        following = None
        if has_more:
            following = query.cursor(filters.sort, *rows[-1][2:])
        lines = [as_line(step, values) for step, values, *_ in rows]
        return RolloutPage(rollouts=lines, next=following, num_matching=num_matching, indexed_share=share)

    def _search(self, database: sqlite3.Connection, text: str, steps: tuple[int, int]) -> str:
        """Places as a JSON list; the last answer is kept for the pages that follow."""
        total = database.execute("SELECT sum(offset), sum(inode % 1000003), count(*) FROM files").fetchone()
        key = (text, steps, total)
        searched = self._searched
        if searched is None or searched[0] != key:
            searched = self._searched = (key, json.dumps(places_with(database, text, steps)))
        return searched[1]

    # --- bringing it up to date ---

    def _refresh(self, database: sqlite3.Connection, steps: tuple[int, int]) -> float:
        """Read what is new of those steps within the budget, a thread the rest; the share of them that is read."""
        deadline = time.monotonic() + _BUDGET_S
        files = self._files.look()
        wanted = [file for file in files if steps[0] <= file.step < steps[1]]
        known = indexing.known_files(database)
        gone = known.keys() - {file.step for file in files}
        if (gone or _stale(wanted, known)) and self._writing.acquire(timeout=_BUDGET_S):
            try:
                self._read(database, wanted, gone, lambda: time.monotonic() > deadline)
            finally:
                self._writing.release()
            known = indexing.known_files(database)
        if _stale(files, known):
            self._start_thread()
        return _share(wanted, known)

    def _read(
        self,
        database: sqlite3.Connection,
        files: list[StepFile],
        gone: Collection[int],
        is_time_up: Callable[[], bool],
    ) -> None:
        """One transaction, newest steps first. Nothing happens while another process is at it."""
        try:
            database.execute(f"PRAGMA busy_timeout = {_BUSY_MS}")
            database.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            if is_busy(error):
                return
            raise
        finally:
            database.execute(f"PRAGMA busy_timeout = {_TIMEOUT_S * 1e3:.0f}")
        try:
            indexing.forget(database, gone)
            known = indexing.known_files(database)
            for file in _stale(files, known):
                indexing.read_on(database, file, is_time_up)
                if is_time_up():
                    break
            database.execute("COMMIT")
        except BaseException:
            database.execute("ROLLBACK")
            raise

    def _start_thread(self) -> None:
        with self._asking:
            if not self._is_closed and (self._thread is None or not self._thread.is_alive()):
                self._thread = threading.Thread(target=self._read_the_rest, name="catalog", daemon=True)
                self._thread.start()

    def _read_the_rest(self) -> None:
        """Until everything is read or `close`; whoever asks goes first."""
        try:
            while not self._is_closed and (files := self._unread()):
                self._read_chunks(files)
        except (sqlite3.Error, StorageError, OSError) as error:  # the next question says it, or makes the file anew
            logger.warning("indexing the rollouts of %s ended: %s", self._folder, error)

    def _unread(self) -> list[StepFile]:
        with self._database.connected(_TIMEOUT_S) as database:
            return _stale(self._files.look(), indexing.known_files(database))

    def _read_chunks(self, files: list[StepFile]) -> None:
        """Some transactions, until it is time to look at what is on disk again."""
        until = time.monotonic() + _LIST_EVERY_S
        while not self._is_closed and files and time.monotonic() < until:
            with self._asking:
                self._asking.wait_for(lambda: self._num_asking == 0, _YIELD_S)
            deadline = time.monotonic() + _CHUNK_S
            with self._writing, self._database.connected(_TIMEOUT_S) as database:
                self._read(database, files, (), partial(self._is_over, deadline))
                files = _stale(files, indexing.known_files(database))

    def _is_over(self, deadline: float) -> bool:
        return self._num_asking > 0 or time.monotonic() > deadline


def _stale(files: list[StepFile], known: dict[int, tuple[int, int]]) -> list[StepFile]:
    """Those that are not read up to their end."""
    return [file for file in files if known.get(file.step, (file.inode, 0)) != (file.inode, file.size)]


def _share(files: list[StepFile], known: dict[int, tuple[int, int]]) -> float:
    """Of their bytes, how many are read."""
    total = sum(file.size for file in files)
    done = sum(min(known.get(file.step, (0, 0))[1], file.size) for file in files)
    return done / total if total else 1.0


def _lines(
    database: sqlite3.Connection, found: Condition, order: str, limit: int, value: str = "NULL"
) -> list[tuple[int, tuple[Any, ...], Any, int]]:
    """(step, what `as_line` takes, the value that is sorted by, place) of the first rows in that order."""
    chosen = f"SELECT place FROM rollouts WHERE {found.sql} ORDER BY {order} LIMIT ?"  # without wide columns: faster
    statement = f"SELECT {_LINE}, {value} FROM rollouts WHERE place IN ({chosen}) ORDER BY {order}"
    rows = database.execute(statement, [*found.values, limit]).fetchall()
    return [(row[0] >> OFFSET_BITS, row[1:-1], row[-1], row[0]) for row in rows]
