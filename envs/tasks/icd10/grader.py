"""Grade of an ICD-10-CM answer; the text of this file is the `source` of a python grader.

1 for the exact code, 0.5 for an ancestor or a descendant of it, 0.25 for another code of the same category (its first
three characters), 0 otherwise. The first code in the answer counts, divided by the number of distinct codes: listing
many earns nothing, and a sentence around one code costs nothing.
"""

import re
from typing import Any

CODE = re.compile(r"\b(?:[A-Z][0-9][0-9A-Z]|QA[0-9])(?:\.?[0-9A-Z]{1,4})?\b")


def grade(sample: dict[str, Any], item: dict[str, Any]) -> float:
    found = CODE.findall(str(sample.get("output_text") or "").upper())
    answers = list(dict.fromkeys(code.replace(".", "") for code in found))
    return closeness(answers[0], item["code"].replace(".", "")) / len(answers) if answers else 0.0


def closeness(answer: str, gold: str) -> float:
    if answer == gold:
        return 1.0
    if answer.startswith(gold) or gold.startswith(answer):
        return 0.5
    return 0.25 if answer[:3] == gold[:3] else 0.0
