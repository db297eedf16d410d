"""Take some rollouts of a step out of its file without losing any: the rest stays, what goes is moved aside.

A process that ends in between leaves a row in two places, never in none, and no index that points wrong for good.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from rft.files import free_name, move_aside, parsed, replace
from rft.types import Rollout


def sift(path: Path, keep: Callable[[Rollout], bool], aside: Path) -> list[Rollout]:
    """Leave in `path` what `keep` accepts, of one id the row written last; returns it, in the order written.

    Everything else (other rows, those of other versions of rft, lines cut off) goes to a file of that name in `aside`.
    The index beside `path` is made anew.
    """
    lines = [line for line in path.read_bytes().split(b"\n") if line]
    kept = {number: rollout for number, rollout in _last(lines) if keep(rollout)}
    index = path.with_suffix(".idx")
    if not kept:
        for file in (path, index):
            if file.exists():
                move_aside(file, aside)
        return []
    others = [line for number, line in enumerate(lines) if number not in kept]
    if others:
        aside.mkdir(exist_ok=True)
        replace(free_name(aside, path.name), _joined(others))
        index.unlink(missing_ok=True)  # without one the file is read through; a wrong one is what must not stay
        replace(path, _joined([lines[number] for number in sorted(kept)]))
    replace(index, _index(path).encode())
    return [kept[number] for number in sorted(kept)]


def readable(path: Path) -> list[Rollout]:
    """The rollouts of a file that can be read, of one id the one written last; none where there is no file."""
    return [rollout for _, rollout in _last(path.read_bytes().split(b"\n"))] if path.exists() else []


def unreadable(path: Path) -> int:
    """How many lines of a file are no rollouts of this version of rft: cut off, or of another one."""
    return sum(1 for line in path.read_bytes().split(b"\n") if line and _rollout(line) is None)


def _last(lines: list[bytes]) -> list[tuple[int, Rollout]]:
    """The rollouts with the numbers of their lines, of one id the last."""
    found = {rollout.id: (number, rollout) for number, line in enumerate(lines) if (rollout := _rollout(line))}
    return list(found.values())


def _rollout(line: bytes) -> Rollout | None:
    row = parsed(line)
    try:
        return None if row is None else Rollout.model_validate(row)
    except ValidationError:
        return None


def _joined(lines: list[bytes]) -> bytes:
    return b"".join(line + b"\n" for line in lines)


def _index(path: Path) -> str:
    """As `RunStore.append_rollout` writes it."""
    entries, offset = [], 0
    with path.open("rb") as file:
        for line in file:
            rollout = parsed(line)
            if rollout is not None:
                entries.append(f"{rollout['id']} {offset}\n")
            offset += len(line)
    return "".join(entries)
