"""A curve in one line of text."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

_BLOCKS = "▁▂▃▄▅▆▇█"
_MAX_POINTS = 48


def sparkline(values: Sequence[float], low: float, high: float) -> str:
    """One block per value, from `low` to `high`; all in the middle where these are equal."""
    if high <= low:
        return _BLOCKS[3] * len(values)
    scaled = [(min(max(value, low), high) - low) / (high - low) for value in values]
    return "".join(_BLOCKS[min(int(part * len(_BLOCKS)), len(_BLOCKS) - 1)] for part in scaled)


def thinned(values: Sequence[float], max_points: int = _MAX_POINTS) -> list[float]:
    """At most so many values: neighbours become their mean; the first and the last stay as they are."""
    size = -(-len(values) // max_points)
    if size <= 1:
        return list(values)
    means = [fmean(values[start : start + size]) for start in range(0, len(values), size)]
    return [values[0], *means[1:-1], values[-1]]
