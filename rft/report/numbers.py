"""The report of a run: report.json and report.png from the run folder alone, and the before/after table.

`before` is a split's first evaluation, `after` its last. Their change is taken item by item, so that easy and hard
items cancel out: its interval is narrower than the two intervals beside it suggest.
"""

from __future__ import annotations

import io
import json
import math
from collections import defaultdict
from collections.abc import Iterable
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rich.table import Table

from rft.metrics import mean_ci95, stop_shares
from rft.store import RunStore
from rft.types import Rollout, Split

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["final_table", "mean_ci95", "write_report"]

SPLITS: tuple[Split, ...] = ("test", "validation")
LABELS = {
    "grade": "grade",
    "valid_call_share": "rollouts with a valid call",
    "tool_calls": "tool calls per rollout",
    "sampled_tokens": "sampled tokens per rollout",
}
PHASES = ("sampling", "training", "sync", "step")
# Okabe and Ito's colours, told apart by colour-blind readers
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
Row = dict[str, Any]


def write_report(store: RunStore) -> dict[str, Any]:
    """Write report.json and report.png into the run folder; returns the report."""
    training, evaluations = _training_rows(store), _evaluation_rows(store)
    report = {
        "run_id": store.run_id,
        "steps": max(training, default=0),
        "seconds": {phase: sum(row.get(f"time/{phase}_s") or 0.0 for row in training.values()) for phase in PHASES},
        "splits": {split: _compare(store, split, evaluations[split]) for split in SPLITS if evaluations[split]},
    }
    store.write_report("report.json", (json.dumps(report, indent=2, allow_nan=False) + "\n").encode())
    store.write_report("report.png", draw(store.run_id, list(training.values()), evaluations))
    return report


def _training_rows(store: RunStore) -> dict[int, Row]:
    """The row of every step, in order; of a step that was made again, the last."""
    rows = {row["step"]: row for row in store.metrics() if row.get("kind") == "training"}
    return dict(sorted(rows.items()))


def _evaluation_rows(store: RunStore) -> dict[str, list[Row]]:
    rows = [row for row in store.metrics() if row.get("kind") == "evaluation"]
    by_place = {(row["split"], row["step"]): row for row in rows}
    found: dict[str, list[Row]] = defaultdict(list)
    for (split, _), row in sorted(by_place.items()):
        found[split].append(row)
    return found


# --- before and after ------------------------------------------------------------------------------------------------


def _compare(store: RunStore, split: Split, rows: list[Row]) -> dict[str, Any]:
    before, after = rows[0], rows[-1]
    has_change = after["step"] > before["step"]
    changes = _changes(store, split, before["step"], after["step"]) if has_change else {}
    measures = {}
    for name in _measures(before):
        measure = {"before": before.get(name), "before_ci95": before.get(f"{name}_ci95")}
        if has_change:
            measure |= {"after": after.get(name), "after_ci95": after.get(f"{name}_ci95")}
            measure |= changes.get(name, {})
        measures[name] = measure
    facts = {name: after.get(name) for name in ("num_items", "num_rollouts")}
    stops = {"before": stop_shares(before)} | ({"after": stop_shares(after)} if has_change else {})
    return {
        "before_step": before["step"],
        "after_step": after["step"],
        **facts,
        "measures": measures,
        "stops": stops,
    }


def _measures(row: Row) -> list[str]:
    """The shadow grades, which nothing optimised, come first."""
    shadows = [name for name in row if name.startswith("shadow/") and not name.endswith("_ci95")]
    return sorted(shadows) + [name for name in LABELS if name in row]


def _changes(store: RunStore, split: Split, before: int, after: int) -> dict[str, dict[str, float | None]]:
    """Per measure the mean change over the items that both evaluations graded, with its 95% interval."""
    olds, news = (_by_item(store.rollouts(step, split)) for step in (before, after))
    changes = {}
    for name in olds.keys() & news.keys():
        old, new = olds[name], news[name]
        mean, half_width = mean_ci95(
            [[fmean(new[item]) - fmean(old[item])] for item in sorted(old.keys() & new.keys())]
        )
        changes[name] = {"change": _finite(mean), "change_ci95": _finite(half_width)}
    return changes


