"""How a bundle is made, from top to bottom: everything is checked, then written, and MANIFEST last.

Made again, a folder is brought to what is asked now; what is there and fits is kept. Until MANIFEST is there again,
nobody can install from it.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from packaging.tags import Tag
from packaging.utils import parse_wheel_filename
from pydantic import BaseModel, ConfigDict

import rft
from rft.bundle import contents, install, pins, wheels
from rft.bundle.pip import check_pip
from rft.bundle.target import Kind, Target
from rft.errors import StorageError, UserError, WorldError
from rft.files import replace

_MARK = ".rft-bundle"  # the first file that is written: this folder is ours
_WHEELS_BYTES = {"cpu": 1_300_000_000, "cuda": 9_000_000_000}  # the second is a guess, nothing was downloaded
_MARGIN_BYTES = 200_000_000
Say = Callable[[str], None]


class Facts(BaseModel):
    """bundle.json: what `install` has to know. needs_glibc: the newest that a wheel asks for."""

    model_config = ConfigDict(extra="forbid")

    rft: str
    target: Kind
    python: str
    machine: str
    needs_glibc: tuple[int, int]
    sets: list[str]  # options of scripts/setup
    models: list[str]
    data: list[str]
    project_sha256: str


@dataclass(frozen=True, slots=True)
class Order:
    """What was asked for, checked: nothing was written yet. files: name in the bundle -> where it is."""

    out: Path
    target: Target
    root: Path
    models: dict[str, Path]
    data: dict[str, Path]
    files: dict[str, Path]


def take_order(out: Path, target: Target, models: list[Path], data: list[Path], root: Path | None = None) -> Order:
    """Check all that can be checked before anything is written; root: of the project, by default ours.

    Raises UserError.
    """
    root = root or contents.checkout()
    check_pip()
    for path in models:
        contents.check_model(path)
    for path in data:
        contents.check_data(path)
    _check_out(out)
    places = contents.placed(root, "models", models), contents.placed(root, "data", data)
    files = {name: file for place in places for at, path in place.items() for name, file in contents.files_of(at, path)}
    order = Order(out, target, root, *places, files)
    _check_disk(order)
    return order


def make(order: Order, say: Say) -> Facts:
    """Write the bundle, or go on with one. Raises UserError, WorldError (an index, a disk)."""
    out, wheelhouse = order.out, order.out / "wheels"
    wheelhouse.mkdir(parents=True, exist_ok=True)
    with _alone(out):
        (out / install.MANIFEST).unlink(missing_ok=True)
        replace(out / _MARK, b"made by `rft bundle`\n")
        versions = asyncio.run(_collect(order, wheelhouse, say))
        say(f"copying {len(order.files)} files of models and data")
        contents.copy_all(order.files, out)
        facts = _write_small(order, versions)
        say("computing checksums")
        _write_manifest(out, say)
    return facts


async def _collect(order: Order, wheelhouse: Path, say: Say) -> dict[str, str]:
    """The wheels; returns name -> version of each."""
    target = order.target
    if target.kind == "cuda":
        say("asking pip which versions go together with CUDA")

        async def gather(some: dict[str, str]) -> None:
            await wheels.gather(some, wheelhouse, target, say)

        versions = await pins.cuda_pins(order.root, target, wheelhouse, gather)
    else:
        versions = pins.cpu_pins(order.root, target)
    await wheels.gather(versions, wheelhouse, target, say)
    for path in wheels.stale(versions, wheelhouse, target):
        path.unlink()
    return versions


def _write_small(order: Order, versions: dict[str, str]) -> Facts:
    """The project, the installer and the facts."""
    out, target = order.out, order.target
    contents.pack_project(order.root, out / install.PROJECT, _constraints(target, versions))
    facts = Facts(
        rft=rft.__version__,
        target=target.kind,
        python=target.python_text,
        machine=target.machine,
        needs_glibc=max(map(_needs_glibc, (out / "wheels").glob("*.whl")), default=(2, 0)),
        sets=[name for name in pins.SETS if name != "cpu"],
        models=sorted(order.models),
        data=sorted(order.data),
        project_sha256=install.digest(out / install.PROJECT),
    )
    replace(out / install.FACTS, (facts.model_dump_json(indent=1) + "\n").encode())
    code = Path(install.__file__)
    replace(out / "install.py", code.read_bytes())
    start = code.with_name("install.sh").read_text(encoding="utf-8").replace("@PYTHON@", target.python_text)
    replace(out / "install", start.encode(), mode=0o777)
    return facts


def _constraints(target: Target, versions: dict[str, str]) -> dict[str, bytes]:
    """The complete set where the project has only its first versions."""
    if target.kind == "cpu":
        return {}
    lines = ["# What pip resolved when the bundle was made, complete: for scripts/setup --cuda --wheels FOLDER."]
    lines += [f"{name}=={version.partition('+')[0]}" for name, version in sorted(versions.items())]
    return {"constraints/cuda.txt": ("\n".join(lines) + "\n").encode()}


def _needs_glibc(wheel: Path) -> tuple[int, int]:
    """The oldest glibc that can run it; (2, 0) when it holds no machine code."""
    return min(map(_glibc_of, parse_wheel_filename(wheel.name)[3]))


def _glibc_of(tag: Tag) -> tuple[int, int]:
    name = tag.platform
    old = {"manylinux2014_": (2, 17), "manylinux2010_": (2, 12), "manylinux1_": (2, 5)}
    for start, glibc in old.items():
        if name.startswith(start):
            return glibc
    parts = name.split("_")
    return (int(parts[1]), int(parts[2])) if parts[0] == "manylinux" else (2, 0)


def _write_manifest(out: Path, say: Say) -> None:
    """Everything in the folder but itself, after all of it is on the disk. `sha256sum -c MANIFEST` reads it."""
    names = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    names = [name for name in names if name not in (install.MANIFEST, _MARK)]
    lines, size = [], 0
    for name in names:
        lines.append(f"{install.digest(out / name)}  {name}\n")
        size += (out / name).stat().st_size
    os.sync()
    replace(out / install.MANIFEST, "".join(lines).encode())
    say(f"{len(names)} files, {size / 1e9:.2f} GB")


def _check_out(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError("is a file", where=str(out), cure="give a folder that does not exist yet")
    if out.is_dir() and any(out.iterdir()) and not (out / _MARK).exists():
        raise UserError("is not empty and no bundle", where=str(out), cure="give a folder that does not exist yet")


def _check_disk(order: Order) -> None:
    have = wheels.size_bytes(order.out / "wheels")
    needed = max(_WHEELS_BYTES[order.target.kind] - have, 0) + _MARGIN_BYTES
    needed += contents.missing_bytes(order.files, order.out)
    if (free := contents.free_bytes(order.out)) < needed:
        problem = f"{free / 1e9:.1f} GB of disk are free, the bundle needs about {needed / 1e9:.1f} GB"
        raise UserError(problem, where=str(order.out), cure="free some space, or give a folder on another disk")


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """One maker at a time, and a disk's failures in words. Raises WorldError."""
    fd = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if not _is_locked(fd):
            raise WorldError(f"{out} is being made by another process", cure="wait for its end")
        yield
    except OSError as error:
        cure = "see to the disk, then do the same again: it goes on where it was"
        raise StorageError(f"{error.filename or out} cannot be written: {error.strerror}", cure=cure) from error
    finally:
        os.close(fd)


def _is_locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
