"""What every grader type shares: the common fields of its spec, the seam, and defaults for what most need not do."""

from __future__ import annotations

import math
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict

from rft.types import Grade, Item


class Spec(BaseModel):
    """The hosted contract's JSON of a grader; `cache` is ours. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = ""
    cache: bool | None = None  # remember grades by what the grader saw; null: where that saves time


class Grader(Protocol):
    """Scores one rollout. `sample` is the contract's dict (rft/graders/sample.py), `trace_id` the rollout's id.

    A failure of the grader itself raises GraderError. It is a score only where the contract says so: 0, with the
    error's flag in `Grade.errors`.
    """

    async def start(self) -> list[str]:
        """Be ready. Returns sentences a person should read; raises where it can be known that grading will fail."""
        ...

    async def grade(self, item: Item, sample: dict[str, Any], trace_id: str = "") -> Grade: ...

    def seen(self, item: Item, sample: dict[str, Any]) -> Any:
        """A JSON value of everything that `grade` depends on beside the spec. Raises GraderError as `grade` does."""
        ...

    async def close(self) -> None: ...


class BaseGrader:
    """A grader that holds nothing and looks at everything."""

    async def start(self) -> list[str]:
        return []

    def seen(self, item: Item, sample: dict[str, Any]) -> Any:
        return [item.row, sample]

    async def close(self) -> None:
        """Nothing is held."""


def is_finite(value: float) -> bool:
    """True for a number that a float can hold; bool counts as 0 or 1."""
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond the range of float
        return False


_TYPES = frozenset({"string_check", "text_similarity", "python", "score_model", "label_model", "endpoint", "multi"})
_TYPES |= {"reward_function", "environment"}


def spec_path(loc: tuple[str | int, ...]) -> list[str]:
    """pydantic's location of an error as the user's path: without the type names that it puts in between."""

    def is_tag(index: int) -> bool:
        is_first = index > 0 and loc[index - 1] == "grader"
        is_named = index >= 2 and loc[index - 2] in ("graders", "shadow_graders")
        return loc[index] in _TYPES and (is_first or is_named)

    return [str(part) for index, part in enumerate(loc) if not is_tag(index)]


def missing_variable_grade(error: Any) -> Grade:
    """The grade for a template variable without a value, where that is the model's doing.

    A variable missing in the sample (an answer without tool calls, or that is no JSON) is a 0 with the contract's
    flag; one missing in the item raises: no answer could have made it good.
    """
    if error.namespace != "sample":
        raise error
    return Grade(score=0.0, errors={error.flag: error.problem})
