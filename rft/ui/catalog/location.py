"""Where the catalog of a run is kept: beside the run, or in a private folder of the user where that cannot be written.

Nobody else may read it (it holds what models and tools said) or have made it.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

NAME = ".catalog.sqlite"


def candidates(run: Path) -> Iterator[Path]:
    """Places for the catalog, the best first."""
    yield run / NAME
    name = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:32] + ".sqlite"
    yield from (folder / name for folder in _private_folders())


def claim(path: Path) -> bool:
    """Make the file unless it is there; whether it is a file of ours that nobody else may read.

    Never opens one that is there: closing it would drop the locks that SQLite holds on it in this process.
    """
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        return _is_private(path, stat.S_ISREG)
    except OSError:
        return False
    return True


def _private_folders() -> Iterator[Path]:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    for folder in (Path(cache) / "rft" / "catalogs", Path(tempfile.gettempdir()) / f"rft-catalogs-{os.getuid()}"):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            continue
        if _is_private(folder, stat.S_ISDIR):
            yield folder


def _is_private(path: Path, is_kind: Callable[[int], bool]) -> bool:
    try:
        status = path.lstat()
    except OSError:
        return False
    return is_kind(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077
