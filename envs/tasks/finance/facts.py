"""Facts: the figures of a document, each on a line of its own: `LABEL: FIGURE (YEAR est.)` or `LABEL YEAR: FIGURE`.

The questions of the task are made of facts; what a line says is all a fact knows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from rft.envs.documents import Document
from rft.envs.tasks.finance.reading import numbers

_LINE = re.compile(
    r"(?P<label>[^:\n]{2,100}?)(?: (?P<before>(?:19|20)\d\d))?: "
    r"(?P<figure>[^():\n]{1,60}?)(?: \((?P<after>(?:19|20)\d\d)(?: est\.)?\))?"
)


@dataclass(frozen=True, slots=True)
class Fact:
    """`value` in the figure's `unit` ("$", "%" or ""), scale words multiplied in."""

    document: str
    title: str
    label: str
    year: int
    figure: str
    value: float
    unit: str


def facts_of(document: Document) -> list[Fact]:
    """The facts of a document in its order; of a label and year that have several figures, none."""
    found: dict[tuple[str, int], list[Fact]] = {}
    for fact in _on_lines(document):
        found.setdefault((fact.label.casefold(), fact.year), []).append(fact)
    return [facts[0] for facts in found.values() if len({fact.figure for fact in facts}) == 1]


def _on_lines(document: Document) -> Iterator[Fact]:
    for line in document.text.splitlines():
        match = _LINE.fullmatch(line.strip())
        year = match and (match["after"] or match["before"])
        if not match or not year:
            continue
        stated = numbers(match["figure"])
        if len(stated) == 1:
            (value, unit), figure = stated[0], match["figure"].strip()
            value = float(f"{value:.12g}")  # 1.1 billion is not 1100000000.0000002
            yield Fact(document.id, document.title, match["label"], int(year), figure, value, unit)
