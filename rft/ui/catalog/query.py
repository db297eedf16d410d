"""Filters, sorts and pages of the table of rollouts, as SQL. A page is found by the last row of the one before."""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass, field
from typing import Any

from pydantic import ConfigDict, Field, field_validator

from rft.errors import UserError
from rft.types import Record, Split
from rft.ui.catalog.database import OFFSET_BITS
from rft.ui.catalog.files import MAX_STEP

MAX_LIMIT = 500
_TOO_LARGE = 1 << 63  # for SQLite
_SORTS = {  # names of RolloutLine -> what is compared
    **dict.fromkeys(("id", "item_id", "split", "attempt", "grade", "stop_reason", "num_turns", "num_tokens")),
    **dict.fromkeys(("num_reasoning_tokens", "started_at", "duration_s", "error", "opening")),
    "step": "place",
    "tools": "num_calls",
}


class Filters(Record):
    """The query of GET /ui/api/runs/{run}/rollouts; rft.ui.schema.RolloutPage says what each means."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    split: Split | None = None
    step: int | None = None
    step_from: int | None = None
    step_to: int | None = None
    item: str | None = None
    grade_min: float | None = Field(None, allow_inf_nan=False)
    grade_max: float | None = Field(None, allow_inf_nan=False)
    stop: str | None = None
    tool: str | None = None
    error: str | None = Field(None, max_length=1_000)
    text: str | None = Field(None, max_length=1_000)
    sort: str = "-step"
    limit: int = Field(100, ge=1, le=MAX_LIMIT)
    after: str | None = Field(None, max_length=4_000)

    @field_validator("sort")
    @classmethod
    def _is_column(cls, sort: str) -> str:
        if sort.removeprefix("-") not in _SORTS:
            raise ValueError(f"must be one of {', '.join(sorted(_SORTS))}, with `-` before it for descending")
        return sort

    @field_validator("split", "step", "step_from", "step_to", "item", "grade_min", "grade_max", mode="before")
    @classmethod
    def _empty_is_any(cls, value: Any) -> Any:
        return None if value == "" else value

    @property
    def steps(self) -> tuple[int, int]:
        """The first step that is asked for and the one behind the last."""
        low, high = max(0, self.step_from or 0), MAX_STEP if self.step_to is None else self.step_to + 1
        if self.step is not None:
            low, high = max(low, self.step), min(high, self.step + 1)
        return min(low, MAX_STEP), max(0, min(high, MAX_STEP))


@dataclass(slots=True)
class Condition:
    """Terms of a WHERE, and their values in order."""

    terms: list[str] = field(default_factory=lambda: ["1"])
    values: list[Any] = field(default_factory=list)

    def add(self, term: str, *values: Any) -> None:
        self.terms.append(f"({term})")
        self.values += values

    @property
    def sql(self) -> str:
        return " AND ".join(self.terms)


def condition(filters: Filters) -> Condition:
    """All filters but the text."""
    found = Condition()
    low, high = filters.steps
    if (low, high) != (0, MAX_STEP):
        found.add("place >= ? AND place < ?", low << OFFSET_BITS, high << OFFSET_BITS)
    for column, value in (("split", filters.split), ("item_id", filters.item), ("stop_reason", filters.stop)):
        if value:
            found.add(f"{column} = ?", value)
    if filters.grade_min is not None:
        found.add("grade >= ?", filters.grade_min)
    if filters.grade_max is not None:
        found.add("grade <= ?", filters.grade_max)
    if filters.tool:
        found.add("place IN (SELECT place FROM calls WHERE tool = ?)", filters.tool)
    if filters.error:
        found.add("instr(errors, ?) > 0", filters.error.casefold())
    return found


def order(sort: str) -> str:
    """Rows without a value come last, of equal ones the newest first; steps are told apart by their places alone."""
    expression, direction = _expression(sort)
    if expression == "place":
        return f"place {direction}"
    return f"{expression} IS NULL, {expression} {direction}, place DESC"


def cursor(sort: str, value: Any, place: int) -> str:
    """What `after` is, to go on behind a row."""
    return base64.urlsafe_b64encode(json.dumps([sort, value, place]).encode()).decode()


def add_cursor(found: Condition, sort: str, after: str) -> None:
    """Only what comes behind. Raises UserError for what `cursor` has not made for this sort."""
    try:
        made_for, value, place = json.loads(base64.urlsafe_b64decode(after))
        if made_for != sort or not isinstance(place, int) or not isinstance(value, str | int | float | None):
            raise ValueError
        if any(isinstance(number, int) and abs(number) >= _TOO_LARGE for number in (value, place)):
            raise ValueError
    except (ValueError, TypeError, binascii.Error):
        cure = "send `next` of the page before, with the same sort"
        raise UserError("this is no place in the table", where="after", cure=cure) from None
    expression, direction = _expression(sort)
    sign = "<" if direction == "DESC" else ">"
    if expression == "place":
        found.add(f"place {sign} ?", place)
    elif value is None:
        found.add(f"{expression} IS NULL AND place < ?", place)
    else:
        behind = f"{expression} {sign} ? OR ({expression} = ? AND place < ?) OR {expression} IS NULL"
        found.add(behind, value, value, place)


def sort_column(sort: str) -> str:
    return _expression(sort)[0]


def _expression(sort: str) -> tuple[str, str]:
    name = sort.removeprefix("-")
    return _SORTS[name] or name, "DESC" if sort.startswith("-") else "ASC"
