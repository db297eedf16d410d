"""A patch as a task: the text that describes it, and the files it edits.

The text comes without what the answer could be read from: diffstats, Index lines, file names of the tree. What is left
may name identifiers and subsystems, as people do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath

_DIFF_STARTS = re.compile(r"(?m)^(?:---(?:\s|$)|diff |Index: |\+\+\+ |@@ |@DPATCH@)")
_FILES = re.compile(r"(?m)^--- (\S+).*\n\+\+\+ (\S+)")
_FIELD = re.compile(r"([A-Za-z]+(?:[- ][A-Za-z]+)*):(?:\s|$)")
_TITLES = frozenset({"subject", "description"})
# Fields of DEP-3, of mails and of commits. Other words before a colon open a title ("netrc: ...") or a sentence.
_DROPPED = re.compile(
    r"from|date|author|origin|forwarded|last-update|patch-name|closes|fixes|resolves|refs|cc|link|url|commit|upstream"
    r"|status|version|applied-upstream|(?:x-)?(?:bug|debian|git|gitlab|change|message|mime|content|co)\w*-[\w-]+|bug"
    r"|[a-z]+(?:[- ][a-z]+)*[- ](?:by|from|id)",
    re.IGNORECASE,
)
_DIFFSTAT = re.compile(r"\s*(?:\S+\s+\|\s+(?:\d+|Bin)\b.*|\d+ files? changed.*|(?:create|delete) mode \d+ .*)")
_COMMENT = re.compile(
    r"#!.*|##? (?!DP: ).*|All lines beginning with.*|\(?(?:cherry picked|backported) from.*|From \S+ .*"
)
_ADDRESS = re.compile(r"<?\b(?:https?|ftp|git)://\S+|\S+@\S+\.\S+|\b[0-9a-f]{12,40}\b")
_TAG = re.compile(r"^\s*(?:\[[^\]]*\]\s*|upstream: )+")
_WORD = re.compile(r"[\w.+/~-]+")
_EMPTY = re.compile(r"(?<!\w)(?:\(\s*\)|\"\s*\"|'\s*'|`\s*[`'])")  # what a name was wrapped in


def edited_files(raw: str) -> list[str]:
    """Files a unified diff changes or removes, sorted; those it creates are not there to be found."""
    olds = (old for old, _ in _FILES.findall(raw) if old != "/dev/null")
    return sorted({old.partition("/")[2] for old in olds} - {""})


def description(raw: str) -> str:
    """What a patch says of itself before its diff, in one line, the title first. May be empty."""
    start = _DIFF_STARTS.search(raw)
    return prose(raw[: start.start()] if start else raw)


def prose(text: str) -> str:
    """A patch's header or a commit message without fields, trailers, diffstats, comments and addresses, in one line."""
    return " ".join(" ".join(_kept_lines(text.splitlines())).split())


def _kept_lines(lines: Iterable[str]) -> Iterator[str]:
    is_dropping = False  # inside a field that goes on with indented lines
    for line in (line.removeprefix("## DP: ") for line in lines):
        if _DIFFSTAT.fullmatch(line) or _COMMENT.fullmatch(line):
            continue
        field = _FIELD.match(line)
        is_title = field is not None and field[1].lower() in _TITLES
        if field and not is_title and _DROPPED.fullmatch(field[1]):
            is_dropping = True
        elif not (is_dropping and line[:1].isspace() and line.strip()):
            is_dropping = False
            yield _ADDRESS.sub("", _TAG.sub("", line[field.end() :] if field and is_title else line))


def without_file_names(text: str, paths: Iterable[str]) -> str:
    """The text without words that are the name, the path or an end of the path of any of these files.

    A path also counts without its ending (`fs/xfs` for `fs/xfs.c`); a bare stem (`xfs`) is a word like others.
    """
    known = {form for path in paths for form in _forms(path.lower())}

    def shown(found: re.Match[str]) -> str:
        word = found[0].rstrip("./~-")
        bare = word.lower().lstrip("./")  # also of `a/lib/url.c`, as diffs write it
        is_name = bare in known or bare.partition("/")[2] in known
        return found[0][len(word) :] if is_name else found[0]

    text = _EMPTY.sub("", _WORD.sub(shown, text))
    return re.sub(r"\s+([,.;:)](?:\s|$))", r"\1", re.sub(r"\s+", " ", text)).strip(" :,;-")


def _forms(path: str) -> Iterator[str]:
    """The path and its ends, `a/b.c` and `b.c`, and without the ending where a folder is left before it."""
    parts = PurePosixPath(path).parts
    for start in range(len(parts)):
        end = "/".join(parts[start:])
        yield end
        if "/" in end and "." in parts[-1]:
            yield end.rpartition(".")[0]


def names_a_file(text: str, paths: Iterable[str]) -> bool:
    """True when the path or the name of one of these files stands in the text, in any case."""
    low = text.lower()
    return any(_stands_in(low, PurePosixPath(path).name.lower()) for path in paths)


def _stands_in(text: str, name: str) -> bool:
    """As a word of its own: `url.c` stands in "lib/url.c:", not in "curl.c" or in "url.conf"."""
    return re.search(rf"(?<![\w.-]){re.escape(name)}(?![\w-]|\.\w)", text) is not None
