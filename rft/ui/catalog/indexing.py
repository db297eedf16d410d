"""Rollout files into the catalog, newest steps first, each read on from where it was read last.

A transaction writes rows and the mark of their file together, so that nothing is lost or twice, whoever is killed when
and however many processes do the same. A file that was replaced (a resumed run) is read anew.
"""

from __future__ import annotations

import os
import sqlite3
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from rft.ui.catalog.database import OFFSET_BITS
from rft.ui.catalog.entries import COLUMNS, SPLITS, entry, text_of, tools_of
from rft.ui.catalog.files import StepFile
from rft.ui.growing import Mark, lines, mark_at, resume
from rft.ui.record import RolloutRow, read_row

_TEXT_BYTES = 1 << 20  # in one row of `texts`
_EVERY = 32  # lines between two looks at the clock
_INSERT = f"INSERT OR REPLACE INTO rollouts VALUES ({','.join('?' * len(COLUMNS))})"


@dataclass(slots=True)
class _Batch:
    """Rows on their way into the database."""

    entries: list[tuple[object, ...]] = field(default_factory=list)
    calls: list[tuple[str, int]] = field(default_factory=list)
    places: array[int] = field(default_factory=lambda: array("q"))
    ends: array[int] = field(default_factory=lambda: array("q"))
    texts: list[bytes] = field(default_factory=list)
    num_bytes: int = 0
    num_unreadable: int = 0

    def add(self, place: int, row: RolloutRow) -> None:
        text = text_of(row).encode("utf-8", "replace")
        self.num_bytes += len(text)
        self.entries.append(entry(place, row))
        self.calls += [(tool, place) for tool in tools_of(row)]
        self.places.append(place)
        self.ends.append(self.num_bytes)
        self.texts.append(text)

    def write(self, database: sqlite3.Connection) -> None:
        if self.entries:
            database.executemany(_INSERT, self.entries)
            database.executemany("INSERT OR IGNORE INTO calls VALUES (?, ?)", self.calls)
            texts = (self.places[0], self.places.tobytes(), self.ends.tobytes(), b"".join(self.texts))
            database.execute("INSERT OR REPLACE INTO texts VALUES (?, ?, ?, ?)", texts)


def known_files(database: sqlite3.Connection) -> dict[int, tuple[int, int]]:
    """step -> (inode, the size up to which the file was read; a line that is being written counts as read)."""
    return {step: (inode, seen) for step, inode, seen in database.execute("SELECT step, inode, seen FROM files")}


def forget(database: sqlite3.Connection, steps: Iterable[int]) -> None:
    """Take the rows of files out that are gone. In a transaction of the caller's."""
    for step in steps:
        places = (step << OFFSET_BITS, (step + 1) << OFFSET_BITS)
        database.execute("DELETE FROM calls WHERE place >= ? AND place < ?", places)
        database.execute("DELETE FROM rollouts WHERE place >= ? AND place < ?", places)
        database.execute("DELETE FROM texts WHERE place >= ? AND place < ?", places)
        database.execute("DELETE FROM files WHERE step = ?", (step,))


def read_on(database: sqlite3.Connection, file: StepFile, is_time_up: Callable[[], bool]) -> bool:
    """Index what follows in a file until the time is up; True at its end. In a transaction of the caller's."""
    row = database.execute(
        "SELECT inode, offset, tail, num_unreadable FROM files WHERE step = ?", (file.step,)
    ).fetchone()
    old = Mark(*row[:3]) if row else Mark()
    try:
        opened = file.path.open("rb")
    except FileNotFoundError:
        forget(database, [file.step])
        return True
    with opened:
        start, size = resume(opened, old), os.fstat(opened.fileno()).st_size
        if start != old and row is not None:
            forget(database, [file.step])
            row = None
        offset, num_unreadable, is_complete = start.offset, row[3] if row else 0, True
        for batch, offset, is_complete in _batches(opened, file.step, start.offset, is_time_up):  # noqa: B007
            batch.write(database)
            num_unreadable += batch.num_unreadable
        mark = mark_at(opened, offset)
    seen = size if is_complete else mark.offset
    values = (file.step, mark.inode, mark.offset, mark.tail, seen, num_unreadable)
    database.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?)", values)
    return is_complete


def _batches(
    file: BinaryIO, step: int, offset: int, is_time_up: Callable[[], bool]
) -> Iterator[tuple[_Batch, int, bool]]:
    """(rows, where reading goes on, whether that is the end)"""
    batch = _Batch()
    for number, (start, line) in enumerate(lines(file, offset)):
        row = read_row(line) if line.strip() else None
        if row is None and not line.endswith(b"\n"):
            break  # it is being written
        offset = start + len(line)
        if row is not None and row.split in SPLITS:
            batch.add((step << OFFSET_BITS) + start, row)
        elif line.strip():
            batch.num_unreadable += 1
        if number % _EVERY == _EVERY - 1 and is_time_up():
            yield batch, offset, False
            return
        if batch.num_bytes >= _TEXT_BYTES:
            yield batch, offset, False
            batch = _Batch()
    yield batch, offset, True