def _by_item(rollouts: Iterable[Rollout]) -> dict[str, dict[str, list[float]]]:
    """measure -> item -> values; rollouts without a grade were discarded and count nowhere."""
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for rollout in rollouts:
        if rollout.grade is None:
            continue
        measured = {f"shadow/{name}": score for name, score in rollout.grade.shadow.items()}
        measured |= {"grade": rollout.grade.score, "valid_call_share": float(rollout.has_valid_call)}
        measured |= {"tool_calls": len(rollout.tool_calls), "sampled_tokens": rollout.num_sampled_tokens}
        for name, value in measured.items():
            values[name][rollout.item_id].append(value)
    return values


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def final_table(report: dict[str, Any]) -> Table:
    """Before and after, for the test and the validation split, with 95% intervals over items."""
    table = Table(title=f"{report['run_id']}: before and after {report['steps']} steps", caption="± 95% over items")
    for heading in ("split", "measure"):
        table.add_column(heading)
    for heading in ("before", "after", "change"):
        table.add_column(heading, justify="right")
    for split, compared in report["splits"].items():
        place = f"{split} ({compared['num_items']} items, steps {compared['before_step']} and {compared['after_step']})"
        for name, measure in compared["measures"].items():
            table.add_row(place, _label(name), *(_cell(measure, key) for key in ("before", "after", "change")))
            place = ""
        for reason in dict.fromkeys(reason for shares in compared["stops"].values() for reason in shares):
            table.add_row("", f"ended by {reason}", *_stop_cells(compared["stops"], reason))
        table.add_section()
    if not report["splits"]:
        table.add_row("-", "no split was evaluated", "-", "-", "-")
    return table


def _stop_cells(stops: dict[str, dict[str, float]], reason: str) -> list[str]:
    """Shares before and after and their change; a reason that did not occur is a share of 0."""
    before, *after = [shares.get(reason, 0.0) for shares in stops.values()]
    return [f"{before:.3f}", *(f"{share:.3f}" for share in after), *(f"{share - before:+.3f}" for share in after)]


def _label(name: str) -> str:
    return LABELS.get(name, f"{name.removeprefix('shadow/')} (shadow grade)")


def _cell(measure: dict[str, Any], key: str) -> str:
    value, half_width = measure.get(key), measure.get(f"{key}_ci95")
    if value is None:
        return "-"
    digits = 3 if abs(value) < 10 else 1
    number = f"{value:+.{digits}f}" if key == "change" else f"{value:.{digits}f}"
    return number if half_width is None else f"{number} ± {half_width:.{digits}f}"


# --- the figure ------------------------------------------------------------------------------------------------------


def draw(title: str, training: list[Row], evaluations: dict[str, list[Row]]) -> bytes:
    """A PNG of four small panels over steps. Colour says which measure, shape which split."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12)
    rows = evaluations.get("validation") or evaluations.get("test") or training
    shadows = sorted({_measure_of(name) for row in [*rows, *training] for name in row if _is_shadow(name)})
    for panel, (name, label) in zip(figure.subplots(2, 2).flat, LABELS.items(), strict=True):
        names = [name, *shadows] if name == "grade" else [name]
        for measure, colour in zip(names, COLOURS, strict=False):
            _draw_measure(panel, measure, colour, training, evaluations)
        _finish_panel(panel, label, has_legend=name == "grade")
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
    return png.getvalue()


def _is_shadow(name: str) -> bool:
    return _measure_of(name).startswith("shadow/") and not name.endswith("_ci95")


def _measure_of(name: str) -> str:
    return name.removeprefix("train/")


def _draw_measure(panel: Axes, name: str, colour: str, training: list[Row], evaluations: dict[str, list[Row]]) -> None:
    label = _label(name) if name.startswith("shadow/") else name.split("_")[0]
    points = [(row["step"], row[f"train/{name}"]) for row in training if row.get(f"train/{name}") is not None]
    if points:
        width = 1.8 if name in LABELS else 1.0
        panel.plot(*zip(*points, strict=True), color=colour, linewidth=width, alpha=0.75, label=f"{label}, training")
    for split, marker, face, size in (("validation", "o", colour, 5), ("test", "D", "none", 8)):
        rows = [row for row in evaluations.get(split, []) if row.get(name) is not None]
        if rows:
            steps, means = [row["step"] for row in rows], [row[name] for row in rows]
            bars = [row.get(f"{name}_ci95") or 0.0 for row in rows]
            panel.errorbar(
                *(steps, means, bars), fmt=marker, color=colour, markerfacecolor=face, markersize=size,
                capsize=3, elinewidth=1.2, label=f"{label}, {split} ± 95%", zorder=3,
            )  # fmt: skip


def _finish_panel(panel: Axes, label: str, *, has_legend: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    panel.set_title(label, fontsize=10, loc="left")
    panel.set_ylabel(
        {"grade": "mean grade", "rollouts with a valid call": "share"}.get(label, "mean number"), fontsize=9
    )
    panel.set_xlabel("step", fontsize=9)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.tick_params(labelsize=8)
    panel.grid(axis="y", color="#DDDDDD", linewidth=0.7)
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_ylim(bottom=min(0.0, panel.get_ylim()[0]))
    if has_legend and panel.get_legend_handles_labels()[0]:
        panel.legend(fontsize=7, frameon=False)
