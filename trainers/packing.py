"""Which training sequences share a packed row, and which rank gets which row. Plain numbers, no tensors.

In lexicographic order neighbours share the longest beginnings, so a row is a run of neighbours: its size is that of
the trie of its sequences, and cutting between two of them costs the beginning that they share, once more. The cuts
are the cheapest that keep every row within its limit. Nothing here knows of groups. Deterministic.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

ROW_COST = 32  # what another row costs beyond its tokens, in tokens: kernel launches, weights read once more
_ROUNDS = 3  # how many numbers of rows per rank are tried, from the smallest possible
_SLACK = tuple(1 + percent / 100 for percent in range(0, 50, 3))  # row limits that are tried, over the mean row


def lexicographic(paths: list[Ints]) -> list[int]:
    """The indices of `paths` (token ids, none negative) in lexicographic order; equal ones keep their order."""
    keys = [path.astype(">u4").tobytes() for path in paths]  # bytes compare much faster than lists of numbers
    return sorted(range(len(paths)), key=keys.__getitem__)


def common_prefix(first: Ints, second: Ints) -> int:
    """How many ids two paths have in common from the start."""
    length = min(first.size, second.size)
    different = first[:length] != second[:length]
    return int(different.argmax()) if different.any() else length


def plan_rows(paths: list[Ints], max_tokens: int, num_ranks: int = 1) -> list[list[int]]:
    """Cut sequences into rows whose tries have at most `max_tokens` tokens; returns each row's indices, ascending.

    A single sequence beyond the limit still gets its own row. For several ranks the number of rows is a multiple of
    theirs (where there are as many sequences) and rows are made so that the busiest rank of `deal` has least to do.
    """
    if not paths:
        return []
    order = lexicographic(paths)
    shared = [0] + [common_prefix(paths[one], paths[other]) for one, other in pairwise(order)]
    added = [paths[index].size - share for index, share in zip(order, shared, strict=True)]
    tries = _Tries(shared, [0, *accumulate(added)])
    plans = [tries.cut(limit, num_ranks) for limit in tries.limits(max_tokens, num_ranks)]
    best = min(plans, key=lambda plan: tries.busiest(plan, num_ranks))  # the first of equals
    return [sorted(order[start:end]) for start, end in pairwise(best)]


def deal(work: list[int], num_ranks: int) -> list[list[int]]:
    """The indices of each rank's rows: largest first to the rank with least work that has not its share of rows."""
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    most, totals = -(-len(work) // num_ranks), [0] * num_ranks
    for index in sorted(range(len(work)), key=lambda i: -work[i]):  # stable: ties keep their order
        rank = min((r for r in range(num_ranks) if len(ranks[r]) < most), key=totals.__getitem__)
        ranks[rank].append(index)
        totals[rank] += work[index]
    return ranks


@dataclass(frozen=True, slots=True)
class _Tries:
    """n sorted sequences: what each shares with its predecessor, and [n + 1] the tokens of the trie before each.

    A plan is the borders of its rows, [0, ..., n].
    """

    shared: list[int]
    before: list[int]

    def size(self, start: int, end: int) -> int:
        """The tokens of the row from sequence `start` to `end`, exclusive."""
        return self.before[end] - self.before[start] + self.shared[start]

    def limits(self, max_tokens: int, num_ranks: int) -> list[int]:
        """Row limits worth trying: the largest, and for several ranks what makes that many rows of about one size."""
        if num_ranks == 1:
            return [max_tokens]
        rounds = -(-self.before[-1] // (max_tokens * num_ranks))
        means = [self.before[-1] / (num_ranks * count) for count in range(rounds, rounds + _ROUNDS)]
        wanted = {min(max_tokens, int(mean * slack) + 1) for mean in means for slack in _SLACK}
        return sorted({max_tokens} | wanted, reverse=True)

    def cut(self, limit: int, num_ranks: int) -> list[int]:
        """The plan with the fewest tokens (a row counts as ROW_COST more), then split on until it suits the ranks."""
        plan = self._cheapest(limit)
        while (len(plan) - 1) % num_ranks and len(plan) <= len(self.shared):
            start, end = max((row for row in pairwise(plan) if row[1] - row[0] > 1), key=lambda row: self.size(*row))
            middle = min(range(start + 1, end), key=lambda m: max(self.size(start, m), self.size(m, end)))
            plan = sorted([*plan, middle])
        return plan

    def _cheapest(self, limit: int) -> list[int]:
        costs, starts = [0], [0]  # of the best plan for the first `end` sequences; where its last row starts
        rows: list[tuple[int, int]] = []  # a heap: cost of the plan whose last row, still open, starts there
        for end in range(1, len(self.before)):
            heapq.heappush(rows, (costs[end - 1] + self.shared[end - 1] + ROW_COST, end - 1))
            while rows[0][1] < end - 1 and self.size(rows[0][1], end) > limit:
                heapq.heappop(rows)  # too long from here on
            costs.append(rows[0][0])
            starts.append(rows[0][1])
        plan = [len(self.shared)]
        while plan[-1]:
            plan.append(starts[plan[-1]])
        return plan[::-1]

    def busiest(self, plan: list[int], num_ranks: int) -> int:
        """What the rank with most work has to do under this plan, rows included."""
        work = [self.size(start, end) + ROW_COST for start, end in pairwise(plan)]
        return max(sum(work[index] for index in rank) for rank in deal(work, num_ranks))
