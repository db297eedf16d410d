"""The numbers of a baseline, from rollouts alone: no engine, no torch.

The rollouts of an item must come from one policy version; `first_rollouts` finds those of a run folder. Costs of
training.costs are not looked at: grades are whole.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from pydantic import Field

from rft.baseline.advice import Advice, Signs, advise
from rft.baseline.chance import UselessChance, useless_chances
from rft.breakdown import num_reasoning_tokens
from rft.errors import UserError
from rft.sift import readable, unreadable
from rft.store import RunStore
from rft.types import Record, Rollout, Split

_BASE_ROLLOUTS = 8  # of a config that does not say


class Spread(Record):
    """Of a measure over the rollouts."""

    mean: float
    p50: float
    p95: float


class ItemNumbers(Record):
    """The grades of one item; the standard deviation is the sample's (k - 1)."""

    item_id: str
    num_rollouts: int
    mean: float
    deviation: float
    maximum: float


class Baseline(Record):
    """What `rft baseline` says. Shares of items are of those with at least two graded rollouts."""

    run_id: str = ""
    label: str = ""  # of the model
    split: str = ""
    problems: list[str] = Field(default_factory=list)  # why less is counted than there is
    num_items: int
    num_rollouts: int  # graded
    num_discarded: int
    lowest: float  # 0, or the least grade below it; highest: 1, or the best grade above it
    highest: float
    mean: float  # of the items' means
    deviation: float  # mean over items
    maximum: float  # mean over items of the best rollout
    headroom: float  # maximum - mean
    all_lowest: float
    all_highest: float
    all_equal_between: float
    varied: float
    useless: list[UselessChance]
    tool_calls: Spread
    sampled_tokens: Spread
    reasoning_tokens: Spread
    duration_s: Spread
    tool_latency_s: Spread  # of all calls of a rollout
    valid_call_share: float | None  # null without tools
    malformed_share: float  # of the calls
    truncated_share: float
    advice: Advice
    items: list[ItemNumbers]


def baseline_of(store: RunStore, split: Split | None = None) -> Baseline:
    """The baseline of a run folder: of the oldest policy version that sampled `split`, by default the run's own.

    Raises UserError when it has too few rollouts to say anything.
    """
    state, config = store.read_state(), store.config()
    chosen: Split = split or state.get("split") or "train"
    rollouts, num_unread = first_rollouts(store, chosen)
    if not rollouts:
        others = sorted({rollout.split for step in store.rollout_steps() for rollout in _some(store, step)})
        cure = f"name one with --split: {', '.join(others)}" if others else "sample with rft baseline CONFIG first"
        raise UserError(f"the run has no rollouts of the split {chosen}", where=str(store.path), cure=cure)
    found = measure(rollouts, _base_rollouts(config), has_tools=bool(config.get("environment")))
    problems = [f"{num_unread} stored rollouts could not be read and are not counted"] if num_unread else []
    label = str(state.get("label") or Path(str(config.get("model", {}).get("path", ""))).name)
    return found.model_copy(update={"run_id": store.run_id, "label": label, "split": chosen, "problems": problems})


