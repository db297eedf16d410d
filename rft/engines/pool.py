"""Several engines as one: every turn of a rollout, and the rollouts of one prompt, go to the engine that knows them.

The first turn is placed by rendezvous hashing of its prompt with bounded loads (Mirrokni, Thorup, Zadimoghaddam 2018):
siblings share an engine and its prefix cache, unless that engine is busier than the others. Later turns stay where the
first was. An engine that fails is left out and its requests are sampled elsewhere; it comes back once it answers and
has loaded the current weights, for it may have been started anew. When none is left because they cannot be reached,
that is an outage: requests wait, up to a limit. Never samples from an engine whose version is not the pool's.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from array import array
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from math import ceil
from typing import TypeVar

from rft.engines import Completion, Engine, EngineLoad, PublishedWeights, SamplingParams
from rft.engines.remote import Sampler
from rft.envs.base import Environment
from rft.envs.outage import OutageLimit, Outages
from rft.errors import EngineAwayError, EngineError

T = TypeVar("T")
logger = logging.getLogger(__name__)

OUR_PLACE = "the engine"  # how the name of an outage of ours begins

_MAX_OVERLOAD = 1.25  # of the mean number of requests in flight; beyond it the next engine in the order is taken
_NUM_KEPT_HOMES = 65_536
_RETURN_EVERY_S = 5.0
_MAX_OUTAGES = 20  # that one request waits for


class EnginePool:
    """Engines of the same model. Needs at least one that works.

    names: what people call them, by default their numbers. limit_s: how long all of them may be away. outages: where
    that is said and waited for; the run shares it with its tools.
    """

    def __init__(self, engines: Sequence[Engine], names: Sequence[str] = (), limit_s: float = 600.0) -> None:
        if not engines:
            raise ValueError("a pool needs an engine")
        self._engines = list(engines)
        self._names = [*names] or [str(index) for index in range(len(engines))]
        self._limit = OutageLimit(limit_s, "engine.outage_limit_s", EngineError)
        self.outages = Outages()
        self.policy_version = engines[0].policy_version
        self.max_model_len = min(engine.max_model_len for engine in engines)
        self.max_concurrent = sum(engine.max_concurrent for engine in engines)
        self.on_status: Callable[[str], None] = logger.debug
        self._in_flight = [0] * len(engines)
        self._down: dict[int, asyncio.Task[None]] = {}  # engine -> who tries to bring it back
        self._homes: OrderedDict[str, int] = OrderedDict()  # rollout -> where its first turn was sampled
        self._published: PublishedWeights | None = None
        self._changing = asyncio.Lock()  # weights, or which engines are in

    @property
    def members(self) -> list[Engine]:
        """The engines that are in."""
        return [engine for index, engine in enumerate(self._engines) if index not in self._down]

    async def start(self) -> None:
        """Start all of them; raises EngineError when one cannot be."""
        for engine in self._engines:
            engine.on_status = self.on_status
        await asyncio.gather(*(engine.start() for engine in self._engines))

    async def generate(self, prompt_ids: list[int], params: SamplingParams, rollout_id: str) -> Completion:
        """Sample where the rollout is at home. Raises EngineError when no engine is left, or all are away too long."""
        while True:
            await self._outage_over()
            index = self._place(prompt_ids, rollout_id)
            self._in_flight[index] += 1
            try:
                return await self._engines[index].generate(prompt_ids, params, rollout_id)
            except EngineError as error:
                if error.retryable:
                    raise
                self._leave_out(index, error)
            finally:
                self._in_flight[index] -= 1

    async def score(self, ids: list[int], start: int) -> list[float]:
        """What one of the engines says; the sync's probe asks each of them instead."""
        return (await self.each(lambda engine: engine.score(ids, start)))[0]

    async def each(self, ask: Callable[[Engine], Awaitable[T]], *, is_patient: bool = True) -> list[T]:
        """What every engine that is in says, at least one. Raises as `generate` does.

        is_patient: wait where none can be reached; else raise EngineAwayError.
        """
        while True:
            if is_patient:
                await self._outage_over()
            present = self._present()
            answers = await asyncio.gather(*(ask(self._engines[i]) for i in present), return_exceptions=True)
            found: list[T] = []
            for index, answer in zip(present, answers, strict=True):
                if isinstance(answer, EngineAwayError):
                    self._leave_out(index, answer)
                elif isinstance(answer, BaseException):
                    raise answer
                else:
                    found.append(answer)
            if found:
                return found
            if not is_patient:
                raise EngineAwayError(f"{self._place_of_all} cannot be reached")

    async def load(self, weights: PublishedWeights) -> None:
        """All engines sample from `weights` from now on; one that cannot load them is left out.

        Returns once one has them. Raises EngineError when none takes them, or all are away too long.
        """
        async with self._changing:
            self._published = weights
            present = self._present()
            results = await asyncio.gather(
                *(self._engines[index].load(weights) for index in present), return_exceptions=True
            )
            failures = {i: result for i, result in zip(present, results, strict=True) if result is not None}
            # those that can be reached say first why they do not take them
            for index in sorted(failures, key=lambda index: isinstance(failures[index], EngineAwayError)):
                failure = failures[index]
                if not isinstance(failure, EngineError):
                    raise failure
                self._leave_out(index, failure, is_alone=len(failures) == len(present))
            self.policy_version = weights.version
        await self._outage_over()

    async def load_metrics(self) -> EngineLoad:
        """Requests of all engines together; of the KV caches the fullest."""
        loads = await self.each(lambda engine: engine.load_metrics(), is_patient=False)
        return EngineLoad(
            num_running=sum(load.num_running for load in loads),
            num_waiting=sum(load.num_waiting for load in loads),
            kv_cache_use=max(load.kv_cache_use for load in loads),
        )

    async def close(self) -> None:
        await self.outages.close()
        for task in self._down.values():
            task.cancel()
        await asyncio.gather(*self._down.values(), return_exceptions=True)
        await asyncio.gather(*(engine.close() for engine in self._engines))

    def _present(self) -> list[int]:
        return [index for index in range(len(self._engines)) if index not in self._down]

    def _place(self, prompt_ids: list[int], rollout_id: str) -> int:
        home = self._homes.get(rollout_id)
        if home is None or home in self._down:
            home = self._choose(prompt_ids)
        self._homes[rollout_id] = home
        self._homes.move_to_end(rollout_id)
        if len(self._homes) > _NUM_KEPT_HOMES:
            self._homes.popitem(last=False)
        return home

    def _choose(self, prompt_ids: list[int]) -> int:
        """The first engine, in the prompt's own order of them, that has room."""
        key = array("q", prompt_ids).tobytes()
        candidates = self._present()
        candidates.sort(key=lambda index: hashlib.blake2b(key, digest_size=8, salt=b"%d" % index).digest())
        bound = _MAX_OVERLOAD * (sum(self._in_flight[index] for index in candidates) + 1) / len(candidates)
        return next((index for index in candidates if self._in_flight[index] + 1 <= ceil(bound)), candidates[0])

    # --- engines that are out ---

    @property
    def _place_of_all(self) -> str:
        return f"{OUR_PLACE} {self._names[0]}" if len(self._names) == 1 else f"{OUR_PLACE}s {', '.join(self._names)}"

    async def _outage_over(self) -> None:
        """Until an engine is in. Raises what the outage ends with, and EngineAwayError once nobody looks any more."""
        for _ in range(_MAX_OUTAGES):
            await self.outages.over(self._place_of_all)
            if self._present():
                return
        raise EngineAwayError(f"{self._place_of_all} cannot be reached")

    def _leave_out(self, index: int, error: EngineError, *, is_alone: bool = False) -> None:
        """Go on without the engine. Raises `error` where it is the last one, and not only away.

        is_alone: no other has done what it did not do.
        """
        if index in self._down:
            return
        is_last = is_alone or self._present() == [index]
        if is_last and not isinstance(error, EngineAwayError):
            raise error
        name = self._names[index]
        if len(self._engines) > 1:
            self.on_status(f"engine {name} is left out: {error.problem}")
            logger.warning("engine %s of %d is left out: %s", name, len(self._engines), error.problem)
        self._down[index] = asyncio.create_task(self._bring_back(index))
        if not self._present():
            self.outages.report(self._place_of_all, self._look_for_any, self._limit)

    async def _bring_back(self, index: int) -> None:
        while index in self._down:
            await asyncio.sleep(_RETURN_EVERY_S)
            if self._present():  # else the outage looks for all of them
                await self._try_again(index)

    async def _look_for_any(self) -> str | None:
        """None once an engine is in again; why not."""
        problems = await asyncio.gather(*(self._try_again(index) for index in list(self._down)))
        return None if self._present() else "; ".join(filter(None, problems))

    async def _try_again(self, index: int) -> str:
        """Take the engine in once it answers and has the weights that the others have; else why not."""
        engine = self._engines[index]
        try:
            await engine.load_metrics()
            async with self._changing:
                if index in self._down and self._published is not None:
                    await engine.load(self._published)
                returning = self._down.pop(index, None)
        except EngineError as error:
            logger.debug("engine %s is still out: %s", self._names[index], error.problem)
            return error.problem
        logger.warning("engine %s is back", self._names[index])
        if returning is not None and returning is not asyncio.current_task():
            returning.cancel()
        return ""


def outages_of(engine: Sampler, environment: Environment | None) -> Outages | None:
    """Where is said what is down of both; None where neither can be."""
    if environment is not None:
        return environment.outages
    return engine.outages if isinstance(engine, EnginePool) else None
