"""From sources to splits: trees with the changes that are to be planned in them, and the rows of each split.

Training has the first stage of the task: changes with a word that, searched for as the demonstrations do, shows a right
file first; `train_all` has the others too. Validation and test have every change whose text names an identifier, or all
of a tree with none: in a history each change has a tree of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from rft.envs.tasks.file_planning import history
from rft.envs.tasks.file_planning.patches import description, edited_files
from rft.envs.tasks.file_planning.reference import bm25_f1, grep_f1
from rft.envs.tasks.file_planning.rows import Change, Hits, demonstration_of, is_first_stage, row_of, shuffled
from rft.envs.tasks.file_planning.trees import read_archive, sources, write_tree
from rft.types import Split

Part = Literal["train", "validation", "test", "train_all", "warmup"]
_PARTS: tuple[Part, ...] = ("train", "validation", "test", "train_all", "warmup")
Rows = list[dict[str, Any]]
NUM_DEMONSTRATIONS = 128  # 16 optimizer steps of 8: enough for a form, and minutes on two cores


@dataclass(frozen=True, slots=True)
class Planned:
    """One tree: its sources by path, the changes to plan in it, and what else is known to be a file of it."""

    split: Split
    files: Mapping[str, bytes]
    changes: tuple[Change, ...]
    other_paths: frozenset[str] = frozenset()

    def rows(self) -> Rows:
        rows = (row_of(change, self.other_paths | self.files.keys()) for change in self.changes)
        return [row for row in rows if row is not None]


def of_debian(name: str, split: Split, upstream: Path, debian: Path) -> Planned:
    """A source package: the patches of its series, each against the tree that upstream released, without the others."""
    with upstream.open("rb") as file:
        released = read_archive(file)
    with debian.open("rb") as file:
        packaging = read_archive(file)
    files, found = sources(released), []
    for line in packaging.get("patches/series", b"").decode().splitlines():
        patch, *_ = [*line.partition("#")[0].split(), ""]
        if not patch:
            continue
        raw = packaging.get(f"patches/{patch}", b"").decode("utf-8", errors="replace")
        edited = tuple(path for path in edited_files(raw) if path in files)
        found.append(Change(name, patch, name, description(raw), edited))
    return Planned(split, files, tuple(found), frozenset(released))


def of_history(repository: Path, name: str, max_commits: int) -> Iterator[Planned]:
    """The commits of a repository, each with the tree before it: the newest tenth for test, the tenth before for
    validation, the others for training. Raises HistoryError.
    """
    commits = list(history.changes(repository, name, max_commits))
    num_held_out = max(1, len(commits) // 10)
    for number, change in enumerate(commits):
        split: Split = ("test", "validation", "train")[min(number // num_held_out, 2)]
        files = sources(history.files_of(repository, change.tree))
        kept = tuple(path for path in change.files if path in files)
        yield Planned(split, files, (Change(name, change.name, change.tree, change.text, kept),))


def write_trees(folder: Path, plans: Iterable[Planned], said: list[str]) -> dict[Part, Rows]:
    """Write each tree that has a row to folder/TREE. Result: the rows of all parts; adds a line a source to `said`."""
    rows: dict[Part, Rows] = {part: [] for part in _PARTS}
    written: dict[str, Path] = {}
    for planned in plans:
        found = planned.rows()
        if not found:
            continue
        write_tree(folder / found[0]["tree"], planned.files, written)
        hits = Hits(planned.files)
        named = [row for row in found if row["identifiers"]]
        if planned.split == "train":
            rows["train"] += [row for row in found if is_first_stage(row, hits)]
            rows["train_all"] += found
            rows["warmup"] += filter(None, (demonstration_of(row, hits) for row in found))
        else:
            rows[planned.split] += named or found
        if len(planned.changes) > 1:
            said.append(
                _described(planned, named or found, hits, f"{len(found)} tasks, {len(named)} with an identifier")
            )
    ordered = {part: shuffled(held) for part, held in rows.items()}
    return {**ordered, "warmup": ordered["warmup"][:NUM_DEMONSTRATIONS]}


def _described(planned: Planned, rows: Rows, hits: Hits, counts: str) -> str:
    size = sum(map(len, planned.files.values())) / 2**20
    any_word, identifier = grep_f1(rows, hits)
    several = fmean(len(row["files"]) > 1 for row in rows)
    return (
        f"{rows[0]['source']} ({planned.split}): {len(planned.files):,} files, {size:.0f} MiB; of "
        f"{len(planned.changes)} patches {counts}, {several:.0%} of these edit several files; F1 of the best file by "
        f"BM25 {bm25_f1(rows, planned.files):.2f}, by a grep for any word {any_word:.2f}, "
        f"for the first identifier {identifier:.2f}"
    )
