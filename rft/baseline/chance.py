"""The chance that a group is useless: all its grades are equal, so that its advantages are zero. Pure numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from statistics import fmean
from typing import Literal

from rft.types import Record

GROUP_SIZES = (2, 4, 8, 16)
_PRIOR_WEIGHT = 1.0  # rollouts that the prior counts for
Estimator = Literal["unbiased", "smoothed"]


class UselessChance(Record):
    """P(a group of `num_rollouts` rollouts of a random item has equal grades)."""

    num_rollouts: int
    chance: float
    estimator: Estimator  # smoothed: more rollouts than were sampled of some item


def all_equal_unbiased(counts: Sequence[int], size: int) -> float:
    """sum_v C(c_v, size) / C(k, size): the share of the groups of `size` among k sampled rollouts whose grades are all
    equal, where c_v of the k have the grade v.

    Every such group is a sample of `size` independent rollouts, so this is a U-statistic (Hoeffding 1948): its mean is
    sum_v p_v^size exactly. (pass@k is estimated in the same way: Chen et al. 2021, arXiv:2107.03374, equation 1.)
    """
    num = sum(counts)
    if not 1 <= size <= num:
        raise ValueError(f"groups of {size} cannot be drawn from {num} rollouts")
    return sum(math.comb(count, size) for count in counts) / math.comb(num, size)


def all_equal_smoothed(counts: Sequence[int], prior: Sequence[float], size: int) -> float:
    """sum_v prod_{i < size} (c_v + a q_v + i) / (k + a + i), for any `size`.

    The mean of sum_v p_v^size under the posterior of a Dirichlet prior with weight a = 1 around q, the shares of the
    grades among all items' rollouts (the Dirichlet-multinomial, or Polya's urn: Johnson, Kotz and Balakrishnan 1997,
    "Discrete Multivariate Distributions", chapters 35 and 40). The prior keeps a grade that an item has not had yet
    possible; what no item has had stays impossible.
    """
    num, chance = sum(counts), 0.0
    for count, share in zip(counts, prior, strict=True):
        start = count + _PRIOR_WEIGHT * share
        chance += math.prod((start + i) / (num + _PRIOR_WEIGHT + i) for i in range(size))
    return chance


def useless_chances(scores: Sequence[Sequence[float]], sizes: Sequence[int] = GROUP_SIZES) -> list[UselessChance]:
    """The mean over items, for each size (ascending). `scores`: the grades of each item, at least one.

    Unbiased where every item has as many rollouts, else smoothed for the items that have fewer. A smoothed chance is
    held below that of the size before it, because the true one never grows.
    """
    pooled = Counter(score for each in scores for score in each)
    prior = [num / pooled.total() for num in pooled.values()]
    found: list[UselessChance] = []
    for size in sizes:
        chance = fmean(_of_item(each, list(pooled), prior, size) for each in scores)
        estimator: Estimator = "unbiased" if all(size <= len(each) for each in scores) else "smoothed"
        if estimator == "smoothed" and found:
            chance = min(chance, found[-1].chance)
        found.append(UselessChance(num_rollouts=size, chance=chance, estimator=estimator))
    return found


def _of_item(scores: Sequence[float], values: Sequence[float], prior: Sequence[float], size: int) -> float:
    counts = Counter(scores)
    if size <= len(scores):
        return all_equal_unbiased(list(counts.values()), size)
    return all_equal_smoothed([counts[value] for value in values], prior, size)
