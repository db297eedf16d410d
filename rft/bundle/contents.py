"""What goes into a bundle besides wheels: the project, models, data. Links are followed, copies complete or absent."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import rft
from rft.bundle.install import copy_file, is_copied
from rft.errors import UserError

# A checkout without what is made in it. Tests come along: scripts/bench_* and scripts/run_seed_cookbook use them.
PROJECT_PARTS = (
    *("rft", "envs", "graders", "trainers", "configs", "scripts", "constraints", "tests"),
    *("pyproject.toml", "README.md", "CONTRIBUTING.md", "LICENSE"),
)
_LEFT_OUT = ("__pycache__", "node_modules", ".mypy_cache", ".ruff_cache", ".pytest_cache")


def checkout() -> Path:
    """The root of the project this code belongs to. Raises UserError when it is only an installed package."""
    root = Path(rft.__file__).resolve().parent.parent
    if not all((root / name).exists() for name in ("pyproject.toml", "scripts/setup", "constraints/cpu.txt")):
        cure = "clone the project, run its scripts/setup, and then .venv/bin/rft bundle there"
        raise UserError("a bundle carries the whole project, and this is only its package", where=str(root), cure=cure)
    return root


def pack_project(root: Path, path: Path, replaced: dict[str, bytes]) -> None:
    """Write the checkout as a tar, whose links and modes survive any disk. replaced: other texts for some files."""
    part = path.with_name(f".{path.name}.part")
    with tarfile.open(part, "w", format=tarfile.PAX_FORMAT) as archive:
        for name in PROJECT_PARTS:
            if (root / name).exists():
                archive.add(root / name, arcname=name, filter=lambda entry: _entry(entry, replaced))
        for name, data in replaced.items():
            _add(archive, name, data)
    part.replace(path)


def _entry(entry: tarfile.TarInfo, replaced: dict[str, bytes]) -> tarfile.TarInfo | None:
    """Nobody's in particular; None leaves it out."""
    is_made = Path(entry.name).name in _LEFT_OUT or entry.name.endswith((".egg-info", ".pyc"))
    if is_made or entry.name in replaced:
        return None
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(data), 0o644
    archive.addfile(entry, io.BytesIO(data))


def check_model(path: Path) -> None:
    """Raises UserError unless it is a folder that transformers can load."""
    if not path.is_dir():
        raise UserError("no such folder", where=f"--model {path}", cure="give the folder of a model")
    if not (path / "config.json").is_file():
        cure = "give a folder that transformers loads (`rft export` and `save_pretrained` write one)"
        raise UserError("holds no config.json", where=f"--model {path}", cure=cure)


def check_data(path: Path) -> None:
    """Raises UserError unless it exists."""
    if not path.exists():
        raise UserError("no such file or folder", where=f"--data {path}", cure="give a JSONL file or a folder of them")


def placed(root: Path, part: str, given: list[Path]) -> dict[str, Path]:
    """Where each goes, `models/NAME` or `data/NAME`; the same place as in the checkout, so that configs still fit."""
    found: dict[str, Path] = {}
    for path in given:
        there = Path(os.path.abspath(path))
        inside = there.relative_to(root) if there.is_relative_to(root / part) else Path(part, there.name)
        if found.setdefault(inside.as_posix(), path) is not path or inside.as_posix() == part:
            cure = f"copy or link it under a name of its own, e.g. {part}/NAME"
            raise UserError(f"its place in the bundle, {inside}, is taken", where=str(path), cure=cure)
    return found


def files_of(name: str, path: Path) -> Iterator[tuple[str, Path]]:
    """(name in the bundle, file) of everything below; links are followed, also to folders. Raises UserError."""
    if path.is_file():
        yield _named(name), path
        return
    seen = set()
    for folder, _, names in os.walk(path, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            continue  # a link to a folder above it
        seen.add(real)
        for file in sorted(names):
            there = Path(folder, file)
            if not there.is_file():
                cure = "restore what it points to, or remove the link"
                raise UserError("is a link to nothing, or no file", where=str(there), cure=cure)
            yield _named(f"{name}/{there.relative_to(path).as_posix()}"), there


def _named(name: str) -> str:
    if any(letter in name for letter in "\n\r\\"):
        raise UserError("a name with a line end or a backslash cannot be in a list of checksums", where=repr(name))
    return name


def copy_all(files: dict[str, Path], out: Path) -> None:
    """Bring each to its place, unless it is there; and remove what is there and not among them."""
    for part in ("models", "data"):
        for path in sorted((out / part).rglob("*"), reverse=True):
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
            elif not path.is_dir() and path.relative_to(out).as_posix() not in files:
                path.unlink()
    for name, path in files.items():
        if not is_copied(path, out / name):
            copy_file(path, out / name)


def missing_bytes(files: dict[str, Path], out: Path) -> int:
    return sum(path.stat().st_size for name, path in files.items() if not is_copied(path, out / name))


def free_bytes(out: Path) -> int:
    """On the disk where `out` is or will be."""
    place = next(path for path in (out, *out.absolute().parents) if path.exists())
    return shutil.disk_usage(place).free
