"""What POST /responses answers: the response, and its output items from a chat completion's message. Pure functions."""

from __future__ import annotations

import base64
import binascii
import time
from typing import Any

from rft.server.ids import new_id
from rft.server.inference.response_request import ResponseRequest

_SEAL = "rft1."


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
        item["encrypted_content"] = sealed(text)
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


def sealed(text: str) -> str:
    """A thought as `encrypted_content`: opaque, and not secret."""
    return _SEAL + base64.urlsafe_b64encode(text.encode("utf-8", "replace")).decode()


def unsealed(content: str) -> str | None:
    """None for what is not ours."""
    try:
        return base64.urlsafe_b64decode(content.removeprefix(_SEAL)).decode() if content.startswith(_SEAL) else None
    except (binascii.Error, ValueError):
        return None
