"""The score_model grader of the hosted contract: a judge model gives a number in `range`.

The answer is forced to `{"result": number, "steps": [{description, conclusion}]}`. A result outside the range is cut
to it; an answer that is no number is a grade of 0 with the contract's flag. With `samples: k` the grade is the mean of
k judgements and `spread` their standard deviation.
"""

from __future__ import annotations

import asyncio
import math
import time
from statistics import fmean, pstdev
from typing import Any, Literal

from pydantic import Field, field_validator

from rft.errors import GraderError, first_cause
from rft.graders.base import BaseGrader, Spec, is_finite, missing_variable_grade
from rft.graders.judge import (
    PARSE_ERROR,
    JudgeMessage,
    Judges,
    SamplingParams,
    Verdict,
    check_messages,
    render_messages,
    verdict_schema,
)
from rft.graders.template import TemplateError
from rft.types import Grade, Item, TokenUsage


class ScoreModelSpec(Spec):
    """`samples` is ours; `pass_threshold` is accepted for the contract's sake and changes no score."""

    type: Literal["score_model"] = "score_model"
    model: str
    input: list[JudgeMessage] = Field(min_length=1)
    range: tuple[float, float] = (0.0, 1.0)
    sampling_params: SamplingParams = SamplingParams()
    samples: int = Field(1, ge=1, le=64)
    pass_threshold: float | None = Field(None, allow_inf_nan=False)

    @field_validator("input")
    @classmethod
    def _templates(cls, messages: list[JudgeMessage]) -> list[JudgeMessage]:
        return check_messages(messages)

    @field_validator("range")
    @classmethod
    def _ordered(cls, ends: tuple[float, float]) -> tuple[float, float]:
        if not (math.isfinite(ends[0]) and math.isfinite(ends[1]) and ends[0] < ends[1]):
            raise ValueError("range is [lowest, highest], two finite numbers, the first smaller")
        return ends


class ScoreModelGrader(BaseGrader):
    """Asks the judge that `spec.model` names. Raises GraderError when no judge is configured for it."""

    def __init__(self, spec: ScoreModelSpec, judges: Judges) -> None:
        self.spec, self._judge = spec, judges[spec.model]

    def seen(self, item: Item, sample: dict[str, Any]) -> Any:
        return render_messages(self.spec.input, item.row, sample)

    async def grade(self, item: Item, sample: dict[str, Any], trace_id: str = "") -> Grade:
        started = time.monotonic()
        try:
            messages = self.seen(item, sample)
        except TemplateError as error:
            return missing_variable_grade(error)
        schema = verdict_schema("result", {"type": "number"})
        try:
            async with asyncio.TaskGroup() as group:
                asked = [
                    group.create_task(self._judge.ask(messages, schema, self.spec.sampling_params))
                    for _ in range(self.spec.samples)
                ]
        except* GraderError as failures:
            raise first_cause(failures) from None
        return self._grade([task.result() for task in asked], time.monotonic() - started)

    def _grade(self, verdicts: list[Verdict], latency_s: float) -> Grade:
        scores, errors, usage = [], dict[str, str](), TokenUsage()
        for verdict in verdicts:
            score, problems = self._score(verdict)
            scores.append(score)
            errors |= problems
            usage += verdict.usage
        spread = pstdev(scores) if len(scores) > 1 else None
        return Grade(
            score=fmean(scores), errors=errors, usage={self.spec.model: usage}, spread=spread, latency_s=latency_s
        )

    def _score(self, verdict: Verdict) -> tuple[float, dict[str, str]]:
        if verdict.answer is None:
            return 0.0, verdict.errors
        result = verdict.answer.get("result")
        if isinstance(result, bool) or not isinstance(result, int | float) or not is_finite(result):
            return 0.0, {PARSE_ERROR: f"the judge's result is {result!r:.100}, not a finite number"}
        lowest, highest = self.spec.range
        return min(highest, max(lowest, float(result))), {}
