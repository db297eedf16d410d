"""Changes out of a git history: the message of a commit, the files it edits, and the tree of its parent.

Reads the repository with `git log` and `git archive`; writes nothing to it and runs nothing that is in it.
"""

from __future__ import annotations

import io
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from rft.envs.tasks.file_planning.patches import prose
from rft.envs.tasks.file_planning.rows import Change
from rft.envs.tasks.file_planning.trees import is_source, read_archive

_GIT_S = 300.0
_COMMIT = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")


class HistoryError(Exception):
    """Git could not do it; the text says what it said."""


def changes(repository: Path, name: str, max_commits: int) -> Iterator[Change]:
    """The last `max_commits` commits of HEAD that have one parent, newest first. Raises HistoryError.

    `files` are the sources that a commit edits or removes; the tree is named by the parent's id.
    """
    shape = ["--no-merges", "--min-parents=1", f"--max-count={max_commits}", "--format=%H %P"]
    for line in _git(repository, "log", *shape).decode().splitlines():
        commit, _, parent = line.partition(" ")
        message = _git(repository, "show", "--no-patch", "--format=%B", commit).decode("utf-8", errors="replace")
        edited = _git(repository, "diff", "--name-only", "-z", "--no-renames", "--diff-filter=MD", parent, commit)
        files = tuple(path for path in edited.decode("utf-8", errors="replace").split("\0") if path and is_source(path))
        yield Change(name, commit, parent, prose(message), files)


def files_of(repository: Path, commit: str) -> Mapping[str, bytes]:
    """The regular files of a commit. Raises HistoryError."""
    if not _COMMIT.fullmatch(commit):
        raise HistoryError(f"{commit[:80]} is not the id of a commit")
    # a prefix of ours, so that a repository with a single folder keeps it
    return read_archive(io.BytesIO(_git(repository, "archive", "--format=tar", "--prefix=tree/", commit)))


def _git(repository: Path, *arguments: str) -> bytes:
    command = ["git", "-C", str(repository), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_GIT_S)
    except FileNotFoundError:
        raise HistoryError("there is no git here") from None
    except subprocess.TimeoutExpired:
        raise HistoryError(f"git {arguments[0]} took more than {_GIT_S:g} s") from None
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["git said nothing"]
        raise HistoryError(said[-1])
    return done.stdout
