"""The rows of file planning: descriptions of changes as questions, the files they edit as answers.

All wording of the prompt is here. Deterministic: the same changes give the same rows in the same order. No row's prompt
holds the name or path of a file to be found.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rft.envs.tasks.file_planning.grader import MAX_PATHS
from rft.envs.tasks.file_planning.patches import names_a_file, without_file_names

MAX_TEXT_CHARS = 200  # a small model reads every word of it in each rollout; the title comes first
NUM_SHOWN = 3
COMMAND = "grep -rci {word} . | sort -t: -nrk2 | head -" + str(NUM_SHOWN)  # as the demonstrations search

SYSTEM_TEXT = "Find the files to edit for a change. Search for words of it, then answer with the paths, one per line."
QUESTION = "Change: {text}"

TOOLS: list[dict[str, Any]] = [  # the names and arguments of the environment `shell`, in as few words as will do
    {
        "type": "function",
        "function": {
            "name": name,
            "description": text,
            "parameters": {"type": "object", "properties": {argument: {"type": "string"}}, "required": [argument]},
        },
    }
    for name, text, argument in (
        ("shell", "Run a command in the source tree.", "command"),
        ("read_file", "Read a file.", "path"),
    )
]
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]{3,}")
_TITLE = re.compile(r"([A-Za-z_][A-Za-z0-9_]{2,})(?:: |/)")


@dataclass(frozen=True, slots=True)
class Change:
    """`files` are paths in `tree`, a folder below trees/; `text` is as its author wrote it."""

    source: str
    name: str
    tree: str
    text: str
    files: tuple[str, ...]


def row_of(change: Change, paths: Iterable[str]) -> dict[str, Any] | None:
    """The row of a change; None where nothing can be asked or answered. paths: all files of its source, in any form."""
    text = shortened(without_file_names(change.text, [*paths, *change.files]))
    if not 0 < len(change.files) <= MAX_PATHS or not words(text) or names_a_file(text, change.files):
        return None
    keys = {"tree": change.tree, "files": list(change.files), "source": change.source, "name": change.name}
    return {"messages": messages_for(text), "tools": TOOLS, **keys, "text": text, "identifiers": identifiers(text)}


def messages_for(text: str) -> list[dict[str, Any]]:
    """What the model reads before it writes: the instruction and the change. No call: how to search is left open."""
    return [
        {"role": "system", "content": SYSTEM_TEXT},
        {"role": "user", "content": QUESTION.format(text=text)},
    ]


def shortened(text: str) -> str:
    """Whole words up to MAX_TEXT_CHARS."""
    if len(text) <= MAX_TEXT_CHARS:
        return text
    return text[: MAX_TEXT_CHARS + 1].rpartition(" ")[0].rstrip(" ,;:-(")


def words(text: str) -> list[str]:
    """What could be searched for, each once, in the order of the text."""
    return list(dict.fromkeys(_WORD.findall(text)))


def identifiers(text: str) -> list[str]:
    """The words that look like code: `a_b`, `aB`, `a()`, and what a title names before its colon."""
    title = _TITLE.match(text)
    found = [word for word in words(text) if "_" in word.strip("_") or re.search(r"[a-z][A-Z]", word)]
    found += [word for word in words(text) if f"{word}(" in text]
    return list(dict.fromkeys([*([title[1]] if title else []), *found]))


class Hits:
    """What COMMAND finds in one tree: how many lines of each file hold a word, in any case."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self._texts = {path: data.decode("utf-8", errors="replace").lower() for path, data in files.items()}
        self._best: dict[str, list[tuple[str, int]]] = {}

    def best(self, word: str) -> list[tuple[str, int]]:
        """The NUM_SHOWN files with the most such lines and how many, most first; fewer where fewer have any."""
        low = word.lower()
        if low not in self._best:
            found = [(path, _num_lines(text, low)) for path, text in self._texts.items() if low in text]
            self._best[low] = sorted(found, key=lambda hit: (hit[1], hit[0]), reverse=True)[:NUM_SHOWN]
        return self._best[low]


def _num_lines(text: str, word: str) -> int:
    num, place = 0, text.find(word)
    while place >= 0:
        num, end = num + 1, text.find("\n", place)
        place = text.find(word, end) if end >= 0 else -1
    return num


def is_first_stage(row: dict[str, Any], hits: Hits) -> bool:
    """Whether some word of the text, searched for with COMMAND, shows a right file first: what training starts with."""
    firsts = {path for word in words(row["text"]) for path, _ in hits.best(word)[:1]}
    return not firsts.isdisjoint(row["files"])


def demonstration_of(row: dict[str, Any], hits: Hits) -> dict[str, Any] | None:
    """The row gone through with a word drawn at random, every second time one that looks like code where there is any.

    It shows the form of a search and of an answer; the files to be found play no part in it. None where no word is in
    as many files as the command shows.
    """
    known = [word for word in words(row["text"]) if len(hits.best(word)) == NUM_SHOWN]
    if not known:
        return None
    chance = random.Random(row["name"])
    named = [word for word in known if word in row["identifiers"]]
    word = chance.choice(named if named and chance.random() < 0.5 else known)
    lines = [f"./{path}:{num}" for path, num in hits.best(word)]
    arguments = json.dumps({"command": COMMAND.format(word=word)})
    call = {"id": "call_0", "type": "function", "function": {"name": "shell", "arguments": arguments}}
    said = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_0", "content": "\n".join(lines) + "\n"},
        {"role": "assistant", "content": lines[0].rpartition(":")[0]},
    ]
    keys = {key: row[key] for key in ("tools", "source", "name")}
    return {"messages": [*row["messages"], *said], **keys}


def shuffled(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Any first n of them are a fair sample."""
    rows = sorted(rows, key=lambda row: (row["source"], row["name"]))
    random.Random(0).shuffle(rows)
    return rows
