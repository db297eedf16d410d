"""The grades of a run over its steps, each split as one line of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any, get_args

from rft.salvage import number
from rft.types import Split

Rows = Sequence[dict[str, Any]]

_BLOCKS = "▁▂▃▄▅▆▇█"
_MAX_POINTS = 48


def grade_curves(training: Rows, evaluations: Rows) -> dict[str, list[float]]:
    """The grades over the steps, `train` and each evaluated split, thinned to what a line can show."""
    curves: dict[str, list[float | None]] = {}
    for row in training:
        curves.setdefault("train", []).append(number(row, "train/grade"))
    for row in evaluations:
        curves.setdefault(row["split"], []).append(number(row, "grade"))
    known = {split: [value for value in curves.get(split, []) if value is not None] for split in get_args(Split)}
    return {split: thinned(values) for split, values in known.items() if values}


def curve_lines(curves: dict[str, list[float]]) -> Iterator[str]:
    """A line per split: its grades as blocks on one scale, the first and the last as numbers."""
    low, high = (end([value for values in curves.values() for value in values], default=0.0) for end in (min, max))
    for split, values in curves.items():
        yield f"grade, {split + ':':<11} {sparkline(values, low, high)}  {values[0]:.3f} → {values[-1]:.3f}"


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
