"""Records as the page shows them: a rollout as a row of a table, a grade as a tree. Imports no web framework."""

from __future__ import annotations

from collections import Counter

from rft.types import Grade, Rollout
from rft.ui.schema import RolloutLine, TraceGrade

_MAX_OPENING = 200  # characters
_MAX_ERROR = 2000


def rollout_line(rollout: Rollout) -> RolloutLine:
    """A row of the table."""
    grade = rollout.grade
    flags = [f"{flag}: {detail}" for flag, detail in grade.all_errors] if grade is not None else []
    error = rollout.error or next(iter(flags), None)
    return RolloutLine(
        id=rollout.id,
        step=rollout.step,
        split=rollout.split,
        item_id=rollout.item_id,
        attempt=rollout.attempt,
        grade=grade.score if grade is not None else None,
        stop_reason=rollout.stop_reason.value,
        num_turns=len(rollout.turns),
        tools=dict(Counter(call.name for call, _ in rollout.tool_calls)),
        num_tokens=rollout.num_sampled_tokens,
        num_reasoning_tokens=sum(turn.reasoning_tokens for turn in rollout.turns),
        started_at=rollout.started_at,
        duration_s=rollout.duration_s,
        error=cut(error) if error else None,
        opening=rollout.output_text[:_MAX_OPENING],
    )


def trace_grade(name: str, grade: Grade) -> TraceGrade:
    """A grade with its parts, each below its name."""
    return TraceGrade(
        name=name,
        score=grade.score,
        errors={flag: cut(detail) for flag, detail in grade.errors.items()},
        latency_s=grade.latency_s,
        is_cached=grade.is_cached,
        parts=[trace_grade(key, part) for key, part in grade.parts.items()],
        shadow=grade.shadow,
        shadow_errors={key: cut(detail) for key, detail in grade.shadow_errors.items()},
    )


def cut(text: str, max_chars: int = _MAX_ERROR) -> str:
    return text if len(text) <= max_chars else text[: max_chars - 1] + "…"
