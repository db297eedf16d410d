"""Numbers about rollouts: means with intervals, shares, counts. Pure functions of records; no torch, no disk."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import fmean, stdev

from rft.types import Group, Rollout

_Z95 = 1.959964  # two-sided 95% quantile of the normal distribution


def mean_ci95(values_per_item: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Mean over items of each item's mean, and the half-width of its 95% interval.

    The rollouts of one item are not independent, so the interval is the normal one over item means
    (1.96 x standard deviation / sqrt(items)); with fewer than two items the half-width is infinite.
    """
    means = [fmean(values) for values in values_per_item if values]
    if not means:
        return math.nan, math.inf
    if len(means) == 1:
        return means[0], math.inf
    return fmean(means), _Z95 * stdev(means) / math.sqrt(len(means))


def _values(groups: Sequence[Group], value: Callable[[Rollout], float]) -> list[list[float]]:
    return [[value(rollout) for rollout in group.rollouts] for group in groups]


_MEASURES: dict[str, Callable[[Rollout], float]] = {
    "grade": lambda rollout: rollout.grade.score if rollout.grade else math.nan,
    "valid_call_share": lambda rollout: float(rollout.has_valid_call),
    "tool_calls": lambda rollout: len(rollout.tool_calls),
    "sampled_tokens": lambda rollout: rollout.num_sampled_tokens,
    "turns": lambda rollout: len(rollout.turns),
    "tool_latency_s": lambda rollout: sum(result.latency_s for turn in rollout.turns for result in turn.results),
    "duration_s": lambda rollout: rollout.duration_s,
}


def rollout_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Every measure as `name` and `name_ci95`, shadow grades as `shadow/name`, stop reasons as `stop/reason` shares."""
    row: dict[str, float] = {}
    shadows = sorted({name for group in groups for r in group.rollouts if r.grade for name in r.grade.shadow})
    measures = dict(_MEASURES)
    for name in shadows:
        measures[f"shadow/{name}"] = lambda rollout, name=name: rollout.grade.shadow[name]  # type: ignore[misc]
    for name, measure in measures.items():
        row[name], row[f"{name}_ci95"] = mean_ci95(_values(groups, measure))
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    for reason, count in sorted(Counter(rollout.stop_reason for rollout in rollouts).items()):
        row[f"stop/{reason}"] = count / len(rollouts)
    return row | {
        "num_items": len(groups),
        "num_rollouts": len(rollouts),
        "num_discarded": sum(group.num_discarded for group in groups),
        "grader_errors": sum(1 for rollout in rollouts if rollout.grade and rollout.grade.errors),
        "forks": sum(turn.is_fork for rollout in rollouts for turn in rollout.turns),
    }
