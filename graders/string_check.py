"""The string_check grader of the hosted contract: 1 when input and reference compare as `operation` says, else 0."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator

from rft.graders.base import BaseGrader, Spec, missing_variable_grade
from rft.graders.template import TemplateError, check_template, render
from rft.types import Grade, Item

Operation = Literal["eq", "ne", "like", "ilike"]


class StringCheckSpec(Spec):
    """`like` and `ilike` ask whether input contains reference; only `ilike` ignores case."""

    type: Literal["string_check"] = "string_check"
    input: str
    reference: str
    operation: Operation

    @field_validator("input", "reference")
    @classmethod
    def _template(cls, text: str) -> str:
        return check_template(text)


class StringCheckGrader(BaseGrader):
    """A variable missing in the sample is the model's doing: 0, flagged. One missing in the item raises."""

    def __init__(self, spec: StringCheckSpec) -> None:
        self.spec = spec

    def seen(self, item: Item, sample: dict[str, Any]) -> Any:
        return [render(template, item.row, sample) for template in (self.spec.input, self.spec.reference)]

    async def grade(self, item: Item, sample: dict[str, Any], trace_id: str = "") -> Grade:
        try:
            text, reference = self.seen(item, sample)
        except TemplateError as error:
            return missing_variable_grade(error)
        return Grade(score=float(compare(text, reference, self.spec.operation)))


def compare(text: str, reference: str, operation: Operation) -> bool:
    if operation == "eq":
        return text == reference
    if operation == "ne":
        return text != reference
    if operation == "like":
        return reference in text
    return reference.casefold() in text.casefold()
