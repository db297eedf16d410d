"""What vLLM forces an answer into: a JSON schema, a call of a tool, or nothing. Pure functions.

Calls are forced in the spelling of training, so that what the model reads of itself later is what it was trained on.
"""

from __future__ import annotations

import json
from typing import Any

from rft.calls import Dialect
from rft.server.errors import ApiError
from rft.server.inference.request import LocalChat

_MAX_WHITESPACE = 1  # in a row: small models never end a run of blanks


def constraint(chat: LocalChat, dialect: Dialect, *, is_generic: bool) -> dict[str, Any] | None:
    """vLLM's `response_format`. `is_generic`: the template knows no tools. Raises ApiError where it cannot."""
    forced = chat.forced_names
    if forced and dialect == "mistral":
        message = "Invalid value for 'tool_choice': this model's calls begin with a special token and cannot be forced."
        raise ApiError(message, code="unsupported_value", param="tool_choice")
    if forced:
        return _tagged(_calls(chat, forced, dialect, is_generic))
    form = _form(chat.response_format)
    if form is None or chat.tool_choice == "none" or not chat.tools or dialect == "mistral":
        return _tagged(form) if form is not None else None
    names = [tool["function"]["name"] for tool in chat.tools]
    return _tagged({"type": "or", "elements": [form, _calls(chat, names, dialect, is_generic)]})


def _form(response_format: dict[str, Any] | None) -> dict[str, Any] | None:
    if response_format is None or response_format["type"] == "text":
        return None
    is_any = response_format["type"] == "json_object"
    schema = {"type": "object"} if is_any else response_format["json_schema"]["schema"]
    return _json(schema)


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": schema, "max_whitespace_cnt": _MAX_WHITESPACE}


def _tagged(form: dict[str, Any]) -> dict[str, Any]:
    return {"type": "structural_tag", "format": form}


def _calls(chat: LocalChat, names: list[str], dialect: Dialect, is_generic: bool) -> dict[str, Any]:
    """One call or more of the named tools, and nothing else."""
    key = "parameters" if dialect == "llama3" else "arguments"
    opens, closes = ("", "") if dialect == "llama3" else ("<tool_call>", "</tool_call>")
    if opens and not is_generic:
        opens, closes = f"{opens}\n", f"\n{closes}"
    tags = [
        {
            "type": "tag",
            "begin": f'{opens}{{"name": {json.dumps(tool["function"]["name"])}, "{key}": ',
            "content": _json(tool["function"].get("parameters") or {"type": "object"}),
            "end": f"}}{closes}",
        }
        for tool in chat.tools
        if tool["function"]["name"] in names
    ]
    separator = "; " if dialect == "llama3" else "\n"
    is_one = not chat.parallel_tool_calls or isinstance(chat.tool_choice, dict)
    return {
        "type": "tags_with_separator",
        "tags": tags,
        "separator": separator,
        "at_least_one": True,
        "stop_after_first": is_one,
    }
