"""F1 of the files an answer names; the text of this file is the `source` of a python grader.

The answer holds paths, one per line; `./` before a path and `:12` after it are let pass. Every wrong path lowers the
precision, and an answer with more than MAX_PATHS paths gets 0: listing the tree earns nothing.
"""

import re
from typing import Any

MAX_PATHS = 10
WORD = re.compile(r"[^\s,;\"'`<>()\[\]{}*|=]+")


def paths_in(text: str) -> set[str]:
    """Words that could be paths: with a slash or an ending, or alone on their line."""
    found = set()
    for line in text.splitlines():
        words = [word.partition(":")[0].rstrip(".!?") for word in WORD.findall(line)]
        for word in words:
            path = re.sub(r"^(?:\./|/tree/)+", "", word)
            if len(words) == 1 or "/" in path or re.search(r"\w\.\w", path):
                found.add(path)
    return found - {""}


def grade(sample: dict[str, Any], item: dict[str, Any]) -> float:
    named, gold = paths_in(str(sample.get("output_text") or "")), set(item["files"])
    right = len(named & gold)
    if not right or len(named) > MAX_PATHS:
        return 0.0
    return 2 * right / (len(named) + len(gold))
