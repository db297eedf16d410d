"""How figures look: colours, axes, and the two ways out, a PNG and an SVG that follows the page's light or dark.

Text in figures is foreign: it is never read as mathematics. matplotlib is imported where it is used.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rft.plain import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by colour-blind readers
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK, GRID, MUTED = "#24292F", "#D8DEE4", "#6E7781"
PAGE_SIZE = (4.3, 3.5)  # inches of a figure in a page: its text is readable on a telephone
_DPI = 150
_MAX_NAME = 28  # characters of a name in a legend
# what a page may set: style sheets of rft/templates/base.html
_THEMED = {INK: "currentColor", GRID: "var(--grid)", MUTED: "var(--muted)"} | {
    colour: f"var(--series-{number}, {colour})" for number, colour in enumerate(COLOURS)
}


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of so many inches and its panels, row by row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def name_of(text: str) -> str:
    """A foreign name, short enough for a legend."""
    return plain(text, max_chars=_MAX_NAME)


def finish(panel: Axes, title: str, xlabel: str = "", ylabel: str = "") -> None:
    """Axes as all our figures have them; a legend where something has a label."""
    panel.set_title(title, fontsize=10, loc="left", color=INK)
    panel.set_xlabel(xlabel, fontsize=9, color=INK)
    panel.set_ylabel(ylabel, fontsize=9, color=INK)
    panel.tick_params(labelsize=8, colors=INK)
    panel.grid(axis="y", color=GRID, linewidth=0.7)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(MUTED)
    if panel.get_legend_handles_labels()[0]:
        panel.legend(fontsize=7.5, frameon=False, labelcolor=INK)


def over_steps(panel: Axes, title: str, ylabel: str) -> None:
    """Finish a panel whose x are steps and whose y start at 0."""
    from matplotlib.ticker import MaxNLocator

    finish(panel, title, "step", ylabel)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.set_ylim(bottom=min(0.0, panel.get_ylim()[0]))


def with_interval(panel: Axes, points: Sequence[tuple[float, float, float]], **look: Any) -> None:
    """Means with the half-widths of their intervals: (x, y, half-width)."""
    if points:
        x, y, half_widths = zip(*points, strict=True)
        panel.errorbar(x, y, half_widths, capsize=2.5, elinewidth=1.1, zorder=3, **look)


def png(figure: Figure) -> bytes:
    """The figure on white, for a file."""
    _literal(figure)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=_DPI)
    return out.getvalue()


def svg(figure: Figure, name: str, described: str) -> str:
    """The figure as an element for a page: transparent, its colours from the page's style sheet.

    name: unique in its page, letters and `-`. described: what a screen reader says.
    """
    import matplotlib

    _literal(figure)
    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"(id=\"|url\(#|xlink:href=\"#)", rf"\g<1>{name}-", text)  # ids of several figures in one page
    text = re.sub(r"font-family: [^;\"]*", "font-family: inherit", text)
    text = re.sub(r"(font: (?:\S+ )*?[\d.]+px) [^;\"]*", r"\1 sans-serif", text)
    text = re.sub("|".join(_THEMED), lambda found: _THEMED[found.group().upper()], text, flags=re.IGNORECASE)
    text = re.sub(r"^<svg ([^>]*?)width=\"[^\"]*\"", r"<svg \1", text)
    text = re.sub(r"^<svg ([^>]*?)height=\"[^\"]*\"", r"<svg \1", text)
    label = described.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def _literal(figure: Figure) -> None:
    """Let no text be mathematics: a `$` in a name would be an error of its parser."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)
