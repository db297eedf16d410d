"""Source packages of Debian, by apt as this machine is configured: the same mirrors and keys, its `deb` entries as
`deb-src`, lists and downloads in folders of ours. Nothing of the system's apt changes, and no package is installed.

apt checks every file against the signed index. What was downloaded is kept: a second run needs no network.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from preparation import PACKAGES, fail

KEPT = PACKAGES / "debian"
_APT_S = 900.0
_SHA256 = re.compile(r"(?m)^Checksums-Sha256:\n((?: .*\n)+)")
_CURE = "run it on Debian or in a container of it, with a network; or put the .dsc and its files into {folder}"


@dataclass(frozen=True, slots=True)
class SourcePackage:
    """`files`: SHA-256 by file name, as the package's .dsc lists them; all lie in `folder`."""

    name: str
    version: str
    folder: Path
    files: dict[str, str]

    def archive(self, ending: str) -> Path:
        """Its one archive `*.ENDING.tar.*`, e.g. of "orig"."""
        (name,) = [name for name in self.files if re.search(rf"\.{ending}\.tar\.\w+$", name)]
        return self.folder / name


def source_packages(pins: dict[str, str]) -> list[SourcePackage]:
    """The packages by name and version: the pinned version, or the nearest that the archive still has.

    Ends the script when one is not to be had.
    """
    found = {name: _kept(name, version) for name, version in pins.items()}
    missing = [name for name, package in found.items() if package is None]
    if missing:
        with tempfile.TemporaryDirectory(prefix="rft-apt-") as scratch:
            apt = _Apt(Path(scratch))
            for name in missing:
                found[name] = _kept(name, apt.download(name, pins[name]))
    for name, package in found.items():
        if package is None:
            fail(f"the files of {name} do not fit its .dsc", f"remove {KEPT / name}, and run it again")
        if package.version != pins[name]:
            print(f"{name}: {package.version} in place of {pins[name]}, which the archive no longer has")
    return [package for package in found.values() if package is not None]


def _kept(name: str, version: str) -> SourcePackage | None:
    """The package when its files are there and whole: of this version, or else the one that once stood in for it."""
    packages = [_read(name, dsc) for dsc in sorted((KEPT / name).glob("*.dsc"))]
    whole = [package for package in packages if all(_is_whole(package, file) for file in package.files)]
    return next((package for package in whole if package.version == version), whole[0] if whole else None)


def _read(name: str, dsc: Path) -> SourcePackage:
    text = dsc.read_text(encoding="utf-8", errors="replace")
    version, listed = re.search(r"(?m)^Version: (\S+)", text), _SHA256.search(text)
    rows = [line.split() for line in listed[1].splitlines()] if listed else []
    files = {os.path.basename(row[2]): row[0] for row in rows if len(row) == 3}
    return SourcePackage(name, version[1] if version else "", dsc.parent, files)


def _is_whole(package: SourcePackage, name: str) -> bool:
    path = package.folder / name
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == package.files[name]


class _Apt:
    """apt with lists of its own in `scratch`."""

    def __init__(self, scratch: Path) -> None:
        if shutil.which("apt-get") is None:
            fail("there is no apt-get here", _CURE.format(folder=KEPT / "PACKAGE"))
        parts, lists = scratch / "parts", scratch / "lists" / "partial"
        parts.mkdir()
        lists.mkdir(parents=True)
        self._options = [
            *("-o", "Dir::Etc::sourcelist=/dev/null", "-o", f"Dir::Etc::sourceparts={parts}"),
            *("-o", f"Dir::State::lists={lists.parent}", "-o", f"Dir::Cache={scratch}"),
            *("-o", "APT::Sandbox::User=", "-o", "APT::Get::List-Cleanup=0"),
        ]
        if not _write_deb_src(parts):
            fail("apt has no `deb` entry here to take sources from", _CURE.format(folder=KEPT / "PACKAGE"))
        self._said = _run("apt-get", *self._options, "-q", "update").stderr  # an entry without sources is no harm

    def download(self, name: str, version: str) -> str:
        """The version that was downloaded to KEPT/name: this one, or the one most like it. Ends the script."""
        known = set(re.findall(r"(?m)^Version: (\S+)", self._show(name)))
        for candidate in sorted(known, key=lambda other: (_likeness(other, version), other), reverse=True):
            (KEPT / name).mkdir(parents=True, exist_ok=True)
            command = [*self._options, "-q", "source", "--download-only", f"{name}={candidate}"]
            done = _run("apt-get", *command, cwd=KEPT / name)
            if done.returncode == 0:
                return candidate
            self._said = done.stderr
        said = (self._said.strip().splitlines() or ["apt knows no version of it"])[-1]
        fail(f"apt could not download the source of {name}: {said}", _CURE.format(folder=KEPT / name))

    def _show(self, name: str) -> str:
        return _run("apt-cache", *self._options, "showsrc", "--only-source", name).stdout


def _likeness(version: str, pinned: str) -> int:
    """How many leading characters they share; the pinned one itself is most like it."""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(version, pinned, strict=False))
    return len(list(same)) + (version == pinned)


def _run(program: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    try:
        environment = {**os.environ, "LC_ALL": "C"}
        return subprocess.run(
            [program, *arguments], capture_output=True, text=True, timeout=_APT_S, env=environment, **options
        )
    except subprocess.TimeoutExpired:
        fail(f"{program} did not end within {_APT_S:g} s", "check the network, and run it again")


def _write_deb_src(folder: Path) -> bool:
    """The configured entries as sources of source packages; False when there are none."""
    shown = _run("apt-config", "shell", "LIST", "Dir::Etc::sourcelist/f", "PARTS", "Dir::Etc::sourceparts/d").stdout
    places = dict(re.findall(r"(\w+)='([^']*)'", shown))
    paths = [Path(places.get("LIST", "/etc/apt/sources.list")), *sorted(Path(places.get("PARTS", "")).glob("*.*"))]
    written = False
    for number, path in enumerate(paths):
        if path.suffix not in (".list", ".sources") or not path.is_file():
            continue
        text = as_deb_src(path.read_text(encoding="utf-8"))
        (folder / f"{number}{path.suffix}").write_text(text, encoding="utf-8")
        written = written or "deb-src" in text
    return written


def as_deb_src(text: str) -> str:
    """A sources file, in the one-line or the deb822 format, that names source packages in place of binary ones."""
    text = re.sub(r"(?m)^(\s*)deb(?=[\s\[])", r"\1deb-src", text)
    return re.sub(r"(?mi)^(Types:).*$", r"\1 deb-src", text)
