"""Checkpoints: everything a bit-exact resume needs, in one folder that is either whole or invisible.

checkpoints/step_000012/ holds what is trained (a peft folder, or model.safetensors of a whole model), trainer.pt
(optimizer, schedule, random states, step), extra.json (what the caller wants back) and MANIFEST (sha256 of every other
file, written last). A folder is written under a temporary name, synced to disk and renamed. With several ranks rank 0
saves and loads, the others take part where weights are sharded; the random states are its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from rft.errors import StorageError, UserError
from rft.trainers.policy import Policy

_NAME = re.compile(r"step_(\d{6,})")
_MANIFEST = "MANIFEST"
_STATE = "trainer.pt"


def save(directory: Path, step: int, policy: Policy, extra: dict[str, Any]) -> Path:
    """Write `directory/step_<step>` and return it; one of the same step is replaced. `extra` must be JSON.

    Raises StorageError naming the folder and the cure when the disk refuses; earlier checkpoints stay as they are.
    """
    target = directory / f"step_{step:06d}"
    temporary = directory / f".{target.name}.{os.getpid()}.tmp"
    try:
        temporary.mkdir(parents=True)
        _write(temporary, step, policy, extra)
        if target.exists():  # a resumed run may pass the same step again
            shutil.rmtree(target)
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
    _verify(path)
    state = torch.load(path / _STATE, map_location="cpu", weights_only=True)
    policy.load_weights(path)
    policy.load_training_state(path / _STATE)
    _set_random_states(state["random"])
    return {**json.loads((path / "extra.json").read_text(encoding="utf-8")), "step": state["step"]}


def load_weights(path: Path, policy: Policy) -> None:
    """Only what was trained: for a run that starts where another one ended. Raises as `load` does, UserError too."""
    _verify(path)
    policy.load_weights(path)


def find(place: Path) -> Path:
    """The checkpoint that a path names: itself, or the newest one of a run folder. Raises UserError without one."""
    if (place / _MANIFEST).is_file():
        return place
    found = latest(place / "checkpoints")
    if found is None:
        cure = "name a run folder that has a checkpoint, or a folder checkpoints/step_NNNNNN in one"
        raise UserError("there is no complete checkpoint", where=str(place), cure=cure)
    return found


def latest(directory: Path) -> Path | None:
    """The complete checkpoint of the highest step, or None. Whether its files are intact is `load`'s question."""
    complete = _complete(directory)
    return complete[-1] if complete else None


def prune(directory: Path, keep: int, best: Collection[int] = ()) -> None:
    """Delete all but the `keep` newest complete checkpoints and those of the steps `best`.

    What interrupted saves of any process left goes too.
    """
    for old in _complete(directory)[:-keep]:
        if _step(old) not in best:
            shutil.rmtree(old)
    for left_over in directory.glob(".step_*.tmp"):
        shutil.rmtree(left_over, ignore_errors=True)


def _write(folder: Path, step: int, policy: Policy, extra: dict[str, Any]) -> None:
    policy.save_weights(folder)
    torch.save({"step": step, **policy.training_state(), "random": _random_states()}, folder / _STATE)
    (folder / "extra.json").write_text(json.dumps(extra), encoding="utf-8")
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    lines = [f"{_sha256(file)}  {file.relative_to(folder).as_posix()}\n" for file in files]
    for file in files:
        _sync(file)
    (folder / _MANIFEST).write_text("".join(lines), encoding="utf-8")
    _sync(folder / _MANIFEST)
    _sync(folder)


def _verify(path: Path) -> None:
    """Raises StorageError that names a corrupt checkpoint and the one before it."""
    problem = _problem(path)
    if problem:
        earlier = [other for other in _complete(path.parent) if _step(other) < (_step(path) or 0)]
        cure = f"remove it to resume from {earlier[-1]}" if earlier else "start anew: there is no earlier checkpoint"
        raise StorageError(f"checkpoint {path} is corrupt: {problem}", cure=cure)


def _problem(path: Path) -> str:
    """What is wrong with a checkpoint's files, or ""."""
    try:
        lines = (path / _MANIFEST).read_text(encoding="utf-8").splitlines()
        for line in lines:
            digest, _, name = line.partition("  ")
            if _sha256(path / name) != digest:
                return f"{name} is not the file that was written"
    except OSError as error:
        return f"cannot read {error.filename}: {error.strerror}"
    return "" if lines else f"{_MANIFEST} is empty"


def _complete(directory: Path) -> list[Path]:
    """The checkpoints that have a manifest, in order of step."""
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if _NAME.fullmatch(path.name) and (path / _MANIFEST).is_file()]
    return sorted(found, key=_step)


def _step(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    return int(match.group(1)) if match else 0


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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Make a file's contents, or a folder's entries, survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
