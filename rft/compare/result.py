"""What a comparison says, as compare.json has it. Names and texts in it are foreign: every view makes them harmless."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rft.types import Record, Split

Outcome = Literal["win", "loss", "tie"]


class Value(Record):
    """A number with its 95% bootstrap interval over `num_items` items; no interval with fewer than two of them."""

    mean: float | None
    low: float | None = None
    high: float | None = None
    num_items: int = 0


class Change(Value):
    """The other side minus the first. Paired: over the items that both have; else the sides are drawn apart."""

    is_paired: bool = True

    @property
    def is_sure(self) -> bool:
        """True when the interval leaves out 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


class MeasureLine(Record):
    """One measure of all sides; `changes` has one entry for every side but the first."""

    name: str
    label: str
    section: str
    better: Literal["higher", "lower"] | None
    sides: list[Value]
    changes: list[Change]


class SideLine(Record):
    label: str
    path: str
    run_id: str
    split: Split
    step: int
    num_items: int
    num_rollouts: int
    num_discarded: int
    problems: list[str] = Field(default_factory=list)


class Attempts(Record):
    """The rollouts of one side at one item."""

    grade: float  # mean
    tool_calls: float  # mean
    rollout_ids: list[str]


class ItemLine(Record):
    """An item that both sides have, as a win of the other side, a loss or a tie, by the mean grade."""

    item_id: str
    text: str
    outcome: Outcome
    first: Attempts
    other: Attempts


class Pairing(Record):
    """The first side against another, item by item; `items`: the largest change first."""

    label: str
    is_paired: bool
    num_shared: int
    wins: int = 0
    losses: int = 0
    ties: int = 0
    items: list[ItemLine] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)


class Comparison(Record):
    split: Split
    pass_at: float
    pass_at_source: str
    slow_s: float
    slow_s_source: str
    sides: list[SideLine]
    measures: list[MeasureLine]
    pairings: list[Pairing]
    num_resamples: int
    seed: int
