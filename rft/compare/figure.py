"""The figures of a comparison: means with intervals, changes by item, and grade against tool calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from rft.compare.result import Comparison, ItemLine, Pairing
from rft.figures import COLOURS, GRID, INK, MUTED, PAGE_SIZE, finish, name_of, new_figure, png, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MAX_ROWS = 10  # measures in the panel of means
_CORNERS = {  # (more calls, better) -> what such items are, and where that is written
    (True, True): ("better with more calls", 0.98, 0.97, "right", "top"),
    (False, True): ("better with fewer calls", 0.02, 0.97, "left", "top"),
    (True, False): ("worse with more calls", 0.98, 0.03, "right", "bottom"),
    (False, False): ("worse with fewer calls", 0.02, 0.03, "left", "bottom"),
}


def draw_png(comparison: Comparison) -> bytes:
    """All panels side by side."""
    panels = _panels(comparison)
    figure, axes = new_figure(5 * len(panels), 4.4, columns=len(panels))
    for axis, (draw, _, _) in zip(axes, panels, strict=True):
        draw(axis, comparison)
    return png(figure)


def draw_svgs(comparison: Comparison) -> list[str]:
    """Each panel as an element of a page."""
    found = []
    for draw, name, described in _panels(comparison):
        figure, (panel,) = new_figure(*PAGE_SIZE)
        draw(panel, comparison)
        found.append(svg(figure, name, described))
    return found


def _panels(comparison: Comparison) -> list[tuple[Callable[[Axes, Comparison], None], str, str]]:
    means = (_draw_means, "means", "Means of each side with 95% intervals; the table below has the numbers")
    if not any(pairing.items for pairing in comparison.pairings):
        return [means]
    return [
        means,
        (_draw_changes, "changes", "The change of the grade of every item, the largest gain first"),
        (_draw_quadrants, "quadrants", "For every item the change of its grade against the change of its tool calls"),
    ]


def _draw_means(panel: Axes, comparison: Comparison) -> None:
    lines = [line for line in comparison.measures if line.section == "grades"][:_MAX_ROWS]
    height = 0.7 / len(comparison.sides)
    for number, side in enumerate(comparison.sides):
        offset = (number - (len(comparison.sides) - 1) / 2) * height
        for row, line in enumerate(lines):
            value = line.sides[number]
            if value.mean is None:
                continue
            look = {"color": COLOURS[number % len(COLOURS)], "label": name_of(side.label) if row == 0 else None}
            low, high = (value.mean, value.mean) if value.low is None or value.high is None else (value.low, value.high)
            panel.barh(row + offset, value.mean, height=height * 0.86, alpha=0.85, **look)  # type: ignore[arg-type]
            panel.plot([low, high], [row + offset] * 2, color=INK, linewidth=1.3, solid_capstyle="round")
    panel.set_yticks(range(len(lines)), [name_of(line.label) for line in lines])
    panel.invert_yaxis()
    finish(panel, f"means on {comparison.split}, with 95% intervals", "mean over items")
    panel.grid(visible=False, axis="y")
    panel.grid(axis="x", color=GRID, linewidth=0.7)
    panel.axvline(0, color=MUTED, linewidth=0.8)


def _draw_changes(panel: Axes, comparison: Comparison) -> None:
    for number, pairing in enumerate(comparison.pairings, 1):
        changes = sorted((_grade_change(line) for line in pairing.items), reverse=True)
        if not changes:
            continue
        colour = COLOURS[number % len(COLOURS)]
        panel.fill_between(range(len(changes)), changes, step="mid", alpha=0.25, color=colour, linewidth=0)
        label = f"{name_of(pairing.label)}: {pairing.wins} won, {pairing.losses} lost, {pairing.ties} tied"
        panel.step(range(len(changes)), changes, where="mid", color=colour, linewidth=1.8, label=label)
    panel.axhline(0, color=MUTED, linewidth=0.9)
    finish(
        panel, f"change by item, against {name_of(comparison.sides[0].label)}", "items, sorted", "change of the grade"
    )


def _draw_quadrants(panel: Axes, comparison: Comparison) -> None:
    for number, pairing in enumerate(comparison.pairings, 1):
        points = Counter((round(_call_change(line), 2), round(_grade_change(line), 2)) for line in pairing.items)
        if points:
            x, y = zip(*points, strict=True)
            panel.scatter(
                x, y, s=[16 + 12 * num for num in points.values()], color=COLOURS[number % len(COLOURS)], alpha=0.55,
                linewidth=0, label=name_of(pairing.label) if len(comparison.pairings) > 1 else None, zorder=3,
            )  # fmt: skip
    reach_x, reach_y = (1.35 * max(0.1, *map(abs, limits)) for limits in (panel.get_xlim(), panel.get_ylim()))
    panel.set_xlim(-reach_x, reach_x)
    panel.set_ylim(-reach_y, reach_y)
    panel.axhline(0, color=MUTED, linewidth=0.9)
    panel.axvline(0, color=MUTED, linewidth=0.9)
    for corner, (text, left, bottom, side, edge) in _CORNERS.items():
        counts = ", ".join(str(_num_in(pairing, *corner)) for pairing in comparison.pairings)
        panel.text(
            left, bottom, f"{text}: {counts}", transform=panel.transAxes, ha=side, va=edge, fontsize=7.5, color=INK
        )
    num_inside = sum(_num_in(pairing, *corner) for pairing in comparison.pairings for corner in _CORNERS)
    num_on_axis = sum(len(pairing.items) for pairing in comparison.pairings) - num_inside
    title = f"grade against tool calls, by item ({num_on_axis} on an axis)"
    finish(panel, title, "change of tool calls per rollout", "change of the grade")
    if len(comparison.pairings) > 1:
        panel.legend(fontsize=7.5, frameon=False, labelcolor=INK, loc="center left")


def _num_in(pairing: Pairing, more_calls: bool, is_better: bool) -> int:
    """Items strictly inside a quadrant; those that kept their grade or their number of calls lie on an axis."""
    return sum(
        bool(_call_change(line) * (1 if more_calls else -1) > 0 and _grade_change(line) * (1 if is_better else -1) > 0)
        for line in pairing.items
    )


def _grade_change(line: ItemLine) -> float:
    return line.other.grade - line.first.grade


def _call_change(line: ItemLine) -> float:
    return line.other.tool_calls - line.first.tool_calls
