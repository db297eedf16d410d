"""Install rft from the folder this file is in, without a network: `./install [FOLDER]`, by default ~/rft.

Checks every file against MANIFEST first, then the machine and the disk, and only then writes: the project, models and
data into FOLDER, and the wheels into FOLDER/.venv by the project's scripts/setup, which proves the result. Run it
again when it was interrupted: it goes on. Standard library only: this file travels without its package.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

HERE = Path(__file__).resolve().parent
MANIFEST, FACTS, PROJECT = "MANIFEST", "bundle.json", "project.tar"
MARGIN_BYTES = 300_000_000  # pip's temporary files, caches, a first small run
NUM_READERS = 2  # hashing lets go of the interpreter's lock
MAX_NAMED = 10
SHOW_S = 5


def fail(problem: str, cure: str) -> NoReturn:
    sys.exit(f"install: {problem}\n  cure: {cure}")


# --- what the folder holds -------------------------------------------------------------------------------------------


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def listed(bundle: Path) -> dict[str, str]:
    """Path inside the bundle -> SHA-256, of its MANIFEST. Raises ValueError naming the line that is not one."""
    found = {}
    for number, line in enumerate((bundle / MANIFEST).read_text(encoding="utf-8").splitlines(), 1):
        checksum, _, name = line.partition("  ")
        if len(checksum) != 64 or not name:
            raise ValueError(f"{bundle / MANIFEST}:{number} is not a line of sha256sum")
        found[name] = checksum
    return found


def wrong_files(bundle: Path, checksums: dict[str, str]) -> Iterator[str]:
    """What is missing or differs, each in words; says how far it is."""
    total = sum(path.stat().st_size for name in checksums if (path := bundle / name).is_file())
    done, shown = 0, time.monotonic()

    def verdict(name: str) -> tuple[int, str | None]:
        path = bundle / name
        if not path.is_file():
            return 0, f"{name} is missing"
        try:
            has_it = digest(path) == checksums[name]
        except OSError as error:
            return 0, f"{name} cannot be read ({error.strerror})"
        return path.stat().st_size, None if has_it else f"{name} differs from its checksum"

    with ThreadPoolExecutor(NUM_READERS) as readers:
        for size, problem in readers.map(verdict, checksums):
            done += size
            if time.monotonic() - shown > SHOW_S:
                shown = time.monotonic()
                print(f"install: checked {done / 1e9:.1f} of {total / 1e9:.1f} GB", flush=True)
            if problem:
                yield problem


def check_files(bundle: Path) -> None:
    """The bundle is complete, and every byte is what was written."""
    if not (bundle / MANIFEST).is_file():
        cure = "run the same `rft bundle` again where it was made (it goes on), and copy the whole folder"
        fail(f"{bundle} is not complete: it has no {MANIFEST}", cure)
    try:
        wrong = list(wrong_files(bundle, listed(bundle)))
    except ValueError as error:
        fail(str(error), "copy the bundle again")
    if wrong:
        more = f", and {len(wrong) - MAX_NAMED} more" if len(wrong) > MAX_NAMED else ""
        fail(f"{'; '.join(wrong[:MAX_NAMED])}{more}", "copy these files again from where the bundle was made")


# --- the machine -----------------------------------------------------------------------------------------------------


def check_machine(facts: dict[str, Any]) -> None:
    """This Python and this system are those the wheels were made for."""
    have = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if have != facts["python"]:
        cure = f"python{facts['python']} install.py, or make one with `rft bundle --python {have}`"
        fail(f"this bundle is for Python {facts['python']}, and this is {have}", cure)
    if sys.platform != "linux" or platform.machine() != facts["machine"]:
        problem = f"this bundle is for Linux on {facts['machine']}, and this is {sys.platform} on {platform.machine()}"
        fail(problem, "make one on a machine of this kind")
    name, version = platform.libc_ver()
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if name != "glibc" or numbers < tuple(facts["needs_glibc"]):
        wanted = ".".join(map(str, facts["needs_glibc"]))
        problem = f"its wheels need glibc {wanted}, and this system has {name or 'another C library'} {version}"
        fail(problem, f"make it with `rft bundle --glibc {version}`, or use a newer system")


def unpacked_bytes(bundle: Path) -> int:
    """What the wheels take once they are installed."""
    total = 0
    for wheel in (bundle / "wheels").glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            total += sum(entry.file_size for entry in archive.infolist())
    return total


def check_disk(bundle: Path, folder: Path) -> None:
    """Room for everything that is not there yet."""
    place = next(path for path in (folder, *folder.parents) if path.exists())
    needed = sum(path.stat().st_size for path, target in carried(bundle, folder) if not is_copied(path, target))
    if not (folder / ".venv/rft-setup.json").exists():
        needed += unpacked_bytes(bundle) + MARGIN_BYTES
    if (free := shutil.disk_usage(place).free) < needed:
        problem = f"{free / 1e9:.1f} GB of disk are free at {place}, installing needs {needed / 1e9:.1f} GB"
        fail(problem, "free some space, or give another folder: ./install FOLDER")


# --- writing ---------------------------------------------------------------------------------------------------------


def carried(bundle: Path, folder: Path) -> Iterator[tuple[Path, Path]]:
    """Every file of models and data, and where it goes."""
    for part in ("models", "data"):
        for path in sorted((bundle / part).rglob("*")):
            if path.is_file():
                yield path, folder / path.relative_to(bundle)


def is_copied(path: Path, target: Path) -> bool:
    """Of the same size and time, which a copy gets when it is complete."""
    if not target.is_file():
        return False
    here, there = path.stat(), target.stat()
    return here.st_size == there.st_size and abs(here.st_mtime - there.st_mtime) < 2  # what a stick keeps of a time


def copy_file(path: Path, target: Path) -> None:
    """It appears complete or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    shutil.copyfile(path, part)
    shutil.copystat(path, part)
    os.replace(part, target)


