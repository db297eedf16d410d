"""Fewer points for a chart, so that every peak and every dip stays: the least and the most of each stretch of steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise


def thinned(values: Sequence[float], max_points: int) -> list[int]:
    """Indexes to draw, ascending: all, or of each of max_points / 2 stretches its minimum and its maximum.

    The first and the last point stay. NaN is a gap: a stretch of nothing else gives one index.
    """
    if len(values) <= max_points:
        return list(range(len(values)))
    num_stretches = max(1, (max_points - 2) // 2)
    bounds = [len(values) * number // num_stretches for number in range(num_stretches + 1)]
    found = {0, len(values) - 1}
    for start, end in pairwise(bounds):
        found.update(_extremes(values, start, end))
    return sorted(found)


def _extremes(values: Sequence[float], start: int, end: int) -> tuple[int, ...]:
    stretch = values[start:end]
    if not math.isnan(sum(stretch)):  # the fast way, which NaN would lead astray
        return start + stretch.index(min(stretch)), start + stretch.index(max(stretch))
    known = [index for index in range(start, end) if values[index] == values[index]]
    if not known:
        return (start,)
    return min(known, key=values.__getitem__), max(known, key=values.__getitem__)
