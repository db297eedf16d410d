"""Graders: what is said of a finished rollout. One file per type, `build_grader` picks it.

The spec of each type is the hosted contract's JSON, unchanged. A grader that fails raises `GraderError`; it turns
into a score only where the contract says so.
"""

from __future__ import annotations

if __name__ != "rft.graders":
    raise ImportError("this folder is the package rft.graders: `import rft.graders`, not `import graders`")

from typing import Annotated, Any, Protocol

from pydantic import Field

from rft.graders.python import PythonGraderSpec
from rft.graders.string_check import StringCheckSpec
from rft.types import Grade, Item

GraderSpec = Annotated[PythonGraderSpec | StringCheckSpec, Field(discriminator="type")]


class Grader(Protocol):
    """Scores one rollout. `sample` is the contract's dict (see rft/graders/sample.py)."""

    async def grade(self, item: Item, sample: dict[str, Any]) -> Grade: ...

    async def close(self) -> None: ...


def build_grader(spec: GraderSpec) -> Grader:
    """The grader that `spec.type` names, imported when used."""
    if isinstance(spec, StringCheckSpec):
        from rft.graders.string_check import StringCheckGrader

        return StringCheckGrader(spec)
    from rft.graders.python import PythonGrader

    return PythonGrader(spec)