def unpack_project(bundle: Path, folder: Path) -> None:
    """The checkout, with its links and modes; pyproject.toml comes last and says that it is complete.

    A complete one is kept: somebody may work in it.
    """
    if (folder / "pyproject.toml").exists():
        return
    part = folder / ".project.part"
    shutil.rmtree(part, ignore_errors=True)
    with tarfile.open(bundle / PROJECT) as archive:
        if hasattr(tarfile, "data_filter"):
            archive.extractall(part, filter="data")
        else:
            archive.extractall(part)
    for path in sorted(part.iterdir(), key=lambda path: path.name == "pyproject.toml"):
        if (there := folder / path.name).is_dir():  # of an installation that was interrupted here
            shutil.rmtree(there)
        path.rename(there)
    part.rmdir()


def check_folder(bundle: Path, folder: Path) -> None:
    """New, empty, or what an earlier installation of this bundle made of it."""
    if folder.exists() and not folder.is_dir():
        fail(f"{folder} is a file", "give another folder: ./install FOLDER")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    facts = folder / FACTS
    if not facts.is_file() or facts.read_bytes() != (bundle / FACTS).read_bytes():
        fail(f"{folder} is not empty and not an installation of this bundle", "give another folder: ./install FOLDER")


def set_up(bundle: Path, folder: Path, facts: dict[str, Any]) -> None:
    """The environment, from the wheels alone, proved by the project's own set-up."""
    options = ["--cuda"] if facts["target"] == "cuda" else [f"--{name}" for name in facts["sets"]]
    command = [sys.executable, str(folder / "scripts/setup"), "--wheels", str(bundle / "wheels"), *options]
    with subprocess.Popen(command) as setup:
        try:
            code = setup.wait()
        except KeyboardInterrupt:
            setup.wait()  # it was interrupted with us, and ends its pips
            raise
    if code != 0:
        sys.exit(code)


def told(folder: Path, facts: dict[str, Any]) -> str:
    """What to do next."""
    lines = [f"install: rft is in {folder}", f"  cd {folder}"]
    lines += [f"  model: {name}" for name in facts["models"]] + [f"  data: {name}" for name in facts["data"]]
    lines += [
        "  .venv/bin/rft --help",
        "  .venv/bin/rft check-offline CONFIG     # a short training that may reach nothing but this machine",
        "  .venv/bin/rft train CONFIG             # configs/README.md goes from rows to proof in six steps",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="install", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("~/rft"), help="where to (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="only compare every file with its checksum")
    arguments = parser.parse_args()
    folder: Path = arguments.folder.expanduser().resolve()
    started = time.monotonic()
    check_files(HERE)
    print(f"install: every file is as it was written ({time.monotonic() - started:.0f} s)", flush=True)
    if arguments.check:
        return
    facts = json.loads((HERE / FACTS).read_text(encoding="utf-8"))
    check_machine(facts)
    check_folder(HERE, folder)
    check_disk(HERE, folder)
    folder.mkdir(parents=True, exist_ok=True)
    copy_file(HERE / FACTS, folder / FACTS)
    unpack_project(HERE, folder)
    for path, target in carried(HERE, folder):
        if not is_copied(path, target):
            copy_file(path, target)
    set_up(HERE, folder, facts)
    print(told(folder, facts))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("install: interrupted; run it again to continue", file=sys.stderr)
        sys.exit(130)