def measure(rollouts: Sequence[Rollout], base_rollouts: int, *, has_tools: bool) -> Baseline:
    """The numbers of rollouts of one policy version. Raises UserError without an item of two graded rollouts."""
    graded = [rollout for rollout in rollouts if rollout.grade is not None]
    items = _items(graded)
    scores = [each for each in items.values() if len(each) > 1]
    if not scores:
        problem = f"no item has two graded rollouts ({len(graded)} graded in all): nothing is known of their variance"
        raise UserError(problem, where="baseline", cure="sample more with --samples 4")
    flat = [score for each in items.values() for score in each]
    lowest, highest = min(0.0, *flat), max(1.0, *flat)
    calls = [call for rollout in graded for call, _ in rollout.tool_calls]
    calling = has_tools or bool(calls)
    mean, best = fmean(map(fmean, items.values())), fmean(map(max, items.values()))
    signs = Signs(
        mean=mean,
        lowest=lowest,
        highest=highest,
        all_lowest=fmean(max(each) == lowest for each in scores),
        all_highest=fmean(min(each) == highest for each in scores),
        all_equal_between=fmean(lowest < min(each) == max(each) < highest for each in scores),
        valid_call_share=fmean(rollout.has_valid_call for rollout in graded) if calling else None,
        malformed_share=fmean(call.error is not None for call in calls) if calls else 0.0,
        truncated_share=fmean(rollout.stop_reason.is_truncated for rollout in graded),
    )
    chances = useless_chances(scores)
    return Baseline(
        **signs.model_dump(),
        num_items=len(items),
        num_rollouts=len(graded),
        num_discarded=sum(rollout.stop_reason.is_discarded for rollout in rollouts),
        deviation=fmean(map(stdev, scores)),
        maximum=best,
        headroom=best - mean,
        varied=fmean(min(each) < max(each) for each in scores),
        useless=chances,
        **{name: _spread(graded, value) for name, value in _MEASURES.items()},
        advice=advise(signs, chances, base_rollouts),
        items=[_of_item(item_id, each) for item_id, each in items.items()],
    )


_MEASURES: dict[str, Callable[[Rollout], float]] = {
    "tool_calls": lambda rollout: len(rollout.tool_calls),
    "sampled_tokens": lambda rollout: rollout.num_sampled_tokens,
    "reasoning_tokens": num_reasoning_tokens,
    "duration_s": lambda rollout: rollout.duration_s,
    "tool_latency_s": lambda rollout: sum(result.latency_s for turn in rollout.turns for result in turn.results),
}


def first_rollouts(store: RunStore, split: Split) -> tuple[list[Rollout], int]:
    """The rollouts of a split that the oldest policy version sampled, and how many stored ones could not be read.

    Those of one version go on until a step has none: later steps are of later versions. Rollouts without any turn
    have no version, and belong to the step they are in.
    """
    found: list[Rollout] = []
    oldest: int | None = None
    num_unread = 0
    for step in store.rollout_steps():
        rollouts = [rollout for rollout in _some(store, step) if rollout.split == split]
        versions = [_version(rollout) for rollout in rollouts if rollout.turns]
        if not rollouts:
            continue
        oldest = min(versions, default=0) if oldest is None else oldest
        if versions and min(versions) > oldest:
            break
        num_unread += unreadable(store.rollout_path(step))
        found += [rollout for rollout in rollouts if not rollout.turns or _version(rollout) == oldest]
    return found, num_unread


def _some(store: RunStore, step: int) -> list[Rollout]:
    return readable(store.rollout_path(step))


def _version(rollout: Rollout) -> int:
    return max(turn.policy_version for turn in rollout.turns)


def _base_rollouts(config: dict[str, Any]) -> int:
    found = config.get("training", {}).get("base_rollouts")
    return found if isinstance(found, int) and found >= 1 else _BASE_ROLLOUTS


def _items(graded: Sequence[Rollout]) -> dict[str, list[float]]:
    scores: dict[str, list[float]] = defaultdict(list)
    for rollout in graded:
        if rollout.grade is not None:
            scores[rollout.item_id].append(rollout.grade.score)
    return dict(scores)


def _of_item(item_id: str, scores: list[float]) -> ItemNumbers:
    deviation = stdev(scores) if len(scores) > 1 else 0.0
    return ItemNumbers(
        item_id=item_id,
        num_rollouts=len(scores),
        mean=fmean(scores),
        deviation=deviation,
        maximum=max(scores),
    )


def _spread(rollouts: Sequence[Rollout], value: Callable[[Rollout], float]) -> Spread:
    values = sorted(value(rollout) for rollout in rollouts)
    return Spread(mean=fmean(values), p50=percentile(values, 0.5), p95=percentile(values, 0.95))


def percentile(ordered: Sequence[float], share: float) -> float:
    """Of ascending values, linear between neighbours (Hyndman and Fan 1996, definition 7)."""
    place = share * (len(ordered) - 1)
    low, high = math.floor(place), math.ceil(place)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
