"""What a rollout cost, taken from its grade before advantages: calls, tokens, seconds. Reports show whole grades.

Costs act only among the rollouts of a group that did not fail, relative to each other, so that doing nothing quickly
never wins: the cheapest of them keeps its grade, the most expensive loses the whole weight of that cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rft.config import CostsConfig
from rft.types import Group, Rollout

_COSTS: dict[str, Callable[[Rollout], float]] = {
    "tool_calls": lambda rollout: len(rollout.tool_calls),
    "sampled_tokens": lambda rollout: rollout.num_sampled_tokens,
    "reasoning_tokens": lambda rollout: sum(turn.reasoning_tokens for turn in rollout.turns),
    "seconds": lambda rollout: rollout.duration_s,
}


def penalties(group: Group, costs: CostsConfig) -> dict[str, list[float]]:
    """What each cost with a weight takes from each rollout of a group: weight x (c - min) / (max - min), >= 0.

    min and max are over the rollouts with a grade above `costs.above`; the others, and equal costs, lose nothing.
    """
    counts = [score > costs.above for score in group.scores]
    found: dict[str, list[float]] = {}
    for name, cost in _COSTS.items():
        weight = getattr(costs, name)
        if weight:
            values = [cost(rollout) for rollout in group.rollouts]
            found[name] = [weight * share for share in _shares(values, counts)]
    return found


def shaped_scores(group: Group, costs: CostsConfig) -> list[float]:
    """The grades of a group, less its penalties."""
    taken = penalties(group, costs).values()
    return [score - sum(each) for score, *each in zip(group.scores, *taken, strict=True)]


def cost_metrics(groups: Sequence[Group], costs: CostsConfig) -> dict[str, float]:
    """`cost/<name>`: what each cost took from a rollout, on average."""
    num_rollouts = max(1, sum(len(group.rollouts) for group in groups))
    totals: dict[str, float] = {}
    for group in groups:
        for name, taken in penalties(group, costs).items():
            totals[name] = totals.get(name, 0.0) + sum(taken)
    return {f"cost/{name}": total / num_rollouts for name, total in totals.items()}


def _shares(values: list[float], counts: list[bool]) -> list[float]:
    passing = [value for value, is_counted in zip(values, counts, strict=True) if is_counted]
    if not passing or min(passing) == max(passing):
        return [0.0] * len(values)
    low, span = min(passing), max(passing) - min(passing)
    return [(value - low) / span if is_counted else 0.0 for value, is_counted in zip(values, counts, strict=True)]
