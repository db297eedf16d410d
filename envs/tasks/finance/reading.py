"""Reading an answer: its number, its citations, and what the tools had shown. The first half of each grader's text.

A config joins it with one of the files beside it: `source: !file [reading.py, grader.py]`. Everything it reads is
written by a model or by documents: it never raises, whatever the text.
"""

import math
import re
from typing import Any

NUMBER = re.compile(
    r"(?<![\w.,])(?P<minus>[-\u2212])?(?P<dollar>(?:US)?\$\s?|USD\s)?(?P<inner>[-\u2212])?"
    r"(?P<digits>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?P<exponent>e[+-]?\d{1,3})?"
    r"(?:\s?(?P<scale>thousand|million|billion|trillion|k|mn|m|bn|b|tn|t))?(?!\w|[,.]\d)(?:\s?(?P<percent>%|percent\b))?",
    re.IGNORECASE,
)
SCALES = {"k": 1e3, "thousand": 1e3, "m": 1e6, "mn": 1e6, "million": 1e6, "b": 1e9, "bn": 1e9, "billion": 1e9}
SCALES |= {"t": 1e12, "tn": 1e12, "trillion": 1e12}
BRACKETS = re.compile(r"\[([^\[\]\n]{1,200})\]")
HEADING = re.compile(r"^\[([^\[\]\n]{1,200})\]", re.MULTILINE)
MAX_LINE_CHARS = 2000
SAME = 1e-6  # relative: two spellings of one number


def numbers(text: str) -> list[tuple[float, str]]:
    """Every number of a text with its scale multiplied in, and its unit: "$", "%" or ""."""
    found = []
    for match in NUMBER.finditer(text):
        value = float(match["digits"].replace(",", "") + (match["exponent"] or ""))
        value *= SCALES.get((match["scale"] or "").lower(), 1.0)
        if math.isfinite(value):
            sign = -1.0 if match["minus"] or match["inner"] else 1.0
            found.append((sign * value, "$" if match["dollar"] else "%" if match["percent"] else ""))
    return found


def answered(sample: dict[str, Any], item: dict[str, Any]) -> tuple[float, str] | None:
    """The number of the last line that holds one: working may stand above it. None for several different ones.

    A year that the question names may be repeated beside it.
    """
    years = {float(year) for year in item.get("years", [])} - {item.get("value")}
    for line in reversed(BRACKETS.sub(" ", str(sample.get("output_text") or "")).splitlines()):
        if len(line) > MAX_LINE_CHARS:
            return None
        found = [(value, unit) for value, unit in numbers(line) if unit or value not in years]
        if found:
            value, unit = next((pair for pair in found if pair[1]), found[0])
            is_one = all(close(other, value, SAME) for other, _ in found)
            return ((-value if value > 0 and "deficit" in line.lower() else value), unit) if is_one else None
    return None


def close(value: float, gold: float, tolerance: float) -> bool:
    return abs(value - gold) <= tolerance * abs(gold) + 1e-12


def is_right(number: tuple[float, str] | None, item: dict[str, Any]) -> bool:
    """Within the item's tolerance (relative, 1% by default), and not in another unit."""
    if number is None:
        return False
    value, unit = number
    has_other_unit = bool(unit and item.get("unit") and unit != item["unit"])
    return not has_other_unit and close(value, float(item["value"]), float(item.get("tolerance", 0.01)))


def citations(sample: dict[str, Any]) -> set[str]:
    """The ids in square brackets: `[a] [b]`, `[a, b]`."""
    text = str(sample.get("output_text") or "")
    parts = (part.strip().casefold() for inner in BRACKETS.findall(text) for part in re.split(r"[,;]", inner))
    return {part for part in parts if part}


def results(sample: dict[str, Any]) -> list[str]:
    """What the tools answered, refusals left out: those may repeat what the model wrote."""
    trace = sample.get("trace") or []
    return [str(m.get("content") or "") for m in trace if m.get("role") == "tool" and not m.get("is_error")]


def seen(texts: list[str]) -> set[str]:
    """The documents whose text the tools have shown: each stands in brackets at the start of a line."""
    return {name.strip().casefold() for text in texts for name in HEADING.findall(text)}


def citation_score(cited: set[str], shown: set[str], gold: set[str]) -> float:
    """F1 of the cited documents; one that was never shown is no hit."""
    hits = len(cited & shown & gold)
    return 2 * hits / (len(cited) + len(gold)) if hits else 0.0


def is_invented_number(number: tuple[float, str] | None, texts: list[str], item: dict[str, Any]) -> bool:
    """A number without any result, or, where it is to be looked up, one that stands in no result."""
    if number is None:
        return False
    shown = [value for text in texts for value, _ in numbers(BRACKETS.sub(" ", text))]
    if item.get("kind") not in ("lookup", "reworded"):
        return not shown
    return not any(close(number[0], value, float(item.get("tolerance", 0.01))) for value in shown)
