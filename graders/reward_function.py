"""TRL's reward functions as graders: `def f(prompts, completions, **columns) -> list[float]`.

The source runs in the sandbox as a python grader's does. The function is called with one rollout at a time: lists of
length one for `prompts` (the row's messages), `completions` (what was said after them, tool results included, as
messages), and for every further key of the row. A function that compares the completions of a batch with each other
cannot be graded this way. What fails is a grade of 0, flagged, as with python graders; TRL's None (not applicable)
is such a failure, because a rollout without a grade cannot be compared with its siblings.
"""

from __future__ import annotations

import ast
from typing import Any, Literal

from pydantic import Field, model_validator

from rft.graders.base import BaseGrader, Spec
from rft.graders.python import MAX_SOURCE_BYTES, PythonGrader, PythonGraderSpec
from rft.types import Grade, Item

# Appended to the user's module; the name cannot collide with one of his that is not meant to.
_ADAPTER = """

def grade(sample, item):
    columns = {key: [value] for key, value in item.items() if key != "messages"}
    scores = __REWARD_FUNCTION__(prompts=[item.get("messages")], completions=[sample["trace"]], **columns)
    scores = scores.tolist() if hasattr(scores, "tolist") else list(scores)
    if len(scores) != 1:
        raise ValueError(f"the reward function returned {len(scores)} scores for 1 completion")
    if scores[0] is None:
        raise ValueError("the reward function returned None: it does not apply to this completion")
    return scores[0]
"""


class RewardFunctionSpec(Spec):
    """`source` is a module that defines `function` with `prompts`, `completions` and `**kwargs`."""

    type: Literal["reward_function"] = "reward_function"
    source: str
    function: str = Field(pattern=r"^[A-Za-z_]\w*$")

    @model_validator(mode="after")
    def _defines_function(self) -> RewardFunctionSpec:
        if len(self.source.encode("utf-8", "surrogatepass")) + len(_ADAPTER) >= MAX_SOURCE_BYTES:
            raise ValueError(f"the source must be smaller than 256 kB ({MAX_SOURCE_BYTES} bytes)")
        try:
            tree = ast.parse(self.source)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ValueError(f"the source is not valid Python: {error}; correct it") from None
        found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == self.function]
        if len(found) != 1:
            raise ValueError(
                f"the source defines `{self.function}` {len(found)} times at its top level; define it once"
            )
        if found[0].args.kwarg is None:
            raise ValueError(f"`{self.function}` must take **kwargs: it is called with every key of the dataset row")
        if self.function == "grade":
            raise ValueError("`grade` is the name of python graders; give the reward function another")
        return self

    def as_python(self) -> PythonGraderSpec:
        """The same as a python grader."""
        adapter = _ADAPTER.replace("__REWARD_FUNCTION__", self.function)
        return PythonGraderSpec(name=self.name, source=self.source + adapter)


class RewardFunctionGrader(BaseGrader):
    """A python grader that calls the function."""

    def __init__(self, spec: RewardFunctionSpec) -> None:
        self.spec, self._python = spec, PythonGrader(spec.as_python())

    async def start(self) -> list[str]:
        return await self._python.start()

    async def grade(self, item: Item, sample: dict[str, Any], trace_id: str = "") -> Grade:
        return await self._python.grade(item, sample, trace_id)

    async def close(self) -> None:
        await self._python.close()
