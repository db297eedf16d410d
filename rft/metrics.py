"""Numbers about rollouts: means with intervals, shares, counts, and the lines that show them. No torch, no disk."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from statistics import fmean, stdev
from typing import Any

from rft.breakdown import breakdown, num_reasoning_tokens
from rft.percentiles import percentile_metrics
from rft.types import Grade, Group, Rollout, StopReason

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


def _values(groups: Sequence[Group], value: Callable[[Rollout], float | None]) -> list[list[float]]:
    """A list per item; rollouts that `value` has nothing to say of are left out."""
    found = ([value(rollout) for rollout in group.rollouts] for group in groups)
    return [[value for value in values if value is not None] for values in found]


_MEASURES: dict[str, Callable[[Rollout], float | None]] = {
    "grade": lambda rollout: rollout.grade.score if rollout.grade else None,
    "valid_call_share": lambda rollout: float(rollout.has_valid_call),
    "tool_calls": lambda rollout: len(rollout.tool_calls),
    "sampled_tokens": lambda rollout: rollout.num_sampled_tokens,
    "reasoning_tokens": num_reasoning_tokens,
    "turns": lambda rollout: len(rollout.turns),
    "tool_latency_s": lambda rollout: sum(result.latency_s for turn in rollout.turns for result in turn.results),
    "duration_s": lambda rollout: rollout.duration_s,
}


def rollout_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Every measure as `name` and `name_ci95`; of all rollouts that ended, discarded ones too, `stop/reason` shares.

    Shadow grades are `shadow/name`, a multi grader's parts `part/key`, what grading took and met `grader/...`. Numbers
    per part, judge model and tool are those of rft/breakdown.py, percentiles those of rft/percentiles.py.
    """
    row: dict[str, float] = {}
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    grades = [rollout.grade for rollout in rollouts if rollout.grade is not None]
    measures = dict(_MEASURES)
    for name in sorted({name for grade in grades for name in grade.shadow}):
        measures[f"shadow/{name}"] = lambda r, name=name: r.grade.shadow.get(name) if r.grade else None  # type: ignore[misc]
    for key in sorted({key for grade in grades for key in grade.parts}):
        measures[f"part/{key}"] = lambda r, key=key: r.grade.sub_scores.get(key) if r.grade else None  # type: ignore[misc]
    for name, measure in measures.items():
        row[name], row[f"{name}_ci95"] = mean_ci95(_values(groups, measure))
    stops = Counter([rollout.stop_reason for rollout in rollouts])
    stops.update(reason for group in groups for reason in group.discards)
    for reason, count in sorted(stops.items()):
        row[f"stop/{reason}"] = count / stops.total()
    return row | {
        "num_items": len(groups),
        "num_rollouts": len(rollouts),
        "num_discarded": sum(group.num_discarded for group in groups),
        **_grader_metrics(grades),
        **breakdown(groups),
        **percentile_metrics(groups),
        "forks": sum(turn.is_fork for rollout in rollouts for turn in rollout.turns),
    }


def group_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """How many groups teach something, and what one of them cost in sampled tokens (0 when there is none)."""
    num_useful = sum(group.has_signal for group in groups)
    num_tokens = sum(rollout.num_sampled_tokens for group in groups for rollout in group.rollouts)
    return {
        "groups/total": len(groups),
        "groups/no_signal": len(groups) - num_useful,
        "groups/tokens_per_useful": num_tokens / num_useful if num_useful else 0.0,
        "budget/rollouts": sum(len(group.rollouts) for group in groups),
        "budget/sampled_tokens": num_tokens,
    }


def staleness_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """How many optimizer steps the weights that sampled were behind those that were trained, over the sampled tokens.

    Step s trains version s - 1. Both are 0 without any token.
    """
    num_tokens: Counter[int] = Counter()
    for group in groups:
        for rollout in group.rollouts:
            for turn in rollout.turns:
                num_tokens[group.step - 1 - turn.policy_version] += len(turn.output_ids)
    behind = sum(steps * num for steps, num in num_tokens.items())
    return {
        "staleness/mean": behind / max(1, num_tokens.total()),
        "staleness/max": max((steps for steps, num in num_tokens.items() if num), default=0),
    }


