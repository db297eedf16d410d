"""A rollout as the trace that eval items of agent jobs have: a GENERATION span per turn, a FUNCTION span per call.

A generation's input is what was added to the conversation since the one before, the first one's the row's messages.
Times are the rollout's own; a call that has no answer ends when it starts, with an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Any

from rft.types import Rollout, ToolCall, ToolResult, Turn

Span = dict[str, Any]


def trace_of(rollout: Rollout, messages: Iterable[Any]) -> dict[str, Any]:
    """messages: those of the dataset row, as the user wrote them."""
    added = [_prompt(message) for message in messages if isinstance(message, dict)]
    spans: list[Span] = []
    for turn in rollout.turns:
        for span in _spans(rollout, turn, added):
            spans.append({**span, "id": f"{span['id']}_{len(spans)}"})
        names = {call.call_id: call.name for call in turn.message.tool_calls}
        added = [_answer(result, names.get(result.call_id, "")) for result in turn.results]
        added += [{"role": reply.role, "content": reply.content, "recipient": "all"} for reply in turn.replies]
    return {"type": "trace", "spans": spans}


def _spans(rollout: Rollout, turn: Turn, added: list[dict[str, Any]]) -> Iterator[Span]:
    started = rollout.started_at + turn.started_s
    sampled = started + turn.sampled_s
    generation = {"type": "GENERATION", "input": added, "output": _output(turn), "model": None, "model_config": None}
    num_inputs = turn.usage.prompt_tokens if turn.usage is not None else len(turn.input_ids)
    usage = {"input_tokens": num_inputs, "output_tokens": turn.num_output_tokens}
    yield _span(rollout, started, sampled, generation | {"usage": usage})
    results = {result.call_id: result for result in turn.results}
    for call in turn.message.tool_calls:
        yield _call(rollout, call, results.get(call.call_id), sampled)


def _call(rollout: Rollout, call: ToolCall, result: ToolResult | None, started: float) -> Span:
    output = result.output if result is not None else None
    data = {"type": "FUNCTION", "name": f"functions.{call.name}", "input": call.arguments, "output": output}
    error = None
    if result is None:
        error = {"message": "the rollout ended before the answer"}
    elif result.is_error:
        error = {"message": call.error or "the tool reported an error"}
    ended = started + (result.latency_s if result is not None else 0.0)
    return _span(rollout, started, ended, data | {"mcp_data": None}, error)


def _span(
    rollout: Rollout, started: float, ended: float, data: dict[str, Any], error: dict[str, Any] | None = None
) -> Span:
    return {
        "id": f"span_{int(started * 1e6)}_{int(ended * 1e6)}",
        "object": "trace.span",
        "trace_id": rollout.id,
        "parent_id": None,
        "started_at": _iso(started),
        "ended_at": _iso(ended),
        "span_data": data,
        "error": error,
        "created_at": _iso(ended),
    }


def _output(turn: Turn) -> list[dict[str, Any]]:
    """A message per recipient: each called function, and everybody for what was said."""
    said = {"role": "assistant", "content": turn.message.content, "recipient": "all"}
    calls = [
        {"role": "assistant", "content": call.arguments, "recipient": f"functions.{call.name}"}
        for call in turn.message.tool_calls
    ]
    return [said, *calls] if turn.message.content or not calls else calls


def _prompt(message: dict[str, Any]) -> dict[str, Any]:
    return {"role": message.get("role"), "content": message.get("content"), "recipient": "all"}


def _answer(result: ToolResult, name: str) -> dict[str, Any]:
    return {"role": "tool", "name": f"functions.{name}", "content": result.output, "recipient": "all"}


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()
