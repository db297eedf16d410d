"""Grader specs in shapes that circulate but that no service takes, normalised to the contract's.

`{"type": "model", "model", "prompt": "... {ground_truth} ... {final_answer}", "response_format"}` is the sketch of the
published Agent RFT pattern: a score_model whose prompt is one user message. `{final_answer}` is what the model said
last, any other `{name}` a key of the dataset row. Its response format is dropped: a judge's answer always has the
contract's own form, and the sketch's `score` is its `result`.
"""

from __future__ import annotations

import re
from typing import Any

_NAME = re.compile(r"(?<!\{)\{([A-Za-z_]\w*)\}(?!\})")
_KEYS = {"type", "name", "model", "prompt", "response_format", "range", "sampling_params", "samples", "cache"}


def from_sketch(spec: Any) -> Any:
    """The spec itself, or the contract's form of a sketched one. Raises ValueError for one that lacks its prompt."""
    if not isinstance(spec, dict) or spec.get("type") != "model":
        return spec
    unknown = sorted(set(spec) - _KEYS)
    if unknown:
        raise ValueError(f"{unknown[0]}: unknown key of a grader of type model")
    if not isinstance(spec.get("prompt"), str):
        raise ValueError("prompt: a grader of type model needs one; or write a score_model with input")
    rest = {key: value for key, value in spec.items() if key not in ("type", "prompt", "response_format")}
    return {"type": "score_model", "input": [{"role": "user", "content": _template(spec["prompt"])}], **rest}


def _template(prompt: str) -> str:
    return _NAME.sub(lambda match: "{{ " + _variable(match[1]) + " }}", prompt)


def _variable(name: str) -> str:
    return "sample.output_text" if name == "final_answer" else f"item.{name}"
