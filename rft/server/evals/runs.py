"""Eval runs that clients start: tasks of the server, a few at a time; their objects and items are in the index.

Guarantees: a run ends as completed, failed or canceled; one that a stop of the server interrupted is failed at the
next start and says so. Items are written in the order of the rows.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rft.errors import RftError, UserError
from rft.graders import GraderTools, build_grader
from rft.server.errors import ApiError
from rft.server.evals.items import Criterion, Examiner, Tally
from rft.server.evals.sources import EvalRow, Question
from rft.server.evals.store import ITEM, RUN
from rft.server.grading.judging import grader_tools, wire_grader
from rft.server.ids import new_id
from rft.server.index import Index

if TYPE_CHECKING:
    from rft.server.services import Services

logger = logging.getLogger("rft.server")
_RUNS_AT_ONCE, _ITEMS_AT_ONCE = 2, 16
_OPEN = ("queued", "in_progress")


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a run is to do. `trees`: the graders with their header values."""

    rows: list[EvalRow]
    question: Question | None
    trees: list[dict[str, Any]]
    project: str


class EvalRuns:
    """The runs of a data folder that are under way. One thread: the server's event loop."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._slots = asyncio.Semaphore(_RUNS_AT_ONCE)
        for status in _OPEN:
            for run in index.page(RUN, limit=2**31, where={"$.status": status}).data:
                self._end(run, "failed", "server_restarted", "the server stopped while the run was under way")

    def start(self, services: Services, eval_id: str, body: dict[str, Any], work: Assignment) -> dict[str, Any]:
        """A new run, queued. body: `name`, `model`, `data_source`, `metadata` of the wire object."""
        run = {
            "object": "eval.run",
            "id": new_id("evalrun_"),
            "eval_id": eval_id,
            "created_at": int(time.time()),
            "status": "queued",
            "error": None,
            "report_url": "",
            **Tally().fields([]),
            **body,
        }
        self._index.put(RUN, run, project=work.project, parent=eval_id)
        task = asyncio.create_task(self._run(services, run, work))
        self._tasks[run["id"]] = task
        task.add_done_callback(lambda _: self._tasks.pop(run["id"], None))
        return dict(run)

    def cancel(self, run: dict[str, Any]) -> dict[str, Any]:
        """The run, canceled. Raises ApiError (400) when it has ended."""
        if run["status"] not in _OPEN:
            message = f"Run {run['id']} is {run['status']} and cannot be canceled."
            raise ApiError(message, code="eval_run_already_ended")
        task = self._tasks.get(run["id"])
        if task is not None:
            task.cancel()
        run["status"] = "canceled"
        self._index.put(RUN, run)
        return run

    def remove(self, run: dict[str, Any]) -> None:
        """With its items; one that is under way is canceled first."""
        if run["status"] in _OPEN:
            self.cancel(run)
        with self._index.transaction():
            self._index.delete_children(ITEM, run["id"])
            self._index.delete(RUN, run["id"])

    def remove_all(self, eval_id: str) -> None:
        for run in self._index.every(RUN, parent=eval_id):
            self.remove(run)

    async def close(self) -> None:
        """Interrupt what is under way; the next start says so of it."""
        for task in self._tasks.values():
            task.cancel()
        await self.ended()

    async def ended(self) -> None:
        """Return when nothing is under way of what is now."""
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _run(self, services: Services, run: dict[str, Any], work: Assignment) -> None:
        try:
            async with self._slots:
                self._index.put(RUN, run | {"status": "in_progress"})
                tally = await self._examine(services, run, work)
            self._index.put(RUN, run | {"status": "completed", **tally.fields(_names(work.trees))})
        except ApiError as error:
            self._end(run, "failed", error.code or "invalid_request", error.message)
        except RftError as error:
            problem = error.problem if isinstance(error, UserError) else str(error)
            self._end(run, "failed", getattr(error, "flag", None) or "grader_error", problem)
        except Exception:  # nobody awaits this task: without a state the run would be in progress forever
            logger.exception("eval run %s failed", run["id"])
            self._end(run, "failed", "server_error", "the server had an error while running it")

    def _end(self, run: dict[str, Any], status: str, code: str, message: str) -> None:
        self._index.put(RUN, run | {"status": status, "error": {"code": code, "message": message}})

    async def _examine(self, services: Services, run: dict[str, Any], work: Assignment) -> Tally:
        tally, tools = Tally(), list[GraderTools]()
        criteria: list[Criterion] = []
        try:
            for tree, name in zip(work.trees, _names(work.trees), strict=True):
                spec = await asyncio.to_thread(wire_grader, services, tree, "testing_criteria")
                tools.append(grader_tools(services, spec, work.project))
                criteria.append(Criterion(build_grader(spec, tools[-1]), tree, name))
                await criteria[-1].grader.start()
            examiner = Examiner(run, criteria, work.question, _asker(services, work), tally)
            for numbered in _chunks(work.rows):
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(examiner.item(row, number)) for number, row in numbered]
                self._write([task.result() for task in tasks], run["id"], work.project, tally)
        finally:
            for criterion in criteria:
                await criterion.grader.close()
            for tool in tools:
                await tool.judges.close()
        return tally

    def _write(self, items: list[dict[str, Any]], run_id: str, project: str, tally: Tally) -> None:
        with self._index.transaction():
            for item in items:
                self._index.put(ITEM, item, project=project, parent=run_id)
                tally.add_item(item)


def _asker(services: Services, work: Assignment) -> Any:
    """What sends a body to the run's model. Raises ApiError for an unknown model, or a server that answers nothing."""
    if work.question is None:
        return None
    target = services.models.target(work.question.model, work.project)

    async def ask(body: dict[str, Any]) -> Mapping[str, Any]:
        answer = await services.inference.chat(target, body)
        assert isinstance(answer, dict), "nothing was asked to be streamed"
        return answer

    return ask


def _names(trees: list[dict[str, Any]]) -> list[str]:
    return [tree["name"] for tree in trees]


def _chunks(rows: list[EvalRow]) -> Iterator[list[tuple[int, EvalRow]]]:
    """Numbered from 0."""
    for start in range(0, len(rows), _ITEMS_AT_ONCE):
        yield list(enumerate(rows[start : start + _ITEMS_AT_ONCE], start))
