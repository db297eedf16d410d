"""Files that any reader can follow while they are written: rows appended with one write each, files replaced whole.

Readers survive a line that was cut off. Does not know what the rows mean, and takes no lock.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rft.errors import StorageError

_CURES = {
    errno.ENOSPC: "free space on that disk, then resume the run",
    errno.EDQUOT: "free some of your disk quota, then resume the run",
    errno.EACCES: "give yourself the right to write there, or choose another runs_dir",
    errno.EPERM: "give yourself the right to write there, or choose another runs_dir",
    errno.EROFS: "choose a runs_dir on a disk that can be written",
}
_MAX_OPEN = 8
_log = logging.getLogger(__name__)


class Appender:
    """Appends lines to files that stay open. One thread, one process."""

    def __init__(self) -> None:
        self._fds: dict[Path, int] = {}

    def append(self, path: Path, line: str) -> int:
        """One write of one line; returns the offset at which it starts. Raises StorageError."""
        with storing(path.parent):
            fd = self._fd(path)
            offset = os.lseek(fd, 0, os.SEEK_END)
            data = line.encode() + b"\n"
            if os.write(fd, data) == len(data):
                return offset
            os.close(self._fds.pop(path))  # the next append starts on a new line, see `_open`
            raise OSError(errno.ENOSPC, "the line was written in part")

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def _fd(self, path: Path) -> int:
        fd = self._fds.get(path)
        if fd is None:
            fd = self._fds[path] = _open(path)
            if len(self._fds) > _MAX_OPEN:  # rollout files of past steps
                os.close(self._fds.pop(next(iter(self._fds))))
        return fd


def _open(path: Path) -> int:
    """For appending; a line that a crash cut off is ended so that the next starts anew."""
    fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    size = os.lseek(fd, 0, os.SEEK_END)
    if size and os.pread(fd, 1, size - 1) != b"\n":
        os.write(fd, b"\n")
    return fd


def append_apart(path: Path, line: str) -> None:
    """One line through a file of its own: from any thread, while an Appender has the file open. Raises StorageError."""
    with storing(path.parent):
        fd = _open(path)
        try:
            os.write(fd, line.encode() + b"\n")
        finally:
            os.close(fd)


def rows(path: Path, containing: bytes = b"") -> Iterator[dict[str, Any]]:
    """The lines of a file that are whole. One cut off by a crash is skipped; the log says so unless it is the last."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        for number, line in enumerate(file, 1):
            if containing not in line:
                continue
            row = parsed(line)
            if row is not None:
                yield row
            elif line.endswith(b"\n") and line.strip():
                _log.warning("%s:%d was cut off when it was written and is skipped", path, number)


def parsed(line: bytes) -> dict[str, Any] | None:
    """The JSON object on a line, None when there is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def replace(path: Path, data: bytes, *, is_durable: bool = True, mode: int = 0o666) -> Path:
    """Write under a temporary name, flush to disk, rename: a reader sees the old file or the new one.

    is_durable: False leaves out the flush, for what is worth nothing after a power cut. mode: before the umask.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storing(path.parent):
        try:
            with open(temporary, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
                file.write(data)
                file.flush()
                if is_durable:
                    os.fsync(file.fileno())
            temporary.rename(path)
        finally:
            temporary.unlink(missing_ok=True)
    return path


def move_aside(path: Path, folder: Path) -> None:
    """Move a file, or a folder, under the first free name."""
    folder.mkdir(exist_ok=True)
    path.rename(free_name(folder, path.name))


def free_name(folder: Path, name: str) -> Path:
    """`folder/name`, or the first of `folder/name.1`, `folder/name.2`, ... that is not there."""
    target, number = folder / name, 0
    while target.exists():
        number += 1
        target = folder / f"{name}.{number}"
    return target


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises StorageError."""
    try:
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise StorageError(f"{path} cannot be read: {error}", cure="restore the file") from None
    return value


def has_open(pid: int, path: Path) -> bool:
    """True when a process has the file open, or is alive and somebody else's, so that nobody can tell."""
    try:
        links = list(Path(f"/proc/{pid}/fd").iterdir())
    except PermissionError:
        return True
    except OSError:
        return False
    return any(_is_same(link, path) for link in links)


def _is_same(link: Path, path: Path) -> bool:
    try:
        return link.samefile(path)
    except OSError:  # closed meanwhile
        return False


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for both."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def storing(folder: Path) -> Iterator[None]:
    """The disk's failures as StorageError, with the folder and the cure."""
    try:
        yield
    except OSError as error:
        cure = _CURES.get(error.errno or 0, "check the disk, then resume the run")
        raise StorageError(f"{folder} cannot be written: {error.strerror or error}", cure=cure) from error
