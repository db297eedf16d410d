"""Grades remembered on disk by what the grader saw: content-addressed, so a changed grader or answer is a new grade.

The key is a hash of the spec and of everything the grader looks at, with the random ids of tool calls replaced by their
order: two rollouts that did the same get the same grade without asking again. Grades with errors are not kept. The
file may be deleted at any time; one that cannot be used costs speed and a warning, never a run.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import sqlite3
import time
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from pydantic import ValidationError

from rft.errors import GraderError
from rft.graders.base import Grader, Spec
from rft.types import Grade, Item

logger = logging.getLogger(__name__)

_BUSY_TIMEOUT_S = 0.2  # for another process that writes; after it the grade is made anew
_NOT_SEEN = frozenset({"name", "cache", "pass_threshold"})  # parts of a spec that change no score


class GradeCache:
    """A key-value file of grades."""

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, _open(path)

    def get(self, key: bytes) -> Grade | None:
        try:
            row = (
                self._file.execute("SELECT grade FROM grades WHERE key = ?", (key,)).fetchone() if self._file else None
            )
            grade = Grade.model_validate_json(row[0]) if row else None
        except (sqlite3.Error, ValidationError) as error:
            self._give_up(error)
            grade = None
        return grade

    def put(self, key: bytes, grade: Grade) -> None:
        if self._file is None:
            return
        try:
            self._file.execute("INSERT OR IGNORE INTO grades VALUES (?, ?)", (key, grade.model_dump_json()))
        except sqlite3.OperationalError as error:
            if "locked" not in str(error):  # a busy file is a grade that is not kept
                self._give_up(error)
        except sqlite3.Error as error:
            self._give_up(error)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _give_up(self, error: Exception) -> None:
        logger.warning("the grade cache %s cannot be used and is off for this run: %s", self._path, error)
        self.close()


def _open(path: Path) -> sqlite3.Connection | None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, isolation_level=None)
        file.execute("PRAGMA journal_mode = WAL")
        file.execute("PRAGMA synchronous = OFF")  # after a power cut it may have to be deleted: it is a cache
        file.execute("CREATE TABLE IF NOT EXISTS grades (key BLOB PRIMARY KEY, grade TEXT NOT NULL) WITHOUT ROWID")
    except (OSError, sqlite3.Error) as error:
        logger.warning("the grade cache %s cannot be opened, grades are not remembered: %s", path, error)
        return None
    return file


class CachedGrader:
    """`grader` with a memory. Equal requests that arrive together are graded once."""

    def __init__(self, spec: Spec, grader: Grader, cache: GradeCache) -> None:
        self._spec = json.dumps(spec.model_dump(mode="json", exclude=set(_NOT_SEEN)), sort_keys=True)
        self._grader, self._cache = grader, cache
        self._locks: WeakValueDictionary[bytes, asyncio.Lock] = WeakValueDictionary()

    async def start(self) -> list[str]:
        return await self._grader.start()

    def seen(self, item: Item, sample: dict[str, Any]) -> Any:
        return self._grader.seen(item, sample)

    async def grade(self, item: Item, sample: dict[str, Any], trace_id: str = "") -> Grade:
        started = time.monotonic()
        try:
            key = self._key(item, sample)
        except GraderError:  # what it cannot look at, it cannot have looked at before
            return await self._grader.grade(item, sample, trace_id)
        async with self._locks.setdefault(key, asyncio.Lock()):
            known = self._cache.get(key)
            if known is not None:
                update = {"is_cached": True, "latency_s": time.monotonic() - started, "usage": {}}
                return known.model_copy(update=update)
            grade = await self._grader.grade(item, sample, trace_id)
            if not grade.all_errors:
                self._cache.put(key, grade)
            return grade

    async def close(self) -> None:
        await self._grader.close()

    def _key(self, item: Item, sample: dict[str, Any]) -> bytes:
        seen = json.dumps(self._grader.seen(item, without_call_ids(sample)), sort_keys=True)
        return hashlib.sha256(f"{self._spec}\n{seen}".encode()).digest()


def without_call_ids(sample: dict[str, Any]) -> dict[str, Any]:
    """The sample with the ids of its tool calls replaced by `call_0`, `call_1`, ... in order of appearance."""
    names: dict[str, str] = {}
    for call in sample.get("output_tools") or []:
        if isinstance(call, dict) and isinstance(call.get("id"), str):
            names.setdefault(call["id"], f"call_{len(names)}")
    renamed: dict[str, Any] = _rename(sample, names) if names else sample
    return renamed


def _rename(value: Any, names: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {
            key: names.get(child, child)
            if key in ("id", "tool_call_id") and isinstance(child, str)
            else _rename(child, names)
            for key, child in value.items()
        }
    return [_rename(child, names) for child in value] if isinstance(value, list) else value
