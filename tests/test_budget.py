"""Adaptive allocation: the budget is kept, goes where grades vary, and does not turn the gradient."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
from typing import Any

import pytest
import torch
from test_collect import a_collector
from test_rollout import RecordingGrader, a_workshop, an_item, say

from rft.budget import StepBudget
from rft.data import further_items
from rft.errors import NoProgressError
from rft.trainers.objective import advantages
from rft.types import Grade, Group, Item


class ItemGrader(RecordingGrader):
    """Items named v-... vary: their rollouts are 0 or 1 by a coin that the rollout's id decides; others are all 0."""

    async def grade(self, item: Item, sample: dict[str, Any], trace_id: str = "") -> Grade:
        return Grade(score=float(item.id.startswith("v") and random.Random(trace_id).random() < 0.5))


def items(pattern: str, prefix: str = "") -> list[Item]:
    return [an_item(id=f"{letter}-{prefix}{index}") for index, letter in enumerate(pattern)]


def collect(first: list[Item], further: list[Item], total: int, size: int = 4) -> tuple[list[Group], StepBudget]:
    collector, seen = a_collector(a_workshop(say("I21.9"), grader=ItemGrader()))
    budget = StepBudget(total, size)
    groups = asyncio.run(collector.collect_adaptive(first, iter(further), 1, budget))
    assert len({rollout.id for rollout in seen}) == len(seen) == sum(len(group.rollouts) for group in groups)
    return groups, budget


def test_items_that_do_not_vary_are_replaced_and_the_rest_goes_to_those_that_do() -> None:
    groups, budget = collect(items("vccv"), items("vvvv", "more"), total=32)
    assert budget.spent == sum(len(group.rollouts) for group in groups) == 32
    assert [len(group.rollouts) for group in groups if not group.has_signal] == [4] * sum(
        not group.has_signal for group in groups
    )
    sizes = [len(group.rollouts) for group in groups if group.has_signal]
    assert len(groups) > 4, "further items took the place of those without signal"
    assert max(sizes) - min(sizes) <= 1
    assert all(group.round_sizes == (4, len(group.rollouts) - 4) for group in groups if len(group.rollouts) > 4)


def test_where_everything_varies_it_is_uniform() -> None:
    first = [item for item in items("v" * 40) if len(set(grades(item))) > 1][:4]
    groups, budget = collect(first, items("vvvv", "more"), total=32)
    assert [len(group.rollouts) for group in groups] == [8] * 4
    assert budget.spent == 32


def grades(item: Item) -> list[float]:
    """The first round of an item of these tests."""
    return [rollout.grade.score for rollout in collect([item], [], total=4)[0][0].rollouts if rollout.grade]


def test_a_dataset_without_signal_ends_with_the_budget() -> None:
    groups, budget = collect(items("cccc"), items("c" * 50, "more"), total=30)
    assert ([len(group.rollouts) for group in groups], budget.spent) == ([4] * 7, 28)
    groups, budget = collect(items("cc"), [], total=32)
    assert ([len(group.rollouts) for group in groups], budget.spent) == ([4, 4], 8)


def test_more_useful_groups_at_equal_rollouts() -> None:
    """30% of the items vary: at least 1.5 times the useful groups of uniform allocation."""
    generator = random.Random(0)
    pool = items("".join(generator.choice("vvvccccccc") for _ in range(900)))
    useful = {"uniform": 0, "adaptive": 0}
    for step in range(12):
        first = pool[step * 6 : step * 6 + 6]
        groups, budget = collect(first, list(further_items(pool, first, step, 0)), total=48)
        assert budget.spent <= 48
        useful["adaptive"] += sum(group.has_signal for group in groups)
        collector, _ = a_collector(a_workshop(say("I21.9"), grader=ItemGrader()))
        useful["uniform"] += sum(g.has_signal for g in asyncio.run(collector.collect(first, "train", 1, 8)))
    assert useful["adaptive"] >= 1.5 * useful["uniform"], useful


def test_a_failure_ends_all_rounds() -> None:
    class Broken(ItemGrader):
        async def grade(self, item: Item, sample: dict[str, Any], trace_id: str = "") -> Grade:
            return Grade(score=0.0, errors={"python_grader_runtime_error": "KeyError"})

    collector, _ = a_collector(a_workshop(say("I21.9"), grader=Broken()))
    with pytest.raises(NoProgressError, match="KeyError"):
        asyncio.run(collector.collect_adaptive(items("cccccc"), iter([]), 1, StepBudget(24, 4)))


def test_further_items_are_others_and_each_once() -> None:
    pool = items("v" * 30)
    found = list(further_items(pool, pool[:6], 3, seed=1))
    assert sorted(item.id for item in found) == sorted(item.id for item in pool[6:])
    assert found == list(further_items(pool, pool[:6], 3, seed=1))
    assert found != list(further_items(pool, pool[:6], 4, seed=1))


@pytest.mark.parametrize(("total", "first"), [(3, 4), (8, 1), (0, 2)])
def test_a_budget_that_cannot_be_spent_is_refused(total: int, first: int) -> None:
    with pytest.raises(ValueError, match="first round"):
        StepBudget(total, first)


REWARDS = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
LOGITS = torch.tensor([0.3, -0.2, -1.0], dtype=torch.float64)


def expected_update(first: int, second: int, is_by_round: bool) -> torch.Tensor:
    """[3] the exact mean of sum_i A_i grad log pi(a_i) over all outcomes of a softmax policy with three actions."""
    probabilities = LOGITS.softmax(0)
    total = torch.zeros(3, dtype=torch.float64)
    for outcome in itertools.product(range(3), repeat=first):
        varies = len(set(outcome)) > 1
        for more in itertools.product(range(3), repeat=second) if varies else [()]:
            actions = [*outcome, *more]
            sizes = (first, len(more)) if more and is_by_round else ()
            found = advantages(REWARDS[actions], "none", sizes)
            scores = torch.nn.functional.one_hot(torch.tensor(actions), 3) - probabilities
            weight = math.prod(probabilities[action].item() for action in actions)
            total += weight * (found[:, None] * scores).sum(0)
    return total


def test_two_rounds_keep_the_direction_of_the_gradient() -> None:
    probabilities = LOGITS.softmax(0)
    gradient = probabilities * (REWARDS - (probabilities * REWARDS).sum())
    by_round, pooled = expected_update(2, 3, True), expected_update(2, 3, False)
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(by_round, gradient, dim=0).item() == pytest.approx(1.0, abs=1e-12)
    assert cosine(pooled, gradient, dim=0).item() < 1 - 1e-6, "one mean over both rounds turns it"
