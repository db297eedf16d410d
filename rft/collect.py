"""MANY rollouts: the groups of one step, sampled concurrently, with discarded rollouts replaced.

Guarantees: a group comes back as soon as it is complete, with exactly the rollouts asked for, in order of attempt,
whatever finished first; every rollout, discarded ones included, went to `on_rollout` once; when too many are discarded
the step ends with the cause. Rollouts start in the order of their items, so that a slow one delays no other. Several
steps may be collected at once: they share the places, and the earlier step has precedence.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field

from rft.budget import StepBudget
from rft.errors import GraderFailuresError, NoProgressError, ToolsDownError, first_cause
from rft.reuse import StoredRollouts
from rft.rollout import Attempt, Workshop, run_rollout
from rft.slots import Slots
from rft.types import Group, Item, Rollout, Split, StopReason, rollout_id, rollout_seed

_MIN_COUNTED = 8  # below this many a share says nothing
_NUM_EXAMPLES = 3
_GC_THRESHOLDS = (50_000, 20, 100)
_CAUSES: dict[StopReason, type[NoProgressError]] = {
    StopReason.TOOL_FAILED: ToolsDownError,
    StopReason.GRADER_FAILED: GraderFailuresError,
}
ATTEMPTS_PER_ROUND = 1_000_000  # so that attempts of different rounds have different numbers
ATTEMPTS_PER_REFILL = 1_000 * ATTEMPTS_PER_ROUND  # and those of a group that is sampled anew


@dataclass(slots=True)
class _Tally:
    """What went wrong in this step: rollouts discarded, grades that failed, and the limits that end it."""

    max_discarded: float
    max_failed: float
    num_discarded: int = 0
    failures: list[str] = field(default_factory=list)

    def add(self, rollout: Rollout) -> None:
        if rollout.stop_reason.is_discarded:
            self.discard(rollout)
        elif rollout.grade is not None and rollout.grade.failure is not None:
            self.fail(rollout, rollout.grade.failure)

    def discard(self, rollout: Rollout) -> None:
        self.num_discarded += 1
        if self.num_discarded > max(self.max_discarded, _MIN_COUNTED):
            raise _CAUSES.get(rollout.stop_reason, NoProgressError)(
                f"{self.num_discarded} rollouts of step {rollout.step} were discarded; "
                f"the last ended with {rollout.stop_reason}: {rollout.error}",
                cure="repair what failed, then continue with --resume",
            )

    def fail(self, rollout: Rollout, failure: str) -> None:
        self.failures.append(failure)
        if len(self.failures) > max(self.max_failed, _MIN_COUNTED):
            examples = list(dict.fromkeys(self.failures))[:_NUM_EXAMPLES]
            raise GraderFailuresError(
                f"the grader failed on {len(self.failures)} rollouts of step {rollout.step}, for example:\n"
                + "\n---\n".join(examples),
                cure="repair the grader (`rft grade run` tries it on one answer), then continue with --resume;"
                " or raise rollout.max_failed_grade_share",
            )


@dataclass(slots=True)
class Collector:
    """Samples groups for a run. `on_rollout` sees every finished rollout (the store, the progress bar).

    stored: rollouts that are taken as they are instead of being sampled.
    """

    workshop: Workshop
    run_id: str
    run_seed: int
    on_rollout: Callable[[Rollout], None]
    stored: StoredRollouts = field(default_factory=StoredRollouts)
    slots: Slots = field(init=False)
    _num_busy: int = field(default=0, init=False)  # steps and evaluations being collected
    _meanwhile: AsyncExitStack = field(default_factory=AsyncExitStack, init=False)

    def __post_init__(self) -> None:
        self.slots = Slots(self.workshop.engine.max_concurrent, self.workshop.limits.max_concurrent)

    async def stream(
        self, items: Sequence[Item], split: Split, step: int, rollouts_per_item: int
    ) -> AsyncGenerator[Group]:
        """One group per item, each as soon as it is complete.

        Raises NoProgressError when more than `max_discarded_share` of the rollouts were discarded or more than
        `max_failed_grade_share` of the grades failed, and EngineError when the engine is gone; all other rollouts are
        cancelled first, as they are when the caller stops reading (`aclose`).
        """
        tally = self._tally(len(items) * rollouts_per_item)
        finished: asyncio.Queue[Group | None] = asyncio.Queue()

        async def collect_group(item: Item) -> None:
            finished.put_nowait(await self._group(item, split, step, rollouts_per_item, tally))

        async def collect_all() -> None:
            async with self._supervised() as tasks:
                for item in items:
                    tasks.create_task(collect_group(item))

        work = asyncio.create_task(collect_all())
        work.add_done_callback(lambda _: finished.put_nowait(None))
        try:
            while (group := await finished.get()) is not None:
                yield group
            await work
        finally:
            work.cancel()
            await asyncio.wait([work])

    async def collect(self, items: Sequence[Item], split: Split, step: int, rollouts_per_item: int) -> list[Group]:
        """The groups of `stream`, in the order of `items`. Raises as it does."""
        async with aclosing(self.stream(items, split, step, rollouts_per_item)) as stream:
            groups = {group.item.id: group async for group in stream}
        return [groups[item.id] for item in items]

    async def collect_adaptive(
        self, items: Sequence[Item], further: Iterator[Item], step: int, budget: StepBudget
    ) -> list[Group]:
        """Training groups within `budget` (rft/budget.py): of `items`, then of the `further` ones that were tried.

        Groups whose grades do not vary have only their first round. Raises as `stream` does.
        """
        tally = self._tally(budget.total)
        async with self._supervised() as tasks:
            groups = await self._first_rounds(items, further, step, budget, tally, tasks)
            varied = [index for index, group in enumerate(groups) if group.has_signal]
            seconds = {
                index: tasks.create_task(
                    self._group(groups[index].item, "train", step, size, tally, ATTEMPTS_PER_ROUND)
                )
                for index, size in zip(varied, budget.split_rest(len(varied)), strict=True)
                if size > 0
            }
        return [_joined(group, seconds[i].result()) if i in seconds else group for i, group in enumerate(groups)]

    @asynccontextmanager
    async def _supervised(self) -> AsyncIterator[asyncio.TaskGroup]:
        """A task group whose first failure is raised as itself; meanwhile the slots follow the engine's load."""
        try:
            async with self._busy(), asyncio.TaskGroup() as tasks:
                yield tasks
        except BaseExceptionGroup as failures:
            raise first_cause(failures) from None

    @asynccontextmanager
    async def _busy(self) -> AsyncIterator[None]:
        """What goes on while anything is collected, once however many steps that are."""
        self._num_busy += 1
        if self._num_busy == 1:
            self._meanwhile.enter_context(_rare_garbage_collection())
            following = asyncio.create_task(self.slots.adapt(self.workshop.engine.load_metrics))
            self._meanwhile.push_async_callback(_cancelled, following)
        try:
            yield
        finally:
            self._num_busy -= 1
            if self._num_busy == 0:
                ended, self._meanwhile = self._meanwhile, AsyncExitStack()  # another may begin while this ends
                await ended.aclose()

    async def _first_rounds(
        self,
        items: Sequence[Item],
        further: Iterator[Item],
        step: int,
        budget: StepBudget,
        tally: _Tally,
        tasks: asyncio.TaskGroup,
    ) -> list[Group]:
        """First rounds of `items`, and of a further item for each one that turns out not to vary."""
        started = [
            tasks.create_task(self._group(item, "train", step, budget.first, tally))
            for item in items
            if budget.take_first()
        ]
        pending = set(started)
        while pending:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                item = None if task.result().has_signal else next(further, None)
                if item is not None and budget.take_first():
                    started.append(tasks.create_task(self._group(item, "train", step, budget.first, tally)))
                    pending.add(started[-1])
        return [task.result() for task in started]

    def _tally(self, num_rollouts: int) -> _Tally:
        limits = self.workshop.limits
        return _Tally(limits.max_discarded_share * num_rollouts, limits.max_failed_grade_share * num_rollouts)

    async def again(self, groups: Sequence[Group], number: int) -> list[Group]:
        """Training groups of the same items and sizes, sampled anew, each in one round. Raises as `stream` does.

        number: from 1, how often they are sampled anew; it makes their attempts' numbers, ids and seeds new.
        """
        tally = self._tally(sum(len(group.rollouts) for group in groups))
        first = number * ATTEMPTS_PER_REFILL
        async with self._supervised() as tasks:
            fresh = [
                tasks.create_task(self._group(group.item, "train", group.step, len(group.rollouts), tally, first))
                for group in groups
            ]
        return [task.result() for task in fresh]

    async def _group(self, item: Item, split: Split, step: int, size: int, tally: _Tally, first: int = 0) -> Group:
        """One group, its attempts numbered from `first`."""
        async with asyncio.TaskGroup() as tasks:
            slots = [tasks.create_task(self._slot(item, split, step, first + i, size, tally)) for i in range(size)]
        results = [slot.result() for slot in slots]
        discards = tuple(reason for _, reasons in results for reason in reasons)
        return Group(item, step, [rollout for rollout, _ in results], discards)

    async def _slot(
        self, item: Item, split: Split, step: int, index: int, size: int, tally: _Tally
    ) -> tuple[Rollout, list[StopReason]]:
        """Attempts `index`, `index + size`, ... until one is not discarded; that one, and why the others were."""
        discards: list[StopReason] = []
        while True:
            rollout = await self._attempt(item, split, step, index + len(discards) * size)
            if rollout.id not in self.stored:  # what failed before a resume may have been repaired
                tally.add(rollout)
            if not rollout.stop_reason.is_discarded:
                return rollout, discards
            discards.append(rollout.stop_reason)

    async def _attempt(self, item: Item, split: Split, step: int, index: int) -> Rollout:
        attempt = Attempt(
            id=rollout_id(self.run_id, split, step, item.id, index),
            item=item,
            split=split,
            step=step,
            index=index,
            seed=rollout_seed(self.run_seed, split, step, item.id, index),
        )
        rollout = self.stored.take(attempt.id)
        if rollout is None:
            async with self._slot_for(attempt):
                rollout = await run_rollout(attempt, self.workshop)
        self.on_rollout(rollout)
        return rollout

    @asynccontextmanager
    async def _slot_for(self, attempt: Attempt) -> AsyncIterator[None]:
        """A place among the rollouts in flight, once no server of tools is down and an engine is there."""
        with self.workshop.waits.on(attempt.id, attempt.item.id, "slot"):
            await self.slots.acquire(attempt.step)
        try:
            if (outages := self.workshop.outages) is not None:
                with self.workshop.waits.on(attempt.id, attempt.item.id, "outage"):
                    await outages.none()
            yield
        finally:
            self.slots.release()


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])


@contextmanager
def _rare_garbage_collection() -> Iterator[None]:
    """While thousands of rollouts live, walk what is new, and seldom: a burst of 1,024 calls spent 0.5 s on it."""
    thresholds = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()


def _joined(first: Group, second: Group) -> Group:
    """Two rounds of one item as one group."""
    return Group(
        first.item,
        first.step,
        first.rollouts + second.rollouts,
        first.discards + second.discards,
        (len(first.rollouts), len(second.rollouts)),
    )
