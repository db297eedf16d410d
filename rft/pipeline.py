"""Sampling beside training: the groups of the next `staleness` steps are sampled while one step trains.

Guarantees: step t trains on no token older than version t - 1 - staleness; with staleness 0 both take turns; a failure
of either ends the other, as itself. The event loop stays in the main thread and the trainer's work goes to one other
thread. A step's items, seeds and rollout ids do not depend on what runs beside it. Not thread-safe.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from rft.errors import EngineError
from rft.sampling import Sampling
from rft.types import Group

T = TypeVar("T")
logger = logging.getLogger(__name__)

_MAX_REFILLS = 3  # of one step, before the engine counts as one that keeps its old weights
_STOP_TIMEOUT_S = 100.0  # the longest that a micro-batch may take to end; less than the watchdog's patience


class Ending(Exception):
    """Raised in the trainer's thread, at its next micro-batch, when the run ends."""


class Pipeline:
    """What a leader samples and trains with. `staleness` and the number of steps are the config's.

    is_threaded: whether `beside` uses a thread; by default when there is something to be beside of.
    hidden_s, num_stale: since the last groups were given. Seconds of `beside` in which sampling ran; groups of that
    step that were too old and were sampled anew.
    """

    def __init__(self, sampling: Sampling, *, is_threaded: bool | None = None) -> None:
        self.sampling, self.staleness = sampling, sampling.config.training.staleness
        self._is_threaded = self.staleness > 0 if is_threaded is None else is_threaded
        self._tasks: dict[int, asyncio.Task[list[Group]]] = {}  # by step
        self._ending = threading.Event()
        self.hidden_s = 0.0
        self.num_stale = 0

    def groups(self, step: int) -> list[Group]:
        """The groups of 1-based `step`; the engine has version `step - 1`. The next ones begin to be sampled.

        Raises as `Collector.stream` does, for this step or one that is sampled ahead, and EngineError when the engine
        goes on answering with weights that are too old.
        """
        sampling = self.sampling
        with sampling.showing("train", step, "sampling", sampling.num_rollouts):
            groups = sampling.watchdog.run(self._take(step))
        groups = self._refilled(groups, step)
        self.hidden_s = 0.0
        return groups

    def beside(self, work: Callable[[], T]) -> T:
        """Do `work` while the steps ahead are sampled. Raises what it raises, or the failure of a step ahead.

        On a failure beside it, or when the run is interrupted, `work` is told by `raise_if_ending` and awaited.
        """
        return self.sampling.watchdog.run(self._beside(work)) if self._is_threaded else work()

    def raise_if_ending(self) -> None:
        """To be called by work now and then, in its thread. Raises Ending when nobody wants its result any more."""
        if self._ending.is_set():
            raise Ending

    async def _take(self, step: int) -> list[Group]:
        """Begin what may be sampled from version `step - 1`, and wait for the groups of `step`."""
        last = self.sampling.config.training.steps
        for ahead in range(step, min(step + self.staleness, last) + 1):
            if ahead not in self._tasks:
                self._tasks[ahead] = asyncio.create_task(self.sampling.sample(ahead), name=f"sampling step {ahead}")
                self._tasks[ahead].add_done_callback(_look)
        groups = await self._until(self._tasks[step])
        del self._tasks[step]
        return groups

    def _refilled(self, groups: list[Group], step: int) -> list[Group]:
        """The groups with those that hold too old a token sampled anew; the old ones stay in the store."""
        oldest, self.num_stale = step - 1 - self.staleness, 0
        for number in range(1, _MAX_REFILLS + 1):
            stale = [index for index, group in enumerate(groups) if _oldest_version(group, step) < oldest]
            if not stale:
                return groups
            self.num_stale += len(stale)
            fresh = self._again([groups[index] for index in stale], step, number)
            for index, group in zip(stale, fresh, strict=True):
                groups[index] = group
        versions = sorted({_oldest_version(group, step) for group in groups})
        if versions[0] >= oldest:
            return groups
        raise EngineError(
            f"the engine still samples from policy version {versions[0]}: step {step} needs {oldest} or later, and"
            f" its groups were sampled {_MAX_REFILLS} times anew",
            cure="restart the server that keeps old weights, then continue with --resume",
        )

    def _again(self, stale: list[Group], step: int, number: int) -> list[Group]:
        num_rollouts = sum(len(group.rollouts) for group in stale)
        with self.sampling.showing("train", step, f"sampling {len(stale)} stale groups anew", num_rollouts):
            return self.sampling.watchdog.run(self._refill(stale, number))

    async def _refill(self, stale: list[Group], number: int) -> list[Group]:
        task = asyncio.create_task(self.sampling.collector.again(stale, number))
        try:
            return await self._until(task)
        finally:
            task.cancel()

    async def _beside(self, work: Callable[[], T]) -> T:
        self._ending.clear()
        training = asyncio.get_running_loop().run_in_executor(None, work)
        try:
            return await self._until(training)
        finally:
            if not training.done():
                self._ending.set()
                await _settled(training)

    async def _until(self, awaited: asyncio.Future[T]) -> T:
        """The result of `awaited`, unless a step ahead fails before it is there."""
        while True:
            running: set[asyncio.Future[Any]] = {
                task for task in self._tasks.values() if not task.done() and task is not awaited
            }
            for task in self._tasks.values():
                if task.done():
                    task.result()  # raises what it failed with
            if awaited.done():
                return awaited.result()
            began = time.perf_counter()
            await asyncio.wait({awaited, *running}, return_when=asyncio.FIRST_COMPLETED)
            if running:
                self.hidden_s += time.perf_counter() - began


def _oldest_version(group: Group, step: int) -> int:
    """Of the weights that any token of the group was sampled from; those of `step` when nothing was sampled."""
    return min((turn.policy_version for rollout in group.rollouts for turn in rollout.turns), default=step - 1)


def _look(task: asyncio.Task[list[Group]]) -> None:
    """At a failure, so that asyncio does not report it a second time."""
    if not task.cancelled():
        task.exception()


async def _settled(training: asyncio.Future[T]) -> None:
    """Wait until the trainer's thread has heard that the run ends; one that never does is left behind."""
    await asyncio.wait([training], timeout=_STOP_TIMEOUT_S)
    if not training.done():
        logger.warning("the trainer did not stop within %.0f s", _STOP_TIMEOUT_S)
    elif not training.cancelled():
        training.exception()  # looked at: why the run ends is raised elsewhere
