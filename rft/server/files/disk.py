"""The disk under what users upload: bytes arrive under a name that nobody looks at, and appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

from rft.errors import StorageError
from rft.server.errors import NO_RETRY, ApiError
from rft.server.files.quota import Quota

HIDDEN = "."  # how names begin that are not yet, or no longer, part of the store


class Incoming:
    """A new folder that holds the file `content`, which grows. Use as a context: what was not kept is removed.

    max_bytes: of the content; None for what we write ourselves, which the quota counts and does not refuse.
    """

    def __init__(self, path: Path, quota: Quota, project: str, max_bytes: int | None) -> None:
        self.name: str = path.name
        self.num_bytes, self.is_kept = 0, False
        self._path, self._quota, self._project, self._max_bytes = path, quota, project, max_bytes
        self._hidden = path.with_name(f"{HIDDEN}new-{path.name}")

    def __enter__(self) -> Incoming:
        with storing():
            self._hidden.mkdir(mode=0o700)
            self._file = (self._hidden / "content").open("xb")
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # what was buffered does not matter any more
            self._file.close()
        if not self.is_kept:
            shutil.rmtree(self._hidden, ignore_errors=True)
            shutil.rmtree(self._path, ignore_errors=True)
            self._quota.add(self._project, -self.num_bytes)

    def take(self, data: bytes) -> None:
        """Append. Raises ApiError: too large, no room in the project, or none on the disk."""
        if self._max_bytes is None:
            self._quota.add(self._project, len(data))
        elif self.num_bytes + len(data) > self._max_bytes:
            message = f"The file is larger than {self._max_bytes:,} bytes."
            raise ApiError(message, status=413, code="file_too_large", param="file")
        else:
            self._quota.reserve(self._project, len(data))
        self.num_bytes += len(data)
        with storing():
            self._file.write(data)

    def settle(self, **texts: str) -> None:
        """All bytes and the small files `texts` (name -> text, `.json` is added) to disk, then the folder's name.

        Still not kept: that is said when the index knows it too.
        """
        with storing():
            _flush(self._file.fileno(), self._file.flush)
            self._file.close()
            for name, text in texts.items():
                with (self._hidden / f"{name}.json").open("x", encoding="utf-8") as file:
                    file.write(text)
                    _flush(file.fileno(), file.flush)
            _flush_folder(self._hidden)
            self._hidden.rename(self._path)
            _flush_folder(self._path.parent)


def remove(path: Path) -> None:
    """A folder, at once for whoever starts after a crash in between."""
    doomed = path.with_name(f"{HIDDEN}gone-{path.name}")
    with contextlib.suppress(FileNotFoundError):
        path.rename(doomed)
        _flush_folder(path.parent)
    shutil.rmtree(doomed, ignore_errors=True)


@contextlib.contextmanager
def storing() -> Iterator[None]:
    """A full disk as an ApiError that the SDK does not retry; other failures of the disk as StorageError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _full() from None
        cure = "check the disk of data_dir, then try again"
        raise StorageError(f"the server's disk cannot be written: {error.strerror}", cure=cure) from error
    except StorageError as error:
        cause = error.__cause__
        if isinstance(cause, sqlite3.Error) and getattr(cause, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
            raise _full() from None
        raise


def _full() -> ApiError:
    message = "The server's disk is full; nothing of this upload was kept. Free space on the disk of data_dir."
    return ApiError(message, status=503, code="storage_full", headers=NO_RETRY)


def _flush(fd: int, flush: Callable[[], None]) -> None:
    flush()
    os.fsync(fd)


def _flush_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
