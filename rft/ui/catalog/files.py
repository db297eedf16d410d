"""The rollout files of a run on disk. All are looked at when the folder changed and now and then, else the newest."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rft.ui.catalog.database import OFFSET_BITS
from rft.ui.growing import inode_of

MAX_STEP = 1 << (62 - OFFSET_BITS)
_NUM_NEWEST = 16  # steps that a run may be writing: evaluations of past ones, sampling of future ones
_ALL_EVERY_S = 5.0


@dataclass(frozen=True, slots=True)
class StepFile:
    """A rollout file as it is on disk."""

    step: int
    path: Path
    inode: int
    size: int


class StepFiles:
    """Of one run. Used from several threads."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._known: dict[int, StepFile] = {}
        self._changed_ns, self._looked_at = -1, 0.0

    def look(self) -> list[StepFile]:
        """By step, the newest first."""
        with self._lock:
            changed_ns, now = _changed_ns(self._folder), time.monotonic()
            if changed_ns != self._changed_ns or now - self._looked_at > _ALL_EVERY_S:
                found = {file.step: file for file in _scan(self._folder)}
                self._known = dict(sorted(found.items(), reverse=True))
                self._changed_ns, self._looked_at = changed_ns, now
            else:
                for step in list(self._known)[:_NUM_NEWEST]:
                    self._look_at(step)
            return list(self._known.values())

    def _look_at(self, step: int) -> None:
        path = self._known[step].path
        try:
            status = path.stat()
        except FileNotFoundError:  # moved aside meanwhile
            del self._known[step]
        else:
            self._known[step] = StepFile(step, path, inode_of(status), status.st_size)


def _changed_ns(folder: Path) -> int:
    try:
        return folder.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _scan(folder: Path) -> Iterator[StepFile]:
    try:
        found = os.scandir(folder)
    except FileNotFoundError:
        return
    with found:
        for file in found:
            stem, _, suffix = file.name.partition(".")
            number = stem.removeprefix("step_")
            if suffix != "jsonl" or number == stem or not number.isdecimal() or int(number) >= MAX_STEP:
                continue
            try:
                status = file.stat()
            except FileNotFoundError:  # moved aside meanwhile
                continue
            yield StepFile(int(number), Path(file.path), inode_of(status), status.st_size)
