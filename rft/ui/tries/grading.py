"""A grader on stored rollouts, in the child: reads the run, grades, compares; nothing is written.

A rollout whose grade is not there in time says so; the others keep theirs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

from rft.errors import GraderError, StorageError, UserError
from rft.graders import Grader, GraderTools, build_grader, judge_models
from rft.graders.run import validate
from rft.graders.sample import sample_of
from rft.regrade import item_of, items_of
from rft.sift import readable
from rft.store import RunStore
from rft.types import Grade, Item, Rollout
from rft.ui.lines import cut, rollout_line, trace_grade
from rft.ui.schema import GraderResult, TriedGrade
from rft.ui.tries.relay import Relay

_MAX_CONCURRENT = 8


async def grade_again(request: dict[str, Any], relay: Relay) -> dict[str, Any]:
    """request: run (its folder), grader, rollout_ids, num_rollouts; deadline_s in all, grading_s once it is ready.

    Returns a GraderResult. Raises UserError for a grader or a run that nothing can be graded with.
    """
    ends_at = time.monotonic() + request["deadline_s"]
    spec = validate(request["grader"])
    store = RunStore.open(Path(request["run"]))
    rollouts = _chosen(store, request["rollout_ids"], request["num_rollouts"])
    items = items_of(store)
    tools = GraderTools(relay.judges(judge_models(spec)))
    try:
        grader = build_grader(spec, tools)
        try:
            async with asyncio.timeout_at(_loop_time(ends_at)):
                await grader.start()
            ends_at = min(ends_at, time.monotonic() + request["grading_s"])
            found = await _grades(grader, rollouts, items, ends_at)
        finally:
            await grader.close()
    except GraderError as error:
        raise UserError(error.problem, where="grader", cure=error.cure) from None
    except TimeoutError:
        raise UserError("the grader was not ready in time", where="grader", cure="make it load faster") from None
    return _result(spec.name, rollouts, found).model_dump(mode="json")


def _chosen(store: RunStore, ids: list[str], num_rollouts: int) -> list[Rollout]:
    """Those named, else the newest that were graded. Raises UserError."""
    if ids:
        return [_named(store, rollout_id) for rollout_id in dict.fromkeys(ids)]
    found = [rollout for rollout, _ in zip(_newest(store), range(num_rollouts), strict=False)]
    if not found:
        raise UserError("the run has no graded rollouts", where="rollout_ids", cure="wait for its first step")
    return found


def _named(store: RunStore, rollout_id: str) -> Rollout:
    try:
        found = store.find(rollout_id)
    except StorageError:
        found = None
    if found is None:
        raise UserError(f"the run has no rollout {cut(rollout_id, 80)} that can be read", where="rollout_ids")
    return found


def _newest(store: RunStore) -> Iterator[Rollout]:
    for step in reversed(store.rollout_steps()):
        for rollout in reversed(readable(store.rollout_path(step))):
            if rollout.grade is not None:
                yield rollout


async def _grades(grader: Grader, rollouts: list[Rollout], items: dict[str, Item], ends_at: float) -> list[Grade | str]:
    """In the order of the rollouts; a text says why there is no grade."""
    slots = asyncio.Semaphore(_MAX_CONCURRENT)

    async def again(rollout: Rollout) -> Grade | str:
        async with slots:
            started = time.monotonic()
            try:
                grade = await grader.grade(item_of(rollout, items), sample_of(rollout), rollout.id)
            except (GraderError, UserError) as error:
                return error.problem
            return grade.model_copy(update={"latency_s": grade.latency_s or time.monotonic() - started})

    tasks = [asyncio.create_task(again(rollout)) for rollout in rollouts]
    done, late = await asyncio.wait(tasks, timeout=max(0.0, ends_at - time.monotonic()))
    for task in late:
        task.cancel()
    await asyncio.gather(*late, return_exceptions=True)
    return [task.result() if task in done else "there was no grade before the time was over" for task in tasks]


def _loop_time(ends_at: float) -> float:
    return asyncio.get_running_loop().time() + ends_at - time.monotonic()


def _result(name: str, rollouts: list[Rollout], found: list[Grade | str]) -> GraderResult:
    pairs = list(zip(rollouts, found, strict=True))
    both = [(old.grade.score, new.score) for old, new in pairs if old.grade is not None and isinstance(new, Grade)]
    return GraderResult(
        graded=[
            TriedGrade(
                rollout=rollout_line(rollout),
                grade=trace_grade(name, grade) if isinstance(grade, Grade) else None,
                problem=cut(grade) if isinstance(grade, str) else None,
            )
            for rollout, grade in pairs
        ],
        mean_old=fmean(old for old, _ in both) if both else None,
        mean_new=fmean(new for _, new in both) if both else None,
    )
