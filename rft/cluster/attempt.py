"""One attempt of a submitted run, as files that its nodes write for each other and for readers.

RUN/slurm/attempt-<job>-<restart>/ holds of each node k: node-<k>.json (who it is), engines-<k>.json (where its servers
answer), beat-<k> (touched every few seconds), end-<k>.json (how it ended), and its logs. Each is written whole by its
node; the end of node 0 is the end of the attempt.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from rft.errors import StorageError
from rft.files import read_json, replace, storing
from rft.types import Record

FOLDER, NONCE = "slurm", "slurm/nonce"
BEAT_S = 3.0
R = TypeVar("R", bound=Record)


class Announcement(Record):
    """What a node says of itself. problem: why it cannot take part, "" when it can."""

    node: int
    name: str  # as Slurm calls it
    host: str
    address: str
    port: int  # of the rendezvous, when this is node 0
    num_gpus: int
    versions: dict[str, str]
    problem: str = ""
    cure: str = ""


class Engines(Record):
    """Where the servers of a node answer."""

    urls: list[str]


class End(Record):
    """How a node ended: the exit code of its task, and why."""

    code: int
    why: str = ""
    time: float


class Attempt:
    """The folder of one attempt, seen from one node or from outside."""

    def __init__(self, run: Path, job_id: str, restart: int) -> None:
        self.run, self.job_id, self.restart = run, job_id, restart
        self.path = run / FOLDER / f"attempt-{job_id}-{restart}"
        self._beats: dict[int, tuple[int, float]] = {}  # node -> its last mark, when it was first seen

    def open(self) -> None:
        with storing(self.path):
            self.path.mkdir(exist_ok=True)

    def announce(self, announcement: Announcement) -> None:
        self._write(f"node-{announcement.node}.json", announcement)

    def announced(self, node: int) -> Announcement | None:
        return self._read(f"node-{node}.json", Announcement)

    def write_engines(self, node: int, urls: list[str]) -> None:
        self._write(f"engines-{node}.json", Engines(urls=urls))

    def engines(self, node: int) -> list[str] | None:
        found = self._read(f"engines-{node}.json", Engines)
        return found.urls if found is not None else None

    def end(self, node: int, code: int, why: str) -> None:
        self._write(f"end-{node}.json", End(code=code, why=why, time=time.time()))

    def ended(self, node: int) -> End | None:
        return self._read(f"end-{node}.json", End)

    def log(self, name: str) -> Path:
        return self.path / f"{name}.log"

    # --- signs of life ---

    def beat(self, node: int) -> None:
        """Say that this node lives; node 0 says it for the run, too, to readers on other machines."""
        for path in (self.path / f"beat-{node}", *([self.run / FOLDER / "beat"] if node == 0 else [])):
            with storing(self.path):
                path.touch()
                os.utime(path)

    def silent_s(self, node: int) -> float:
        """Since when the node has not been heard of, by our own clock."""
        try:
            mark = (self.path / f"beat-{node}").stat().st_mtime_ns
        except OSError:
            mark = 0
        now = time.monotonic()
        if node not in self._beats or self._beats[node][0] != mark:
            self._beats[node] = (mark, now)
        return now - self._beats[node][1]

    def _write(self, name: str, record: Record) -> None:
        replace(self.path / name, record.model_dump_json(indent=2).encode())

    def _read(self, name: str, kind: type[R]) -> R | None:
        path = self.path / name
        try:
            return kind.model_validate(read_json(path)) if path.exists() else None
        except (StorageError, ValidationError):  # a file system that shows a name before its content
            return None


def attempts_of(run: Path, job_id: str) -> list[Attempt]:
    """All attempts of a job, the first one first."""
    found = (run / FOLDER).glob(f"attempt-{job_id}-*")
    restarts = sorted(int(path.name.rpartition("-")[2]) for path in found if path.name.rpartition("-")[2].isdigit())
    return [Attempt(run, job_id, restart) for restart in restarts]
