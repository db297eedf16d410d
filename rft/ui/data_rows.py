"""The dataset row that a rollout is about, from the run's data file: an item's id says in which file and line it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rft.store import RunStore

_MAX_BYTES = 512 << 20  # of a file that are looked through
_BLOCK = 1 << 20


def find_row(store: RunStore, config: dict[str, Any], item_id: str) -> str | None:
    """The row as the file has it; None where the file is gone, too long or has no such line."""
    stem, _, number = item_id.rpartition("-")
    if not number.isdecimal() or len(number) > 12:
        return None
    data = config.get("data")
    for name in data.values() if isinstance(data, dict) else ():
        if isinstance(name, str) and name and Path(name).stem == stem:
            for path in store.places(name):
                if path.is_file():
                    return _line(path, int(number))
    return None


def _line(path: Path, number: int) -> str | None:
    """The line of that 1-based number."""
    missing, num_bytes = number - 1, 0
    with path.open("rb") as file:
        while missing > 0:
            block = file.read(_BLOCK)
            num_bytes += len(block)
            if not block or num_bytes > _MAX_BYTES:
                return None
            count = block.count(b"\n")
            if count >= missing:
                file.seek(_behind(block, missing) - len(block), 1)
            missing -= min(count, missing)
        line = file.readline(_MAX_BYTES).strip()
    return line.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace") if line else None


def _behind(block: bytes, count: int) -> int:
    """Where the text after the `count`-th newline starts."""
    position = 0
    for _ in range(count):
        position = block.index(b"\n", position) + 1
    return position
