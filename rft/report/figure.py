"""The figures of a run: report.png with four panels, and the panels of the HTML report. Shown over steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rft.figures import COLOURS, INK, PAGE_SIZE, name_of, new_figure, over_steps, png, svg, with_interval
from rft.salvage import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, Any]
LABELS = {
    "grade": "grade",
    "valid_call_share": "rollouts with a valid call",
    "tool_calls": "tool calls per rollout",
    "sampled_tokens": "sampled tokens per rollout",
}
_UNITS = {"grade": "mean grade", "valid_call_share": "share"}
_MARKS = (("validation", "o", None, 5), ("test", "D", "none", 8))  # split, marker, face, size
_MAX_POINTS = 240  # of one line: more cannot be told apart, and would make a page large
_MAX_NAMES = 6  # lines or bars of one panel
_PHASES = ("sampling", "training", "sync")


def label_of(name: str) -> str:
    """What a measure is called for a person."""
    kind, _, rest = name.partition("/")
    return LABELS.get(name, f"{rest} (shadow grade)" if kind == "shadow" else f"{rest} (part)")


def draw(title: str, training: list[Row], evaluations: dict[str, list[Row]]) -> bytes:
    """report.png. Colour says which measure, shape which split."""
    figure, axes = new_figure(10, 6.6, rows=2, columns=2)
    figure.suptitle(title, fontsize=12, color=INK)
    for panel, (name, label) in zip(axes, LABELS.items(), strict=True):
        names = [name, *_named("shadow", training, evaluations)] if name == "grade" else [name]
        for measure, colour in zip(names, COLOURS, strict=False):
            _draw_measure(panel, measure, colour, training, evaluations)
        over_steps(panel, label, _UNITS.get(name, "mean number"))
        if name != "grade" and (legend := panel.get_legend()):
            legend.remove()
    return png(figure)


def panels(training: list[Row], evaluations: dict[str, list[Row]]) -> list[str]:
    """The figures of the HTML report as elements; what a run has nothing of is left out."""
    training = binned(training)
    evaluations = {split: binned(rows) for split, rows in evaluations.items()}
    drawn: list[tuple[str, str, Callable[[Axes], bool]]] = [
        ("grade", "The grade over steps", lambda panel: _draw_grade(panel, training, evaluations)),
        ("others", "Shadow and part grades over steps", lambda panel: _draw_others(panel, training, evaluations)),
        ("groups", "Groups with and without signal per step", lambda panel: _draw_groups(panel, training)),
        ("tools", "Tool calls per rollout by tool over steps", lambda panel: _draw_tools(panel, training)),
        ("tokens", "Tokens per rollout over steps", lambda panel: _draw_tokens(panel, training)),
        ("ends", "Why rollouts ended, by step", lambda panel: _draw_ends(panel, training)),
        ("phases", "Seconds per step by phase", lambda panel: _draw_phases(panel, training)),
    ]
    found = []
    for name, described, draw_into in drawn:
        figure, (panel,) = new_figure(*PAGE_SIZE)
        if draw_into(panel):
            found.append(svg(figure, name, described))
    return found


def binned(rows: list[Row], max_points: int = _MAX_POINTS) -> list[Row]:
    """At most so many rows: neighbours become one, with the means of their numbers."""
    size = -(-len(rows) // max_points)
    if size <= 1:
        return rows
    return [_mean_row(rows[start : start + size]) for start in range(0, len(rows), size)]


def _mean_row(rows: Sequence[Row]) -> Row:
    values = {name: [row[name] for row in rows if number(row, name) is not None] for name in rows[-1]}
    return {name: fmean(known) for name, known in values.items() if known} | {"step": rows[-1]["step"]}


# --- panels ----------------------------------------------------------------------------------------------------------


def _draw_grade(panel: Axes, training: list[Row], evaluations: dict[str, list[Row]]) -> bool:
    _draw_band(panel, training, "train/grade", COLOURS[0], "training")
    for (split, marker, _, size), colour in zip(_MARKS, COLOURS[1:], strict=False):
        look = {"marker": marker, "markersize": size * 0.8, "color": colour, "linewidth": 1.6}
        with_interval(panel, _points(evaluations.get(split, []), "grade"), label=split, **look)
    over_steps(panel, "grade, with 95% intervals", "mean grade")
    return bool(training or evaluations)


def _draw_others(panel: Axes, training: list[Row], evaluations: dict[str, list[Row]]) -> bool:
    names = _named("shadow", training, evaluations) + _named("part", training, evaluations)
    for name, colour in zip(names[:_MAX_NAMES], COLOURS, strict=False):
        _draw_measure(panel, name, colour, training, evaluations)
    over_steps(panel, "shadow and part grades", "mean grade")
    return bool(names)


def _draw_band(panel: Axes, rows: list[Row], name: str, colour: str, label: str) -> None:
    points = _points(rows, name)
    if points:
        x, y, half_widths = zip(*points, strict=True)
        low, high = ([mean + sign * half for mean, half in zip(y, half_widths, strict=True)] for sign in (-1, 1))
        panel.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        panel.plot(x, y, color=colour, linewidth=1.8, label=label)


def _draw_groups(panel: Axes, training: list[Row]) -> bool:
    total = [number(row, "groups/total") or 0.0 for row in training]
    without = [number(row, "groups/no_signal") or 0.0 for row in training]
    useful = [all_of - none for all_of, none in zip(total, without, strict=True)]
    _stack(panel, training, {"useful": useful, "all grades equal": without})
    over_steps(panel, "groups per step", "groups")
    return any(total)


def _draw_tools(panel: Axes, training: list[Row]) -> bool:
    names = sorted({name for row in training for name in row if name.startswith("train/tool_num/")})
    sizes = {name: sum(number(row, name) or 0.0 for row in training) for name in names}
    names = sorted(sorted(sizes, key=lambda name: -sizes[name])[: _MAX_NAMES - 1])
    shown = {name.removeprefix("train/tool_num/"): name for name in names} | {
        "unknown names": "train/unknown_tool_calls"
    }
    calls = {
        label: [(number(row, name) or 0.0) / max(1.0, number(row, "train/num_rollouts") or 1.0) for row in training]
        for label, name in shown.items()
    }
    _stack(panel, training, {label: values for label, values in calls.items() if any(values)})
    over_steps(panel, "tool calls per rollout, by tool", "calls")
    return any(any(values) for values in calls.values())


def _draw_tokens(panel: Axes, training: list[Row]) -> bool:
    for name, label, colour in (("sampled", "sampled", COLOURS[0]), ("reasoning", "of them reasoning", COLOURS[1])):
        points = _points(training, f"train/{name}_tokens")
        if name == "sampled" or any(mean for _, mean, _ in points):
            _draw_band(panel, training, f"train/{name}_tokens", colour, label)
    over_steps(panel, "tokens per rollout", "tokens")
    return bool(_points(training, "train/sampled_tokens"))


def _draw_ends(panel: Axes, training: list[Row]) -> bool:
    reasons = sorted({name for row in training for name in row if name.startswith("train/stop/")})[:_MAX_NAMES]
    shares = {name.removeprefix("train/stop/"): [number(row, name) or 0.0 for row in training] for name in reasons}
    _stack(panel, training, shares)
    over_steps(panel, "how rollouts ended", "share")
    return bool(reasons)


def _draw_phases(panel: Axes, training: list[Row]) -> bool:
    phases = {phase: [number(row, f"time/{phase}_s") or 0.0 for row in training] for phase in _PHASES}
    known = [sum(values) for values in zip(*phases.values(), strict=True)]
    steps = [number(row, "time/step_s") or 0.0 for row in training]
    phases["other"] = [max(0.0, step - part) for step, part in zip(steps, known, strict=True)]
    _stack(panel, training, phases)
    over_steps(panel, "seconds per step, by phase", "seconds")
    return any(steps)


def _stack(panel: Axes, rows: list[Row], parts: dict[str, list[float]]) -> None:
    """Bars that add up; their legend stands above them."""
    if not rows:
        return
    steps = [row["step"] for row in rows]
    width = 0.85 * (steps[-1] - steps[0]) / (len(steps) - 1) if len(steps) > 1 else 0.85
    bottom = [0.0] * len(rows)
    for (name, values), colour in zip(parts.items(), COLOURS, strict=False):
        panel.bar(steps, values, width, bottom=bottom, color=colour, alpha=0.9, linewidth=0, label=name_of(name))
        bottom = [below + value for below, value in zip(bottom, values, strict=True)]
    panel.set_ylim(0, 1.28 * max(*bottom, 1e-9, 0.0))


def _draw_measure(panel: Axes, name: str, colour: str, training: list[Row], evaluations: dict[str, list[Row]]) -> None:
    label = name.split("_")[0] if name in LABELS else name_of(label_of(name))
    if points := _points(training, f"train/{name}"):
        x, y, _ = zip(*points, strict=True)
        width = 1.8 if name in LABELS else 1.0
        panel.plot(x, y, color=colour, linewidth=width, alpha=0.75, label=f"{label}, training")
    for split, marker, face, size in _MARKS:
        look = {"color": colour, "markerfacecolor": face or colour, "markersize": size, "linestyle": "none"}
        points = _points(evaluations.get(split, []), name)
        with_interval(panel, points, marker=marker, label=f"{label}, {split} ± 95%", **look)


def _points(rows: list[Row], name: str) -> list[tuple[float, float, float]]:
    """(step, mean, half-width of the interval or 0) where the measure is known."""
    found = [(row["step"], number(row, name), number(row, f"{name}_ci95")) for row in rows]
    return [(step, mean, half_width or 0.0) for step, mean, half_width in found if mean is not None]


def _named(kind: str, training: list[Row], evaluations: dict[str, list[Row]]) -> list[str]:
    """`shadow/x` or `part/x` of all rows."""
    rows = [*training, *(row for rows in evaluations.values() for row in rows)]
    names = {name.removeprefix("train/") for row in rows for name in row}
    return sorted(name for name in names if name.startswith(f"{kind}/") and not name.endswith("_ci95"))
