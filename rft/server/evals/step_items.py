"""Where the validation rollouts of an evaluated step are in its file, and how they were graded.

A file is read once, without decoding what was sampled; after that a page costs what its own items cost. What is kept
is forgotten when the file changes. Used from several threads.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rft.files import parsed
from rft.store import RunStore
from rft.types import Rollout, StopReason

_MAX_TABLES = 32
# A quote inside a JSON string is always behind a backslash, so neither pattern can match text of a model or a tool.
_HEAD = re.compile(rb'\{"id": "([^"\\]+)", "item_id": "(?:[^"\\]|\\.)*", "split": "(\w+)", ')
_TAIL = b', "stop_reason": "'


@dataclass(frozen=True, slots=True)
class Place:
    """One rollout: where its line starts, when it was made (Unix seconds), and the scores of its grade."""

    id: str
    offset: int
    started_at: float
    score: float
    parts: dict[str, float]  # of a multi grader, by key


@dataclass(frozen=True, slots=True)
class Table:
    """The graded validation rollouts of a step in the order written, by id."""

    path: Path
    places: dict[str, Place]

    def read(self, chosen: Iterable[Place]) -> list[Rollout]:
        """Those rollouts, in that order; one that is not there any more is left out."""
        found = []
        with self.path.open("rb") as file:
            for place in chosen:
                file.seek(place.offset)
                rollout = _rollout(file.readline())
                if rollout is not None and rollout.id == place.id:
                    found.append(rollout)
        return found


class StepItems:
    """The tables that were asked for last."""

    def __init__(self) -> None:
        self._tables: OrderedDict[tuple[Path, int, int], Table] = OrderedDict()
        self._lock = threading.Lock()

    def table(self, store: RunStore, step: int) -> Table:
        """Reads the step's file where it is not known; empty without a file. Raises OSError."""
        path = store.rollout_path(step)
        try:
            status = path.stat()
        except FileNotFoundError:
            return Table(path, {})
        key = (path, status.st_ino, status.st_size)
        with self._lock:
            if key in self._tables:
                self._tables.move_to_end(key)
                return self._tables[key]
        table = Table(path, _places(path))
        with self._lock:
            self._tables[key] = table
            while len(self._tables) > _MAX_TABLES:
                self._tables.popitem(last=False)
        return table


def _rollout(line: bytes) -> Rollout | None:
    """Straight from the text, which takes a quarter of the time; half a surrogate pair is read the other way only."""
    try:
        return Rollout.model_validate_json(line)
    except ValidationError:
        row = parsed(line)
        return Rollout.model_validate(row) if row is not None and "turns" in row else None


def _places(path: Path) -> dict[str, Place]:
    """A rollout that was made again (a resumed run) counts as made last."""
    places: dict[str, Place] = {}
    offset = 0
    with path.open("rb") as file:
        for line in file:
            place = _place(line, offset)
            if place is not None:
                places.pop(place.id, None)
                places[place.id] = place
            offset += len(line)
    return places


def _place(line: bytes, offset: int) -> Place | None:
    """None for what is no graded validation rollout: others, discarded ones, a line that was cut off."""
    head = _HEAD.match(line)
    if head is not None and head[2] != b"validation":
        return None
    facts = _facts(line) if head is not None else parsed(line)
    if facts is None or facts.get("split", "validation") != "validation":
        return None
    grade = facts.get("grade")
    if not grade or StopReason(facts["stop_reason"]).is_discarded:
        return None
    rollout_id = head[1].decode() if head is not None else facts["id"]
    parts = {key: part["score"] for key, part in grade["parts"].items()}
    return Place(rollout_id, offset, facts["started_at"], grade["score"], parts)


def _facts(line: bytes) -> dict[str, Any] | None:
    """What follows the turns of a rollout, or the whole of it where the line is not written as expected."""
    start = line.find(_TAIL)
    if start < 0 or not line.endswith(b"\n"):
        return parsed(line)
    try:
        facts: dict[str, Any] = json.loads(b"{" + line[start + 2 :])
    except ValueError:
        return parsed(line)
    return facts
