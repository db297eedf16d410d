"""Several engines as one: every turn of a rollout, and the rollouts of one prompt, go to the engine that knows them.

The first turn is placed by rendezvous hashing of its prompt with bounded loads (Mirrokni, Thorup, Zadimoghaddam 2018):
siblings share an engine and its prefix cache, unless that engine is busier than the others. Later turns stay where the
first was. An engine that fails is left out and its requests are sampled elsewhere; it comes back once it answers and
has loaded the current weights. Never samples from an engine whose version is not the pool's.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from math import ceil

from rft.engines import Completion, Engine, EngineLoad, PublishedWeights, SamplingParams
from rft.errors import EngineError

logger = logging.getLogger(__name__)

_MAX_OVERLOAD = 1.25  # of the mean number of requests in flight; beyond it the next engine in the order is taken
_NUM_KEPT_HOMES = 65_536
_RETURN_EVERY_S = 5.0


class EnginePool:
    """Engines of the same model. Needs at least one that works."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        if not engines:
            raise ValueError("a pool needs an engine")
        self._engines = list(engines)
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
        """Sample where the rollout is at home. Raises EngineError when no engine is left."""
        while True:
            index = self._place(prompt_ids, rollout_id)
            self._in_flight[index] += 1
            try:
                return await self._engines[index].generate(prompt_ids, params, rollout_id)
            except EngineError as error:
                if error.retryable or not self._others(index):
                    raise
                self._leave_out(index, error)
            finally:
                self._in_flight[index] -= 1

    async def score(self, ids: list[int], start: int) -> list[float]:
        """What one of the engines says; the sync's probe asks each of `members` instead."""
        return await self.members[0].score(ids, start)

    async def load(self, weights: PublishedWeights) -> None:
        """All engines sample from `weights` from now on; one that cannot load them is left out."""
        async with self._changing:
            self._published = weights
            loading = {i: engine.load(weights) for i, engine in enumerate(self._engines) if i not in self._down}
            results = await asyncio.gather(*loading.values(), return_exceptions=True)
            failures = {i: result for i, result in zip(loading, results, strict=True) if result is not None}
            for index, failure in failures.items():
                if not isinstance(failure, EngineError) or len(failures) == len(loading):
                    raise failure
                self._leave_out(index, failure)
            self.policy_version = weights.version

    async def load_metrics(self) -> EngineLoad:
        """Requests of all engines together; of the KV caches the fullest."""
        loads = await asyncio.gather(*(engine.load_metrics() for engine in self.members))
        return EngineLoad(
            num_running=sum(load.num_running for load in loads),
            num_waiting=sum(load.num_waiting for load in loads),
            kv_cache_use=max(load.kv_cache_use for load in loads),
        )

    async def close(self) -> None:
        for task in self._down.values():
            task.cancel()
        await asyncio.gather(*self._down.values(), return_exceptions=True)
        await asyncio.gather(*(engine.close() for engine in self._engines))

    def _others(self, index: int) -> list[int]:
        return [other for other in range(len(self._engines)) if other != index and other not in self._down]

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
        candidates = [index for index in range(len(self._engines)) if index not in self._down]
        candidates.sort(key=lambda index: hashlib.blake2b(key, digest_size=8, salt=b"%d" % index).digest())
        bound = _MAX_OVERLOAD * (sum(self._in_flight[index] for index in candidates) + 1) / len(candidates)
        return next((index for index in candidates if self._in_flight[index] + 1 <= ceil(bound)), candidates[0])

    def _leave_out(self, index: int, error: EngineError) -> None:
        if index not in self._down:
            self.on_status(f"engine {index} is left out: {error.problem}")
            logger.warning("engine %d of %d is left out: %s", index, len(self._engines), error.problem)
            self._down[index] = asyncio.create_task(self._bring_back(index))

    async def _bring_back(self, index: int) -> None:
        """Take the engine in again once it answers and has the weights that the others have."""
        engine = self._engines[index]
        while True:
            await asyncio.sleep(_RETURN_EVERY_S)
            try:
                async with self._changing:
                    await engine.load_metrics()
                    if self._published is not None:
                        await engine.load(self._published)
                    del self._down[index]
            except EngineError as error:
                logger.debug("engine %d is still out: %s", index, error.problem)
            else:
                logger.warning("engine %d is back", index)
                return
