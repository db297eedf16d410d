"""The machine a bundle is for: which wheels fit it, and how pip is told so. Linux and CPython alone."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, cast, get_args

from packaging.requirements import Requirement
from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import parse_wheel_filename

from rft.errors import UserError

Kind = Literal["cpu", "cuda"]
DEFAULT_GLIBC = "2.31"  # the oldest that every pinned wheel knows: Debian 11, Ubuntu 20.04, RHEL 9
_OLDEST_GLIBC_MINOR = 5
_MIN_PYTHON = (3, 11)
_OLD_NAMES = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}  # what these were called before


@dataclass(frozen=True)
class Target:
    """python: (3, 11); machine: as `uname -m` says it; glibc: (2, 31), at least what is there."""

    kind: Kind
    python: tuple[int, int]
    machine: str
    glibc: tuple[int, int]

    @property
    def is_own_python(self) -> bool:
        return self.python == sys.version_info[:2]

    @property
    def python_text(self) -> str:
        return f"{self.python[0]}.{self.python[1]}"

    @cached_property
    def platforms(self) -> list[str]:
        """The platform tags it accepts, the best first."""
        names: list[str] = []
        for minor in range(self.glibc[1], _OLDEST_GLIBC_MINOR - 1, -1):
            names.append(f"manylinux_2_{minor}_{self.machine}")
            if minor in _OLD_NAMES:
                names.append(f"{_OLD_NAMES[minor]}_{self.machine}")
        return [*names, f"linux_{self.machine}"]

    @cached_property
    def tags(self) -> frozenset[Tag]:
        return frozenset(self._tags())

    def _tags(self) -> Iterator[Tag]:
        abi = f"cp{self.python[0]}{self.python[1]}"
        yield from cpython_tags(self.python, abis=[abi], platforms=self.platforms)
        yield from compatible_tags(self.python, interpreter=abi, platforms=self.platforms)

    def fits(self, wheel_name: str) -> bool:
        """Whether it can install this file; its name must be a wheel's."""
        return not self.tags.isdisjoint(parse_wheel_filename(wheel_name)[3])

    def pip_options(self) -> list[str]:
        """What makes pip look for this machine's packages instead of its own."""
        abi = f"cp{self.python[0]}{self.python[1]}"
        words = ["--python-version", self.python_text, "--implementation", "cp"]
        words += [word for name in (abi, "abi3", "none") for word in ("--abi", name)]
        return words + [word for name in self.platforms for word in ("--platform", name)]

    def wants(self, requirement: Requirement) -> bool:
        """Whether the requirement's marker holds there."""
        if requirement.marker is None:
            return True
        version = {"python_version": self.python_text, "python_full_version": f"{self.python_text}.0"}
        return requirement.marker.evaluate({**version, "platform_machine": self.machine, "extra": ""})


def parse_target(kind: str, python: str | None, glibc: str) -> Target:
    """Read what was asked for. Raises UserError naming the option."""
    if kind not in get_args(Kind):
        raise UserError(f"no target is called {kind}", where="--target", cure="--target cpu, or --target cuda")
    if sys.platform != "linux":
        raise UserError("bundles are made on Linux, for Linux", where=sys.platform, cure="make it on a Linux machine")
    running = sys.version_info[:2]
    version = running if python is None else _pair(python, "--python", "3.11")
    if version < _MIN_PYTHON or version[0] != _MIN_PYTHON[0]:
        raise UserError(f"rft needs Python 3.11 or newer, not {python}", where="--python", cure="e.g. --python 3.11")
    if kind == "cuda" and version != running:
        said = f"{running[0]}.{running[1]}"
        problem = f"what CUDA builds need is resolved by pip, for the Python it runs in ({said}), not for {python}"
        raise UserError(problem, where="--python", cure=f"run rft with Python {python}, or --python {said}")
    return Target(cast(Kind, kind), version, platform.machine(), _pair(glibc, "--glibc", DEFAULT_GLIBC))


def _pair(text: str, option: str, example: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)\.(\d+)", text)
    if found is None:
        raise UserError(f"{text!r} is no version", where=option, cure=f"two numbers, e.g. {option} {example}")
    return int(found[1]), int(found[2])
