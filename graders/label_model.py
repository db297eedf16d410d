"""The label_model grader of the hosted contract: a judge model chooses one of `labels`; 1 for a passing one, else 0."""

from __future__ import annotations

import time
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from rft.graders.base import BaseGrader, Spec, missing_variable_grade
from rft.graders.judge import (
    PARSE_ERROR,
    JudgeMessage,
    Judges,
    SamplingParams,
    check_messages,
    render_messages,
    verdict_schema,
)
from rft.graders.template import TemplateError
from rft.types import Grade, Item


class LabelModelSpec(Spec):
    """In training, allowed only as a part of a multi grader."""

    type: Literal["label_model"] = "label_model"
    model: str
    input: list[JudgeMessage] = Field(min_length=1)
    labels: list[str] = Field(min_length=2)
    passing_labels: list[str] = Field(min_length=1)
    sampling_params: SamplingParams = SamplingParams()

    @field_validator("input")
    @classmethod
    def _templates(cls, messages: list[JudgeMessage]) -> list[JudgeMessage]:
        return check_messages(messages)

    @model_validator(mode="after")
    def _passing_are_labels(self) -> LabelModelSpec:
        unknown = sorted(set(self.passing_labels) - set(self.labels))
        if unknown:
            raise ValueError(f"passing_labels: {', '.join(unknown)} is not among labels")
        return self


class LabelModelGrader(BaseGrader):
    """Asks the judge that `spec.model` names. Raises GraderError when no judge is configured for it."""

    def __init__(self, spec: LabelModelSpec, judges: Judges) -> None:
        self.spec, self._judge = spec, judges[spec.model]

    def seen(self, item: Item, sample: dict[str, Any]) -> Any:
        return render_messages(self.spec.input, item.row, sample)

    async def grade(self, item: Item, sample: dict[str, Any], trace_id: str = "") -> Grade:
        started = time.monotonic()
        try:
            messages = self.seen(item, sample)
        except TemplateError as error:
            return missing_variable_grade(error)
        schema = verdict_schema("label", {"type": "string", "enum": self.spec.labels})
        verdict = await self._judge.ask(messages, schema, self.spec.sampling_params)
        label, errors = (verdict.answer or {}).get("label"), verdict.errors
        if not errors and label not in self.spec.labels:
            errors = {PARSE_ERROR: f"the judge's label is {label!r:.100}, not one of {self.spec.labels}"}
        return Grade(
            score=float(not errors and label in self.spec.passing_labels),
            errors=errors,
            usage={self.spec.model: verdict.usage},
            latency_s=time.monotonic() - started,
        )
