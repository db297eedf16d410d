"""The exact versions a bundle holds: the project's constraints, or, for CUDA, what pip resolves from them."""

from __future__ import annotations

import json
import re
import tempfile
import tomllib
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from rft.bundle.pip import pip, refusal
from rft.bundle.target import Target
from rft.errors import UserError

SETS = ("cpu", "graders", "warmup", "cluster")  # constraints files; `dev` stays at home
_CUDA_EXTRAS = ("train", "cuda", "graders", "warmup", "cluster")
_RESOLVE_LIMIT_S = 900
# What pip says of a package without wheels, first where nothing else holds its version.
_MISSING = re.compile(r"(?:No matching distribution found for|The user requested \(constraint\)) ([A-Za-z0-9._-]+)")


def pinned(root: Path, names: tuple[str, ...], target: Target) -> dict[str, str]:
    """name -> version of the constraints files, where their markers hold on the target."""
    found: dict[str, str] = {}
    for name in names:
        for line in (root / "constraints" / f"{name}.txt").read_text(encoding="utf-8").splitlines():
            if text := line.partition("#")[0].strip():
                requirement = Requirement(text)
                if target.wants(requirement):
                    found[canonicalize_name(requirement.name)] = str(requirement.specifier).removeprefix("==")
    return found


def cpu_pins(root: Path, target: Target) -> dict[str, str]:
    """The tested set, with the build of torch that needs no CUDA."""
    pins = pinned(root, SETS, target)
    return pins | {name: f"{version}+cpu" for name, version in pins.items() if name == "torch"}


async def cuda_pins(
    root: Path, target: Target, wheels: Path, gather: Callable[[dict[str, str]], Awaitable[None]]
) -> dict[str, str]:
    """What pip resolves for the extras that a GPU machine needs; rft's own dependencies in the tested versions.

    gather: puts wheels of packages into `wheels`, built where there is only source, which pip's resolver would not
    look at. Raises UserError, WorldError.
    """
    direct, tested, cuda = _direct(root), pinned(root, SETS, target), pinned(root, ("cuda",), target)
    held = {name: tested[name] for name in map(_name, direct) if name in tested and name not in cuda}
    await gather(held)
    tried: set[str] = set()
    while True:
        with tempfile.TemporaryDirectory(prefix="rft-pins-") as folder:
            code, said = await _resolve(Path(folder), direct, held | cuda, target, wheels)
            if code == 0:
                return _checked(_of_report(Path(folder) / "report.json"))
        missing = _MISSING.search(said)
        name = canonicalize_name(missing[1].rstrip("=")) if missing else ""
        if name not in tested or name in tried:
            raise refusal("the versions for CUDA could not be resolved", said)
        tried.add(name)
        await gather({name: tested[name]})


async def _resolve(
    folder: Path, direct: list[str], held: dict[str, str], target: Target, wheels: Path
) -> tuple[int, str]:
    (folder / "wanted.txt").write_text("\n".join(direct), encoding="utf-8")
    (folder / "held.txt").write_text("\n".join(f"{name}==={version}" for name, version in held.items()), "utf-8")
    files = ["-r", str(folder / "wanted.txt"), "-c", str(folder / "held.txt"), "--find-links", wheels.as_uri()]
    report = ["--dry-run", "--ignore-installed", "--report", str(folder / "report.json"), "--target", str(folder)]
    only = ["--only-binary=:all:", *target.pip_options()]
    return await pip("install", *report, *only, *files, limit_s=_RESOLVE_LIMIT_S)


def _of_report(path: Path) -> dict[str, str]:
    rows = json.loads(path.read_text(encoding="utf-8"))["install"]
    return {canonicalize_name(row["metadata"]["name"]): str(Version(row["metadata"]["version"])) for row in rows}


def _checked(pins: dict[str, str]) -> dict[str, str]:
    """Raises UserError where pip's configuration prefers builds without CUDA."""
    if wrong := [f"{name}=={version}" for name, version in pins.items() if version.endswith("+cpu")]:
        cure = "leave indexes of CPU builds out of pip's configuration, e.g. PIP_CONFIG_FILE=/dev/null"
        raise UserError(f"pip chose builds without CUDA: {', '.join(wrong)}", where="--target cuda", cure=cure)
    return pins


def _name(text: str) -> str:
    return canonicalize_name(Requirement(text).name)


def _direct(root: Path) -> list[str]:
    """What pyproject.toml asks for, with its extras for GPUs and what builds it."""
    tree = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    project = tree["project"]
    extras: dict[str, list[str]] = project["optional-dependencies"]

    def asked() -> Iterator[str]:
        yield from tree["build-system"]["requires"]  # the checkout is installed without a build environment
        yield from project["dependencies"]
        for extra in _CUDA_EXTRAS:
            yield from extras[extra]

    own = canonicalize_name(project["name"])
    return sorted({text for text in asked() if _name(text) != own})
