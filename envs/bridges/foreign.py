"""What every bridge shares: foreign code by its name, a model's arguments, and foreign values as text and JSON."""

from __future__ import annotations

import hashlib
import json
import math
from importlib import import_module
from typing import Any, Literal

from rft.envs.tasks import ArgumentError
from rft.errors import UserError
from rft.types import Item, ToolCall, ToolResult
from rft.wire import MAX_BODY_BYTES

_MAX_FACT_BYTES = 65_536  # of one value in an outcome: it is written with every rollout
_MAX_DEPTH = 32


def load_object(name: str, where: str) -> Any:
    """What `package.module:NAME` names. Raises UserError naming the field `where` and the cure."""
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise UserError(f"{name!r} does not name an object", where=where, cure="write package.module:NAME")
    try:
        found: Any = import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        cure = "check the name, and that the module can be imported from here"
        raise UserError(f"cannot be loaded: {error}", where=where, cure=cure) from None
    except Exception as error:  # importing runs the user's code: whatever it raises, the user must repair it
        problem = f"{module} raised {type(error).__name__} when it was imported: {error}"
        raise UserError(problem, where=where, cure="repair the module") from error
    return found


def arguments_of(call: ToolCall) -> dict[str, Any]:
    """The call's arguments. Raises ArgumentError, written for the model."""
    try:
        arguments = json.loads(call.arguments)
    except (ValueError, RecursionError) as error:
        raise ArgumentError(f"arguments: not valid JSON: {error}") from None
    if not isinstance(arguments, dict):
        raise ArgumentError("arguments: must be a JSON object")
    return arguments


def seed_of(item: Item, rollout_id: str, source: Literal["item", "rollout"]) -> int:
    """The row's `seed`; without one a number that follows from the item, or from the rollout."""
    given = item.row.get("seed")
    if isinstance(given, int) and not isinstance(given, bool) and given >= 0:
        return given
    key = item.id if source == "item" else rollout_id
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") >> 1


def no_such_tool(name: str, names: list[str]) -> ArgumentError:
    return ArgumentError(f"there is no tool {name}; the tools are: {', '.join(sorted(names))}")


def result_of(call: ToolCall, text: str, latency_s: float, is_error: bool = False) -> ToolResult:
    """The text as the model sees it: within the cap, and encodable."""
    output = clean(text)
    if len(output.encode()) > MAX_BODY_BYTES:
        output, is_error = f"413: the answer of {call.name} is larger than {MAX_BODY_BYTES:,} bytes", True
    return ToolResult(call_id=call.call_id, output=output, is_error=is_error, latency_s=latency_s)


def clean(text: str) -> str:
    """The text with halves of surrogate pairs replaced: they could not be written anywhere."""
    return text.encode("utf-8", errors="replace").decode()


def as_text(value: Any) -> str:
    """A value for the model to read: text as it is, else JSON, else what Python prints."""
    if isinstance(value, str):
        return value
    try:
        return json.dumps(as_json(value), ensure_ascii=False)
    except TypeError:
        return str(value)


def as_json(value: Any, depth: int = 0) -> Any:
    """The value as plain JSON data: numpy's numbers and arrays too, NaN and infinity as null.

    Raises TypeError for what has no JSON form.
    """
    if value is None or isinstance(value, bool | int):
        return bool(value) if isinstance(value, bool) else value if value is None else int(value)
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if depth < _MAX_DEPTH:
        if isinstance(value, dict):
            return {clean(str(key)): as_json(part, depth + 1) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return [as_json(part, depth + 1) for part in value]
        if type(value).__module__.partition(".")[0] == "numpy":  # not imported here: whoever has one has numpy
            return as_json(value.tolist(), depth + 1)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def facts(values: dict[str, Any]) -> dict[str, Any]:
    """Those of the values that are JSON and of reasonable size."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        try:
            plain = as_json(value)
            is_small = len(json.dumps(plain)) <= _MAX_FACT_BYTES
        except TypeError:
            continue
        if is_small:
            found[name] = plain
    return found
