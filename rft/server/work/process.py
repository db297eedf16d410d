"""The process of one job: its command, its log, its signs of life, its end.

Guarantees: it and all it started are gone when the context ends, and when this server dies, however it dies (see
rft/supervise.py). Knows nothing of the wire.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from rft.cluster.queue import QUEUE
from rft.engines.launch import ServerProcess, launch, make_scratch
from rft.errors import StorageError
from rft.files import replace, storing
from rft.server.settings import SlurmWorkerConfig, WorkerConfig
from rft.server.work.endings import Ending, judge
from rft.store import RunStore

CONFIG, LOG = "job_config.yaml", "worker.log"
_ENDING, _LAUNCH = "ending.json", "launch.yaml"
# What configs/accelerate/single.yaml says; without it accelerate would read the user's own defaults.
_ONE_PROCESS = """compute_environment: LOCAL_MACHINE
distributed_type: 'NO'
machine_rank: 0
main_training_function: main
mixed_precision: 'no'
num_machines: 1
num_processes: 1
use_cpu: false
"""
_SIGNS = ("state.json", "live.json", "metrics.jsonl", "events.jsonl", "checkpoints", "engine.log", LOG, QUEUE)
_NUM_LINES = 5  # of the log, where the run said nothing else
_POLL_S = 0.1
_MARGIN_S = 10.0

Mark = tuple[int, int, int]


class JobProcess:
    """One process on a run folder, from its start to its end."""

    def __init__(self, folder: Path, process: ServerProcess, state_before: Mark | None) -> None:
        self._folder, self._process, self._state_before = folder, process, state_before
        self._has_begun = False
        self._signs: list[Mark | None] = []
        self._seen_at = asyncio.get_running_loop().time()

    @classmethod
    @asynccontextmanager
    async def started(cls, folder: Path, config: WorkerConfig, *, is_warmup: bool) -> AsyncIterator[JobProcess]:
        """A process that trains in the folder, or goes on training there. Raises StorageError."""
        with storing(folder):
            (folder / _ENDING).unlink(missing_ok=True)
        state_before = mark_of(folder / "state.json")
        environment = {"HF_HUB_OFFLINE": "1", "RFT_ENDING": str(folder / _ENDING)}
        if is_warmup:  # trains on one device
            environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
        command = _command(folder, config, is_warmup=is_warmup)
        process = await launch(command, environment, make_scratch(), folder / LOG, config.stop_timeout_s)
        try:
            yield cls(folder, process, state_before)
        finally:
            await process.close()

    async def has_ended(self, timeout_s: float) -> bool:
        return await self._process.has_ended(timeout_s)

    @property
    def has_begun(self) -> bool:
        """Whether the run has said anything since this process started, but that it waits in a queue."""
        if not self._has_begun and mark_of(self._folder / "state.json") != self._state_before:
            self._has_begun = RunStore(self._folder).read_state().get("status") != "queued"
        return self._has_begun

    def silent_s(self) -> float:
        """Since when nothing in the run folder changed, by a clock that does not jump."""
        signs, now = [mark_of(self._folder / name) for name in _SIGNS], asyncio.get_running_loop().time()
        if signs != self._signs:
            self._signs, self._seen_at = signs, now
        return now - self._seen_at

    def ending(self) -> Ending:
        """How it ended, once it has."""
        store = RunStore(self._folder)
        state = store.read_state() if self.has_begun else {}
        last_lines = self._process.log_tail(_NUM_LINES) if (self._folder / LOG).exists() else []
        return judge(_told(self._folder / _ENDING), state, is_done=store.is_done, last_lines=last_lines)


async def wait_until_free(folder: Path, config: WorkerConfig) -> None:
    """Wait until no process of an earlier server writes the run; one that does not end in time is killed.

    It was told to end when its server died. Raises StorageError when it cannot be ended either. A job of Slurm is not
    waited for: `rft submit` follows it again.
    """
    if isinstance(config, SlurmWorkerConfig):
        return
    store = RunStore(folder)
    if await _is_free(store, 2 * config.stop_timeout_s + _MARGIN_S):
        return
    if (writer := store.writer()) is not None:
        os.kill(writer, signal.SIGKILL)  # it holds the lock of this run, so it is one of ours
    if not await _is_free(store, _MARGIN_S):
        raise StorageError(f"process {store.writer()} writes {folder} and cannot be ended", cure="end it")


async def _is_free(store: RunStore, timeout_s: float) -> bool:
    """Wait for the lock of another server's child: nobody tells us of its end, so we look."""
    clock = asyncio.get_running_loop()
    deadline = clock.time() + timeout_s
    while is_taken := store.writer() is not None:
        if clock.time() >= deadline:
            break
        await asyncio.sleep(_POLL_S)
    return not is_taken


def mark_of(path: Path) -> Mark | None:
    """What changes whenever a file does; None when there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _command(folder: Path, config: WorkerConfig, *, is_warmup: bool) -> list[str]:
    resume = ["--resume"] if (folder / "config.json").is_file() else []
    run = [str(folder / CONFIG), "--run-id", folder.name, *resume]
    if isinstance(config, SlurmWorkerConfig):
        return [sys.executable, "-m", "rft", "submit", *run, *config.options(is_warmup=is_warmup), "--wait"]
    if is_warmup:
        return [sys.executable, "-m", "rft", "warmup", *run]
    launcher = config.launch
    if not launcher:
        plain = replace(folder / _LAUNCH, _ONE_PROCESS.encode())
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(plain)]
    return [*launcher, "-m", "rft", "train", *run]


def _told(path: Path) -> dict[str, Any] | None:
    """What the command wrote about its error, None when it could not."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