def _grader_metrics(grades: Sequence[Grade]) -> dict[str, float]:
    """Errors per flag, seconds and judge tokens per rollout, the share of grades that came from the cache."""
    leaves = [leaf for grade in grades for leaf in grade.leaves]
    flags = Counter(flag for grade in grades for flag, _ in grade.all_errors)
    spreads = [leaf.spread for leaf in leaves if leaf.spread is not None]
    usage = [used for grade in grades for used in grade.all_usage.values()]
    row: dict[str, float] = {
        "grader_errors": sum(1 for grade in grades if grade.all_errors),
        "grader/latency_s": fmean([grade.latency_s for grade in grades] or [0.0]),
        "grader/cache_hit_share": fmean([leaf.is_cached for leaf in leaves] or [0.0]),
        "grader/prompt_tokens": sum(used.prompt_tokens for used in usage),
        "grader/completion_tokens": sum(used.completion_tokens for used in usage),
        "grader/shadow_errors": sum(len(grade.shadow_errors) for grade in grades),
    }
    if spreads:
        row["grader/judge_spread"] = fmean(spreads)
    return row | {f"grader_error/{flag}": float(count) for flag, count in sorted(flags.items())}


def best_steps(rows: Iterable[dict[str, Any]], count: int, among: Collection[int]) -> set[int]:
    """Of the steps `among` those with the highest validation grades; of equal ones the later."""
    found = [row for row in rows if row.get("kind") == "evaluation" and row["split"] == "validation"]
    graded = {row["step"]: row["grade"] for row in found if row.get("grade") is not None and row["step"] in among}
    ranked = sorted(graded, key=lambda step: (graded[step], step))
    return set(ranked[len(ranked) - count :]) if count < len(ranked) else set(ranked)


def stop_shares(row: dict[str, Any]) -> dict[str, float]:
    """The share of each stop reason that a row knows, the most first."""
    named = {name.rpartition("stop/")[2]: share for name, share in row.items() if name.split("/")[-2:-1] == ["stop"]}
    found = {reason: share for reason, share in named.items() if isinstance(share, int | float)}
    return dict(sorted(found.items(), key=lambda entry: -entry[1]))


def _other_ends(row: dict[str, Any]) -> str:
    """Why rollouts ended other than with an answer, for a line; "" when all answered."""
    shares = [f"{reason} {share:.2f}" for reason, share in stop_shares(row).items() if reason != StopReason.ANSWERED]
    return f"  ended by {', '.join(shares)}" if shares else ""


def sampling_line(row: dict[str, Any], num_steps: int) -> str:
    """One row of a run that only samples as a line."""
    return (
        f"step {row['step']:>3}/{num_steps}  grade {row['train/grade']:.3f}"
        f"  valid calls {row['train/valid_call_share']:.2f}{_other_ends(row)}"
        f"  useful groups {row['groups/total'] - row['groups/no_signal']}/{row['groups/total']}"
    )


def step_line(row: dict[str, Any], num_steps: int) -> str:
    """One training row as the line a person follows."""
    shadows = "".join(
        f"  {name.removeprefix('train/shadow/')} {value:.3f}"
        for name, value in row.items()
        if name.startswith("train/shadow/") and not name.endswith("_ci95")
    )
    cached = f"  grades cached {share:.2f}" if (share := row.get("train/grader/cache_hit_share", 0.0)) else ""
    return (
        f"step {row['step']:>3}/{num_steps}  grade {row['train/grade']:.3f}{shadows}"
        f"  valid calls {row['train/valid_call_share']:.2f}{cached}{_other_ends(row)}"
        f"  useful groups {row['groups/total'] - row['groups/no_signal']}/{row['groups/total']}"
        f"  log-prob gap {row['logprob_gap/mean']:.4f}"
        f"  {row['time/step_s']:.1f} s (sampling {row['time/sampling_s']:.1f}, training {row['time/training_s']:.1f},"
        f" sync {row['time/sync_s']:.1f}){_hidden(row)}"
    )


def _hidden(row: dict[str, Any]) -> str:
    """How much of the sampling cost no time, for a line; "" when nothing was sampled beside training."""
    hidden_s = row.get("time/hidden_s", 0.0)
    if not hidden_s:
        return ""
    stale = f", {row['groups/stale']} stale groups" if row.get("groups/stale") else ""
    return f"  {hidden_s:.1f} s of sampling hidden, {row['staleness/mean']:.2f} steps behind{stale}"


def evaluation_line(row: dict[str, Any]) -> str:
    """One evaluation row as a line: each measure with its 95% interval."""
    shadows = [name for name in row if name.startswith("shadow/") and not name.endswith("_ci95")]
    parts = [
        f"{name.removeprefix('shadow/')} {row[name]:.3f} ± {row[f'{name}_ci95']:.3f}"
        for name in ["grade", *shadows, "valid_call_share"]
    ]
    return (
        f"{row['split']} at step {row['step']}: {', '.join(parts)}"
        f"  ({row['num_items']} items, {row['num_rollouts']} rollouts, {row['seconds']:.0f} s){_other_ends(row)}"
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
