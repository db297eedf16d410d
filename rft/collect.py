"""MANY rollouts: the groups of one step, sampled concurrently, with discarded rollouts replaced.

Guarantees: a group comes back with exactly the rollouts asked for, in order of attempt, whatever finished first; every
rollout, discarded ones included, went to `on_rollout` once; when too many are discarded the step ends with the cause.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rft.errors import NoProgressError
from rft.rollout import Attempt, Workshop, run_rollout
from rft.types import Group, Item, Rollout, Split, rollout_id, rollout_seed

_MIN_DISCARDED = 8  # below this many a share says nothing


@dataclass(slots=True)
class _Tally:
    """How many rollouts of this step were discarded, and the limit that ends it."""

    limit: float
    num_discarded: int = 0

    def discard(self, rollout: Rollout) -> None:
        self.num_discarded += 1
        if self.num_discarded > max(self.limit, _MIN_DISCARDED):
            raise NoProgressError(
                f"{self.num_discarded} rollouts of step {rollout.step} were discarded; "
                f"the last ended with {rollout.stop_reason}: {rollout.error}",
                cure="repair what failed, then continue with --resume",
            )


@dataclass(slots=True)
class Collector:
    """Samples groups for a run. `on_rollout` sees every finished rollout (the store, the progress bar)."""

    workshop: Workshop
    run_id: str
    run_seed: int
    on_rollout: Callable[[Rollout], None]
    _slots: asyncio.Semaphore = field(init=False)

    def __post_init__(self) -> None:
        self._slots = asyncio.Semaphore(self.workshop.limits.max_concurrent)

    async def collect(self, items: Sequence[Item], split: Split, step: int, rollouts_per_item: int) -> list[Group]:
        """One group per item, in the order of `items`.

        Raises NoProgressError when more than `max_discarded_share` of the rollouts were discarded, and EngineError
        when the engine is gone; all other rollouts are cancelled first.
        """
        tally = _Tally(self.workshop.limits.max_discarded_share * len(items) * rollouts_per_item)
        try:
            async with asyncio.TaskGroup() as tasks:
                groups = [tasks.create_task(self._group(item, split, step, rollouts_per_item, tally)) for item in items]
        except BaseExceptionGroup as failures:
            raise _leaf(failures) from None
        return [group.result() for group in groups]

    async def _group(self, item: Item, split: Split, step: int, size: int, tally: _Tally) -> Group:
        async with asyncio.TaskGroup() as tasks:
            slots = [tasks.create_task(self._slot(item, split, step, index, size, tally)) for index in range(size)]
        results = [slot.result() for slot in slots]
        return Group(item, step, [rollout for rollout, _ in results], sum(discarded for _, discarded in results))

    async def _slot(
        self, item: Item, split: Split, step: int, index: int, size: int, tally: _Tally
    ) -> tuple[Rollout, int]:
        """Attempts `index`, `index + size`, ... until one is not discarded; that one, and how many were."""
        num_discarded = 0
        while True:
            rollout = await self._attempt(item, split, step, index + num_discarded * size)
            if not rollout.stop_reason.is_discarded:
                return rollout, num_discarded
            num_discarded += 1
            tally.discard(rollout)

    async def _attempt(self, item: Item, split: Split, step: int, index: int) -> Rollout:
        attempt = Attempt(
            id=rollout_id(self.run_id, split, step, item.id, index),
            item=item,
            split=split,
            step=step,
            index=index,
            seed=rollout_seed(self.run_seed, split, step, item.id, index),
        )
        async with self._slots:
            rollout = await run_rollout(attempt, self.workshop)
        self.on_rollout(rollout)
        return rollout


def _leaf(failures: BaseExceptionGroup) -> BaseException:
    """The first cause inside nested exception groups: its siblings were cancelled because of it."""
    failure: BaseException = failures
    while isinstance(failure, BaseExceptionGroup):
        failure = failure.exceptions[0]
    return failure
