"""The index: one SQLite file (WAL) with every object the API lists, by kind, project and parent, in order of making.

Guarantees: a write is on disk when the call returns; order is that of insertion, whatever the clock does; a page costs
the same wherever it lies. The objects are the wire's own JSON. It does not know what they mean.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rft.errors import StorageError

Order = Literal["asc", "desc"]
_BUSY_TIMEOUT_S = 10.0
_SCHEMA = """
CREATE TABLE IF NOT EXISTS objects (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    kind TEXT NOT NULL, id TEXT NOT NULL, project TEXT NOT NULL, parent TEXT NOT NULL, body TEXT NOT NULL,
    UNIQUE (kind, id)
);
CREATE INDEX IF NOT EXISTS by_project ON objects (kind, project, seq);
CREATE INDEX IF NOT EXISTS by_parent ON objects (kind, parent, seq);
"""


@dataclass(frozen=True, slots=True)
class Page:
    """A part of a list, and whether more follows."""

    data: list[dict[str, Any]]
    has_more: bool

    def body(self) -> dict[str, Any]:
        """As the wire has it; the ids of both ends are there for lists that page by them."""
        ends = {"first_id": self.data[0]["id"], "last_id": self.data[-1]["id"]} if self.data else {}
        return {
            "object": "list",
            "data": self.data,
            "has_more": self.has_more,
            "first_id": None,
            "last_id": None,
        } | ends


class Index:
    """Objects by (kind, id). Thread-safe; one process (app.py holds the data folder's lock)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        with self._storing():
            self._database = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, check_same_thread=False)
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=FULL")
            self._database.executescript(_SCHEMA)

    def put(self, kind: str, body: dict[str, Any], *, project: str = "", parent: str = "") -> None:
        """Insert, or replace the body of the object with this id; its place in the order, project and parent stay."""
        text = json.dumps(body, allow_nan=False)
        statement = (
            "INSERT INTO objects (kind, id, project, parent, body) VALUES (?, ?, ?, ?, ?)"
            " ON CONFLICT (kind, id) DO UPDATE SET body = excluded.body"
        )
        with self._writing() as database:
            database.execute(statement, (kind, body["id"], project, parent, text))

    def get(self, kind: str, object_id: str, *, project: str | None = None) -> dict[str, Any] | None:
        """The object, or None when there is none, or none in that project (None: in any)."""
        row = self._one("SELECT body, project FROM objects WHERE kind = ? AND id = ?", (kind, object_id))
        if row is None or project not in (None, row[1]):
            return None
        found: dict[str, Any] = json.loads(row[0])
        return found

    def project_of(self, kind: str, object_id: str) -> str | None:
        row = self._one("SELECT project FROM objects WHERE kind = ? AND id = ?", (kind, object_id))
        return str(row[0]) if row is not None else None

    def delete(self, kind: str, object_id: str) -> bool:
        """Whether it was there."""
        with self._writing() as database:
            return database.execute("DELETE FROM objects WHERE kind = ? AND id = ?", (kind, object_id)).rowcount > 0

    def delete_children(self, kind: str, parent: str) -> None:
        """All of a kind with that parent."""
        with self._writing() as database:
            database.execute("DELETE FROM objects WHERE kind = ? AND parent = ?", (kind, parent))

    def page(
        self,
        kind: str,
        *,
        limit: int,
        project: str | None = None,
        parent: str | None = None,
        after: str | None = None,
        order: Order = "desc",
        where: Mapping[str, str | None] | None = None,
    ) -> Page:
        """What follows the object `after` in `order` of making; desc is newest first. An unknown `after` gives nothing.

        where: JSON paths and the text each must be equal to, None for null or missing, e.g. {'$.purpose': 'evals'}.
        """
        conditions, values = ["kind = ?"], [kind]
        for column, value in (("project", project), ("parent", parent)):
            if value is not None:
                conditions.append(f"{column} = ?")
                values.append(value)
        for path, wanted in (where or {}).items():
            conditions.append("json_extract(body, ?) IS ?")
            values += [path, wanted]  # type: ignore[list-item]
        if after is not None:
            conditions.append(
                f"seq {'<' if order == 'desc' else '>'} (SELECT seq FROM objects WHERE kind = ? AND id = ?)"
            )
            values += [kind, after]
        direction = "DESC" if order == "desc" else "ASC"
        statement = f"SELECT body FROM objects WHERE {' AND '.join(conditions)} ORDER BY seq {direction} LIMIT ?"
        with self._storing(), self._lock:
            rows = self._database.execute(statement, (*values, limit + 1)).fetchall()
        return Page([json.loads(body) for (body,) in rows[:limit]], len(rows) > limit)

    def every(self, kind: str, *, project: str | None = None, parent: str | None = None) -> list[dict[str, Any]]:
        """All of a kind, oldest first: for lists that are short."""
        return self.page(kind, limit=2**31, project=project, parent=parent, order="asc").data

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Several writes that happen all or not at all, and reach the disk once."""
        with self._writing():
            yield

    def close(self) -> None:
        with self._lock:
            self._database.close()

    def _one(self, statement: str, values: tuple[str, ...]) -> tuple[Any, ...] | None:
        with self._storing(), self._lock:
            row: tuple[Any, ...] | None = self._database.execute(statement, values).fetchone()
            return row

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._storing(), self._lock:
            if self._database.in_transaction:  # part of `transaction`
                yield self._database
                return
            with self._database:
                self._database.execute("BEGIN IMMEDIATE")
                yield self._database

    @contextmanager
    def _storing(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            cure = "free space on that disk, or restore the file from a copy; nothing that was written is lost"
            raise StorageError(f"the index {self.path} cannot be used: {error}", cure=cure) from error
