"""One rollout as the page shows it: turns, calls on a time line, the grade, the group; long texts cut and referred to.

A reference is `prompt`, `item`, `environment`, or a place in a turn: `3.reasoning`, `3.content`, `3.call.0.arguments`,
`3.call.0.result`, `3.reply.0`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from rft.ui.errors import Missing
from rft.ui.record import GradeRow, RolloutRow, TurnRow, calls_of, decoded
from rft.ui.schema import (
    MAX_TEXT,
    RolloutLine,
    Text,
    TextPart,
    Trace,
    TraceCall,
    TraceGrade,
    TraceReply,
    TraceTurn,
)

_MAX_NAME, _MAX_CALLS = 200, 500
_MAX_DEPTH = 8  # of a grade's parts


@dataclass(frozen=True, slots=True)
class Sources:
    """Where the texts come from that a rollout does not hold itself."""

    prompt: Callable[[RolloutRow], str]
    item: Callable[[RolloutRow], str | None]


def trace_of(run_id: str, row: RolloutRow, line: RolloutLine, group: list[RolloutLine], sources: Sources) -> Trace:
    item, environment = sources.item(row), _environment(row)
    return Trace(
        rollout=line,
        run_id=run_id,
        seed=row.seed,
        error=row.error[:MAX_TEXT] if row.error else None,
        prompt=_cut(sources.prompt(row), "prompt"),
        item=_cut(item, "item") if item is not None else None,
        environment=_cut(environment, "environment") if environment else None,
        turns=[_turn(index, turn) for index, turn in enumerate(row.turns)],
        grade=grade_of(row.grade, "grade") if row.grade is not None else None,
        group=group,
    )


def text_part(row: RolloutRow, ref: str, offset: int, sources: Sources) -> TextPart:
    """The text behind a reference from `offset` on, as much as an answer holds. Raises Missing."""
    text = _text(row, ref, sources)
    if text is None:
        raise Missing("there is no such text", where=ref[:80], cure="use a ref of the trace")
    return TextPart(text=text[offset : offset + MAX_TEXT], offset=offset, num_chars=len(text))


def grade_of(grade: GradeRow, name: str, depth: int = 0) -> TraceGrade | None:
    """With its parts; None where it has no number."""
    if grade.score is None or depth > _MAX_DEPTH:
        return None
    parts = (grade_of(part, key, depth + 1) for key, part in grade.parts.items())
    return TraceGrade(
        name=name[:_MAX_NAME],
        score=grade.score,
        errors=_short(grade.errors),
        latency_s=grade.latency_s,
        is_cached=grade.is_cached,
        parts=[part for part in parts if part is not None],
        shadow={key[:_MAX_NAME]: score for key, score in grade.shadow.items() if score is not None},
        shadow_errors=_short(grade.shadow_errors),
    )


def _short(errors: dict[str, str]) -> dict[str, str]:
    return {flag[:_MAX_NAME]: detail[:MAX_TEXT] for flag, detail in errors.items()}


def _environment(row: RolloutRow) -> str:
    try:
        text = msgspec.json.encode(decoded(row.environment)).decode()
    except msgspec.MsgspecError:  # half a surrogate pair
        text = bytes(row.environment).decode("utf-8", "replace")
    return "" if text in ("{}", "null") else text


def _turn(index: int, turn: TurnRow) -> TraceTurn:
    return TraceTurn(
        index=index,
        started_s=turn.started_s,
        sampled_s=turn.sampled_s,
        num_input_tokens=turn.num_input_tokens,
        num_output_tokens=turn.num_output_tokens,
        num_reasoning_tokens=turn.reasoning_tokens,
        finish_reason=turn.finish_reason,
        policy_version=turn.policy_version,
        is_fork=turn.is_fork,
        reasoning=_cut(turn.message.reasoning, f"{index}.reasoning"),
        content=_cut(turn.message.content, f"{index}.content"),
        calls=_calls(index, turn),
        replies=[
            TraceReply(role=reply.role[:_MAX_NAME], content=_cut(reply.content, f"{index}.reply.{number}"))
            for number, reply in enumerate(turn.replies)
        ],
    )


def _calls(index: int, turn: TurnRow) -> list[TraceCall]:
    """The calls of a turn go out together, when it was sampled."""
    found = []
    for number, (call, result) in enumerate(calls_of(turn)[:_MAX_CALLS]):
        ref = f"{index}.call.{number}"
        found.append(
            TraceCall(
                call_id=call.call_id[:_MAX_NAME],
                name=call.name[:_MAX_NAME],
                arguments=_cut(call.arguments, f"{ref}.arguments"),
                malformed=call.error[:MAX_TEXT] if call.error else None,
                result=_cut(result.output, f"{ref}.result") if result is not None else None,
                is_error=result.is_error if result is not None else False,
                started_s=turn.started_s + turn.sampled_s,
                latency_s=result.latency_s if result is not None else 0.0,
                num_attempts=result.num_attempts if result is not None else 1,
            )
        )
    return found


def _cut(text: str, ref: str) -> Text:
    return Text(text=text[:MAX_TEXT], num_chars=len(text), ref=ref)


def _text(row: RolloutRow, ref: str, sources: Sources) -> str | None:
    if ref == "prompt":
        return sources.prompt(row)
    if ref == "item":
        return sources.item(row)
    if ref == "environment":
        return _environment(row)
    index, _, rest = ref.partition(".")
    if not index.isdecimal() or len(index) > 9 or int(index) >= len(row.turns):
        return None
    return _text_of_turn(row.turns[int(index)], rest.split("."))


def _text_of_turn(turn: TurnRow, rest: list[str]) -> str | None:
    match rest:
        case ["reasoning"]:
            return turn.message.reasoning
        case ["content"]:
            return turn.message.content
        case ["reply", number] if _is_index(number, len(turn.replies)):
            return turn.replies[int(number)].content
        case ["call", number, what] if _is_index(number, len(turn.message.tool_calls)):
            call, result = calls_of(turn)[int(number)]
            found = {"arguments": call.arguments, "result": result.output if result is not None else None}
            return found.get(what)
    return None


def _is_index(number: str, size: int) -> bool:
    return number.isdecimal() and len(number) <= 9 and int(number) < size
