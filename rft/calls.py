"""Tool calls in the text of a model: one parser per dialect of chat templates, and the way back.

A malformed call is data: it comes back as a ToolCall whose `error` tells the model what was wrong. Never raises,
whatever the model wrote.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from rft.types import Item, ToolCall

Dialect = Literal["hermes", "llama3", "mistral"]
_TOO_MUCH = "the call is not valid JSON: nested too deeply, or a number with too many digits"


@dataclass(frozen=True, slots=True)
class _RawCall:
    """A call as found in the text: a decoded object, or why it could not be decoded."""

    payload: Any
    text: str
    error: str | None = None


def _decode(text: str) -> _RawCall:
    try:
        return _RawCall(json.loads(text), text)
    except json.JSONDecodeError as error:
        return _RawCall(None, text, f"the call is not valid JSON: {error.msg} at character {error.pos}")
    except (ValueError, RecursionError):  # a number of thousands of digits, brackets in brackets
        return _RawCall(None, text, _TOO_MUCH)


def _parse_hermes(text: str) -> tuple[str, list[_RawCall]]:
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number of times (Qwen, Hermes, generic)."""
    opens, closes = "<tool_call>", "</tool_call>"
    content, position = "", 0
    calls: list[_RawCall] = []
    while (start := text.find(opens, position)) >= 0:
        content += text[position:start]
        end = text.find(closes, start)
        if end < 0:
            rest = text[start + len(opens) :]
            return content, [*calls, _RawCall(None, rest.strip(), "the call does not end with </tool_call>")]
        calls.append(_decode(text[start + len(opens) : end].strip()))
        position = end + len(closes)
    return content + text[position:], calls


def _parse_llama3(text: str) -> tuple[str, list[_RawCall]]:
    """A bare `{"name": ..., "parameters": {...}}`, several separated by `;`, perhaps after `<|python_tag|>`."""
    body = text.replace("<|python_tag|>", "").strip()
    if not body.startswith("{"):
        return text, []
    decoder, position = json.JSONDecoder(), 0
    calls: list[_RawCall] = []
    while position < len(body):
        try:
            payload, end = decoder.raw_decode(body, position)
        except json.JSONDecodeError as error:
            return "", [*calls, _RawCall(None, body[position:], f"the call is not valid JSON: {error.msg}")]
        except (ValueError, RecursionError):
            return "", [*calls, _RawCall(None, body[position:], _TOO_MUCH)]
        calls.append(_RawCall(payload, body[position:end]))
        position = end + len(body[end:]) - len(body[end:].lstrip("; \n"))
    if not all(isinstance(call.payload, dict) and "name" in call.payload for call in calls):
        return text, []  # an answer that happens to be JSON
    return "", calls


def _parse_mistral(text: str) -> tuple[str, list[_RawCall]]:
    """`[TOOL_CALLS][{...}, ...]`, or `[TOOL_CALLS]name[ARGS]{...}` once per call."""
    content, marked, body = text.partition("[TOOL_CALLS]")
    if not marked:
        return text, []
    if body.lstrip().startswith("["):
        raw = _decode(body.strip())
        many = raw.payload if isinstance(raw.payload, list) else []
        return content, [_RawCall(payload, json.dumps(payload)) for payload in many] or [raw]
    return content, [_decode_named(part) for part in body.split("[TOOL_CALLS]")]


def _decode_named(text: str) -> _RawCall:
    name, marked, arguments = text.partition("[ARGS]")
    raw = _decode((arguments if marked else name[name.find("{") :]).strip())
    name = name if marked else name[: max(name.find("{"), 0)]
    return raw if raw.error else _RawCall({"name": name.strip(), "arguments": raw.payload}, text)


_PARSERS: dict[Dialect, Callable[[str], tuple[str, list[_RawCall]]]] = {
    "hermes": _parse_hermes,
    "llama3": _parse_llama3,
    "mistral": _parse_mistral,
}


def dialect_of(template: Any) -> Dialect:
    text = str(template)
    if "[TOOL_CALLS]" in text:
        return "mistral"
    return "hermes" if "<tool_call>" in text else "llama3"


def parse_calls(text: str, dialect: Dialect, item: Item, prefix: str) -> tuple[str, list[ToolCall]]:
    """What the text says beside its calls, and the calls, with ids `call_<prefix>_<n>`."""
    content, found = _PARSERS[dialect](text)
    return content, [_checked(raw, index, prefix, item) for index, raw in enumerate(found)]


def read_call(name: str, arguments: str, item: Item, prefix: str, index: int) -> ToolCall:
    """A call that a chat API has taken from the text already, with the id that `parse_calls` would give it."""
    raw = _decode(arguments.strip() or "{}")
    return _checked(_RawCall({"name": name, "arguments": raw.payload}, arguments, raw.error), index, prefix, item)


def spell_calls(calls: list[ToolCall], dialect: Dialect) -> str:
    """Well-formed calls in the plainest text that `parse_calls` reads back."""
    if dialect == "llama3":
        return "; ".join(_spelled(call, "parameters") for call in calls)
    if dialect == "mistral":
        return f"[TOOL_CALLS][{', '.join(_spelled(call, 'arguments') for call in calls)}]"
    return "\n".join(f"<tool_call>\n{_spelled(call, 'arguments')}\n</tool_call>" for call in calls)


def _spelled(call: ToolCall, key: str) -> str:
    return json.dumps({"name": call.name, key: json.loads(call.arguments)}, ensure_ascii=False)


def _checked(raw: _RawCall, index: int, prefix: str, item: Item) -> ToolCall:
    """A ToolCall whose name and arguments are usable, or one whose `error` says why they are not."""
    payload = raw.payload if isinstance(raw.payload, dict) else {}
    name = payload.get("name")
    arguments = payload.get("arguments", payload.get("parameters", {}))
    error = raw.error or _problem(raw.payload, name, arguments, item)
    if error is None and index > 0 and not item.parallel_tool_calls:
        error = "only one call per turn is allowed"
    return ToolCall(
        id=f"fc_{prefix}_{index}",
        call_id=f"call_{prefix}_{index}",
        name=name if isinstance(name, str) else "",
        arguments=raw.text if error else json.dumps(arguments, ensure_ascii=False),
        error=error,
    )


def _problem(payload: Any, name: Any, arguments: Any, item: Item) -> str | None:
    if not isinstance(payload, dict):
        return "a call must be a JSON object with name and arguments"
    if name not in item.tool_names:
        return f"there is no tool {json.dumps(name)}; the tools are: {', '.join(item.tool_names)}"
    return None if isinstance(arguments, dict) else "arguments must be a JSON object"
