"""How numbers are spread over the rollouts of a step, where a mean hides it: for rows of rft/metrics.py."""

from __future__ import annotations

from collections.abc import Sequence

from rft.breakdown import num_reasoning_tokens
from rft.types import Group, Rollout

SHARES = {"p10": 0.1, "p50": 0.5, "p90": 0.9}


def percentile(ordered: Sequence[float], share: float) -> float:
    """Linear between the two nearest of the sorted values (Hyndman and Fan's type 7, what numpy does)."""
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def percentile_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """`name_p10`, `name_p50`, `name_p90` over rollouts: calls, tokens, seconds; `tool_calls_p10/tool` of each tool.

    `tool_call_s_p10/tool` is over calls. Only tools that an item has are named, as in rft/breakdown.py.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    if not rollouts:
        return {}
    row = _spread("tool_calls", [len(rollout.tool_calls) for rollout in rollouts])
    row |= _spread("sampled_tokens", [rollout.num_sampled_tokens for rollout in rollouts])
    row |= _spread("reasoning_tokens", [num_reasoning_tokens(rollout) for rollout in rollouts])
    row |= _spread("duration_s", [rollout.duration_s for rollout in rollouts])
    known = {name for group in groups for name in group.item.tool_names}
    calls = [_calls_by_tool(rollout) for rollout in rollouts]
    for tool in sorted(known & {name for by_tool in calls for name in by_tool}):
        row |= _spread("tool_calls", [len(by_tool.get(tool, ())) for by_tool in calls], f"/{tool}")
        row |= _spread("tool_call_s", [seconds for by_tool in calls for seconds in by_tool.get(tool, ())], f"/{tool}")
    return row


def _calls_by_tool(rollout: Rollout) -> dict[str, list[float]]:
    """The seconds of each call, by tool; a call without a result took none."""
    found: dict[str, list[float]] = {}
    for call, result in rollout.tool_calls:
        found.setdefault(call.name, []).append(result.latency_s if result is not None else 0.0)
    return found


def _spread(name: str, values: Sequence[float], ending: str = "") -> dict[str, float]:
    ordered = sorted(values)
    return {f"{name}_{suffix}{ending}": percentile(ordered, share) for suffix, share in SHARES.items()}
