"""The tree a planner looks at: the sources before the change, small enough that a grep over it takes a moment.

Holds regular text files alone. Documentation, translations, tests, generated files and whatever is binary or long are
left out: a plan is not about them, and a search through them is slow. `is_source` is the one rule for it.
"""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import IO

MAX_FILE_BYTES = 400_000
_FOLDERS = re.compile(
    r"debian|build-aux|docs?|documentation|tests?|testsuite|testdata|regress|unittests|fuzz(?:ing)?|examples|po|locales?"
    r"|translations|node_modules|vendor|third_party|m4|\..*",
    re.IGNORECASE,
)
_ENDINGS = re.compile(
    r"\.(?:pot?|g?mo|txt|rst|md|html?|texi|info|pod|xml|svg|json|csv|css|map|log|patch|diff|[1-8]|d|dsp|dsw|sln"
    r"|vcx?proj|filters|pem|crt)",
    re.IGNORECASE,
)
_NAMES = re.compile(
    r"(?:change(?:log|s)|news|readme|authors|thanks|copying|licen[sc]e|todo|install|protocol|credits|maintainers"
    r"|release-notes|configure|config\.(?:guess|sub|rpath)|aclocal\.m4|ltmain\.sh|depcomp|missing|makefile\.in|ylwrap)"
    r"(?:[-.].*)?|\..*",
    re.IGNORECASE,
)
_KEPT_NAMES = frozenset({"configure.ac", "configure.in"})


def is_source(path: str) -> bool:
    """Whether a path of a source tree is one that a plan may name."""
    pure = PurePosixPath(path)
    if pure.is_absolute() or any(map(_FOLDERS.fullmatch, pure.parts[:-1])):
        return False
    if pure.name in _KEPT_NAMES:
        return True
    return not _ENDINGS.fullmatch(pure.suffix) and not _NAMES.fullmatch(pure.name)


def is_readable(data: bytes) -> bool:
    """Text, and not too long to be searched."""
    return 0 < len(data) <= MAX_FILE_BYTES and b"\0" not in data[:8192]


def read_archive(file: IO[bytes]) -> dict[str, bytes]:
    """The regular files of a tar archive by path, without the one folder that holds them all, where there is one."""
    with tarfile.open(fileobj=file) as archive:
        held = {m.name.removeprefix("./"): archive.extractfile(m) for m in archive if m.isfile()}
        files = {name: content.read() for name, content in held.items() if content is not None}
    tops = {name.partition("/")[0] for name in files}
    depth = 1 if len(tops) == 1 and all("/" in name for name in files) else 0
    return {"/".join(name.split("/")[depth:]): data for name, data in files.items()}


def sources(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Those that the tree shows, in the order of their paths."""
    return {path: data for path, data in sorted(files.items()) if is_source(path) and is_readable(data)}


def write_tree(root: Path, files: Mapping[str, bytes], written: dict[str, Path]) -> None:
    """Write a tree, unless it is there: two commits may have one parent.

    A file with a content that was `written` before is a link to it: the trees of a history share most.
    """
    if root.exists():
        return
    for path, data in files.items():
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256(data).hexdigest()
        if digest in written:
            os.link(written[digest], target)
        else:
            target.write_bytes(data)
            written[digest] = target
