"""The environment grader: the score is what the environment says of the episode. One of rft's own types."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from rft.errors import GraderError
from rft.graders.base import BaseGrader, Spec, is_finite
from rft.types import Grade, Item

_FLAG = "invalid_variable_error"


class EnvironmentSpec(Spec):
    """`key`: the name in `sample.environment`; dots lead into objects, e.g. metrics.accuracy. true counts as 1.

    `range`: the score is cut to it.
    """

    type: Literal["environment"] = "environment"
    key: str = Field("reward", min_length=1)
    range: tuple[float, float] | None = None

    @model_validator(mode="after")
    def _in_order(self) -> EnvironmentSpec:
        if self.range is not None and not self.range[0] < self.range[1]:
            raise ValueError(f"range: {self.range[0]:g} is not below {self.range[1]:g}")
        return self


class EnvironmentGrader(BaseGrader):
    """A value that is missing or no finite number raises: it is the environment's failure and not the model's."""

    def __init__(self, spec: EnvironmentSpec) -> None:
        self.spec = spec

    def seen(self, item: Item, sample: dict[str, Any]) -> Any:
        value: Any = sample.get("environment", {})
        for part in self.spec.key.split("."):
            if not isinstance(value, dict) or part not in value:
                said = ", ".join(sample.get("environment", {})) or "nothing"
                problem = f"sample.environment has no {self.spec.key}; the environment said: {said}"
                raise GraderError(problem, flag=_FLAG, cure="set the grader's key to what the environment reports")
            value = value[part]
        return value

    async def grade(self, item: Item, sample: dict[str, Any], trace_id: str = "") -> Grade:
        value = self.seen(item, sample)
        if not isinstance(value, int | float) or not is_finite(value):
            raise GraderError(f"sample.environment.{self.spec.key} is {value!r}, not a finite number", flag=_FLAG)
        score = float(value)
        if self.spec.range is not None:
            score = min(max(score, self.spec.range[0]), self.spec.range[1])
        return Grade(score=score)
