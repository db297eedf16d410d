"""What is measured of a side: each measure makes a statistic of the rollouts of its items.

Only rollouts with a grade are measured; discarded ones count in the shares of failures. Every mean is the mean over
items of the item's mean, so that an item with more rollouts does not count more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb
from statistics import fmean, median_low
from typing import Literal

import numpy as np

from rft.breakdown import num_reasoning_tokens
from rft.compare.bootstrap import ItemMean, Quantile, Statistic
from rft.compare.sides import Side
from rft.types import Rollout

Better = Literal["higher", "lower"]
Items = Sequence[Sequence[Rollout]]


@dataclass(frozen=True, slots=True)
class Measure:
    """`better`: which way a user wants it, None where that depends. `section`: with what it is shown."""

    name: str
    label: str
    section: str
    better: Better | None
    statistic: Callable[[Items], Statistic]


def pass_at_k(num: int, num_passed: int, k: int) -> float:
    """The chance that at least one of k rollouts passes: 1 - C(n-c, k) / C(n, k), unbiased for n >= k.

    Chen et al. 2021, "Evaluating Large Language Models Trained on Code", equation 1.
    """
    return 1.0 - comb(num - num_passed, k) / comb(num, k)


def measures_of(sides: Sequence[Side], pass_at: float, slow_s: float) -> list[Measure]:
    """All measures that the rollouts of the sides have something to say of, in the order they are shown."""
    return [
        *_grades(sides),
        *_passes(sides, pass_at),
        *_tools(sides),
        _mean("sampled_tokens", "sampled tokens", "tokens", None, lambda r: r.num_sampled_tokens),
        _mean("reasoning_tokens", "reasoning tokens", "tokens", None, num_reasoning_tokens),
        _mean("turns", "turns", "tokens", None, lambda r: len(r.turns)),
        _mean("seconds", "seconds, mean", "time", "lower", lambda r: r.duration_s),
        _quantile("seconds_p50", "seconds, median", 0.5),
        _quantile("seconds_p95", "seconds, 95th percentile", 0.95),
        _mean("slow_share", f"share above {slow_s:.3g} s", "time", "lower", lambda r: float(r.duration_s > slow_s)),
        *_failures(sides),
    ]


def _grades(sides: Sequence[Side]) -> list[Measure]:
    grades = [r.grade for side in sides for rollouts in side.items.values() for r in rollouts if r.grade]
    found = [_mean("grade", "grade", "grades", "higher", lambda r: r.grade.score if r.grade else None)]
    for name in sorted({name for grade in grades for name in grade.shadow}):
        shadow = lambda r, name=name: r.grade.shadow.get(name) if r.grade else None  # noqa: E731
        found.append(_mean(f"shadow/{name}", f"{name} (shadow grade)", "grades", "higher", shadow))
    for key in sorted({key for grade in grades for key in grade.parts}):
        part = lambda r, key=key: r.grade.sub_scores.get(key) if r.grade else None  # noqa: E731
        found.append(_mean(f"part/{key}", f"{key} (part)", "grades", "higher", part))
    return found


def _passes(sides: Sequence[Side], pass_at: float) -> list[Measure]:
    """pass@1, 2, 4, ... up to the rollouts that at least half of the items of every side have."""
    usual = [median_low([len(_graded(rollouts)) for rollouts in side.items.values()] or [0]) for side in sides]

    def of_item(rollouts: Sequence[Rollout], k: int) -> float | None:
        passed = [r.grade.score >= pass_at for r in rollouts if r.grade is not None]
        return pass_at_k(len(passed), sum(passed), k) if len(passed) >= k else None

    found, k = [], 1
    while k <= max(1, min(usual)):
        label = "pass share (pass@1)" if k == 1 else f"pass@{k}"
        statistic = lambda items, k=k: _item_mean(items, lambda rollouts: of_item(rollouts, k))  # noqa: E731
        found.append(Measure("pass_share" if k == 1 else f"pass@{k}", label, "grades", "higher", statistic))
        k *= 2
    return found


def _tools(sides: Sequence[Side]) -> list[Measure]:
    """Tool calls in all, per tool that the environment serves, and of names that the model made up."""
    found = [_mean("tool_calls", "tool calls", "tools", None, lambda r: len(r.tool_calls))]
    known = sorted(set().union(*(side.tools for side in sides)))
    for name in known:
        calls = lambda r, name=name: sum(call.name == name for call, _ in r.tool_calls)  # noqa: E731
        found.append(_mean(f"tool_calls/{name}", f"calls of {name}", "tools", None, calls))
    unknown = lambda r: sum(call.name not in known for call, _ in r.tool_calls)  # noqa: E731
    return [
        *found,
        _mean("unknown_tool_calls", "calls of unknown tools", "tools", "lower", unknown),
        _mean("malformed_calls", "malformed calls", "tools", "lower", _num_malformed),
        _mean("tool_errors", "calls that a tool refused", "tools", "lower", _num_refused),
    ]


def _num_malformed(rollout: Rollout) -> float:
    return sum(call.error is not None for call, _ in rollout.tool_calls)


def _num_refused(rollout: Rollout) -> float:
    return sum(call.error is None and result is not None and result.is_error for call, result in rollout.tool_calls)


def _failures(sides: Sequence[Side]) -> list[Measure]:
    failures = {
        r.stop_reason
        for side in sides
        for rollouts in side.items.values()
        for r in rollouts
        if r.stop_reason.is_discarded
    }
    found = [
        _mean("truncated_share", "ended by a limit", "failures", "lower", lambda r: float(r.stop_reason.is_truncated)),
        _mean("grader_error_share", "grader reported an error", "failures", "lower", _has_grader_failure),
        _share_of_all("discarded_share", "discarded", lambda r: r.stop_reason.is_discarded),
    ]
    for reason in sorted(failures):
        is_it = lambda r, reason=reason: r.stop_reason == reason  # noqa: E731
        found.append(_share_of_all(f"discarded_share/{reason}", f"discarded: {reason}", is_it))
    return found


def _has_grader_failure(rollout: Rollout) -> float:
    return float(rollout.grade is not None and rollout.grade.failure is not None)


# --- from rollouts to a statistic ---


def _mean(
    name: str, label: str, section: str, better: Better | None, value: Callable[[Rollout], float | None]
) -> Measure:
    def of_item(rollouts: Sequence[Rollout]) -> float | None:
        found = [number for rollout in _graded(rollouts) if (number := value(rollout)) is not None]
        return fmean(found) if found else None

    return Measure(name, label, section, better, lambda items: _item_mean(items, of_item))


def _share_of_all(name: str, label: str, is_it: Callable[[Rollout], bool]) -> Measure:
    def of_item(rollouts: Sequence[Rollout]) -> float | None:
        return fmean([is_it(rollout) for rollout in rollouts]) if rollouts else None

    return Measure(name, label, "failures", "lower", lambda items: _item_mean(items, of_item))


def _quantile(name: str, label: str, q: float) -> Measure:
    def statistic(items: Items) -> Statistic:
        found = sorted((r.duration_s, place) for place, rollouts in enumerate(items) for r in _graded(rollouts))
        values, places = [seconds for seconds, _ in found], [place for _, place in found]
        return Quantile(q, np.array(values, dtype=np.float64), np.array(places, dtype=np.intp))

    return Measure(name, label, "time", "lower", statistic)


def _item_mean(items: Items, of_item: Callable[[Sequence[Rollout]], float | None]) -> ItemMean:
    found = [of_item(rollouts) for rollouts in items]
    return ItemMean(np.array([np.nan if value is None else value for value in found], dtype=np.float64))


def _graded(rollouts: Sequence[Rollout]) -> list[Rollout]:
    return [rollout for rollout in rollouts if rollout.grade is not None]
