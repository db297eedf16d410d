"""The python grader of the hosted contract: a module that defines `grade(sample, item) -> float`, run in a sandbox.

What its code does wrong (an exception, a value that is no finite number, two minutes passed) is a grade of 0 flagged
`python_grader_runtime_error`; a sandbox that fails raises GraderError, which is never a grade.
"""

from __future__ import annotations

import ast
import time
from typing import Any, Literal

from pydantic import Field, field_validator

from rft.errors import GraderError
from rft.graders.base import BaseGrader, Spec, is_finite
from rft.sandbox import CodeError, Sandbox, SandboxError
from rft.types import Grade, Item

RUNTIME_ERROR = "python_grader_runtime_error"
SERVER_ERROR = "python_grader_server_error"
MAX_SOURCE_BYTES = 256_000
CURE = "define `def grade(sample, item):` once, at the top level of the source"
_FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


class PythonGraderSpec(Spec):
    """`image_tag` and `pass_threshold` are accepted for the contract's sake; neither changes a score."""

    type: Literal["python"] = "python"
    source: str
    image_tag: str | None = None
    pass_threshold: float | None = Field(None, allow_inf_nan=False)

    @field_validator("source")
    @classmethod
    def _defines_grade(cls, source: str) -> str:
        return check_source(source)


class PythonGrader(BaseGrader):
    """Grades in `num_workers` warm processes, the first of them started by `start`, the others when needed."""

    def __init__(self, spec: PythonGraderSpec, *, num_workers: int = 2, wall_s: float = 120.0) -> None:
        self.spec = spec
        self._sandbox = Sandbox(spec.source, function="grade", num_workers=num_workers, wall_s=wall_s)

    async def start(self) -> list[str]:
        """Load the source and say what isolation is in force. Raises GraderError when the source does not load."""
        try:
            await self._sandbox.start()
        except CodeError as error:
            raise GraderError(
                f"the source of the python grader does not load:\n{error.detail}",
                flag=RUNTIME_ERROR,
                cure="try it with `rft grade run`; the packages a grader may import are those of extra graders",
            ) from error
        except SandboxError as error:
            raise GraderError(f"python grader: {error.problem}", flag=SERVER_ERROR, cure=error.cure) from error
        return [f"python graders run in a sandbox; {self._sandbox.protection}"]

    async def grade(self, item: Item, sample: dict[str, Any], trace_id: str = "") -> Grade:
        started = time.monotonic()
        try:
            value = await self._sandbox.call(sample, item.row)
        except CodeError as error:
            return _zero(error.detail, started)
        except SandboxError as error:
            raise GraderError(
                f"python grader: {error.problem}", flag=SERVER_ERROR, retryable=error.retryable, cure=error.cure
            ) from error
        if not isinstance(value, int | float) or not is_finite(value):
            return _zero(f"grade() returned {value!r:.200}, not a finite number", started)
        return Grade(score=float(value), latency_s=time.monotonic() - started)

    async def close(self) -> None:
        await self._sandbox.close()


def check_source(source: str) -> str:
    """The source itself; ValueError naming what is wrong with it and the cure."""
    if len(source.encode("utf-8", "surrogatepass")) >= MAX_SOURCE_BYTES:
        raise ValueError(f"the source must be smaller than 256 kB ({MAX_SOURCE_BYTES} bytes)")
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"the source is not valid Python: {error}; correct it") from None
    found = [node for node in tree.body if isinstance(node, _FUNCTION) and node.name == "grade"]
    if len(found) != 1:
        raise ValueError(f"the source defines `grade` {len(found)} times; {CURE}")
    if isinstance(found[0], ast.AsyncFunctionDef):
        raise ValueError(f"`grade` must not be async; {CURE}")
    if not takes_two(found[0].args):
        raise ValueError(f"`grade` must take exactly two positional arguments; {CURE}")
    return source


def takes_two(args: ast.arguments) -> bool:
    """True for `(a, b)`; keyword-only arguments are fine when they have defaults."""
    has_two = len(args.posonlyargs) + len(args.args) == 2 and args.vararg is None
    return has_two and all(default is not None for default in args.kw_defaults)


def _zero(detail: str, started: float) -> Grade:
    return Grade(score=0.0, errors={RUNTIME_ERROR: detail}, latency_s=time.monotonic() - started)
