"""Percentile bootstrap over items: how far a number would move had other items been drawn.

The rollouts of one item are not independent, so items are resampled, each with all its rollouts. Paired: both sides
are resampled alike, so that easy and hard items cancel out. Seeded: the same folders give the same intervals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Counts = NDArray[np.float64]  # [resamples, items] how often each item was drawn

NUM_RESAMPLES = 10_000
_LEVEL = (2.5, 97.5)  # percentiles that hold 95%
_MAX_CELLS = 1_000_000  # of one block of counts: 8 MB, and as much for every rollout of an item


class Statistic(Protocol):
    """A number of a side, for any resample of its items."""

    def at(self, counts: Counts) -> Floats:
        """One value per resample; NaN where it drew no item that has a value."""
        ...


@dataclass(frozen=True, slots=True)
class ItemMean:
    """The mean over items. `values`: one per item, NaN where the item has none."""

    values: Floats

    def at(self, counts: Counts) -> Floats:
        known = ~np.isnan(self.values)
        drawn = counts if known.all() else counts[:, known]
        with np.errstate(invalid="ignore"):
            means: Floats = drawn @ self.values[known] / drawn.sum(axis=1)
        return means


@dataclass(frozen=True, slots=True)
class Quantile:
    """The smallest value that at least the share `q` of all rollouts does not exceed (nearest rank)."""

    q: float
    values: Floats  # [rollouts] sorted
    items: NDArray[np.intp]  # [rollouts] the item that each belongs to

    def at(self, counts: Counts) -> Floats:
        if not len(self.values):
            return np.full(len(counts), np.nan)
        below = np.take(counts.astype(np.int32), self.items, axis=1)  # [resamples, rollouts]
        np.cumsum(below, axis=1, out=below)
        found = [self.values[np.searchsorted(row, self.q * row[-1])] if row[-1] else np.nan for row in below]
        return np.array(found, dtype=np.float64)


Difference = Callable[[Counts, Counts], Floats]  # of the counts of the first side and of the other


def intervals(
    statistics: Sequence[Difference], num_items: tuple[int, int], *, is_paired: bool, seed: int = 0
) -> list[tuple[float, float] | None]:
    """The 95% percentile interval of each statistic (Efron 1979); None with fewer than two items on a side.

    num_items: of the first side and of the other, the same where they are paired.
    """
    if min(num_items) < 2 or not statistics:
        return [None] * len(statistics)
    blocks = [
        np.stack([statistic(first, other) for statistic in statistics])
        for first, other in _resamples(num_items, is_paired, seed)
    ]
    drawn = np.concatenate(blocks, axis=1)  # [statistics, resamples]
    return [_interval(row) for row in drawn]


def _interval(drawn: Floats) -> tuple[float, float] | None:
    known = drawn[~np.isnan(drawn)]
    if not len(known):
        return None
    low, high = np.percentile(known, _LEVEL)
    return float(low), float(high)


def _resamples(num_items: tuple[int, int], is_paired: bool, seed: int) -> Iterator[tuple[Counts, Counts]]:
    """Blocks of counts for both sides, of NUM_RESAMPLES in all."""
    random = np.random.default_rng(seed)
    size = max(1, min(NUM_RESAMPLES, _MAX_CELLS // max(num_items)))
    for start in range(0, NUM_RESAMPLES, size):
        num = min(size, NUM_RESAMPLES - start)
        first = _drawn(random, num, num_items[0])
        yield first, first if is_paired else _drawn(random, num, num_items[1])


def _drawn(random: np.random.Generator, num_resamples: int, num_items: int) -> Counts:
    """[resamples, items] of as many draws with replacement as there are items."""
    draws = random.integers(0, num_items, (num_resamples, num_items))
    places = draws + num_items * np.arange(num_resamples)[:, None]
    counts = np.bincount(places.ravel(), minlength=num_resamples * num_items)
    return counts.reshape(num_resamples, num_items).astype(np.float64)


def once(num_items: int) -> Counts:
    """The items as they are: [1, items]."""
    return np.ones((1, num_items))
