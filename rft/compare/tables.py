"""A comparison on a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from rft.compare.result import Change, Comparison, MeasureLine, Pairing, Value
from rft.tables import cell, new_table

_NUM_ITEMS = 5  # of the wins and of the losses
_MAX_LABEL = 60  # characters
_STYLES = {"better": "green", "worse": "red", "": ""}


def tables(comparison: Comparison, *, is_boxed: bool) -> Iterator[RenderableType]:
    """What is compared, the measures, and for every pair of sides the items that changed most."""
    yield cell(headline(comparison), style="bold")
    yield _measures(comparison, is_boxed)
    yield cell(
        f"95% bootstrap intervals over items. Passing is a grade of {comparison.pass_at:g}"
        f" ({comparison.pass_at_source}), slow is above {comparison.slow_s:.3g} s ({comparison.slow_s_source})."
    )
    if zeros := all_zero(comparison):
        yield cell(f"0 on all sides: {', '.join(line.label for line in zeros)}")
    for side in comparison.sides:
        for problem in side.problems:
            yield cell(f"{side.label}: {problem}", style="yellow")
    for pairing in comparison.pairings:
        yield from _items(comparison, pairing, is_boxed)


def headline(comparison: Comparison) -> str:
    """What is compared, in one line."""
    sizes = {side.num_items for side in comparison.sides}
    num_shared = min(pairing.num_shared for pairing in comparison.pairings)
    num_items = f"{num_shared} items" if sizes == {num_shared} else f"{num_shared} items in common"
    first, *others = [side.label for side in comparison.sides]
    return f"{', '.join(others)} against {first} on {comparison.split}, {num_items}"


def all_zero(comparison: Comparison) -> list[MeasureLine]:
    """Measures that are 0 everywhere: worth a word, not a row."""
    return [line for line in comparison.measures if not any(value.mean for value in line.sides)]


def number(value: float | None, *, is_signed: bool = False, like: float | None = None) -> str:
    """With three digits behind the point, one from 10 on (or from where `like` is so large); `-` for no number."""
    if value is None:
        return "-"
    digits = 3 if abs(value if like is None else like) < 10 else 1
    return f"{value:+.{digits}f}" if is_signed else f"{value:.{digits}f}"


def between(value: Value, *, is_signed: bool = False) -> str:
    """The interval as `[low, high]`, "" without one."""
    if value.low is None:
        return ""
    low, high = (number(bound, is_signed=is_signed, like=value.mean) for bound in (value.low, value.high))
    return f"[{low}, {high}]"


def verdict(line: MeasureLine, change: Change) -> str:
    """`better`, `worse`, or "" where the interval holds 0 or neither way is better."""
    if line.better is None or not change.is_sure or change.mean is None:
        return ""
    return "better" if (change.mean > 0) == (line.better == "higher") else "worse"


def _measures(comparison: Comparison, is_boxed: bool) -> Table:
    first, *others = [side.label for side in comparison.sides]
    headings = [part for label in others for part in (label, "change", "95%", "")]
    table = new_table("measure", first, *headings, left=("measure", "95%", ""), is_boxed=is_boxed)
    zeros, section = all_zero(comparison), None
    for line in comparison.measures:
        if line in zeros:
            continue
        if section not in (None, line.section):
            table.add_section()
        section = line.section
        cells: list[Text] = [cell(line.label, max_chars=_MAX_LABEL), cell(number(line.sides[0].mean))]
        for value, change in zip(line.sides[1:], line.changes, strict=True):
            said = verdict(line, change)
            style = _STYLES[said]
            cells += [cell(number(value.mean)), cell(number(change.mean, is_signed=True), style=style)]
            cells += [cell(between(change, is_signed=True)), cell(said, style=style)]
        table.add_row(*cells)
    return table


def _items(comparison: Comparison, pairing: Pairing, is_boxed: bool) -> Iterator[RenderableType]:
    first = comparison.sides[0]
    other = next(side for side in comparison.sides if side.label == pairing.label)
    yield Text()
    for note in pairing.notes:
        yield cell(f"{pairing.label}: {note}", style="yellow")
    if not pairing.is_paired:
        return
    yield cell(
        f"{pairing.label} against {first.label}: {pairing.wins} items won, {pairing.losses} lost, {pairing.ties} tied",
        style="bold",
    )
    table = new_table("item", "grade", "tool calls", "rollouts", left=("item", "rollouts"), is_boxed=is_boxed)
    changed = {"win": 0, "loss": 0}
    for line in pairing.items:
        if line.outcome == "tie" or changed[line.outcome] >= _NUM_ITEMS:
            continue
        changed[line.outcome] += 1
        style = "green" if line.outcome == "win" else "red"
        table.add_row(
            cell(line.item_id, max_chars=_MAX_LABEL),
            cell(f"{number(line.first.grade)} → {number(line.other.grade)}", style=style),
            cell(f"{line.first.tool_calls:.1f} → {line.other.tool_calls:.1f}"),
            cell(f"{line.first.rollout_ids[0]} {line.other.rollout_ids[0]}"),
        )
    if table.row_count:
        yield table
        paths = " or ".join(dict.fromkeys((first.path, other.path)))
        yield cell(f"see one with: rft show {paths} ROLLOUT")
