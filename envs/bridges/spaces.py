"""Gymnasium's action spaces as JSON schemas, and a model's JSON as actions. Needs gymnasium, so imported when used."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from gymnasium import spaces

from rft.envs.tasks import ArgumentError
from rft.errors import UserError

_PRINTABLE = 200  # characters of a charset that are worth telling the model


def schema_of(space: spaces.Space[Any]) -> dict[str, Any]:
    """The JSON schema of an action. Raises UserError for a space that has no sensible one."""
    match space:
        case spaces.Discrete():
            first = int(space.start)
            return {"type": "integer", "minimum": first, "maximum": first + int(space.n) - 1}
        case spaces.MultiDiscrete():
            lows, highs = space.start, space.start + space.nvec - 1
            return _array(space.shape, "integer", int(lows.min()), int(highs.max()))
        case spaces.MultiBinary():
            return _array(space.shape, "integer", 0, 1)
        case spaces.Box():
            kind = "integer" if np.issubdtype(space.dtype, np.integer) else "number"
            return _array(space.shape, kind, space.low.min().item(), space.high.max().item())
        case spaces.Text():
            return _text(space)
        case spaces.Dict():
            parts = {name: schema_of(part) for name, part in space.spaces.items()}
            return {"type": "object", "properties": parts, "required": list(parts), "additionalProperties": False}
        case spaces.Tuple():
            items = [schema_of(part) for part in space.spaces]
            return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
    raise UserError(
        f"the action space {type(space).__name__} cannot be written as a tool's argument",
        where="environment.env",
        cure="wrap the environment so that its actions are Discrete, MultiDiscrete, MultiBinary, Box, Text, "
        "Dict or Tuple",
    )


def action_of(value: Any, space: spaces.Space[Any]) -> Any:
    """The action that the JSON value means. Raises ArgumentError, written for the model, when the space lacks it."""
    action = _converted(value, space)
    if action is None or not space.contains(action):
        raise ArgumentError(f"arguments.action: not a possible action; an action is {_in_words(space)}")
    return action


def _array(shape: tuple[int, ...], kind: str, low: float, high: float) -> dict[str, Any]:
    """Numbers nested as `shape` says; bounds that are infinite, or too large to mean anything, are left out."""
    schema: dict[str, Any] = {"type": kind}
    if abs(low) < 1e15:
        schema["minimum"] = low
    if abs(high) < 1e15:
        schema["maximum"] = high
    for size in reversed(shape):
        schema = {"type": "array", "items": schema, "minItems": size, "maxItems": size}
    return schema


def _text(space: spaces.Text) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string", "minLength": space.min_length, "maxLength": space.max_length}
    if len(space.characters) <= _PRINTABLE:
        schema["description"] = f"made of these characters: {''.join(sorted(space.character_set))}"
    return schema


def _converted(value: Any, space: spaces.Space[Any]) -> Any:
    """The value in the type that the space asks for; None when it cannot be that."""
    match space:
        case spaces.Discrete():
            return value if _is_number(value, whole=True) else None
        case spaces.MultiDiscrete() | spaces.MultiBinary():
            return _as_array(value, space, whole=True)
        case spaces.Box():
            return _as_array(value, space, whole=bool(np.issubdtype(space.dtype, np.integer)))
        case spaces.Text():
            return value if isinstance(value, str) else None
        case spaces.Dict():
            if not isinstance(value, dict) or value.keys() != space.spaces.keys():
                return None
            parts = {name: _converted(value[name], part) for name, part in space.spaces.items()}
            return None if any(part is None for part in parts.values()) else parts
        case spaces.Tuple():
            if not isinstance(value, list) or len(value) != len(space.spaces):
                return None
            items = tuple(_converted(part, inner) for part, inner in zip(value, space.spaces, strict=True))
            return None if any(item is None for item in items) else items
    return None


def _as_array(value: Any, space: Any, whole: bool) -> Any:
    """An array of the space's shape and type; None for anything that would have to be rounded or cut to fit."""
    if not _are_numbers(value, whole, depth=len(space.shape)):
        return None
    try:
        array = np.array(value, dtype=np.float64 if not whole else np.int64)
    except (ValueError, OverflowError):  # rows of different lengths, numbers beyond the type
        return None
    cast = array.astype(space.dtype)
    is_same = array.shape == space.shape and (not whole or bool((cast == array).all()))
    return cast if is_same else None


def _are_numbers(value: Any, whole: bool, depth: int) -> bool:
    if depth == 0:
        return _is_number(value, whole)
    return isinstance(value, list) and all(_are_numbers(part, whole, depth - 1) for part in value)


def _is_number(value: Any, whole: bool) -> bool:
    if isinstance(value, bool):
        return False
    return isinstance(value, int) or (not whole and isinstance(value, float) and math.isfinite(value))


def _in_words(space: spaces.Space[Any]) -> str:
    schema = schema_of(space)
    if isinstance(space, spaces.Discrete):
        return f"a whole number from {schema['minimum']} to {schema['maximum']}"
    return f"JSON of this schema: {schema}"
