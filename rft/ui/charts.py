"""The charts of rft/ui/plans.py, drawn from a run's numbers, with few enough points for a page.

What an older run did not record is left out, line by line; a chart without any number is left out as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

from rft.types import Split
from rft.ui.columns import NAN, Columns, Table
from rft.ui.plans import PLANS, Line, Plan
from rft.ui.schema import Chart, Charts, Series
from rft.ui.thinning import thinned

_SPLITS: tuple[Split, ...] = get_args(Split)
_MAX_LINES = 24  # that one beginning of a name gives: tools and error flags can have many
_MAX_LABEL = 100


@dataclass(frozen=True, slots=True)
class _Source:
    """Rows of one kind; `prefix` is before the names of rft/metrics.py."""

    table: Table
    split: Split
    prefix: str

    def columns(self, line: Line) -> list[tuple[str, str]]:
        """(column, label) of every line that is drawn. Of percentiles the column is the median's."""
        start = self.prefix + line.name.replace("{}", "p50")
        if not line.name.endswith("/"):
            return [(start, line.label)]
        found = [name for name in sorted(self.table.values) if name.startswith(start) and not name.endswith("_ci95")]
        return [(name, f"{line.label} {name.removeprefix(start)}".strip()[:_MAX_LABEL]) for name in found[:_MAX_LINES]]

    def values(self, column: str, over: str = "") -> list[float]:
        """By step; divided by another column where one is named, NaN where that is 0."""
        values = self.table.series(column)[1]
        if not over:
            return values
        totals = self.table.series(self.prefix + over)[1] or [NAN] * len(values)
        return [value / total if total else NAN for value, total in zip(values, totals, strict=True)]

    def bounds(self, line: Line, column: str, values: list[float]) -> tuple[list[float], list[float]]:
        """The 10th and 90th percentiles, or the ends of the 95% interval; empty where there is neither."""
        if "{}" in line.name:
            low, high = (column.replace("_p50", f"_{share}", 1) for share in ("p10", "p90"))
            return self.values(low), self.values(high)
        half_widths = [] if line.over else self.values(f"{column}_ci95")
        pairs = list(zip(values, half_widths, strict=False))
        return [value - half_width for value, half_width in pairs], [value + half_width for value, half_width in pairs]


def build_charts(columns: Columns, points: int) -> Charts:
    """All charts of a run, each series with at most `points` points."""
    rollouts = [_Source(columns.table(kind), "train", "train/") for kind in ("training", "sampling")]
    rollouts += [_Source(columns.table("evaluation", split), split, "") for split in _SPLITS]
    rollouts = [source for source in rollouts if source.table.steps]
    trained = [source for source in rollouts if source.prefix]
    sources = {
        "all": rollouts,
        "train": trained,
        "step": [_Source(source.table, "train", "") for source in trained],
        "warmup": [_Source(columns.table("warmup"), "train", "")],
    }
    found = [_chart(plan, sources[plan.rows], points) for plan in PLANS]
    return Charts(revision=columns.revision, charts=[chart for chart in found if chart.series])


def _chart(plan: Plan, sources: Sequence[_Source], points: int) -> Chart:
    series = [line for source in sources for line in _lines(plan, source, points)]
    return Chart(id=plan.id, title=plan.title, unit=plan.unit, help=plan.help, kind=plan.kind, series=series)


def _lines(plan: Plan, source: _Source, points: int) -> Iterator[Series]:
    for line in plan.lines:
        for column, label in source.columns(line):
            values = source.values(column, line.over)
            if line.is_complement:
                values = [1 - value for value in values]
            if any(value == value and (value != 0 or not plan.hides_zero) for value in values):
                yield _series(source, line, column, label, values, points)


def _series(source: _Source, line: Line, column: str, label: str, values: list[float], points: int) -> Series:
    chosen, steps = thinned(values, points), source.table.series(column)[0]
    low, high = source.bounds(line, column, values)
    return Series(
        name=label,
        split=source.split,
        x=[steps[index] for index in chosen],
        y=_picked(values, chosen),
        low=_picked(low, chosen) if low else None,
        high=_picked(high, chosen) if high else None,
    )


def _picked(values: Sequence[float], chosen: Sequence[int]) -> list[float | None]:
    """Those values to six digits; null for what is missing or not finite."""
    return [float(f"{values[index]:.6g}") if values[index] - values[index] == 0 else None for index in chosen]
