"""A file that somebody appends to, read on from where it was read before; a replaced file is noticed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

_TAIL_BYTES = 64


@dataclass(frozen=True, slots=True)
class Mark:
    """How far a file was read: up to `offset`, and the bytes before it, by which the file is known again."""

    inode: int = 0
    offset: int = 0
    tail: bytes = b""


def inode_of(status: os.stat_result) -> int:
    """As much of it as SQLite's signed integers hold: some file systems use all 64 bits."""
    return status.st_ino & (1 << 62) - 1


def resume(file: BinaryIO, mark: Mark) -> Mark:
    """The mark if the file still is the one that was read up to it, else one at its start."""
    status = os.fstat(file.fileno())
    start = max(0, mark.offset - _TAIL_BYTES)
    is_same = (
        inode_of(status) == mark.inode
        and status.st_size >= mark.offset
        and os.pread(file.fileno(), mark.offset - start, start) == mark.tail
    )
    return mark if is_same else Mark(inode_of(status))


def mark_at(file: BinaryIO, offset: int) -> Mark:
    start = max(0, offset - _TAIL_BYTES)
    return Mark(inode_of(os.fstat(file.fileno())), offset, os.pread(file.fileno(), offset - start, start))


def lines(file: BinaryIO, offset: int) -> Iterator[tuple[int, bytes]]:
    """(where it starts, the line) from `offset` on. The last one may not be complete: it has no newline then."""
    file.seek(offset)
    for line in file:
        yield offset, line
        offset += len(line)


def last_lines(path: Path, max_bytes: int) -> list[bytes]:
    """The complete lines within the last `max_bytes` of a file, in order; none when there is no file."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - max_bytes))
            found = file.read(max_bytes).split(b"\n")
    except FileNotFoundError:
        return []
    return [line for line in (found if size <= max_bytes else found[1:]) if line]
