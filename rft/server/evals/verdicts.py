"""Pass and fail: what a grader's score counts as in an eval. It changes no reward.

A score passes from the grader's `pass_threshold` on; without one from 0.5 on, which for graders that only know 0 and 1
is 1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

DEFAULT_THRESHOLD = 0.5


def threshold_of(spec: Mapping[str, Any]) -> float:
    value = spec.get("pass_threshold")
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else DEFAULT_THRESHOLD


def criterion_id(owner: str, key: str) -> str:
    """`8-4-4-4-12` hex digits that name a grader of an eval, the same each time."""
    digits = hashlib.sha256(f"{owner}\x1f{key}".encode()).hexdigest()
    return "-".join([digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:32]])


def count_results(statuses: Iterable[str]) -> dict[str, int]:
    """The wire's `result_counts` of items' statuses: pass, fail, error."""
    found = list(statuses)
    passed, failed = found.count("pass"), found.count("fail")
    return {"total": len(found), "errored": len(found) - passed - failed, "failed": failed, "passed": passed}


def model_usage(name: str, num: int, prompt: int, completion: int, cached: int) -> dict[str, Any]:
    """An entry of the wire's `per_model_usage`."""
    return {
        "model_name": name,
        "invocation_count": num,
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "cached_tokens": cached,
    }
