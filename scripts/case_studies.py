"""The case studies: what each consists of (configs/case_studies.yaml), its results over seeds, and the README's table.

The seeds of a study evaluate the same items, so their rollouts are pooled item by item and compared by `rft compare`'s
own bootstrap. Nothing here runs anything: see run_case_study.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import yaml
from pydantic import Field, ValidationError

from rft.compare.comparison import compare
from rft.compare.result import Comparison, MeasureLine
from rft.compare.sides import Side
from rft.errors import UserError
from rft.types import Record, Rollout

ROOT = Path(__file__).resolve().parent.parent
MANIFEST = ROOT / "configs" / "case_studies.yaml"
RESULTS = ROOT / "configs" / "case_studies"
README = ROOT / "README.md"
BEGIN, END = "<!-- case studies: scripts/run_case_study -->", "<!-- end of case studies -->"
# The two-sided 95% quantile of Student's t for 1, 2, ... degrees of freedom: seeds are few.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


class Study(Record):
    """An entry of the manifest; paths are seen from the project's root."""

    title: str
    config: Path
    prepare: list[str] = Field(description="commands, run in this order")
    measures: dict[str, str] = Field(min_length=1, description="shown name -> measure of rft compare; first: headline")
    cases: Path | None = Field(None, description="graded answers for rft grade test and probe")
    warmup: bool = Field(False, description="rft warmup first; training starts from its weights")
    needs: str = Field("", description="what a result that is not better needs, for the table")


class Shift(Record):
    """A measure before and after, over all seeds; `low` and `high` hold 95% of the change's bootstrap over items."""

    before: float
    after: float
    change: float
    low: float | None
    high: float | None


class Result(Record):
    """What a study measured. `half_width`: of the headline's 95% interval, the larger of items' and seeds'."""

    name: str
    title: str
    seeds: list[int]
    minutes: list[float]
    num_items: int
    rollouts_per_item: float
    headline: str
    changes: list[float] = Field(description="of the headline, one per seed")
    half_width: float
    shifts: dict[str, Shift]
    warmed_up: float | None = Field(None, description="the headline after the warm-up, before the first step")
    baseline: dict[str, Any]
    slow_s: float = Field(description="the threshold of slow_share: the base's 95th percentile of seconds")
    versions: dict[str, str] = Field(default_factory=dict)

    @property
    def is_better(self) -> bool:
        return abs(self.shifts[self.headline].change) > self.half_width and self.shifts[self.headline].change > 0


def read_manifest(path: Path = MANIFEST) -> dict[str, Study]:
    """The studies by name. Raises UserError naming the entry."""
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    try:
        return {name: Study.model_validate(entry) for name, entry in tree.items()}
    except ValidationError as error:
        raise UserError(str(error), where=str(path), cure="see the comment at its top") from None


def half_width(changes: Sequence[float], low: float | None, high: float | None) -> float:
    """Half the 95% interval of the mean change: Student's over seeds or the bootstrap over items, the larger one."""
    over_items = math.nan if low is None or high is None else (high - low) / 2
    if len(changes) < 2:
        return over_items
    quantile = _T95[min(len(changes) - 1, len(_T95)) - 1]
    return max(quantile * stdev(changes) / math.sqrt(len(changes)), over_items)


def pooled(sides: Sequence[Side], label: str) -> Side:
    """One side with the rollouts of all of them, item by item."""
    items: dict[str, list[Rollout]] = {}
    for side in sides:
        for item_id, rollouts in side.items.items():
            items.setdefault(item_id, []).extend(rollouts)
    tools = frozenset[str]().union(*(side.tools for side in sides))
    return replace(sides[0], label=label, items=items, tools=tools)


def compare_seeds(befores: Sequence[Side], afters: Sequence[Side], headline: str) -> tuple[Comparison, list[float]]:
    """The pooled comparison, and the headline's change with each seed. The sides go together one by one."""
    whole = compare([pooled(befores, "before"), pooled(afters, "after")])
    each = [compare(list(pair), slow_s=whole.slow_s) for pair in zip(befores, afters, strict=True)]
    return whole, [_line(one, headline).changes[0].mean or 0.0 for one in each]


def shifts_of(comparison: Comparison, measures: dict[str, str]) -> dict[str, Shift]:
    """The measures that are shown, by their shown names. Raises UserError for one that no rollout has."""
    found = {}
    for shown, name in measures.items():
        line = _line(comparison, name)
        before, after = (value.mean for value in line.sides)
        if before is not None and after is not None:
            change = line.changes[0]
            found[shown] = Shift(
                before=before, after=after, change=change.mean or 0.0, low=change.low, high=change.high
            )
    return found


def _line(comparison: Comparison, name: str) -> MeasureLine:
    found = next((line for line in comparison.measures if line.name == name), None)
    if found is None:
        known = ", ".join(line.name for line in comparison.measures)
        raise UserError(f"no rollout has the measure {name}", where=str(MANIFEST), cure=f"take one of {known}")
    return found


# --- the table ---


def read_results(manifest: dict[str, Study], folder: Path = RESULTS) -> list[Result]:
    """The results that are there, in the manifest's order."""
    paths = [folder / f"{name}.json" for name in manifest]
    return [Result.model_validate_json(path.read_text(encoding="utf-8")) for path in paths if path.exists()]


def table(results: Sequence[Result], manifest: dict[str, Study]) -> str:
    """Markdown, one row per study that has a result."""
    if not results:
        return "No result with three seeds yet."
    lines = [
        "| case study | measured | base -> trained | change, 95% | seeds, minutes each | varied first | also |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        lines.append("| " + " | ".join(_cells(result, manifest[result.name])) + " |")
    return "\n".join(lines)


def _cells(result: Result, study: Study) -> list[str]:
    head = result.shifts[result.headline]
    middle = "" if result.warmed_up is None else f"{result.warmed_up:.3f} (warmed up) -> "
    verdict = "" if result.is_better else f"; not better{': ' + study.needs if study.needs else ''}"
    also = [f"{name} {_short(shift.before)} -> {_short(shift.after)}" for name, shift in result.shifts.items()]
    return [
        f"`{study.config}`: {result.title}",
        f"{result.headline}, {result.num_items} items",
        f"{head.before:.3f} -> {middle}{head.after:.3f}",
        f"{head.change:+.3f} ± {result.half_width:.3f}{verdict}",
        f"{len(result.seeds)}, {fmean(result.minutes):.0f}",
        f"{result.baseline['varied']:.0%}",
        "; ".join(also[1:]),
    ]


def _short(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 100 else f"{value:,.0f}"


def with_table(text: str, made: str) -> str:
    """The README with another table between its marks. Raises UserError when they are missing."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise UserError("the marks of the table are missing", where=str(README), cure=f"write {BEGIN} and {END}")
    return f"{head}{BEGIN}\n{made}\n{END}{tail}"


def write_result(result: Result, folder: Path = RESULTS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result.name}.json"
    path.write_text(json.dumps(result.model_dump(mode="json"), indent=1) + "\n", encoding="utf-8")
    return path
