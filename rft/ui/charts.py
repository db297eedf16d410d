"""Which charts a run has, from the numbers of rft/metrics.py, rft/breakdown.py and rft/percentiles.py.

What an older run did not record is left out, line by line; a chart without any number is left out as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from rft.types import Split
from rft.ui.columns import Columns, Table
from rft.ui.schema import Chart, Charts, Series
from rft.ui.thinning import thinned

_SPLITS: tuple[Split, ...] = get_args(Split)
_MAX_LINES = 24  # of a chart: tools and error flags can have many names
_ENDS = ("_ci95",)


@dataclass(frozen=True, slots=True)
class _Source:
    """Rows of one kind; `prefix` is before the names of rft/metrics.py."""

    table: Table
    split: Split
    prefix: str

    def named(self, start: str) -> Iterator[tuple[str, str]]:
        """(column, what follows `start`) of every name that starts so, without intervals."""
        for column in sorted(self.table.values):
            name = column.removeprefix(self.prefix)
            if column.startswith(self.prefix) and name.startswith(start) and not name.endswith(_ENDS):
                yield column, name.removeprefix(start)


@dataclass(frozen=True, slots=True)
class _Pen:
    """Draws series with at most so many points."""

    points: int

    def line(
        self,
        source: _Source,
        column: str,
        name: str,
        *,
        bounds: tuple[str, str] | None = None,
        over: str = "",
    ) -> list[Series]:
        """One series, or none where nothing was recorded. `bounds`: columns; `over`: the column that divides it."""
        steps, values = source.table.series(column)
        if over:
            values = _divided(values, source.table.series(over)[1])
        if all(value != value for value in values):
            return []
        chosen = thinned(values, self.points)
        low, high = self._bounds(source, column, values, bounds)
        return [
            Series(
                name=name,
                split=source.split,
                x=[steps[index] for index in chosen],
                y=_picked(values, chosen),
                low=_picked(low, chosen) if low else None,
                high=_picked(high, chosen) if high else None,
            )
        ]

    def _bounds(
        self, source: _Source, column: str, values: list[float], bounds: tuple[str, str] | None
    ) -> tuple[list[float], list[float]]:
        """The columns that were named, else the 95% interval, else nothing."""
        if bounds is not None:
            return source.table.series(bounds[0])[1], source.table.series(bounds[1])[1]
        half_widths = source.table.series(f"{column}_ci95")[1]
        low = [value - half_width for value, half_width in zip(values, half_widths, strict=False)]
        return low, [value + half_width for value, half_width in zip(values, half_widths, strict=False)]


def build_charts(columns: Columns, points: int) -> Charts:
    """All charts of a run, each series with at most `points` points."""
    sources, pen = _sources(columns), _Pen(points)
    training = [source for source in sources if source.prefix]
    found = [
        *_measures(sources, pen),
        *_tools(sources, pen),
        *_errors(sources, pen),
        *_steps(training, pen),
        *_warmup(_Source(columns.table("warmup"), "train", ""), pen),
    ]
    return Charts(revision=columns.revision, charts=[chart for chart in found if chart.series])


def _sources(columns: Columns) -> list[_Source]:
    """Training first, then each split that was evaluated."""
    training = [_Source(columns.table(kind), "train", "train/") for kind in ("training", "sampling")]
    evaluated = [_Source(columns.table("evaluation", split), split, "") for split in _SPLITS]
    return [source for source in [*training, *evaluated] if source.table.steps]


def _measures(sources: Sequence[_Source], pen: _Pen) -> Iterator[Chart]:
    def mean(name: str, label: str) -> list[Series]:
        return [series for source in sources for series in pen.line(source, source.prefix + name, label)]

    def spread(name: str, label: str) -> list[Series]:
        """The median between the 10th and the 90th percentile."""
        found = []
        for source in sources:
            low, middle, high = (f"{source.prefix}{name}_{share}" for share in ("p10", "p50", "p90"))
            found += pen.line(source, middle, label, bounds=(low, high))
        return found

    def each(start: str) -> list[Series]:
        names = [(source, column, name) for source in sources for column, name in source.named(start)]
        return [series for source, column, name in names[:_MAX_LINES] for series in pen.line(source, column, name)]

    band = "The line is the median rollout of a step, the band goes from the 10th to the 90th percentile."
    interval = "The band is the 95% interval over items."
    yield _chart(
        "grade",
        "Grade",
        "",
        f"Mean grade per step; validation tells whether it generalises. {interval}",
        mean("grade", "grade"),
    )
    yield _chart(
        "parts", "Parts of the grade", "", "Mean score of each part of a multi grader, unweighted.", each("part/")
    )
    yield _chart(
        "shadow",
        "Shadow grades",
        "",
        "Logged and never optimised: when they fall while the grade rises, the grader is gamed.",
        each("shadow/"),
    )
    yield _chart(
        "valid_calls",
        "Rollouts with a valid call",
        "share",
        f"At least one call that its tool accepted. {interval}",
        mean("valid_call_share", "valid call"),
    )
    yield _chart(
        "tool_calls",
        "Tool calls per rollout",
        "calls",
        f"Mean over rollouts. {interval}",
        mean("tool_calls", "all tools"),
    )
    yield _chart(
        "tool_calls_spread", "Tool calls per rollout, distribution", "calls", band, spread("tool_calls", "all tools")
    )
    yield _chart("turns", "Turns per rollout", "turns", f"Mean over rollouts. {interval}", mean("turns", "turns"))
    yield _chart(
        "completion_tokens",
        "Completion tokens per rollout",
        "tokens",
        f"Sampled tokens, reasoning included. {interval}",
        mean("sampled_tokens", "completion"),
    )
    yield _chart(
        "completion_tokens_spread",
        "Completion tokens per rollout, distribution",
        "tokens",
        band,
        spread("sampled_tokens", "completion"),
    )
    yield _chart(
        "reasoning_tokens",
        "Reasoning tokens per rollout",
        "tokens",
        f"Of the sampled tokens, those inside <think>. {interval}",
        mean("reasoning_tokens", "reasoning"),
    )
    yield _chart(
        "reasoning_tokens_spread",
        "Reasoning tokens per rollout, distribution",
        "tokens",
        band,
        spread("reasoning_tokens", "reasoning"),
    )
    yield _chart(
        "latency",
        "Seconds per rollout",
        "s",
        f"From its first prompt to its grade. {band}",
        spread("duration_s", "rollout"),
    )
    yield _chart(
        "latency_mean",
        "Seconds per rollout, mean",
        "s",
        f"{interval}",
        [*mean("duration_s", "rollout"), *mean("tool_latency_s", "of it, tools")],
    )


def _tools(sources: Sequence[_Source], pen: _Pen) -> Iterator[Chart]:
    mean: list[Series] = []
    calls: list[Series] = []
    seconds: list[Series] = []
    for source in sources:
        for column, tool in list(source.named("tool_num/"))[:_MAX_LINES]:
            mean += pen.line(source, column, tool, over=f"{source.prefix}num_rollouts")
        for found, name in ((calls, "tool_calls"), (seconds, "tool_call_s")):
            for column, tool in list(source.named(f"{name}_p50/"))[:_MAX_LINES]:
                bounds = (f"{source.prefix}{name}_p10/{tool}", f"{source.prefix}{name}_p90/{tool}")
                found += pen.line(source, column, tool, bounds=bounds)
    band = "The line is the median, the band goes from the 10th to the 90th percentile."
    yield _chart("calls_by_tool", "Tool calls per rollout by tool", "calls", "Mean over all rollouts of a step.", mean)
    yield _chart(
        "calls_by_tool_spread", "Tool calls per rollout by tool, distribution", "calls", f"Over rollouts. {band}", calls
    )
    yield _chart("tool_latency", "Seconds per tool call", "s", f"Over calls. {band}", seconds)


def _errors(sources: Sequence[_Source], pen: _Pen) -> Iterator[Chart]:
    counts = {
        "num_discarded": "discarded rollouts",
        "grader_errors": "grades with an error",
        "grader/shadow_errors": "failed shadow grades",
        "unknown_tool_calls": "calls of unknown tools",
    }
    errors: list[Series] = []
    stops: list[Series] = []
    for source in sources:
        for name, label in counts.items():
            errors += _unless_zero(pen.line(source, source.prefix + name, label))
        for start, label in (("tool_errors/", "failed calls of"), ("grader_error/", "grader:")):
            for column, name in list(source.named(start))[:_MAX_LINES]:
                errors += _unless_zero(pen.line(source, column, f"{label} {name}"))
        if source.split == "train":
            for column, name in source.named("stop/"):
                stops += pen.line(source, column, name)
    yield _chart("errors", "Errors by kind", "per step", "Counts per step; what never happened is left out.", errors)
    help_text = "Share of the rollouts of a training step by why they ended; discarded ones are replaced."
    yield _chart("stops", "Why rollouts ended", "share", help_text, stops, "stacked")


def _steps(training: Sequence[_Source], pen: _Pen) -> Iterator[Chart]:
    def of(columns: dict[str, str]) -> list[Series]:
        return [
            line for source in training for column, name in columns.items() for line in pen.line(source, column, name)
        ]

    useful: list[Series] = []
    for source in training:
        for line in pen.line(source, "groups/no_signal", "useful", over="groups/total"):
            useful.append(line.model_copy(update={"y": [None if y is None else round(1 - y, 6) for y in line.y]}))
    phases = {f"time/{phase}_s": phase for phase in ("sampling", "training", "sync")}
    yield _chart(
        "useful_groups", "Useful groups", "share", "Groups whose grades differ; the others teach nothing.", useful
    )
    yield _chart("phases", "Seconds per phase", "s", "What a step's time went into.", of(phases), "stacked")
    yield _chart(
        "entropy",
        "Entropy",
        "nats",
        "Of the sampled distributions; near 0 the policy has stopped exploring.",
        of({"update/entropy": "entropy"}),
    )
    yield _chart(
        "loss", "Loss", "", "Of the policy; its level says little, a jump says a lot.", of({"update/loss": "loss"})
    )
    yield _chart("grad_norm", "Gradient norm", "", "Before clipping.", of({"update/grad_norm": "norm"}))
    yield _chart(
        "clip_share",
        "Clipped tokens",
        "share",
        "Tokens whose gradient the clip removed.",
        of({"update/clip_share": "clipped"}),
    )
    kl = {"update/approx_kl": "to the sampler", "update/reference_kl": "to the reference"}
    yield _chart(
        "kl", "KL divergence", "nats", "How far the policy is from who sampled, and from the reference model.", of(kl)
    )
    gaps = {"logprob_gap/mean": "engine and trainer", "probe/mean": "probe after sync"}
    yield _chart("logprob_gap", "Log-probability gap", "nats", "Mean |difference|; it should stay near 0.", of(gaps))
    yield _chart(
        "staleness",
        "Staleness",
        "steps",
        "How far the sampling weights were behind.",
        of({"staleness/mean": "mean", "staleness/max": "max"}),
    )
    yield _chart(
        "learning_rate", "Learning rate", "", "As the schedule set it.", of({"update/learning_rate": "learning rate"})
    )


def _warmup(source: _Source, pen: _Pen) -> Iterator[Chart]:
    found = [*pen.line(source, "update/loss", "training"), *pen.line(source, "held_out/loss", "held out")]
    yield _chart("warmup_loss", "Loss of the warm-up", "nats", "Per token of the demonstrations.", found)


def _chart(
    id: str, title: str, unit: str, help: str, series: list[Series], kind: Literal["lines", "stacked"] = "lines"
) -> Chart:
    return Chart(id=id, title=title, unit=unit, help=help, kind=kind, series=series)


def _unless_zero(series: list[Series]) -> list[Series]:
    return [line for line in series if any(line.y)]


def _divided(values: list[float], by: list[float]) -> list[float]:
    """NaN where there is nothing to divide by."""
    return [value / total if total else float("nan") for value, total in zip(values, by, strict=False)]


def _picked(values: Sequence[float], chosen: Sequence[int]) -> list[float | None]:
    """Those values to six digits; null for what is missing."""
    picked = (values[index] if index < len(values) else float("nan") for index in chosen)
    return [float(f"{value:.6g}") if value - value == 0 else None for value in picked]
