"""F1 of the answered set of codes against the right one, only equal codes counting; the source of a python grader."""

import re
from typing import Any

CODE = re.compile(r"\b(?:[A-Z][0-9][0-9A-Z]|QA[0-9])(?:\.?[0-9A-Z]{1,4})?\b")
MAX_CODES = 5  # as in grader.py


def grade(sample: dict[str, Any], item: dict[str, Any]) -> float:
    answered = {code.replace(".", "") for code in CODE.findall(str(sample.get("output_text") or "").upper())}
    right = {code.replace(".", "") for code in item["codes"]}
    return 2 * len(answered & right) / (len(answered) + len(right)) if len(answered) <= MAX_CODES else 0.0
