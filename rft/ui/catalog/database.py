"""The catalog's SQLite file: its tables, and connections to it.

A cache: what is broken or of another version is made anew. One connection per use and thread.
A rollback journal and not WAL, which cannot be shared over a network's file system. Nothing is flushed to disk, which
would make the run wait for its own writes: what this machine wrote before it last started is made anew.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import socket
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from rft.errors import StorageError
from rft.ui.catalog import location

logger = logging.getLogger("rft.ui")

VERSION = 1
OFFSET_BITS = 40  # of a place: below them the step
_SCHEMA = f"""
CREATE TABLE files (
    step INTEGER PRIMARY KEY, inode INTEGER NOT NULL, offset INTEGER NOT NULL, tail BLOB NOT NULL,
    seen INTEGER NOT NULL, num_unreadable INTEGER NOT NULL
);
CREATE TABLE rollouts (
    place INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, item_id TEXT NOT NULL, split TEXT NOT NULL,
    attempt INTEGER NOT NULL, grade REAL, stop_reason TEXT NOT NULL, num_turns INTEGER NOT NULL,
    num_calls INTEGER NOT NULL, num_tokens INTEGER NOT NULL, num_reasoning_tokens INTEGER NOT NULL,
    started_at REAL NOT NULL, duration_s REAL NOT NULL, tools TEXT NOT NULL, error TEXT, opening TEXT NOT NULL,
    errors TEXT
);
CREATE TABLE calls (tool TEXT NOT NULL, place INTEGER NOT NULL, PRIMARY KEY (tool, place)) WITHOUT ROWID;
CREATE TABLE texts (place INTEGER PRIMARY KEY, places BLOB NOT NULL, ends BLOB NOT NULL, text BLOB NOT NULL);
CREATE TABLE writer (host TEXT NOT NULL, boot TEXT NOT NULL);
PRAGMA user_version = {VERSION};
"""
_PRAGMAS = "PRAGMA journal_mode = TRUNCATE; PRAGMA synchronous = OFF; PRAGMA cache_size = -8000;"


class Database:
    """Where it is, and how to get a connection."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._path: Path | None = None

    @contextlib.contextmanager
    def connected(self, timeout_s: float) -> Iterator[sqlite3.Connection]:
        """A connection with the tables in place, without an open transaction. Raises StorageError, sqlite3.Error."""
        connection = self._connect(timeout_s)
        try:
            yield connection
        finally:
            connection.close()

    def discard(self) -> None:
        """Delete the file: whoever comes next makes it anew. Who has it open goes on with what is gone."""
        if self._path is not None:
            for name in (self._path, self._path.with_name(self._path.name + "-journal")):
                with contextlib.suppress(OSError):
                    name.unlink()

    def _connect(self, timeout_s: float) -> sqlite3.Connection:
        for path in [self._path] if self._path else location.candidates(self._run):
            for _ in range(2):  # the second time without the file that was no good
                if not location.claim(path):
                    break
                connection = sqlite3.connect(path, timeout=timeout_s, isolation_level=None)
                try:
                    _prepare(connection)
                except sqlite3.Error as error:
                    connection.close()
                    if is_busy(error):
                        raise
                    logger.info("%s is made anew: %s", path, error)
                    self._path = path
                    self.discard()
                    self._path = None
                else:
                    self._path = path
                    return connection
        self._path = None
        raise StorageError("no folder for the index of rollouts can be written", cure="set XDG_CACHE_HOME to one")


def is_busy(error: sqlite3.Error) -> bool:
    """True when somebody else writes just now: nothing is wrong with the file."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def _prepare(connection: sqlite3.Connection) -> None:
    """Make the tables unless they are there. Raises sqlite3.Error for a file that cannot be trusted."""
    connection.executescript(_PRAGMAS)
    if _version(connection) == 0:
        connection.execute("BEGIN IMMEDIATE")
        if _version(connection) == 0:  # nobody was faster
            for statement in _SCHEMA.split(";"):
                connection.execute(statement)
            connection.execute("INSERT INTO writer VALUES (?, ?)", _writer())
        connection.execute("COMMIT")
    if _version(connection) != VERSION:
        raise sqlite3.DatabaseError("it is of another version")
    host, boot = connection.execute("SELECT host, boot FROM writer").fetchone()
    if host == _writer()[0] and boot != _writer()[1]:
        raise sqlite3.DatabaseError("this machine was started anew since it was made")


@functools.cache
def _writer() -> tuple[str, str]:
    """This machine, and since when it runs."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:  # no Linux
        boot = ""
    return socket.gethostname(), boot


def _version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])
