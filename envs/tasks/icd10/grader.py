"""Grade of an ICD-10-CM answer; the text of this file is the `source` of a python grader.

1 for the exact code, 0.5 for an ancestor or a descendant of it, 0.25 for another code of the same category (its first
three characters), 0 otherwise. The first code in the answer counts, so listing many earns nothing.
"""

import re
from typing import Any

CODE = re.compile(r"\b(?:[A-Z][0-9][0-9A-Z]|QA[0-9])(?:\.?[0-9A-Z]{1,4})?\b")


def grade(sample: dict[str, Any], item: dict[str, Any]) -> float:
    found = CODE.search(str(sample.get("output_text") or "").upper())
    if not found:
        return 0.0
    answer, gold = found.group().replace(".", ""), item["code"].replace(".", "")
    if answer == gold:
        return 1.0
    if answer.startswith(gold) or gold.startswith(answer):
        return 0.5
    return 0.25 if answer[:3] == gold[:3] else 0.0
