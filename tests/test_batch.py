"""Packed rows: exact sharing, masks, splitting, and the deal over ranks."""

from __future__ import annotations

import random

import pytest
import torch

from rft.trainers.batch import build_micro_batches, count_tokens, split_over_ranks
from rft.trainers.packing import ROW_COST
from rft.types import Grade, Group, Item, Message, Rollout, StopReason, Turn

IMBALANCE = 1.2  # the busiest rank's work over the mean, for a few dozen short sequences


def turn(inputs: list[int], outputs: list[int], is_fork: bool = False) -> Turn:
    """One turn whose log-probabilities tell the ids apart: -id / 100."""
    return Turn(
        input_ids=inputs,
        output_ids=outputs,
        logprobs=[-value / 100 for value in outputs],
        finish_reason="stop",
        policy_version=0,
        message=Message(role="assistant"),
        is_fork=is_fork,
    )


def group(rollouts: list[list[Turn]], name: str = "item") -> Group:
    """A group of rollouts given as turns; grades 0, 1, 2, ..."""
    records = [
        Rollout(
            id=f"{name}-{attempt}",
            item_id=name,
            split="train",
            step=0,
            attempt=attempt,
            seed=0,
            turns=turns,
            stop_reason=StopReason.ANSWERED,
            grade=Grade(score=attempt),
            started_at=0.0,
            duration_s=1.0,
        )
        for attempt, turns in enumerate(rollouts)
    ]
    return Group(Item(id=name, row={}, messages=[]), 0, records)


def random_group(seed: int, num_rollouts: int = 8, vocabulary: int = 60) -> Group:
    """A prompt, a few different first turns, tool results that depend on the turn alone, some last turns, a fork."""
    draw = random.Random(seed)

    def tokens(low: int, high: int) -> list[int]:
        return [draw.randrange(vocabulary) for _ in range(draw.randint(low, high))]

    prompt = tokens(20, 30)
    calls = [(tokens(2, 8), tokens(5, 12)) for _ in range(3)]
    rollouts = []
    for attempt in range(num_rollouts):
        first, result = draw.choice(calls)
        turns = [turn(prompt, first)]
        if attempt % 4:
            turns.append(turn(result, tokens(1, 5)))
        if attempt % 5 == 3:
            turns.append(turn(prompt[:7] + tokens(3, 6), tokens(2, 4), is_fork=True))
        if attempt % 6 == 5:
            turns[-1].results.clear()
            turns.append(turn(tokens(4, 4), []))  # a tool result that nothing was sampled after
        rollouts.append(turns)
    return group(rollouts, f"item{seed}")


def values(groups: list[Group]) -> list[torch.Tensor]:
    return [torch.linspace(-1, 1, len(g.rollouts)) for g in groups]


