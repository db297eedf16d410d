"""The run folder: what a run did, as files that any reader can follow while it is written.

Written as rft/files.py says. One process writes, held by a lock on the folder; readers need no lock. Nothing is
deleted: what a resumed run makes again is moved aside. The store does not know what its metrics mean.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import ValidationError
from pydantic_core import PydanticSerializationError

from rft.errors import StorageError, UserError
from rft.files import Appender, append_apart, finite, has_open, parsed, read_json, replace, rows, storing
from rft.sift import readable, sift
from rft.types import Rollout, Split

Level = Literal["info", "warn", "error"]
_UNFINISHED = ("starting", "running")
_SIGNS = ("live.json", "events.jsonl", "metrics.jsonl", "state.json", "slurm/beat")
_SILENT_S = 120.0  # without any sign, a run on another machine counts as gone
_MAX_PARENTS = 3  # between a run and the folder it was started in
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class RunStore:
    """One run folder. Reading needs nothing; the first write takes the folder's lock, `close` gives it back."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.on_metrics: Callable[[dict[str, Any]], None] | None = None  # called with every row that is appended
        self._lock_fd: int | None = None
        self._files = Appender()

    @classmethod
    def create(cls, runs_dir: Path, run_id: str, config: dict[str, Any]) -> Self:
        """A new run folder, locked. Raises UserError when a run of that id exists."""
        if not _RUN_ID.fullmatch(run_id):
            raise UserError("a run id has letters, digits, `.`, `_` and `-` only", where=run_id, cure="rename the run")
        store = cls(runs_dir / run_id)
        with storing(store.path):
            for folder in (store.rollout_folder, store.checkpoints, store.weights):
                folder.mkdir(parents=True, exist_ok=True)
        store.lock()
        if store._config_path.exists():
            store.close()
            raise UserError("this run exists already", where=str(store.path), cure="resume it, or choose another name")
        store._write_json(store._config_path, config)
        return store

    @classmethod
    def open(cls, path: Path) -> Self:
        """An existing run folder. Raises UserError when there is none."""
        store = cls(Path(path))
        if not store._config_path.is_file():
            raise UserError("there is no run here: config.json is missing", where=str(path), cure="check the path")
        return store

    # --- places ---

    @property
    def run_id(self) -> str:
        return self.path.resolve().name

    @property
    def engine_log(self) -> Path:
        return self.path / "engine.log"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def grade_cache(self) -> Path:
        return self.path / "grades.sqlite"

    def judge_log(self, name: str) -> Path:
        """Of a judge the run serves."""
        return self.path / f"judge-{_file_name(name)}.log"

    def regrades(self, name: str) -> Path:
        """The grades of the run's rollouts by another grader."""
        return self.path / "regrades" / f"{_file_name(name)}.jsonl"

    @property
    def weights(self) -> Path:
        return self.path / "weights"

    @property
    def rollout_folder(self) -> Path:
        return self.path / "rollouts"

    @property
    def _superseded(self) -> Path:
        return self.rollout_folder / "superseded"

    @property
    def is_done(self) -> bool:
        return (self.path / "DONE").exists()

    @property
    def is_pause_asked(self) -> bool:
        return self._pause_path.exists()

    @property
    def _pause_path(self) -> Path:
        return self.path / "PAUSE"

    @property
    def _config_path(self) -> Path:
        return self.path / "config.json"

    @property
    def _events_path(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def _live_path(self) -> Path:
        return self.path / "live.json"

    def rollout_path(self, step: int) -> Path:
        return self.rollout_folder / f"step_{step:06d}.jsonl"

    # --- writing ---

    def append_rollout(self, rollout: Rollout) -> None:
        """Append to the file of its step, and its place to the index beside it."""
        path = self.rollout_path(rollout.step)
        offset = self._append(path, _line(rollout))
        self._append(path.with_suffix(".idx"), f"{rollout.id} {offset}")

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Append a flat row; numbers that are not finite are written as null."""
        self._append(self.path / "metrics.jsonl", json.dumps(finite(row), allow_nan=False))
        if self.on_metrics is not None:
            self.on_metrics(row)

    def append_event(self, level: Level, message: str, data: dict[str, Any] | None = None) -> None:
        self._append(self._events_path, _event(level, message, data))

    def append_event_apart(self, level: Level, message: str, data: dict[str, Any] | None = None) -> None:
        """The same from any thread, while another appends."""
        append_apart(self._events_path, _event(level, message, data))

    def write_state(self, state: dict[str, Any]) -> None:
        self._write_json(self.path / "state.json", state)

    def write_live(self, live: dict[str, Any]) -> None:
        """What the run is doing now (rft/live.py); worth nothing after a crash, so it is not flushed to disk."""
        self.lock()
        replace(self._live_path, json.dumps(finite(live), allow_nan=False).encode(), is_durable=False)

    def beat(self) -> None:
        """A sign of life while nothing is sampled: only the time of live.json changes."""
        with contextlib.suppress(OSError):  # it is not there yet, or the disk has a problem that others will meet
            os.utime(self._live_path)

    def mark_done(self) -> None:
        """The last thing a run writes."""
        self._write_json(self.path / "DONE", {"time": time.time()})

    def ask_to_pause(self) -> None:
        """Let the run pause after the step it is in. From any process, without the lock; the run folder must exist."""
        replace(self._pause_path, b"")

    def withdraw_pause(self) -> None:
        """Ask no more. From any process, without the lock."""
        with storing(self.path):
            self._pause_path.unlink(missing_ok=True)

    def write_report(self, name: str, data: bytes) -> Path:
        """Replace a report file. Reports derive from the rest, so this needs no lock."""
        return replace(self.path / name, data)

    def rewind(self, step: int, is_usable: Callable[[Rollout], bool] = lambda _: False) -> list[Rollout]:
        """Move aside what belongs to steps after `step`, and the mark that the run is done.

        Rollouts that `is_usable` accepts stay where they are and are returned, with those of `step` itself.
        """
        self.lock()
        self._files.close()
        kept = [rollout for rollout in readable(self.rollout_path(step)) if is_usable(rollout)]
        with storing(self.path):
            for path in sorted(self.rollout_folder.glob("step_*.jsonl")):
                if _step_of(path) > step:
                    kept += sift(path, is_usable, self._superseded)
            for left_over in (*self.path.glob(".*.tmp"), *self.rollout_folder.glob(".*.tmp")):
                left_over.unlink()  # of a file that a killed process was replacing
            for left_over in self.weights.glob(".*"):  # weights that it was publishing: as large as the model
                shutil.rmtree(left_over)
            (self.path / "DONE").unlink(missing_ok=True)
        metrics = self.path / "metrics.jsonl"
        written = list(rows(metrics))
        later = [row for row in written if row.get("step", 0) > step]
        if later:
            for row in later:
                self._append(self.path / "metrics.superseded.jsonl", json.dumps(row))
            left = [json.dumps(row) + "\n" for row in written if row.get("step", 0) <= step]
            replace(metrics, "".join(left).encode())
        return kept

    def set_aside(self, step: int, ids: Collection[str]) -> None:
        """Move rollouts of a step out of its file: the step was made without them."""
        self.lock()
        self._files.close()
        with storing(self.path):
            sift(self.rollout_path(step), lambda rollout: rollout.id not in ids, self._superseded)

    # --- reading ---

    def config(self) -> dict[str, Any]:
        return read_json(self._config_path)

    def read_state(self) -> dict[str, Any]:
        """The last state written, {} when there is none."""
        path = self.path / "state.json"
        return read_json(path) if path.exists() else {}

    @property
    def status(self) -> str:
        """The state's status; `killed` when that is unfinished and nobody writes the run."""
        found = str(self.read_state().get("status", "unknown"))
        return "killed" if found in _UNFINISHED and not self.is_written else found

    def read_live(self) -> dict[str, Any]:
        """What the run was last doing, {} when it never said."""
        return read_json(self._live_path) if self._live_path.exists() else {}

    def metrics(self) -> Iterator[dict[str, Any]]:
        return rows(self.path / "metrics.jsonl")

    def has_evaluation(self, split: Split, step: int) -> bool:
        """True when the metrics hold the evaluation of a split at a step."""
        found = (row for row in self.metrics() if row.get("kind") == "evaluation")
        return any(row["split"] == split and row["step"] == step for row in found)

    def places(self, path: str) -> Iterator[Path]:
        """Where a path of the config may lead: from a folder above the run, where it was started; else from here."""
        if not Path(path).is_absolute():
            yield from (parent / path for parent in self.path.resolve().parents[:_MAX_PARENTS])
        yield Path(path)

    def events(self) -> Iterator[dict[str, Any]]:
        return rows(self._events_path)

    def rollouts(self, step: int | None = None, split: Split | None = None) -> Iterator[Rollout]:
        """By step, in the order written. One that was made again (a resumed run) comes once, as made last."""
        paths = sorted(self.rollout_folder.glob("step_*.jsonl")) if step is None else [self.rollout_path(step)]
        for path in paths:
            last = {row["id"]: row for row in rows(path) if split is None or row["split"] == split}
            yield from (_rollout(row, path) for row in last.values())

    def rollout_steps(self) -> list[int]:
        """The steps that have rollouts; the last one may be in flight."""
        return sorted(_step_of(path) for path in self.rollout_folder.glob("step_*.jsonl"))

    def find(self, rollout_id: str) -> Rollout | None:
        """The rollout of that id, through the index; where that is stale or absent, by reading the files."""
        paths = sorted(self.rollout_folder.glob("step_*.jsonl"))
        for path in paths:
            row = _indexed(path, rollout_id)
            if row is not None:
                return _rollout(row, path)
        for path in paths:
            for row in rows(path, containing=rollout_id.encode()):
                if row["id"] == rollout_id:
                    return _rollout(row, path)
        return None

    # --- the lock, the files ---

    def lock(self) -> None:
        """Be the one writer. Raises UserError naming the process that is."""
        if self._lock_fd is not None:
            return
        with storing(self.path):
            fd = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.ftruncate(fd, 0)
                os.pwrite(fd, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
            except BlockingIOError:
                pid, _, host = os.pread(fd, 256, 0).decode("ascii", "replace").strip().partition(" ")
                owner = (pid or "unknown") + (f" on {host}" if host not in ("", socket.gethostname()) else "")
                os.close(fd)
                cure = "wait until it ends, or end it"
                raise UserError(f"process {owner} is writing this run", where=str(self.path), cure=cure) from None
        self._lock_fd = fd

    def writer(self) -> int | None:
        """The process of this machine that holds the lock, None when there is none. Takes no lock itself."""
        pid, host = self._owner()
        is_here = host in ("", socket.gethostname())
        return pid if pid is not None and is_here and has_open(pid, self.path / ".lock") else None

    @property
    def is_written(self) -> bool:
        """Whether somebody writes the run: a process of this machine, or one of another that gave a sign of life in
        the last two minutes, by this machine's clock.
        """
        pid, host = self._owner()
        if pid is None or host in ("", socket.gethostname()):
            return self.writer() is not None
        now, signs = time.time(), (self.path / name for name in _SIGNS)
        return any(now - path.stat().st_mtime < _SILENT_S for path in signs if path.exists())

    def _owner(self) -> tuple[int | None, str]:
        """Who last held the lock: process and machine, "" where an older version did not say which."""
        try:
            pid, _, host = (self.path / ".lock").read_text("ascii").strip().partition(" ")
            return int(pid), host
        except (OSError, ValueError):
            return None, ""

    def close(self) -> None:
        """Close all files and release the lock. The store can go on reading."""
        self._files.close()
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _append(self, path: Path, line: str) -> int:
        self.lock()
        return self._files.append(path, line)

    def _write_json(self, path: Path, value: dict[str, Any]) -> None:
        self.lock()
        replace(path, (json.dumps(finite(value), indent=2, allow_nan=False) + "\n").encode())


def _line(rollout: Rollout) -> str:
    """The rollout in ASCII, so that no letter of a model's or a tool's ends a line."""
    try:
        return rollout.model_dump_json(ensure_ascii=True)
    except PydanticSerializationError:  # half a character, which tools can send as \ud800
        return json.dumps(rollout.model_dump())


def _indexed(path: Path, rollout_id: str) -> dict[str, Any] | None:
    """The row the index points at, if the index has it and points right."""
    try:
        lines = path.with_suffix(".idx").read_text("ascii", "replace").splitlines()
    except FileNotFoundError:
        return None
    for line in reversed(lines):
        name, _, offset = line.partition(" ")
        if name == rollout_id and offset.isascii() and offset.isdigit():
            with path.open("rb") as file:
                file.seek(int(offset))
                row = parsed(file.readline())
            return row if row is not None and row.get("id") == rollout_id else None
    return None


def _event(level: Level, message: str, data: dict[str, Any] | None) -> str:
    return json.dumps({"time": time.time(), "level": level, "message": message, "data": finite(data)}, allow_nan=False)


def _rollout(row: dict[str, Any], path: Path) -> Rollout:
    try:
        return Rollout.model_validate(row)
    except ValidationError as error:
        problem = f"{path}: rollout {row.get('id')} is not what this version of rft writes: {error}"
        raise StorageError(problem, cure="read the run with the version of rft that wrote it") from None


def _file_name(name: str) -> str:
    """A name that may hold anything, with only what every disk accepts."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", name)


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))
