"""`sample_of`: a rollout as graders see it, in the hosted contract's shape.

`output_tools` holds the calls of the whole rollout, `trace` adds what the tools answered, `stop_reason` why it ended:
supersets of the contract. The prompt is not repeated here, it is in `item.messages`.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

from rft.types import Message, Rollout, Turn


def sample_of(rollout: Rollout) -> dict[str, Any]:
    """choices, output_text, output_json, output_tools, output_reasoning_summary, stop_reason, trace.

    And `environment`, where the environment said how the episode went.
    """
    return {
        **({"environment": rollout.environment} if rollout.environment else {}),
        "choices": [_choice(rollout)],
        "output_text": rollout.output_text,
        "output_json": _parsed(rollout.output_text),
        "output_tools": [call.as_chat() for call, _ in rollout.tool_calls],
        "output_reasoning_summary": None,
        "stop_reason": rollout.stop_reason.value,
        "trace": [message for turn in rollout.turns for message in _trace(turn)],
    }


def sample_of_text(text: str) -> dict[str, Any]:
    """An answer given as text alone, as the contract's graders/run takes it."""
    message: dict[str, Any] = {"role": "assistant", "content": text}
    return {
        "choices": [{"index": 0, "message": {**message, "tool_calls": []}, "finish_reason": "stop"}],
        "output_text": text,
        "output_json": _parsed(text),
        "output_tools": [],
        "output_reasoning_summary": None,
        "trace": [message],
    }


def _choice(rollout: Rollout) -> dict[str, Any]:
    """The last sampled message; an empty one when nothing was sampled."""
    last = rollout.turns[-1] if rollout.turns else None
    message = last.message if last else Message(role="assistant")
    finish_reason: str = last.finish_reason if last else "stop"
    if finish_reason == "stop" and message.tool_calls:
        finish_reason = "tool_calls"
    return {"index": 0, "message": {"tool_calls": [], **message.as_chat()}, "finish_reason": finish_reason}


def _trace(turn: Turn) -> list[dict[str, Any]]:
    """The sampled message, then what the world answered: a tool message per result, or its replies."""
    answers = [
        {"role": "tool", "tool_call_id": result.call_id, "content": result.output, "is_error": result.is_error}
        for result in turn.results
    ]
    return [turn.message.as_chat(), *answers, *(reply.as_chat() for reply in turn.replies)]


def _parsed(text: str) -> Any:
    """The text as JSON, or None when it is not JSON (RFC 8259: no NaN, no Infinity)."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
