"""Runs rft's command line in forked processes, each of which kills itself at a named point of the real code.

Reads cases from stdin, one JSON object a line: {"point": name or null, "count": n, "pause": run folder or null,
"args": [...], "log": path}; answers each with its wait status as a number on a line. With `pause` the run is asked to
pause at the point, by the file that any process may write, and goes on. Everything heavy is imported once, before the
first fork; nothing has computed by then, so that no thread is lost in a fork. A child is the real thing but for the
wrapped function, and dies with this process.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch  # noqa: F401  the imports that a child would otherwise make again
import torch
from peft import PeftModel  # noqa: F401
from transformers import AutoModelForCausalLM  # noqa: F401

import rft.cli
import rft.engines.transformers
import rft.job
import rft.rollout
import rft.trainers.grpo
from rft import collect, sift, store
from rft.trainers import checkpoint, full, lora, sync, update

_PR_SET_PDEATHSIG = 1


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def half(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def before(function: Callable[..., Any], *args: Any, **options: Any) -> None:
    die()


def after(function: Callable[..., Any], *args: Any, **options: Any) -> None:
    function(*args, **options)
    die()


async def awaited_before(function: Callable[..., Any], *args: Any, **options: Any) -> None:
    die()


def halfway_through_saving(function: Callable[..., Any], folder: Path, *args: Any) -> None:
    """A manifest was not written, a state file in part."""
    function(folder, *args)
    (folder / "MANIFEST").unlink()
    half(folder / "trainer.pt")
    die()


def halfway_through_publishing(function: Callable[..., Any], path: Path, write: Callable[[Path], None]) -> None:
    def write_half(folder: Path) -> None:
        write(folder)
        half(next(iter(sorted(folder.glob("*.safetensors")))))
        die()

    function(path, write_half)


def torn_row(function: Callable[..., Any], self: store.RunStore, row: dict[str, Any]) -> None:
    with (self.path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row)[: len(json.dumps(row)) // 2])
    die()


def torn_rollout(function: Callable[..., Any], self: store.RunStore, rollout: Any) -> None:
    with (self.rollout_folder / f"step_{rollout.step:06d}.jsonl").open("a") as file:
        file.write(rollout.model_dump_json()[:200])
    die()


def torn_state(function: Callable[..., Any], self: store.RunStore, state: dict[str, Any]) -> None:
    """The temporary file that a replacement begins with."""
    (self.path / f".state.json.{os.getpid()}.tmp").write_text('{"status": "run')
    die()


Point = tuple[Any, str, Callable[..., Any]]
POINTS: dict[str, Point] = {
    "sampling a turn": (rft.rollout, "_sample_turn", awaited_before),
    "between two rollouts": (collect, "run_rollout", awaited_before),
    "writing a rollout": (store.RunStore, "append_rollout", torn_rollout),
    "grading": (rft.rollout, "_grade", awaited_before),
    "forward": (update, "backward", before),
    "optimizer, lora": (lora.LoraWeights, "after_step", before),
    "optimizer, full": (full.FullWeights, "after_step", before),
    "saving": (checkpoint, "_write", halfway_through_saving),
    "saved": (checkpoint, "save", after),
    "pruning": (checkpoint.shutil, "rmtree", before),
    "publishing": (sync, "_replace", halfway_through_publishing),
    "probing": (sync.Sync, "probe", awaited_before),
    "metrics": (store.RunStore, "append_metrics", torn_row),
    "measured": (store.RunStore, "append_metrics", after),
    "state": (store.RunStore, "write_state", torn_state),
    "rewinding": (sift, "replace", before),
}


def asking(run: Path) -> Callable[..., Any]:
    """What asks for a pause and then does what was to be done, awaitable or not."""

    def ask(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        store.RunStore(run).ask_to_pause()
        return function(*args, **options)

    return ask


def arm(point: str, count: int, pause: str | None) -> None:
    """Let the `count`-th call at a point, from 1, be its last, or the one in which a pause is asked for."""
    place, name, ending = POINTS[point]
    if pause is not None:
        ending = asking(Path(pause))
    function, calls = getattr(place, name), 0

    @functools.wraps(function)
    def wrapped(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return ending(function, *args, **options) if calls == count else function(*args, **options)

    setattr(place, name, wrapped)


def child(case: dict[str, Any]) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    log = os.open(case["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    torch.set_num_threads(1)
    if case["point"] is not None:
        arm(case["point"], case["count"], case["pause"])
    sys.argv = ["rft", *case["args"]]
    rft.cli.main()


def main() -> None:
    for line in sys.stdin:
        case = json.loads(line)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                child(case)
            except SystemExit as ending:
                code = int(ending.code or 0)
            except BaseException:  # the parent's loop must not go on in the child
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stdout.flush()
                os._exit(code)
        print(os.waitpid(pid, 0)[1], flush=True)


if __name__ == "__main__":
    main()
