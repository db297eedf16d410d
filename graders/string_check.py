"""The string_check grader of the hosted contract: 1 when input and reference compare as `operation` says, else 0."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, field_validator

from rft.graders.template import TemplateError, check_template, render
from rft.types import Grade, Item

Operation = Literal["eq", "ne", "like", "ilike"]


class StringCheckSpec(BaseModel):
    """`like` and `ilike` ask whether input contains reference; only `ilike` ignores case."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["string_check"] = "string_check"
    name: str = ""
    input: str
    reference: str
    operation: Operation

    @field_validator("input", "reference")
    @classmethod
    def _template(cls, text: str) -> str:
        return check_template(text)


class StringCheckGrader:
    """A variable missing in the sample is the model's doing: 0, flagged. One missing in the item raises."""

    def __init__(self, spec: StringCheckSpec) -> None:
        self.spec = spec

    async def grade(self, item: Item, sample: dict[str, Any]) -> Grade:
        try:
            text = render(self.spec.input, item.row, sample)
            reference = render(self.spec.reference, item.row, sample)
        except TemplateError as error:
            if error.namespace != "sample":
                raise
            return Grade(score=0.0, errors={error.flag: error.problem})
        return Grade(score=float(compare(text, reference, self.spec.operation)))

    async def close(self) -> None:
        """Nothing is held."""


def compare(text: str, reference: str, operation: Operation) -> bool:
    if operation == "eq":
        return text == reference
    if operation == "ne":
        return text != reference
    if operation == "like":
        return reference in text
    return reference.casefold() in text.casefold()
