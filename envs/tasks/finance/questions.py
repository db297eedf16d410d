"""Questions made of facts: look one up, say it in other words, or reckon with two of them.

Every answer is a number with a unit, every question knows the documents that it stands in. Deterministic.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from rft.envs.tasks.finance.facts import Fact

Kind = Literal["lookup", "reworded", "balance", "growth", "per_person", "compare", "own"]
# label in the factbook -> how a lookup asks, and how one asks who does not know the document's words
PHRASES = {
    "Budget revenues": ("were the budget revenues", "did the government take in"),
    "Budget expenditures": ("were the budget expenditures", "did the government spend"),
    "Public debt": ("was the public debt", "did the state owe, as a share of GDP"),
    "Exports": ("were the exports", "was sold abroad"),
    "Imports": ("were the imports", "was bought abroad"),
    "Real GDP per capita": ("was the real GDP per capita", "was produced per inhabitant, at purchasing power"),
    "Real GDP (purchasing power parity)": ("was the real GDP (purchasing power parity)", ""),
    "Real GDP growth rate": ("was the real GDP growth rate", ""),
    "GDP (official exchange rate)": ("was the GDP (official exchange rate)", ""),
    "Inflation rate (consumer prices)": ("was the inflation rate", "did prices rise"),
    "Unemployment rate": ("was the unemployment rate", "share of the workforce had no job"),
    "Debt - external": ("was the external debt", "was owed to foreigners"),
    "Reserves of foreign exchange and gold": ("were the reserves of foreign exchange and gold", ""),
    "Current account balance": ("was the current account balance", ""),
    "Labor force": ("was the labor force", "people were working or looking for work"),
    "Industrial production growth rate": ("was the industrial production growth rate", ""),
    "Population below poverty line": ("was the population below poverty line", "share of the people was poor"),
    "Remittances": ("were the remittances", ""),
    "Population": ("was the population", "people lived there"),
    "Military Expenditures": ("were the military expenditures", "did the armed forces cost, as a share of GDP"),
}
_LEAST_SHARE = 0.01  # of the larger figure that a difference must be: else rounding of the figures decides


@dataclass(frozen=True, slots=True)
class Question:
    """`tolerance` is relative. `years`: those of the question, which an answer may repeat."""

    text: str
    kind: Kind
    documents: tuple[str, ...]
    value: float
    unit: str
    years: tuple[int, ...]
    tolerance: float = field(default=0.01)


def lookups(facts: Sequence[Fact]) -> list[Question]:
    """One for each fact: of the factbook's labels in their phrase, of others by the label as it stands."""
    return [_of(fact, "lookup", _lookup(fact)) for fact in facts]


def _lookup(fact: Fact) -> str:
    if fact.label in PHRASES:
        return f"What {PHRASES[fact.label][0]} of {fact.title} in {fact.year}?"
    return f"{fact.title}: what was {fact.label} in {fact.year}, as printed?"


def reworded(facts: Sequence[Fact]) -> list[Question]:
    """Lookups that do not say the document's words."""
    found = []
    for fact in facts:
        words = PHRASES.get(fact.label, ("", ""))[1]
        start = "How many" if words.startswith("people") else "What" if words.startswith("share") else "How much"
        if words:
            found.append(_of(fact, "reworded", f"{fact.title}, {fact.year}: {start} {words}?"))
    return found


def _of(fact: Fact, kind: Kind, text: str) -> Question:
    return Question(text, kind, (fact.document,), fact.value, fact.unit, (fact.year,))


def reckoned(facts: Sequence[Fact]) -> list[Question]:
    """Questions of two figures of one document."""
    known = {(fact.label, fact.year): fact for fact in facts}
    return [*_balances(known), *_growths(known), *_per_person(known)]


def _balances(known: dict[tuple[str, int], Fact]) -> Iterator[Question]:
    for (label, year), plus in known.items():
        if label not in ("Budget revenues", "Exports"):
            continue
        minus = known.get(("Budget expenditures" if label == "Budget revenues" else "Imports", year))
        if minus and _differ(plus, minus):
            name = "budget balance (revenues minus expenditures)"
            name = name if label == "Budget revenues" else "trade balance (exports minus imports)"
            text = f"What was the {name} of {plus.title} in {year}?"
            yield Question(text, "balance", (plus.document,), plus.value - minus.value, "$", (year,))


def _growths(known: dict[tuple[str, int], Fact]) -> Iterator[Question]:
    for label in ("Exports", "Imports", "Reserves of foreign exchange and gold"):
        series = sorted((fact for (name, _), fact in known.items() if name == label), key=lambda fact: fact.year)
        for before, after in pairwise(series):
            if after.year == before.year + 1 and before.value > 0 and _differ(before, after):
                value = 100 * (after.value / before.value - 1)
                years = f"from {before.year} to {after.year}"
                text = f"By how many percent did the {label.lower()} of {after.title} grow {years}?"
                tolerance = max(0.01, 0.1 / abs(value))  # a tenth of a percent: as such rates are printed
                span = (before.year, after.year)
                yield Question(text, "growth", (after.document,), value, "%", span, round(tolerance, 4))


def _per_person(known: dict[tuple[str, int], Fact]) -> Iterator[Question]:
    people = next((fact for (label, _), fact in known.items() if label == "Population" and fact.value > 0), None)
    for (label, year), fact in known.items():
        if people and label in ("Debt - external", "Exports") and fact.value > 0:
            name = "external debt" if label == "Debt - external" else "exports"
            text = f"Divide the {name} of {fact.title} in {year} by its population of {people.year}."
            years = (year, people.year)
            yield Question(text, "per_person", (fact.document,), fact.value / people.value, "$", years)


def compared(facts: Sequence[Fact], pick: random.Random) -> list[Question]:
    """How much more one document has of something than another of the same facts, in the same year."""
    groups: dict[tuple[str, int], list[Fact]] = {}
    for fact in facts:
        if fact.label in ("Exports", "Imports", "Budget revenues") and fact.unit == "$":
            groups.setdefault((fact.label, fact.year), []).append(fact)
    found = []
    for (label, year), group in groups.items():
        pick.shuffle(group)
        for one, other in zip(group[::2], group[1::2], strict=False):
            more, less = sorted((one, other), key=lambda fact: -fact.value)
            if _differ(more, less):
                text = f"By how much were the {label.lower()} of {more.title} above those of {less.title} in {year}?"
                documents = (more.document, less.document)
                found.append(Question(text, "compare", documents, more.value - less.value, "$", (year,)))
    return found


def _differ(one: Fact, other: Fact) -> bool:
    return abs(one.value - other.value) > _LEAST_SHARE * max(abs(one.value), abs(other.value))
