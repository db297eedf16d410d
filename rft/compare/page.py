"""A comparison as one HTML file, and the three files of `rft compare --out`."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path

from rft import __version__
from rft.compare.figure import draw_png, draw_svgs
from rft.compare.result import Comparison, ItemLine, Outcome, Pairing
from rft.compare.tables import all_zero, between, headline, number, verdict
from rft.compare.traces import anchor, traced
from rft.files import replace, storing
from rft.html import figure, render

_MAX_ITEMS = 60  # of the wins, the losses and the ties of a pair
_MAX_IDS = 4  # rollouts named per item and side
_MAX_TURNS, _MAX_CALLS = 20, 10  # of a trace
_OUTCOMES: dict[Outcome, str] = {"win": "won", "loss": "lost", "tie": "tied"}


def write_comparison(comparison: Comparison, folder: Path) -> list[Path]:
    """compare.json, compare.png and compare.html. Raises StorageError."""
    with storing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return [
        replace(folder / "compare.json", to_json(comparison, indent=2).encode()),
        replace(folder / "compare.png", draw_png(comparison)),
        replace(folder / "compare.html", page(comparison).encode()),
    ]


def to_json(comparison: Comparison, indent: int | None = None) -> str:
    """As ASCII: foreign text may hold halves of characters, which UTF-8 cannot."""
    return json.dumps(comparison.model_dump(), indent=indent, allow_nan=False) + "\n"


def page(comparison: Comparison) -> str:
    """The HTML file."""
    zeros = all_zero(comparison)
    shown = [line for line in comparison.measures if line not in zeros]
    traces = traced(comparison)
    return render(
        "compare.html",
        title="Comparison",
        version=__version__,
        headline=headline(comparison),
        comparison=comparison,
        figures=[figure(element) for element in draw_svgs(comparison)],
        sections=[list(lines) for _, lines in groupby(shown, key=lambda line: line.section)],
        zeros=zeros,
        blocks=[
            {"pairing": pairing, "place": place, "side": comparison.sides[place], "parts": _parts(pairing)}
            for place, pairing in enumerate(comparison.pairings, 1)
        ],
        max_ids=_MAX_IDS,
        traces=traces,
        traced={one.anchor for one in traces},
        anchor=anchor,
        max_turns=_MAX_TURNS,
        max_calls=_MAX_CALLS,
        number=number,
        between=between,
        verdict=verdict,
    )


def _parts(pairing: Pairing) -> list[tuple[str, list[ItemLine], int]]:
    """What was won, lost and tied: the word, the lines shown, how many there are."""
    found = [(word, [line for line in pairing.items if line.outcome == outcome]) for outcome, word in _OUTCOMES.items()]
    return [(word, lines[:_MAX_ITEMS], len(lines)) for word, lines in found if lines]
