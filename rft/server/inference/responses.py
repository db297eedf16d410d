"""The responses API as a translation of chat completions: items -> messages, a completion -> output items.

Pure functions. Reasoning makes the round trip in `content` and, opaque, in `encrypted_content`; what echoes it back
gives a local model the thoughts it had. What has no meaning here is refused with the path of its field.
"""

from __future__ import annotations

import base64
import binascii
import time
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from rft.server.errors import ApiError
from rft.server.ids import new_id

_SEAL = "rft1."
_INCLUDABLE = ("reasoning.encrypted_content",)


class ResponseRequest(BaseModel):
    """What POST /responses takes; the last fields change nothing here."""

    model_config = ConfigDict(extra="forbid")

    model: str
    input: str | list[dict[str, Any]] = Field(default_factory=list)
    instructions: str | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    store: bool | None = None
    previous_response_id: str | None = None
    include: list[str] | None = None
    metadata: dict[str, str] | None = None
    stream: bool | None = None
    background: bool | None = None
    conversation: Any = None
    prompt: Any = None
    top_logprobs: int | None = None
    stream_options: dict[str, Any] | None = None
    truncation: Literal["auto", "disabled"] | None = Field(
        None, description="nothing is left out: too long is an error"
    )
    user: str | None = None
    max_tool_calls: int | None = Field(None, description="counts built-in tools, of which there are none")
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    @property
    def seals_reasoning(self) -> bool:
        return "reasoning.encrypted_content" in (self.include or [])

    @property
    def has_summary(self) -> bool:
        asked = self.reasoning or {}
        return (asked.get("summary") or asked.get("generate_summary")) is not None

    @property
    def items(self) -> list[dict[str, Any]]:
        """The input as items with ids."""
        if isinstance(self.input, str):
            return [_user_item(self.input)]
        return [_with_id(item) for item in self.input]


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


def output_items(request: ResponseRequest, message: dict[str, Any], *, is_cut: bool = False) -> list[dict[str, Any]]:
    """A chat completion's message as output items: its thoughts, its text, its calls. `is_cut`: it met a limit."""
    items: list[dict[str, Any]] = []
    thought = message.get("reasoning_content") or message.get("reasoning")
    if isinstance(thought, str) and thought:
        items.append(reasoning_item(request, new_id("rs_"), thought))
    calls = message.get("tool_calls") or []
    text = message.get("content") or ""
    if text or message.get("refusal") or not (calls or items):
        items.append(message_item(new_id("msg_"), text, refusal=message.get("refusal")))
    items += [call_item(new_id("fc_"), call) for call in calls]
    if is_cut:
        items[-1]["status"] = "incomplete"
    return items


def reasoning_item(request: ResponseRequest, item_id: str, text: str) -> dict[str, Any]:
    item: dict[str, Any] = {"id": item_id, "type": "reasoning", "summary": []}
    if request.has_summary:
        item["summary"] = [{"type": "summary_text", "text": text}]
    else:
        item["content"] = [{"type": "reasoning_text", "text": text}]
    if request.seals_reasoning:
        item["encrypted_content"] = _SEAL + base64.urlsafe_b64encode(text.encode("utf-8", "replace")).decode()
    return item


def message_item(item_id: str, text: str, *, refusal: str | None = None) -> dict[str, Any]:
    part: dict[str, Any] = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    content = [{"type": "refusal", "refusal": refusal}] if refusal else [part]
    return {"id": item_id, "type": "message", "role": "assistant", "status": "completed", "content": content}


def call_item(item_id: str, call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {
        "id": item_id,
        "type": "function_call",
        "call_id": call["id"],
        "name": function["name"],
        "arguments": function["arguments"],
        "status": "completed",
    }


def response_body(request: ResponseRequest, response_id: str, created_at: int) -> dict[str, Any]:
    """The response before anything was said: what was asked, with the defaults filled in."""
    reasoning = request.reasoning or {}
    return {
        "id": response_id,
        "object": "response",
        "created_at": created_at,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": request.max_tool_calls,
        "metadata": request.metadata or {},
        "model": request.model,
        "output": [],
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": request.previous_response_id,
        "reasoning": {"effort": reasoning.get("effort"), "summary": reasoning.get("summary")},
        "service_tier": "default",
        "store": request.store is not False,
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "text": {"format": {"type": "text"}} | (request.text or {}),
        "tool_choice": request.tool_choice or "auto",
        "tools": request.tools or [],
        "top_logprobs": 0,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "truncation": request.truncation or "disabled",
        "usage": None,
        "user": request.user,
    }


def finished(
    body: dict[str, Any], output: list[dict[str, Any]], finish_reason: str | None, usage: dict[str, Any] | None
) -> dict[str, Any]:
    """The response when all has been said; `finish_reason` and `usage` as the chat completion has them."""
    reasons = {"length": "max_output_tokens", "content_filter": "content_filter"}
    reason = reasons.get(finish_reason or "")
    return body | {
        "status": "incomplete" if reason else "completed",
        "incomplete_details": {"reason": reason} if reason else None,
        "completed_at": None if reason else int(time.time()),
        "output": output,
        "usage": _usage(usage or {}),
    }


def _usage(usage: dict[str, Any]) -> dict[str, Any]:
    num_in, num_out = usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    thought = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens") or 0
    return {
        "input_tokens": num_in,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": num_out,
        "output_tokens_details": {"reasoning_tokens": thought},
        "total_tokens": num_in + num_out,
    }


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


def _user_item(text: str) -> dict[str, Any]:
    content = [{"type": "input_text", "text": text}]
    return {"id": new_id("msg_"), "type": "message", "role": "user", "status": "completed", "content": content}


_PREFIXES = {"function_call": "fc_", "function_call_output": "fco_", "reasoning": "rs_"}


def _with_id(item: dict[str, Any]) -> dict[str, Any]:
    kind = item.get("type") or "message"
    return {"type": kind, **item, "id": item.get("id") or new_id(_PREFIXES.get(kind, "msg_"))}


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
    if isinstance(sealed, str) and sealed.startswith(_SEAL):
        try:
            return base64.urlsafe_b64decode(sealed.removeprefix(_SEAL)).decode()
        except (binascii.Error, ValueError):
            return ""
    parts = item.get("content") or item.get("summary") or []
    return "".join(str(part.get("text") or "") for part in parts if isinstance(part, dict))
