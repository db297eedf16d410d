"""The tries that the page asks for: each in a process of its own, within a deadline, one at a time for each owner."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from fastapi import Request

from rft.errors import ConfigError, UserError
from rft.ui.judging import Judging, refuse_redacted
from rft.ui.refusals import Refusal
from rft.ui.runs import Known
from rft.ui.schema import DatasetResult, GraderResult, GraderTry
from rft.ui.tries.process import TryError, run_apart

DEADLINE_S = 55.0  # of a try, in all; the page waits for 60
GRADING_S = 45.0  # for the grades themselves: what is there by then is shown
_MARGIN_S = 8.0  # from the last grade to the answer
MAX_DATASET_BYTES = 16_000_000


class Playground:
    """Of one application. One event loop."""

    def __init__(self, judging: Judging, grading_s: float = GRADING_S) -> None:
        self.judging, self.grading_s = judging, grading_s
        self._busy: set[tuple[str, str]] = set()

    async def grade(self, request: Request, known: Known, asked: GraderTry) -> GraderResult:
        """Stored rollouts with another grader; nothing is written. Raises Refusal (429), UserError."""
        if known.store is None:
            raise UserError("this job has not run yet", where=known.id, cure="wait for its first step")
        with self._turn(self.judging.owner(request), "grader"):
            try:
                refuse_redacted(asked.grader)
                judges = await self.judging.judges(request, known, asked.grader)
            except ConfigError as error:
                return _refused(error.problem + (f" ({error.cure})" if error.cure else ""), error.where)
            place = {"run": str(known.store.path.resolve())}
            times = {"deadline_s": DEADLINE_S - _MARGIN_S, "grading_s": self.grading_s}
            told = asked.model_dump() | place | times
            try:
                answer = await run_apart("grade", told, deadline_s=DEADLINE_S, judges=judges)
            except TryError as error:
                return _refused(error.problem)
            finally:
                await judges.close()
        if "problem" in answer and "graded" not in answer:
            return _refused(answer["problem"], answer["field"])
        return GraderResult.model_validate(answer)

    async def validate(self, request: Request, body: AsyncIterator[bytes]) -> DatasetResult:
        """A DatasetTry as it arrives, put into a private file and looked through. Raises Refusal, UserError."""
        with TemporaryDirectory(prefix="rft-dataset-") as folder, contextlib.ExitStack() as stack:
            path = Path(folder) / "body.json"
            await _store(body, path)
            stack.enter_context(self._turn(self.judging.owner(request), "dataset"))
            try:
                answer = await run_apart("dataset", {"body": str(path)}, deadline_s=DEADLINE_S)
            except TryError as error:
                raise Refusal(error.problem, status=400, code="dataset_not_read", cure="try a part of it") from None
        if "num_rows" not in answer:
            raise UserError(answer["problem"], where=answer["field"] or "")
        return DatasetResult.model_validate(answer)

    @contextlib.contextmanager
    def _turn(self, owner: str, what: str) -> Iterator[None]:
        """Raises Refusal (429) while the owner's last try goes on."""
        if (owner, what) in self._busy:
            problem = f"another {what} is being tried; wait for it"
            raise Refusal(problem, status=429, code="busy", cure=f"it takes at most {DEADLINE_S:g} s")
        self._busy.add((owner, what))
        try:
            yield
        finally:
            self._busy.discard((owner, what))


def _refused(problem: str, field: str | None = None) -> GraderResult:
    """The grader itself is wrong, and nothing was graded."""
    return GraderResult(graded=[], problem=problem, field=field or None)


async def _store(body: AsyncIterator[bytes], path: Path) -> None:
    """Raises Refusal (413) as soon as it is too large."""
    num_bytes = 0
    with open(path, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:  # noqa: ASYNC230  small writes
        async for part in body:
            num_bytes += len(part)
            if num_bytes > MAX_DATASET_BYTES:
                raise too_large(MAX_DATASET_BYTES)
            file.write(part)


def too_large(max_bytes: int) -> Refusal:
    problem = f"the request body is larger than {max_bytes:,} bytes"
    return Refusal(problem, status=413, code="request_too_large", cure="send a part of it")
