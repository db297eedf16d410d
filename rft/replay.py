"""Groups from a run folder instead of from an engine: the same rollouts again, in the same order.

What a run trained on can be rebuilt from what it stored, because a rollout's attempt number says its group, its round
and its place in it. Training on it from the same start makes the same weights.
"""

from __future__ import annotations

from rft.collect import ATTEMPTS_PER_REFILL, ATTEMPTS_PER_ROUND
from rft.config import RunConfig
from rft.data import further_items, items_for_step
from rft.errors import UserError
from rft.store import RunStore
from rft.types import Group, Item, Rollout


def stored_groups(store: RunStore, items: list[Item], config: RunConfig, step: int) -> list[Group]:
    """The groups that a run of this data and seed trained on at 1-based `step`. Raises UserError when it has none."""
    by_item: dict[str, list[Rollout]] = {}
    discards: dict[str, list[Rollout]] = {}
    for rollout in store.rollouts(step, "train"):
        kind = discards if rollout.stop_reason.is_discarded else by_item
        kind.setdefault(rollout.item_id, []).append(rollout)
    order = items_for_step(items, step - 1, config.training.items_per_step, config.seed)
    order += further_items(items, order, step - 1, config.seed)
    found = [_group(item, step, by_item[item.id], discards.get(item.id, [])) for item in order if item.id in by_item]
    if not found or len(found) < len(by_item):
        problem = f"holds no rollouts of step {step}" if not by_item else f"has rollouts of other data at step {step}"
        cure = "name a run of the same data, or lower training.steps to the steps it has"
        raise UserError(f"the run {problem}", where=str(store.path), cure=cure)
    return found


def _group(item: Item, step: int, rollouts: list[Rollout], discards: list[Rollout]) -> Group:
    """Rollouts in the order they were asked for: by round, then by place; a replacement has its predecessor's place.

    Of a group that was sampled anew (its tokens were too old) the last sampling counts.
    """
    last = max(rollout.attempt // ATTEMPTS_PER_REFILL for rollout in rollouts)
    discards = [rollout for rollout in discards if rollout.attempt // ATTEMPTS_PER_REFILL == last]
    rounds: dict[int, list[Rollout]] = {}
    for rollout in rollouts:
        if rollout.attempt // ATTEMPTS_PER_REFILL == last:
            rounds.setdefault(rollout.attempt // ATTEMPTS_PER_ROUND, []).append(rollout)
    ordered: list[Rollout] = []
    for number, members in sorted(rounds.items()):
        first, size = number * ATTEMPTS_PER_ROUND, len(members)
        ordered += sorted(members, key=lambda rollout: (rollout.attempt - first) % size)
    sizes = tuple(len(members) for _, members in sorted(rounds.items())) if len(rounds) > 1 else ()
    return Group(item, step, ordered, tuple(rollout.stop_reason for rollout in discards), sizes)
