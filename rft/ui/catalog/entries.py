"""What the catalog keeps of one rollout: the columns of the table, and the text that can be searched."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any, get_args

from rft.types import Split
from rft.ui.record import RolloutRow, TurnRow, calls_of
from rft.ui.schema import MAX_TEXT, RolloutLine

MAX_NAME = 100  # characters of a tool's name
_MAX_ID, _MAX_SHORT, _MAX_ERRORS = 500, 200, 2_000
_MAX_TOOLS = 50  # by name; a model can make up any number
SPLITS: tuple[str, ...] = get_args(Split)
# In the order of the values that `entry` gives. A line is made of all but the last.
COLUMNS = (
    "place", "id", "item_id", "split", "attempt", "grade", "stop_reason", "num_turns", "num_calls", "num_tokens",
    "num_reasoning_tokens", "started_at", "duration_s", "tools", "error", "opening", "errors",
)  # fmt: skip


def entry(place: int, row: RolloutRow) -> tuple[Any, ...]:
    """The values of COLUMNS."""
    tools, errors = tools_of(row), _errors(row)
    return (
        place,
        row.id[:_MAX_ID],
        row.item_id[:_MAX_ID],
        row.split,
        row.attempt,
        row.grade.score if row.grade is not None else None,
        row.stop_reason[:MAX_NAME],
        len(row.turns),
        sum(tools.values()),
        sum(turn.num_output_tokens for turn in row.turns),
        sum(turn.reasoning_tokens for turn in row.turns),
        row.started_at,
        row.duration_s,
        json.dumps(tools, ensure_ascii=False),
        errors[0][:_MAX_SHORT] if errors else None,
        _opening(row),
        "\n".join(errors).casefold()[:_MAX_ERRORS] if errors else None,
    )


def line_of(step: int, row: RolloutRow) -> RolloutLine:
    """The row of the table for a rollout that was just read."""
    return as_line(step, entry(0, row)[1:-1])


def as_line(step: int, values: tuple[Any, ...]) -> RolloutLine:
    """values: of COLUMNS without the first and the last."""
    found = dict(zip(COLUMNS[1:-1], values, strict=True))
    found["tools"] = json.loads(found["tools"])
    del found["num_calls"]
    return RolloutLine(step=step, **found)


def tools_of(row: RolloutRow) -> dict[str, int]:
    """Calls by tool, the most used first; names beyond the first 50 are left out."""
    counts = Counter(call.name[:MAX_NAME] for turn in row.turns for call in turn.message.tool_calls)
    return dict(counts.most_common(_MAX_TOOLS))


def text_of(row: RolloutRow) -> str:
    """What was said, called and returned, folded for searching; of each text what a trace shows without more asking."""
    return "\0".join(text[:MAX_TEXT] for turn in row.turns for text in _texts(turn) if text).casefold()


def _texts(turn: TurnRow) -> list[str]:
    calls = [text for call, result in calls_of(turn) for text in (call.name, call.arguments)]
    results = [result.output for result in turn.results]
    return [turn.message.reasoning, turn.message.content, *calls, *results, *(reply.content for reply in turn.replies)]


def _errors(row: RolloutRow) -> list[str]:
    """Why it was discarded, then the flags of its grade with their details, then failed shadow graders."""
    found = [row.error] if row.error else []
    if row.grade is not None:
        pairs = [*row.grade.all_errors, *row.grade.shadow_errors.items()]
        found += [f"{flag}: {detail}" for flag, detail in pairs]
    return found


def _opening(row: RolloutRow) -> str:
    text = row.turns[-1].message.content if row.turns else ""
    return " ".join(text[: 2 * _MAX_SHORT].split())[:_MAX_SHORT]
