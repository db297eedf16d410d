"""The responses API as a translation to chat completions: items -> messages, options -> options.

Pure functions. Reasoning makes the round trip in `content` and, opaque, in `encrypted_content`; what echoes it back
gives a local model the thoughts it had. What has no meaning here is refused with the path of its field.
"""

from __future__ import annotations

from typing import Any

from rft.server.errors import ApiError
from rft.server.inference.response_objects import unsealed
from rft.server.inference.response_request import ResponseRequest

_INCLUDABLE = ("reasoning.encrypted_content",)


def chat_body(request: ResponseRequest, history: list[dict[str, Any]], *, is_local: bool) -> dict[str, Any]:
    """The chat completion that answers `history` (items of responses before) and the request's own input.

    is_local: thoughts travel too. Raises ApiError (400).
    """
    _check(request)
    messages = [{"role": "developer", "content": request.instructions}] if request.instructions else []
    messages += _messages(history, "previous_response_id", is_local=is_local)
    messages += _messages(request.items, "input", is_local=is_local)
    form = _response_format((request.text or {}).get("format"))
    body: dict[str, Any] = {
        "model": request.model,
        "messages": messages,
        "tools": [_chat_tool(tool, index) for index, tool in enumerate(request.tools or [])] or None,
        "tool_choice": _chat_choice(request.tool_choice) if request.tools else None,
        "parallel_tool_calls": request.parallel_tool_calls if request.tools else None,
        "response_format": form,
        "reasoning_effort": (request.reasoning or {}).get("effort"),
        "max_completion_tokens": request.max_output_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
    }
    if request.stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return {key: value for key, value in body.items() if value is not None}


def _check(request: ResponseRequest) -> None:
    """Raises ApiError (400) for what this server does not have."""
    unsupported = {
        "background": bool(request.background),
        "conversation": request.conversation is not None,
        "prompt": request.prompt is not None,
        "top_logprobs": bool(request.top_logprobs),
    }
    for name, is_asked in unsupported.items():
        if is_asked:
            raise _unsupported(name, "this server does not support it; leave it out")
    for index, name in enumerate(request.include or []):
        if name not in _INCLUDABLE:
            raise _unsupported(f"include[{index}]", f"this server can include {', '.join(_INCLUDABLE)} only")


def _unsupported(param: str, problem: str) -> ApiError:
    return ApiError(f"Unsupported value for '{param}': {problem}.", code="unsupported_value", param=param)


def _invalid(param: str, problem: str) -> ApiError:
    return ApiError(f"Invalid value for '{param}': {problem}.", code="invalid_value", param=param)


def _chat_tool(tool: dict[str, Any], index: int) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise _unsupported(f"tools[{index}].type", f"{tool.get('type')} tools do not exist here; use function tools")
    if not isinstance(tool.get("name"), str) or not tool["name"]:
        raise _invalid(f"tools[{index}].name", "must be a non-empty string")
    keys = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {key: tool[key] for key in keys if tool.get(key) is not None}}


def _chat_choice(choice: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") != "function":
        raise _unsupported("tool_choice", "must be auto, none, required or {type: function, name: ...}")
    return {"type": "function", "function": {"name": choice.get("name")}}


def _response_format(form: Any) -> dict[str, Any] | None:
    if form is None or (isinstance(form, dict) and form.get("type") == "text"):
        return None
    if not isinstance(form, dict) or form.get("type") not in ("json_schema", "json_object"):
        raise _invalid("text.format", "must be an object of type text, json_object or json_schema")
    if form["type"] == "json_object":
        return {"type": "json_object"}
    if not isinstance(form.get("schema"), dict):
        raise _invalid("text.format.schema", "must be a JSON schema")
    keys = ("name", "description", "schema", "strict")
    return {"type": "json_schema", "json_schema": {key: form[key] for key in keys if form.get(key) is not None}}


def _messages(items: list[dict[str, Any]], param: str, *, is_local: bool) -> list[dict[str, Any]]:
    """Items as messages: the thoughts, text and calls of one turn become one message of the assistant."""
    messages: list[dict[str, Any]] = []
    turn: dict[str, Any] | None = None  # the assistant's, while it may still grow
    for index, item in enumerate(items):
        place, kind = f"{param}[{index}]", item.get("type") or "message"
        is_said = kind == "message" and item.get("role") == "assistant"
        if kind == "function_call" or is_said or kind == "reasoning":
            if turn is None or kind == "reasoning" or (is_said and (turn["content"] or "tool_calls" in turn)):
                turn = {"role": "assistant", "content": ""}
                messages.append(turn)
            _grow(turn, item, kind, place)
            continue
        turn = None
        messages.append(_other_message(item, kind, place))
    if not is_local:
        for message in messages:
            message.pop("reasoning_content", None)
    # a thought that nothing followed is no turn
    return [m for m in messages if m["role"] != "assistant" or m["content"] or "tool_calls" in m]


def _grow(turn: dict[str, Any], item: dict[str, Any], kind: str, place: str) -> None:
    if kind == "reasoning":
        turn["reasoning_content"] = _thought(item)
    elif kind == "message":
        turn["content"] = _text(item.get("content"), f"{place}.content")
    else:
        values = {key: item.get(key) for key in ("call_id", "name", "arguments")}
        wrong = next((key for key, value in values.items() if not isinstance(value, str)), None)
        if wrong is not None:
            raise _invalid(f"{place}.{wrong}", "must be a string")
        function = {"name": values["name"], "arguments": values["arguments"]}
        call = {"id": values["call_id"], "type": "function", "function": function}
        turn.setdefault("tool_calls", []).append(call)


def _other_message(item: dict[str, Any], kind: str, place: str) -> dict[str, Any]:
    if kind == "function_call_output":
        if not isinstance(item.get("call_id"), str):
            raise _invalid(f"{place}.call_id", "must be the id of a function call")
        return {
            "role": "tool",
            "tool_call_id": item["call_id"],
            "content": _text(item.get("output"), f"{place}.output"),
        }
    if kind != "message":
        raise _unsupported(f"{place}.type", f"items of type {kind} mean nothing to this server")
    if item.get("role") not in ("user", "system", "developer"):
        raise _invalid(f"{place}.role", "must be user, system, developer or assistant")
    return {"role": item["role"], "content": _text(item.get("content"), f"{place}.content")}


def _text(content: Any, place: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _invalid(place, "must be a string or a list of text parts")
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("input_text", "output_text", "text", "refusal"):
            raise _unsupported(f"{place}[{index}]", f"only text is read here, not a part of type {kind}")
        texts.append(str(part.get("text") or part.get("refusal") or ""))
    return "".join(texts)


def _thought(item: dict[str, Any]) -> str:
    """What a reasoning item of ours, or of another server, says."""
    sealed = item.get("encrypted_content")
    said = unsealed(sealed) if isinstance(sealed, str) else None
    if said is not None:
        return said
    parts = item.get("content") or item.get("summary") or []
    return "".join(str(part.get("text") or "") for part in parts if isinstance(part, dict))