def test_the_trie_in_depth_first_order():
    shared = [turn([1, 2, 3], [4, 5])]
    one = group([[*shared, turn([6], [7, 9])], [*shared, turn([6], [8, 9])], [turn([1, 2, 3], [4, 5])]])
    (row,) = build_micro_batches([one], [torch.tensor([1.0, 2.0, 3.0])], 100, "packed")
    assert row.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]  # the last sampled id of a path predicts nothing
    assert row.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 6, 6]]
    assert row.subtree_end.tolist() == [[8, 8, 8, 8, 8, 8, 7, 8]]
    assert row.predictors.tolist() == [2, 3, 5, 6, 7]
    assert row.predictors[row.predictor_index].tolist() == [2, 3, 5, 6, 2, 3, 5, 7, 2, 3]
    assert row.targets.tolist() == [4, 5, 7, 9, 4, 5, 8, 9, 4, 5]
    assert row.rollout_index.tolist() == [0] * 4 + [1] * 4 + [2] * 2
    assert row.advantages.tolist() == [1.0] * 4 + [2.0] * 4 + [3.0] * 2
    assert row.sampled_logprobs.tolist() == pytest.approx([-target / 100 for target in row.targets.tolist()])
    mask = row.attention_mask[0, 0].int().tolist()
    assert mask[7] == [1, 1, 1, 1, 1, 1, 0, 1]  # not its sibling
    assert mask[4] == [1, 1, 1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("layout", ["packed", "plain"])
@pytest.mark.parametrize("limit", [45, 10_000])
def test_every_loss_token_sees_exactly_its_own_history(seed, layout, limit):
    groups = [random_group(seed), random_group(seed + 100, num_rollouts=5)]
    rollouts = [rollout for one in groups for rollout in one.rollouts]
    sequences = [(index, sequence) for index, rollout in enumerate(rollouts) for sequence in rollout.sequences]
    found: dict[int, list[tuple[int, list[int], int, float]]] = {index: [] for index in range(len(sequences))}
    for batch in build_micro_batches(groups, values(groups), limit, layout):
        width, mask = batch.input_ids.shape[1], batch.attention_mask
        for place, target, logprob, rollout, index in zip(
            batch.predictors[batch.predictor_index].tolist(),
            batch.targets.tolist(),
            batch.sampled_logprobs.tolist(),
            batch.rollout_index.tolist(),
            batch.sequence_index.tolist(),
            strict=True,
        ):
            row, position = divmod(place, width)
            seen = mask[row, 0, position]
            assert batch.position_ids[row][seen].tolist() == list(range(int(seen.sum())))
            found[index].append((rollout, batch.input_ids[row][seen].tolist(), target, logprob))
    for index, (rollout, sequence) in enumerate(sequences):
        times = [time for time, is_sampled in enumerate(sequence.mask) if is_sampled]
        expected = [(rollout, sequence.ids[:time], sequence.ids[time]) for time in times]
        assert [token[:3] for token in found[index]] == expected
        assert [token[3] for token in found[index]] == pytest.approx([sequence.logprobs[time] for time in times])


def test_order_of_tokens_is_the_same_in_every_layout():
    groups = [random_group(3)]
    (packed,) = build_micro_batches(groups, values(groups), 10_000, "packed")
    (plain,) = build_micro_batches(groups, values(groups), 10_000, "plain")
    assert packed.targets.tolist() == plain.targets.tolist()
    assert packed.rollout_index.tolist() == plain.rollout_index.tolist()
    assert torch.equal(packed.advantages, plain.advantages)
    assert plain.num_row_tokens > 3 * packed.num_row_tokens  # sharing really shrinks the row
    assert len(packed.predictors) < len(plain.predictors) == packed.num_tokens


def test_rows_respect_the_limit_and_lose_nothing():
    groups = [random_group(1), random_group(2)]
    whole = build_micro_batches(groups, values(groups), 10_000, "packed")
    parts = build_micro_batches(groups, values(groups), 50, "packed")
    assert len(whole) == 1 < len(parts)
    assert all(batch.num_row_tokens <= 50 for batch in parts)
    expected = sum(rollout.num_sampled_tokens for one in groups for rollout in one.rollouts)
    assert count_tokens(parts) == count_tokens(whole) == expected
    plain = build_micro_batches(groups, values(groups), 100, "plain")
    assert all(batch.num_row_tokens <= 100 for batch in plain) and count_tokens(plain) == expected


def test_a_sequence_beyond_the_limit_gets_its_own_row():
    long = group([[turn(list(range(30)), [1, 2])], [turn([5], [6])]])
    rows = build_micro_batches([long], [torch.zeros(2)], 10, "packed")
    assert sorted(row.num_row_tokens for row in rows) == [1, 31]


def test_building_is_deterministic():
    groups = [random_group(7)]
    first, second = (build_micro_batches(groups, values(groups), 60, "packed") for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.input_ids, other.input_ids) and torch.equal(one.targets, other.targets)


def test_groups_of_one_row_share_their_beginnings_and_nothing_else():
    """Two groups with the same instructions, one with others: a forest of two tries."""
    first = group([[turn([1, 2, 3], [4, 5])], [turn([1, 2, 3], [6])]], "first")
    second = group([[turn([1, 2, 7], [8])], [turn([1, 2, 7], [4, 5, 6])]], "second")
    third = group([[turn([9, 2, 3], [4, 5])], [turn([9, 2, 3], [6, 6])]], "third")
    (row,) = build_micro_batches([first, third, second], [torch.tensor([-1.0, 1.0])] * 3, 100, "packed")
    assert row.input_ids.tolist() == [[1, 2, 3, 4, 7, 4, 5, 9, 2, 3, 4, 6]]
    assert row.position_ids.tolist() == [[0, 1, 2, 3, 2, 3, 4, 0, 1, 2, 3, 3]]
    assert row.subtree_end.tolist() == [[7, 7, 4, 4, 7, 7, 7, 12, 12, 12, 11, 12]]
    assert row.targets.tolist() == [4, 5, 6, 4, 5, 6, 6, 8, 4, 5, 6], "by (sequence, time), not by place in the row"
    assert row.rollout_index.tolist() == [0, 0, 1, 2, 2, 3, 3, 4, 5, 5, 5]
    mask = row.attention_mask[0, 0].int().tolist()
    assert mask[5] == [1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0]
    assert mask[11] == [0] * 7 + [1, 1, 1, 0, 1]


def many_groups(seed: int, num_groups: int, common: int = 30) -> list[Group]:
    """Groups of 2 to 8 random rollouts, with forks, that all begin alike."""
    draw = random.Random(seed)
    start = [draw.randrange(60) for _ in range(common)]
    groups = [random_group(100 * seed + index, draw.randint(2, 8)) for index in range(num_groups)]
    for one in groups:
        for rollout in one.rollouts:
            for part in rollout.turns:
                if part.is_fork or part is rollout.turns[0]:
                    part.input_ids[:0] = start
    return groups


@pytest.mark.parametrize("seed", range(5))
def test_a_row_of_several_groups_computes_less(seed):
    groups = many_groups(seed, 6)
    for limit in (120, 300, 10_000):
        together = build_micro_batches(groups, values(groups), limit, "packed")
        apart = [row for one in groups for row in build_micro_batches([one], values([one]), limit, "packed")]
        assert all(row.num_row_tokens <= limit for row in together)
        assert count_tokens(together) == count_tokens(apart)
        costs = [sum(row.num_row_tokens + ROW_COST for row in rows) for rows in (together, apart)]
        assert costs[0] < costs[1] or (limit == 120 and costs[0] == costs[1]), "120: no room for two groups"


@pytest.mark.parametrize("num_groups", [4, 12])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_ranks_get_equal_counts_and_nearly_equal_work(num_ranks, num_groups):
    for seed in range(3):
        groups = many_groups(seed, num_groups)
        for limit in (150, 400, 10_000):
            batches = build_micro_batches(groups, values(groups), limit, "packed", num_ranks)
            ranks = split_over_ranks(batches, num_ranks)
            assert len({len(rank) for rank in ranks}) == 1
            assert sum(len(rank) for rank in ranks) == len(batches), "no padding"
            assert all(batch.num_row_tokens <= limit for batch in batches)
            assert sum(count_tokens(rank) for rank in ranks) == sum(
                rollout.num_sampled_tokens for one in groups for rollout in one.rollouts
            )
            work = [sum(batch.num_row_tokens for batch in rank) for rank in ranks]
            assert max(work) <= IMBALANCE * sum(work) / num_ranks


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7])
def test_rows_made_for_one_rank_can_be_dealt_to_several(num_ranks):
    groups = [random_group(seed, num_rollouts=3 + seed) for seed in range(6)]
    batches = build_micro_batches(groups, values(groups), 60, "packed")
    ranks = split_over_ranks(batches, num_ranks)
    assert len(ranks) == num_ranks and len({len(rank) for rank in ranks}) == 1
    assert sum(count_tokens(rank) for rank in ranks) == count_tokens(batches)
    work = [sum(batch.num_row_tokens for batch in rank) for rank in ranks]
    if len(batches) >= num_ranks:
        assert max(work) - min(work) <= 60 + 2 * len(batches)


def test_a_rank_without_work_still_runs_one_micro_batch():
    groups = [random_group(0)]
    ranks = split_over_ranks(build_micro_batches(groups, values(groups), 10_000, "packed"), 2)
    assert [len(rank) for rank in ranks] == [1, 1]
    assert count_tokens(ranks[1]) == 0 and ranks[1][0].num_row_tokens == 2
