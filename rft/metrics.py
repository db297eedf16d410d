"""Numbers about rollouts: means with intervals, shares, counts, and the lines that show them. No torch, no disk."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import fmean, stdev
from typing import Any

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


def step_line(row: dict[str, Any], num_steps: int) -> str:
    """One training row as the line a person follows."""
    shadows = "".join(
        f"  {name.removeprefix('train/shadow/')} {value:.3f}"
        for name, value in row.items()
        if name.startswith("train/shadow/") and not name.endswith("_ci95")
    )
    return (
        f"step {row['step']:>3}/{num_steps}  grade {row['train/grade']:.3f}{shadows}"
        f"  valid calls {row['train/valid_call_share']:.2f}"
        f"  useful groups {row['groups/total'] - row['groups/no_signal']}/{row['groups/total']}"
        f"  log-prob gap {row['logprob_gap/mean']:.4f}"
        f"  {row['time/step_s']:.1f} s (sampling {row['time/sampling_s']:.1f}, training {row['time/training_s']:.1f},"
        f" sync {row['time/sync_s']:.1f})"
    )


def evaluation_line(row: dict[str, Any]) -> str:
    """One evaluation row as a line: each measure with its 95% interval."""
    shadows = [name for name in row if name.startswith("shadow/") and not name.endswith("_ci95")]
    parts = [
        f"{name.removeprefix('shadow/')} {row[name]:.3f} ± {row[f'{name}_ci95']:.3f}"
        for name in ["grade", *shadows, "valid_call_share"]
    ]
    return (
        f"{row['split']} at step {row['step']}: {', '.join(parts)}"
        f"  ({row['num_items']} items, {row['num_rollouts']} rollouts, {row['seconds']:.0f} s)"
    )


class Clock:
    """Seconds per phase of one step."""

    def __init__(self) -> None:
        self._started = self._lap = time.perf_counter()
        self._seconds: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self._seconds[phase], self._lap = now - self._lap, now

    def metrics(self) -> dict[str, float]:
        row = {f"time/{phase}_s": seconds for phase, seconds in self._seconds.items()}
        return row | {"time/step_s": time.perf_counter() - self._started}
