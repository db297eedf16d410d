"""The way to an answer; the text of this file is the `source` of a python grader.

0.5 for a call that a tool answered, 0.5 for the share of named paths that a tool showed: no path is made up. What has
neither a slash nor a dot is no path: repeating an error earns nothing.
"""

import re
from typing import Any

WORD = re.compile(r"[\w.+~/-]+")


def words_of(text: str) -> set[str]:
    return {word.strip("./") for word in WORD.findall(text)} - {""}


def grade(sample: dict[str, Any], item: dict[str, Any]) -> float:
    shown = [m["content"] for m in sample["trace"] if m["role"] == "tool" and not m.get("is_error")]
    if not shown:
        return 0.0
    named = {word for word in words_of(str(sample.get("output_text") or "")) if "/" in word or "." in word}
    return 0.5 + 0.5 * len(named & words_of("\n".join(map(str, shown)))) / max(1, len(named))
