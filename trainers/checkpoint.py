"""Checkpoints: everything a bit-exact resume needs, in one folder that is either whole or invisible.

checkpoints/step_000012/ holds what is trained (a peft folder, or model.safetensors of a whole model), trainer.pt
(optimizer, schedule, random states, step), extra.json (what the caller wants back) and MANIFEST (sha256 of every other
file, written last). A folder is written under a temporary name, synced to disk and renamed. With several ranks rank 0
saves and loads, the others take part where weights are sharded; the random states are its own.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from rft.checkpoints import MANIFEST, complete, find, latest, name_of, sha256, step_of, verify
from rft.errors import StorageError
from rft.trainers.policy import Policy

_STATE = "trainer.pt"

__all__ = ["find", "latest", "load", "load_weights", "prune", "save"]  # the first two are rft/checkpoints.py's


def save(directory: Path, step: int, policy: Policy, extra: dict[str, Any]) -> Path:
    """Write `directory/step_<step>` and return it; one of the same step is replaced. `extra` must be JSON.

    Raises StorageError naming the folder and the cure when the disk refuses; earlier checkpoints stay as they are.
    """
    target = directory / name_of(step)
    temporary = _temporary(target)
    try:
        temporary.mkdir(parents=True)
        _write(temporary, step, policy, extra)
        if target.exists():  # an interruption left it incomplete, or the caller makes it again
            _remove(target)
        temporary.rename(target)
        _sync(directory)
    except (OSError, SafetensorError) as error:  # safetensors wraps what the system said
        raise _storage_error(target, error) from error
    except RuntimeError as error:  # torch's zip writer reports a full disk as a RuntimeError
        if "write" not in str(error) and "enforce fail" not in str(error):
            raise
        raise _storage_error(target, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def load(path: Path, policy: Policy) -> dict[str, Any]:
    """Restore `policy` and the random states from a checkpoint; returns its `extra`, and its step as "step".

    Verifies every file first. Raises StorageError that names a corrupt checkpoint and the one before it.
    """
    verify(path)
    state = torch.load(path / _STATE, map_location="cpu", weights_only=True)
    policy.load_weights(path)
    policy.load_training_state(path / _STATE)
    _set_random_states(state["random"])
    return {**json.loads((path / "extra.json").read_text(encoding="utf-8")), "step": state["step"]}


def load_weights(path: Path, policy: Policy) -> None:
    """Only what was trained: for a run that starts where another one ended. Raises as `load` does, UserError too."""
    verify(path)
    policy.load_weights(path)


def prune(directory: Path, keep: int, best: Collection[int] = ()) -> None:
    """Delete all but the `keep` newest complete checkpoints and those of the steps `best`.

    What interrupted saves of any process left goes too.
    """
    for old in complete(directory)[:-keep]:
        if step_of(old) not in best:
            _remove(old)
    for left_over in directory.glob(".step_*.tmp"):
        shutil.rmtree(left_over, ignore_errors=True)


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}.tmp")


def _remove(path: Path) -> None:
    """Under another name first: half of a checkpoint must not look like a whole one."""
    doomed = path.with_name(f".{path.name}.{os.getpid()}.old.tmp")
    path.rename(doomed)
    shutil.rmtree(doomed)


def _write(folder: Path, step: int, policy: Policy, extra: dict[str, Any]) -> None:
    policy.save_weights(folder)
    torch.save({"step": step, **policy.training_state(), "random": _random_states()}, folder / _STATE)
    (folder / "extra.json").write_text(json.dumps(extra), encoding="utf-8")
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    lines = [f"{sha256(file)}  {file.relative_to(folder).as_posix()}\n" for file in files]
    for file in files:
        _sync(file)
    (folder / MANIFEST).write_text("".join(lines), encoding="utf-8")
    _sync(folder / MANIFEST)
    _sync(folder)


def _random_states() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators, as types that torch.load accepts weights-only."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    words = torch.from_numpy(np.asarray(keys).astype(np.int64))
    numpy_state = [name, words, int(position), int(has_gauss), float(gauss)]
    states: dict[str, Any] = {"python": random.getstate(), "numpy": numpy_state, "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def _set_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])


def _storage_error(target: Path, error: Exception) -> StorageError:
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error).splitlines()[0]
    cure = "free space there or point runs_dir elsewhere, then resume: earlier checkpoints are untouched"
    return StorageError(f"checkpoint {target} cannot be written: {reason}", cure=cure)


def _sync(path: Path) -> None:
    """Make a file's contents, or a folder's entries, survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
