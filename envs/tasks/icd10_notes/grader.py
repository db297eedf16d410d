"""Soft F1 of the codes of a note: how close the answered set is to the right one; the source of a python grader.

A pair of codes is worth 1 when equal, 0.5 when one is an ancestor of the other, 0.25 in the same category (the first
three characters). The soft F1 is 2 M / (answered + right), M the worth of the best one-to-one matching; where no pair
is merely close it is the F1 of two sets. A code too many lowers it, and more than five codes are worth nothing: a note
has at most three.
"""

import re
from itertools import permutations
from typing import Any

CODE = re.compile(r"\b(?:[A-Z][0-9][0-9A-Z]|QA[0-9])(?:\.?[0-9A-Z]{1,4})?\b")
MAX_CODES = 5


def grade(sample: dict[str, Any], item: dict[str, Any]) -> float:
    answered = codes_in(str(sample.get("output_text") or ""))
    right = [code.replace(".", "") for code in item["codes"]]
    return soft_f1(answered, right) if len(answered) <= MAX_CODES else 0.0


def codes_in(text: str) -> list[str]:
    """Distinct codes without dots, in their order."""
    return list(dict.fromkeys(code.replace(".", "") for code in CODE.findall(text.upper())))


def soft_f1(answered: list[str], right: list[str]) -> float:
    few, many = sorted((answered, right), key=len)
    best = max(sum(map(worth, few, others)) for others in permutations(many, len(few)))
    return 2 * best / (len(answered) + len(right))


def worth(one: str, other: str) -> float:
    if one == other:
        return 1.0
    if one.startswith(other) or other.startswith(one):
        return 0.5
    return 0.25 if one[:3] == other[:3] else 0.0
