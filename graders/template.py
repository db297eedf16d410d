"""The contract's templates: `{{ item.answer }}`, `{{ sample.output_tools[0].function.arguments }}`.

Rendered in one pass, so that text from the data or the model is never read as a template. Strings are inserted raw,
everything else as compact JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from rft.errors import GraderError

INVALID_VARIABLE = "invalid_variable_error"
_PLACEHOLDER = re.compile(r"\{\{\s*(.*?)\s*\}\}", re.DOTALL)
_PATH = re.compile(r"(?:item|sample)(?:\.[^\s.\[\]{}]+|\[\d+\])+")
_STEP = re.compile(r"\.([^.\[\]]+)|\[(\d+)\]")
_MISSING = object()


class TemplateError(GraderError):
    """A variable has no value; `flag` is the contract's name for it, `namespace` is `item` or `sample`."""

    flag = INVALID_VARIABLE

    def __init__(self, variable: str) -> None:
        self.variable, self.namespace = variable, re.split(r"[.\[]", variable)[0]
        cure = "check the name against the dataset row" if self.namespace == "item" else ""
        super().__init__(f"{INVALID_VARIABLE}: there is no value for {{{{ {variable} }}}}", cure=cure)


def check_template(text: str) -> str:
    """The text itself; ValueError naming the placeholder that can never have a value."""
    for match in _PLACEHOLDER.finditer(text):
        if not _PATH.fullmatch(match[1]):
            raise ValueError(f"{match[0]} is not a variable; write {{{{ item.key }}}} or {{{{ sample.output_text }}}}")
    return text


def render(text: str, item: Mapping[str, Any], sample: Mapping[str, Any]) -> str:
    """The text with every placeholder replaced. Raises TemplateError for a variable that does not exist."""
    namespaces = {"item": item, "sample": sample}
    return _PLACEHOLDER.sub(lambda match: _as_text(_look_up(match[1], namespaces)), text)


def _look_up(variable: str, namespaces: Mapping[str, Mapping[str, Any]]) -> Any:
    if not _PATH.fullmatch(variable):
        raise TemplateError(variable)
    value: Any = namespaces
    for key, index in _STEP.findall("." + variable):
        value = _child(value, key, index)
        if value is _MISSING:
            raise TemplateError(variable)
    return value


def _child(value: Any, key: str, index: str) -> Any:
    if key:
        return value.get(key, _MISSING) if isinstance(value, Mapping) else _MISSING
    is_inside = isinstance(value, list) and int(index) < len(value)
    return value[int(index)] if is_inside else _MISSING


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, separators=(",", ":"))
