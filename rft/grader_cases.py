"""Trying a grader on hand-made answers before a run depends on it: does it say what it should, and always the same?

A case is one JSON line: `{"item": {...}, "answer": "...", "score": 0.5, "tolerance": 0.05}` expects a score;
`{"item": {...}, "answers": {"good": "...", "fair": "...", "bad": "..."}}` expects falling scores in that order.
`"results": ["..."]` is what tools had answered before, for graders that read the trace.
"""

from __future__ import annotations

import asyncio
import json
from itertools import pairwise
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rft.errors import DataError, GraderError
from rft.graders import Grader
from rft.graders.sample import sample_of_text
from rft.types import Item

_MAX_CONCURRENT = 16


class Case(BaseModel):
    """One line of a cases file; see the module's text."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    item: dict[str, Any] = Field(default_factory=dict)
    answer: str | None = None
    score: float | None = None
    tolerance: float = Field(1e-6, ge=0)
    answers: dict[str, str] = Field(default_factory=dict)
    results: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _is_one_kind(self) -> Case:
        has_score, has_order = self.answer is not None and self.score is not None, len(self.answers) >= 2
        if has_score == has_order or (self.answer is None) != (self.score is None):
            raise ValueError("give either answer and score, or answers: two or more, the best first")
        return self


class CaseResult(BaseModel):
    """What the grader said. `means` and `spreads` (standard deviations over repeats) are by the answers' names."""

    line: int
    passed: bool
    problem: str = ""
    means: dict[str, float] = Field(default_factory=dict)
    spreads: dict[str, float] = Field(default_factory=dict)


def load_cases(path: Path) -> list[tuple[int, Case]]:
    """(line number, case) of a JSONL file. Raises DataError naming file, line and field."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read: {error}", where=str(path), cure="check the path") from None
    cases = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            cases.append((number, _parse(line, f"{path}:{number}")))
    if not cases:
        raise DataError("holds no cases", where=str(path), cure="write one JSON object per line")
    return cases


def _parse(line: str, where: str) -> Case:
    try:
        return Case.model_validate(json.loads(line))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        field = ".".join(map(str, problem["loc"]))
        text = "unknown key" if problem["type"] == "extra_forbidden" else problem["msg"].removeprefix("Value error, ")
        raise DataError(
            text, where=f"{where}: {field}" if field else where, cure="see `rft grade test --help`"
        ) from None
    except ValueError as error:
        raise DataError(f"is not JSON: {error}", where=where, cure="write one JSON object per line") from None


async def test_cases(grader: Grader, cases: list[tuple[int, Case]], repeats: int) -> list[CaseResult]:
    """Grade every answer `repeats` times and compare. A grader that fails on a case fails the case."""
    slots = asyncio.Semaphore(_MAX_CONCURRENT)

    async def judge(number: int, case: Case) -> CaseResult:
        async with slots:
            return await _test(grader, number, case, repeats)

    return await asyncio.gather(*(judge(number, case) for number, case in cases))


async def _test(grader: Grader, number: int, case: Case, repeats: int) -> CaseResult:
    answers = case.answers or {"answer": case.answer or ""}
    means, spreads = dict[str, float](), dict[str, float]()
    item = Item(id=str(number), row=case.item, messages=[])
    try:
        for name, answer in answers.items():
            sample = _sample(answer, case.results)
            grades = [await grader.grade(item, sample, f"trace_case_{number}_{repeat}") for repeat in range(repeats)]
            failure = next((detail for grade in grades for _, detail in grade.all_errors), None)
            if failure is not None:
                return CaseResult(line=number, passed=False, problem=f"{name}: {failure}")
            scores = [grade.score for grade in grades]
            means[name], spreads[name] = fmean(scores), pstdev(scores)
    except GraderError as error:
        return CaseResult(line=number, passed=False, problem=error.problem)
    problem = _order_problem(means) if case.answers else _score_problem(case, means["answer"])
    return CaseResult(line=number, passed=not problem, problem=problem, means=means, spreads=spreads)


def _sample(answer: str, results: list[str]) -> dict[str, Any]:
    """The answer of a rollout whose tools had answered `results`."""
    sample = sample_of_text(answer)
    told = [
        {"role": "tool", "tool_call_id": f"call_case_{number}", "content": result, "is_error": False}
        for number, result in enumerate(results)
    ]
    return {**sample, "trace": [*told, *sample["trace"]]}


def _score_problem(case: Case, score: float) -> str:
    assert case.score is not None
    if abs(score - case.score) <= case.tolerance:
        return ""
    return f"scored {score:.4g}, expected {case.score:.4g} ± {case.tolerance:.2g}"


def _order_problem(means: dict[str, float]) -> str:
    names = list(means)
    for better, worse in pairwise(names):
        if means[better] <= means[worse]:
            return f"{better} ({means[better]:.4g}) is not above {worse} ({means[worse]:.4g})"
    return ""
