"""The comparison itself: every measure of every side, and the change from the first side to each other one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from rft.compare.bootstrap import NUM_RESAMPLES, Counts, Floats, ItemMean, Statistic, intervals, once
from rft.compare.measures import Items, Measure, measures_of
from rft.compare.result import Attempts, Change, Comparison, ItemLine, MeasureLine, Outcome, Pairing, SideLine, Value
from rft.compare.sides import Side
from rft.compare.texts import is_same
from rft.types import Rollout

_PASS_AT = 0.5
_SLOW_QUANTILE = 95
_TIE = 1e-9  # grades closer than this are the same number computed in another order


def compare(
    sides: Sequence[Side], *, pass_at: float | None = None, slow_s: float | None = None, seed: int = 0
) -> Comparison:
    """All sides against the first.

    pass_at: the grade with which a rollout passes; by default the grader's pass_threshold, else 0.5. slow_s: by
    default the 95th percentile of the first side's seconds.
    """
    passing, passing_source = _pass_at(sides[0], pass_at)
    slow, slow_source = _slow_s(sides[0], slow_s)
    measures = measures_of(sides, passing, slow)
    shared = [_Shared.of(sides[0], other) for other in sides[1:]]
    values = [_values(side, measures, seed) for side in sides]
    changes = [_changes(pair, measures, seed) for pair in shared]
    lines = [
        MeasureLine(
            name=measure.name,
            label=measure.label,
            section=measure.section,
            better=measure.better,
            sides=[of_side[number] for of_side in values],
            changes=[of_pair[number] for of_pair in changes],
        )
        for number, measure in enumerate(measures)
    ]
    return Comparison(
        split=sides[0].split,
        pass_at=passing,
        pass_at_source=passing_source,
        slow_s=slow,
        slow_s_source=slow_source,
        sides=[_side_line(side) for side in sides],
        measures=[line for line in lines if any(value.mean is not None for value in line.sides)],
        pairings=[_pairing(pair) for pair in shared],
        num_resamples=NUM_RESAMPLES,
        seed=seed,
    )


def _pass_at(first: Side, given: float | None) -> tuple[float, str]:
    grader: Any = first.config.get("grader")
    threshold = grader.get("pass_threshold") if isinstance(grader, dict) else None
    if given is not None:
        return given, "as asked for"
    if isinstance(threshold, int | float):
        return float(threshold), "the grader's pass_threshold"
    return _PASS_AT, "the grader has no pass_threshold"


def _slow_s(first: Side, given: float | None) -> tuple[float, str]:
    if given is not None:
        return given, "as asked for"
    seconds = [rollout.duration_s for rollout in first.rollouts if rollout.grade is not None]
    return float(np.percentile(seconds, _SLOW_QUANTILE)), f"the {_SLOW_QUANTILE}th percentile of {first.label}"


def _side_line(side: Side) -> SideLine:
    return SideLine(
        label=side.label,
        path=str(side.store.path),
        run_id=side.store.run_id,
        split=side.split,
        step=side.step,
        num_items=len(side.items),
        num_rollouts=sum(rollout.grade is not None for rollout in side.rollouts),
        num_discarded=sum(rollout.stop_reason.is_discarded for rollout in side.rollouts),
        problems=side.problems,
    )


# --- numbers ---


def _values(side: Side, measures: Sequence[Measure], seed: int) -> list[Value]:
    items = list(side.items.values())
    statistics = [measure.statistic(items) for measure in measures]
    found = intervals([_alone(one) for one in statistics], (len(items), len(items)), is_paired=True, seed=seed)
    return [
        Value(mean=_at_once(one, len(items)), **_bounds(interval), num_items=_num_known(one, len(items)))
        for one, interval in zip(statistics, found, strict=True)
    ]


def _changes(pair: _Shared, measures: Sequence[Measure], seed: int) -> list[Change]:
    firsts, others = pair.items
    both = [_joined(measure, firsts, others, is_paired=pair.is_paired) for measure in measures]
    sizes = (len(firsts), len(others))
    found = intervals([_difference(first, other) for first, other in both], sizes, is_paired=pair.is_paired, seed=seed)
    return [
        Change(
            mean=_minus(_at_once(other, sizes[1]), _at_once(first, sizes[0])),
            **_bounds(interval),
            num_items=min(_num_known(first, sizes[0]), _num_known(other, sizes[1])),
            is_paired=pair.is_paired,
        )
        for (first, other), interval in zip(both, found, strict=True)
    ]


def _joined(measure: Measure, firsts: Items, others: Items, *, is_paired: bool) -> tuple[Statistic, Statistic]:
    """Both statistics; paired means only over items at which both sides have a value."""
    first, other = measure.statistic(firsts), measure.statistic(others)
    if is_paired and isinstance(first, ItemMean) and isinstance(other, ItemMean):
        is_missing = np.isnan(first.values) | np.isnan(other.values)
        return (
            ItemMean(np.where(is_missing, np.nan, first.values)),
            ItemMean(np.where(is_missing, np.nan, other.values)),
        )
    return first, other


def _alone(statistic: Statistic) -> Any:
    return lambda counts, _: statistic.at(counts)


def _difference(first: Statistic, other: Statistic) -> Any:
    def at(firsts: Counts, others: Counts) -> Floats:
        return other.at(others) - first.at(firsts)

    return at


def _at_once(statistic: Statistic, num_items: int) -> float | None:
    value = float(statistic.at(once(num_items))[0])
    return value if math.isfinite(value) else None


def _num_known(statistic: Statistic, num_items: int) -> int:
    return int((~np.isnan(statistic.values)).sum()) if isinstance(statistic, ItemMean) else num_items


def _minus(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _bounds(interval: tuple[float, float] | None) -> dict[str, Any]:
    return {"low": interval[0], "high": interval[1]} if interval is not None else {}


# --- items ---


@dataclass(frozen=True, slots=True)
class _Shared:
    """Two sides and the items that both have; none: they are compared unpaired."""

    first: Side
    other: Side
    item_ids: list[str]
    notes: list[str]

    @classmethod
    def of(cls, first: Side, other: Side) -> _Shared:
        common = sorted(first.items.keys() & other.items.keys())
        is_same_text = {item_id: is_same(first.texts[item_id], other.texts[item_id]) for item_id in common}
        shared = [item_id for item_id in common if is_same_text[item_id] is not False]
        notes = []
        if len(shared) < len(common):
            notes.append(f"{len(common) - len(shared)} items have the same id and different texts: they are not paired")
        if any(is_same_text[item_id] is None for item_id in shared):
            notes.append("paired by id alone: whether the items' texts are the same cannot be told from the folders")
        num_apart = len(first.items) + len(other.items) - 2 * len(common)
        if not shared:
            notes.append("no item is on both sides: compared unpaired, the intervals are wider for it")
        elif num_apart:
            notes.append(f"{num_apart} items are on one side only: the changes leave them out")
        return cls(first, other, shared, notes)

    @property
    def is_paired(self) -> bool:
        return bool(self.item_ids)

    @property
    def items(self) -> tuple[Items, Items]:
        if not self.is_paired:
            return list(self.first.items.values()), list(self.other.items.values())
        firsts, others = ([side.items[item_id] for item_id in self.item_ids] for side in (self.first, self.other))
        return firsts, others


def _pairing(pair: _Shared) -> Pairing:
    lines = [line for item_id in pair.item_ids if (line := _item_line(pair, item_id)) is not None]
    lines.sort(key=lambda line: -abs(line.other.grade - line.first.grade))
    outcomes = [line.outcome for line in lines]
    return Pairing(
        label=pair.other.label,
        is_paired=pair.is_paired,
        num_shared=len(pair.item_ids),
        wins=outcomes.count("win"),
        losses=outcomes.count("loss"),
        ties=outcomes.count("tie"),
        items=lines,
        notes=pair.notes,
    )


def _item_line(pair: _Shared, item_id: str) -> ItemLine | None:
    first, other = _attempts(pair.first.items[item_id]), _attempts(pair.other.items[item_id])
    if first is None or other is None:
        return None
    change = other.grade - first.grade
    outcome: Outcome = "tie" if abs(change) < _TIE else "win" if change > 0 else "loss"
    text = pair.first.texts[item_id].shown or pair.other.texts[item_id].shown
    return ItemLine(item_id=item_id, text=text, outcome=outcome, first=first, other=other)


def _attempts(rollouts: Sequence[Rollout]) -> Attempts | None:
    """None when all were discarded."""
    graded = [(rollout, rollout.grade.score) for rollout in rollouts if rollout.grade is not None]
    if not graded:
        return None
    return Attempts(
        grade=fmean(score for _, score in graded),
        tool_calls=fmean(len(rollout.tool_calls) for rollout, _ in graded),
        rollout_ids=[rollout.id for rollout, _ in graded],
    )
