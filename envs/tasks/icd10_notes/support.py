"""Whether an answer rests on searching: half for a call that was answered, half for the share of answered codes that
search found; the source of a python grader. It is for training alone: support says nothing about what is right.

A line of a result begins with the code it offers; a code elsewhere in a result, as in a repeated query, is not found.
"""

import re
from typing import Any

CODE = re.compile(r"\b(?:[A-Z][0-9][0-9A-Z]|QA[0-9])(?:\.?[0-9A-Z]{1,4})?\b")
MAX_CODES = 5  # as in grader.py


def grade(sample: dict[str, Any], item: dict[str, Any]) -> float:
    results = [m["content"] for m in sample["trace"] if m["role"] == "tool" and not m.get("is_error")]
    answered = {code.replace(".", "") for code in CODE.findall(str(sample.get("output_text") or "").upper())}
    score = 0.5 * bool(results)
    if 0 < len(answered) <= MAX_CODES:
        score += 0.5 * len(answered & found_in(results)) / len(answered)
    return score


def found_in(results: list[str]) -> set[str]:
    starts = [CODE.match(line) for result in results for line in result.splitlines()]
    return {start.group().replace(".", "") for start in starts if start}
