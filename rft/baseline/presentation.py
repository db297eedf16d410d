"""A baseline as a person reads it: a table with the verdict, and baseline.json and baseline.png in the run folder."""

from __future__ import annotations

from rich.console import Group, RenderableType

from rft.baseline.numbers import Baseline, Spread
from rft.figures import COLOURS, finish, new_figure, png
from rft.plain import plain
from rft.store import RunStore
from rft.tables import cell, new_table

_MAX_NAMED = 40  # items whose names still fit below the axis


def write_baseline(store: RunStore, baseline: Baseline) -> None:
    """Write baseline.json and baseline.png. Raises StorageError."""
    store.write_report("baseline.json", (baseline.model_dump_json(indent=2) + "\n").encode())
    store.write_report("baseline.png", draw(baseline))


def table(baseline: Baseline, *, is_boxed: bool) -> RenderableType:
    """The numbers, then the verdict with its cure."""
    title = f"{baseline.label}, {baseline.split}: {baseline.num_items} items, {baseline.num_rollouts} rollouts"
    rows = new_table("measure", "", left=["measure"], is_boxed=is_boxed)
    for name, value in _rows(baseline):
        rows.add_row(cell(name), cell(value))
    advice = baseline.advice
    lines = [cell(f"verdict: {advice.sentence}", style="bold"), cell(f"  next: {advice.cure}")]
    if advice.rollouts_per_item is not None:
        sampling = f"{advice.rollouts_per_item} rollouts per item: training.compute_multiplier="
        lines.append(cell(f"  recommended: {sampling}{advice.compute_multiplier:g}"))
    problems = [cell(f"  {problem}", style="yellow") for problem in baseline.problems]
    return Group(cell(title), rows, *lines, *problems)


def _rows(baseline: Baseline) -> list[tuple[str, str]]:
    rows = [
        ("grade, mean over items", f"{baseline.mean:.3f}"),
        ("standard deviation within an item", f"{baseline.deviation:.3f}"),
        ("best rollout of an item", f"{baseline.maximum:.3f}"),
        ("headroom (best - mean)", f"{baseline.headroom:.3f}"),
        ("items whose grades vary", f"{baseline.varied:.0%}"),
        (f"items without variance: all {baseline.lowest:g}", f"{baseline.all_lowest:.0%}"),
        (f"items without variance: all {baseline.highest:g}", f"{baseline.all_highest:.0%}"),
        ("items without variance: equal in between", f"{baseline.all_equal_between:.0%}"),
    ]
    for one in baseline.useless:
        rows.append((f"P(useless group), {one.num_rollouts} rollouts, {one.estimator}", f"{one.chance:.3f}"))
    if baseline.valid_call_share is not None:
        rows.append(("rollouts with a valid call", f"{baseline.valid_call_share:.0%}"))
        rows.append(("malformed calls", f"{baseline.malformed_share:.0%}"))
    rows.append(("rollouts that met a limit", f"{baseline.truncated_share:.0%}"))
    spreads = {
        "tool calls": baseline.tool_calls,
        "sampled tokens": baseline.sampled_tokens,
        "reasoning tokens": baseline.reasoning_tokens,
        "seconds": baseline.duration_s,
        "seconds in tools": baseline.tool_latency_s,
    }
    rows += [(f"{name}: mean, p50, p95", _three(spread)) for name, spread in spreads.items()]
    if baseline.num_discarded:
        rows.append(("discarded rollouts", str(baseline.num_discarded)))
    return rows


def _three(spread: Spread) -> str:
    digits = 0 if spread.mean >= 100 else 2
    return "  ".join(f"{value:.{digits}f}" for value in (spread.mean, spread.p50, spread.p95))


def draw(baseline: Baseline) -> bytes:
    """A PNG: the items in order of their mean grade, each with its standard deviation and its best rollout."""
    items = sorted(baseline.items, key=lambda item: (item.mean, item.maximum))
    figure, (panel,) = new_figure(10, 4.8)
    places = range(1, len(items) + 1)
    panel.errorbar(
        *(places, [item.mean for item in items], [item.deviation for item in items]), fmt="o", color=COLOURS[0],
        markersize=4, elinewidth=1.2, capsize=2, label="mean ± standard deviation",
    )  # fmt: skip
    panel.plot(
        places, [item.maximum for item in items], "D", color=COLOURS[1], markersize=4, fillstyle="none", label="best"
    )
    title = f"{baseline.label}, {baseline.split} split. Verdict: {baseline.advice.verdict}"
    finish(panel, plain(title), "items, by mean grade", "grade")
    if len(items) <= _MAX_NAMED:
        names = [plain(item.item_id, max_chars=24) for item in items]
        panel.set_xticks(list(places), names, rotation=90, fontsize=6, parse_math=False)
    panel.set_ylim(bottom=min(baseline.lowest, panel.get_ylim()[0]), top=max(baseline.highest * 1.05, 0.1))
    return png(figure)
