"""Cuts are the cheapest that keep rows within their limit; the deal is fair."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from rft.trainers.packing import ROW_COST, common_prefix, deal, lexicographic, plan_rows


def random_paths(seed: int, count: int) -> list[np.ndarray]:
    """Sequences of a small random tree, so that many begin alike; some are equal, some the start of another."""
    draw = random.Random(seed)
    paths = [[300 + draw.randrange(2)]]
    for _ in range(count - 1):
        known = draw.choice(paths)
        start = known[: draw.randint(0, len(known))]
        paths.append(start + [draw.randrange(400) for _ in range(draw.randint(0 if start else 1, 20))])
    return [np.array(path) for path in paths]


def trie_size(paths: list[np.ndarray]) -> int:
    return len({tuple(path[:end].tolist()) for path in paths for end in range(1, len(path) + 1)})


def test_order_is_that_of_lists():
    paths = random_paths(0, 50)
    assert lexicographic(paths) == sorted(range(50), key=lambda index: paths[index].tolist())


def test_common_prefix():
    one, other = np.array([5, 6, 7]), np.array([5, 6, 8, 9])
    assert common_prefix(one, other) == 2 and common_prefix(one[:2], other) == 2 and common_prefix(one[:0], other) == 0


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("limit", [15, 40, 100])
def test_no_cut_of_the_sorted_sequences_costs_less(seed, limit):
    paths = random_paths(seed, 9)
    rows = plan_rows(paths, limit)
    assert sorted(index for row in rows for index in row) == list(range(9))
    assert all(row == sorted(row) for row in rows)

    def cost(rows: list[list[int]]) -> float:
        sizes = [trie_size([paths[index] for index in row]) for row in rows]
        is_allowed = all(size <= limit or len(row) == 1 for size, row in zip(sizes, rows, strict=True))
        return sum(sizes) + ROW_COST * len(rows) if is_allowed else float("inf")

    order = lexicographic(paths)
    cuts = (cut for count in range(9) for cut in itertools.combinations(range(1, 9), count))
    plans = ([order[a:b] for a, b in itertools.pairwise([0, *cut, 9])] for cut in cuts)
    assert cost(rows) == min(cost(plan) for plan in plans)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
def test_the_number_of_rows_suits_the_ranks(num_ranks):
    for count in (1, 4, 7, 30):
        rows = plan_rows(random_paths(count, count), 60, num_ranks)
        assert len(rows) % num_ranks == 0 or len(rows) == count < num_ranks
        assert rows == plan_rows(random_paths(count, count), 60, num_ranks), "deterministic"


def test_nothing_to_plan():
    assert plan_rows([], 100, 2) == [] and deal([], 2) == [[], []]


def test_every_rank_has_its_share_of_rows():
    assert deal([10, 1, 1, 1], 2) == [[0, 3], [1, 2]]
    assert deal([5, 9, 7], 2) == [[1], [2, 0]]
