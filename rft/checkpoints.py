"""Which checkpoints there are, and whether they are intact: names and checksums, no weights, no torch.

checkpoints/step_000012/ is complete when it holds MANIFEST: the sha256 of every other file, written last by
trainers/checkpoint.py. Folders without one are what an interruption left; nothing here uses or removes them.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from rft.errors import StorageError, UserError
from rft.files import move_aside, storing

MANIFEST = "MANIFEST"
_NAME = re.compile(r"step_(\d{6,})")


def name_of(step: int) -> str:
    return f"step_{step:06d}"


def step_of(path: Path) -> int:
    """The step that a checkpoint's name says, 0 for other names."""
    match = _NAME.fullmatch(path.name)
    return int(match.group(1)) if match else 0


def complete(directory: Path) -> list[Path]:
    """The checkpoints that have a manifest, in order of step."""
    return [path for path in _named(directory) if (path / MANIFEST).is_file()]


def incomplete(directory: Path) -> list[Path]:
    """The folders named as checkpoints are that have none, in order of step."""
    return [path for path in _named(directory) if not (path / MANIFEST).is_file()]


def _named(directory: Path) -> list[Path]:
    found = directory.iterdir() if directory.is_dir() else ()
    return sorted((path for path in found if _NAME.fullmatch(path.name)), key=step_of)


def latest(directory: Path) -> Path | None:
    """The complete checkpoint of the highest step, or None. Whether its files are intact is `verify`'s question."""
    found = complete(directory)
    return found[-1] if found else None


def named(directory: Path, name: str) -> Path:
    """The complete checkpoint called "last", "12" or "step_000012". Raises UserError naming those there are."""
    found = complete(directory)
    wanted = name_of(int(name)) if name.isascii() and name.isdigit() else name
    chosen = found[-1:] if name == "last" else [path for path in found if path.name == wanted]
    if not chosen:
        names = ", ".join(path.name for path in found) or "none yet"
        raise UserError(f"there is no checkpoint `{name}`", where=str(directory), cure=f"choose one of: {names}")
    return chosen[0]


def find(place: Path) -> Path:
    """The checkpoint that a path names: itself, or the newest one of a run folder. Raises UserError without one."""
    if (place / MANIFEST).is_file():
        return place
    found = latest(place / "checkpoints")
    if found is None:
        cure = "name a run folder that has a checkpoint, or a folder checkpoints/step_NNNNNN in one"
        raise UserError("there is no complete checkpoint", where=str(place), cure=cure)
    return found


def verify(path: Path, around: str = "--resume --checkpoint {name}") -> None:
    """Compare every file with the manifest. Raises StorageError that names a corrupt checkpoint and a way around it.

    around: how a person chooses another checkpoint, by its `{name}` or `{path}`.
    """
    problem = _problem(path)
    if problem:
        earlier = [other for other in complete(path.parent) if step_of(other) < step_of(path)]
        cure = "start anew: there is no earlier checkpoint"
        if earlier:
            cure = "use the one before it: " + around.format(name=earlier[-1].name, path=earlier[-1])
        raise StorageError(f"checkpoint {path} is corrupt: {problem}", cure=cure)


def supersede_after(path: Path) -> None:
    """Move aside the checkpoints of later steps than this one's, corrupt ones too: a run goes on from this one."""
    with storing(path.parent):
        for other in _named(path.parent):
            if step_of(other) > step_of(path):
                move_aside(other, path.parent / "superseded")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _problem(path: Path) -> str:
    """What is wrong with a checkpoint's files, or ""."""
    try:
        lines = (path / MANIFEST).read_text(encoding="utf-8", errors="replace").splitlines()
        for line in lines:
            digest, _, name = line.partition("  ")
            if sha256(path / name) != digest:
                return f"{name} is not the file that was written"
    except OSError as error:
        return f"cannot read {error.filename}: {error.strerror}"
    return "" if lines else f"{MANIFEST} is empty"
