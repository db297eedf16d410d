"""The numbers of a report: report.json, report.png, and the before/after table.

`before` is a split's first evaluation, `after` its last. Their change is taken item by item, so that easy and hard
items cancel out: its interval is narrower than the two intervals beside it suggest.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable
from statistics import fmean
from typing import Any

from rich.table import Table

from rft.files import finite
from rft.metrics import mean_ci95, stop_shares
from rft.report.figure import LABELS, Row, draw, label_of
from rft.salvage import metric_rows, number, salvaged
from rft.store import RunStore
from rft.tables import cell
from rft.types import Rollout, Split

SPLITS: tuple[Split, ...] = ("test", "validation")
PHASES = ("sampling", "training", "sync", "step")


def write_report(store: RunStore) -> dict[str, Any]:
    """Write report.json and report.png into the run folder; returns the report."""
    report = report_of(store)
    store.write_report("report.json", (json.dumps(report, indent=2, allow_nan=False) + "\n").encode())
    store.write_report("report.png", draw(store.run_id, metric_rows(store, "training"), evaluation_rows(store)))
    return report


def report_of(store: RunStore) -> dict[str, Any]:
    """What report.json holds. Of a folder that was cut off, or of another version, as much as can be read."""
    training, evaluations = metric_rows(store, "training"), evaluation_rows(store)
    report: dict[str, Any] = finite(
        {
            "run_id": store.run_id,
            "steps": max((row["step"] for row in training), default=0),
            "seconds": {phase: sum(number(row, f"time/{phase}_s") or 0.0 for row in training) for phase in PHASES},
            "splits": {split: _compare(store, split, evaluations[split]) for split in SPLITS if split in evaluations},
        }
    )
    return report


def evaluation_rows(store: RunStore) -> dict[str, list[Row]]:
    """The evaluations of every split that has some, by step."""
    found: dict[str, list[Row]] = defaultdict(list)
    for row in metric_rows(store, "evaluation"):
        found[row["split"]].append(row)
    return dict(found)


# --- before and after ------------------------------------------------------------------------------------------------


def _compare(store: RunStore, split: Split, rows: list[Row]) -> dict[str, Any]:
    before, after = rows[0], rows[-1]
    has_change = after["step"] > before["step"]
    changes = _changes(store, split, before["step"], after["step"]) if has_change else {}
    measures = {}
    for name in _measures(before):
        measure = {"before": number(before, name), "before_ci95": number(before, f"{name}_ci95")}
        if has_change:
            measure |= {"after": number(after, name), "after_ci95": number(after, f"{name}_ci95")}
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
    named = [name for name in row if name.startswith(("shadow/", "part/")) and not name.endswith("_ci95")]
    return sorted(named, key=lambda name: (name.startswith("part/"), name)) + [name for name in LABELS if name in row]


def _changes(store: RunStore, split: Split, before: int, after: int) -> dict[str, dict[str, float | None]]:
    """Per measure the mean change over the items that both evaluations graded, with its 95% interval."""
    olds, news = (_by_item(salvaged(store, step, split).rollouts) for step in (before, after))
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
        measured |= {f"part/{key}": score for key, score in rollout.grade.sub_scores.items()}
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
            numbers = [cell_of(measure, key) for key in ("before", "after", "change")]
            table.add_row(place, cell(label_of(name)), *numbers)
            place = ""
        for reason in dict.fromkeys(reason for shares in compared["stops"].values() for reason in shares):
            table.add_row("", cell(f"ended by {reason}"), *stop_cells(compared["stops"], reason))
        table.add_section()
    if not report["splits"]:
        table.add_row("-", "no split was evaluated", "-", "-", "-")
    return table


def stop_cells(stops: dict[str, dict[str, float]], reason: str) -> list[str]:
    """Shares before and after and their change; a reason that did not occur is a share of 0."""
    before, *after = [shares.get(reason, 0.0) for shares in stops.values()]
    return [f"{before:.3f}", *(f"{share:.3f}" for share in after), *(f"{share - before:+.3f}" for share in after)]


def cell_of(measure: dict[str, Any], key: str) -> str:
    """`before`, `after` or `change` of a measure with its interval, `-` where there is none."""
    value, half_width = measure.get(key), measure.get(f"{key}_ci95")
    if value is None:
        return "-"
    digits = 3 if abs(value) < 10 else 1
    number = f"{value:+.{digits}f}" if key == "change" else f"{value:.{digits}f}"
    return number if half_width is None else f"{number} ± {half_width:.{digits}f}"
