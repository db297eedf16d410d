"""The multi grader of the hosted contract: named graders, all at once, and a formula over their scores."""

from __future__ import annotations

import asyncio
import keyword
import time
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from rft.errors import GraderError, first_cause
from rft.graders.base import BaseGrader, Grader, Spec
from rft.graders.formula import Formula, FormulaError
from rft.types import Grade, Item

if TYPE_CHECKING:
    from rft.graders import PartSpec

FORMULA_ERROR = "formula_parse_error"


class MultiSpec(Spec):
    """`graders` are by the names the formula uses. `invalid_grade` is the score when grading fails; null discards."""

    type: Literal["multi"] = "multi"
    graders: dict[str, PartSpec] = Field(min_length=1)
    calculate_output: str
    invalid_grade: float | None = Field(None, allow_inf_nan=False)

    @field_validator("graders", mode="before")
    @classmethod
    def _not_nested(cls, graders: Any) -> Any:
        if not isinstance(graders, dict):
            raise ValueError(f"expected an object of named graders, but got {type(graders).__name__}")
        for key, grader in graders.items():
            if isinstance(grader, dict) and grader.get("type") == "multi":
                raise ValueError(f"{key} is a multi grader inside a multi grader; write its formula into this one")
            if not str(key).isidentifier() or keyword.iskeyword(key):
                raise ValueError(f"{key!r} cannot be a name in a formula; use letters, digits and _")
        return graders

    @field_validator("calculate_output")
    @classmethod
    def _formula_is_sound(cls, text: str, info: ValidationInfo) -> str:
        if "graders" in info.data:  # else they are what is wrong
            Formula(text, frozenset(info.data["graders"]))  # a FormulaError is a ValueError
        return text


class MultiGrader(BaseGrader):
    """A part that fails fails the whole; the others are cancelled."""

    def __init__(self, spec: MultiSpec, parts: dict[str, Grader]) -> None:
        self.spec, self._parts = spec, parts
        self._formula = Formula(spec.calculate_output, frozenset(spec.graders))

    async def start(self) -> list[str]:
        return [note for part in self._parts.values() for note in await part.start()]

    async def grade(self, item: Item, sample: dict[str, Any], trace_id: str = "") -> Grade:
        started, parts = time.monotonic(), dict[str, Grade]()
        try:
            parts = await self._grade_parts(item, sample, trace_id)
            score, errors = self._formula({key: part.score for key, part in parts.items()}), dict[str, str]()
        except (GraderError, FormulaError) as error:
            failure = error if isinstance(error, GraderError) else GraderError(str(error), flag=FORMULA_ERROR)
            if self.spec.invalid_grade is None:
                raise failure from None
            score, errors = self.spec.invalid_grade, {failure.flag: failure.problem}
        return Grade(score=score, parts=parts, errors=errors, latency_s=time.monotonic() - started)

    async def _grade_parts(self, item: Item, sample: dict[str, Any], trace_id: str) -> dict[str, Grade]:
        try:
            async with asyncio.TaskGroup() as group:
                tasks = {
                    key: group.create_task(self._grade_part(key, part, item, sample, trace_id))
                    for key, part in self._parts.items()
                }
        except* GraderError as failures:
            raise first_cause(failures) from None
        return {key: task.result() for key, task in tasks.items()}

    async def _grade_part(self, key: str, part: Grader, item: Item, sample: dict[str, Any], trace_id: str) -> Grade:
        try:
            return await part.grade(item, sample, trace_id)
        except GraderError as error:
            raise GraderError(
                f"{key}: {error.problem}", flag=error.flag, retryable=error.retryable, cure=error.cure
            ) from error

    async def close(self) -> None:
        for part in self._parts.values():
            await part.close()
