"""What scripts/simulate_scale simulates with: a clock that jumps, engines with places and speeds, a slow tool.

The clock is the event loop's: nothing is waited for, so that what is measured in simulated seconds does not depend on
the machine, and a run takes as long as its work on the CPU.
"""

from __future__ import annotations

import asyncio
import random
import selectors
from collections import Counter, defaultdict
from typing import Any

from rft.engines import Completion, EngineLoad, PublishedWeights, SamplingParams
from rft.engines.gate import Gate
from rft.envs.base import Session
from rft.envs.outage import Outages
from rft.errors import EngineBehindError, EngineError
from rft.types import Item, ToolCall, ToolResult

TOKEN_S = 0.05  # of one request alone
RELOAD_S = 2.0  # of a whole model from a shared disk
DRAIN_LIMIT_S = 300.0


class _JumpingSelector(selectors.DefaultSelector):
    """Instead of waiting for the next timer it says that the time has come."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0 if timeout is not None else None)
        if not ready and timeout:
            self.now += timeout
        return ready


class SimulatedLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock starts at 0 and jumps from timer to timer."""

    def __init__(self) -> None:
        self._clock = _JumpingSelector()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now


class SimulatedEngine:
    """Samples `places` requests at once; one alone at `token_s` a token, all together at twice that.

    turns: what each rollout says; said: how many of them, counted by all engines.
    kind: `merged` weights wait until nothing is in flight, and load in RELOAD_S; `adapter` ones let requests finish.
    num_foreign: places that another client takes all the time.
    """

    max_model_len = 4096

    def __init__(self, turns: list[list[int]], said: Counter[str], places: int, kind: str) -> None:
        self.policy_version, self.max_concurrent = 0, places
        self.on_status: Any = None
        self.num_foreign, self.token_s, self.is_dead = 0, TOKEN_S, False
        self.num_requests = 0
        self.waited_s: defaultdict[str, float] = defaultdict(float)  # by rollout, for a place
        self._turns, self._said, self._kind = turns, said, kind
        self._gate, self._places, self._num_asked, self._num_running = Gate(), asyncio.Semaphore(places), 0, 0

    async def start(self) -> None:
        return None

    def take_places(self, count: int) -> None:
        """Another client has them from now on."""
        self.num_foreign = count
        self._places = asyncio.Semaphore(self.max_concurrent - count)

    async def generate(self, prompt_ids: list[int], params: SamplingParams, rollout_id: str) -> Completion:
        ids = self._turns[self._said[rollout_id]]
        clock = asyncio.get_running_loop().time
        self.num_requests += 1
        self._num_asked += 1
        asked = clock()
        try:
            async with self._gate.request(), self._places:
                self.waited_s[rollout_id] += clock() - asked
                version = self.policy_version
                completion = await self._sample(ids, version)
        finally:
            self._num_asked -= 1
        self._said[rollout_id] += 1
        return completion

    async def _sample(self, ids: list[int], version: int) -> Completion:
        self._check()
        self._num_running += 1
        num_busy = min(self._num_asked + self.num_foreign, self.max_concurrent)  # all that come when a load is over
        slowdown = 1 + num_busy / self.max_concurrent
        try:
            await asyncio.sleep(self.token_s * slowdown * len(ids))
        finally:
            self._num_running -= 1
        self._check()
        return Completion(list(ids), [-0.5] * len(ids), "stop", version)

    def _check(self) -> None:
        if self.is_dead:
            raise EngineError("the server died")
        if self.policy_version < 0:
            raise EngineBehindError("it was restarted")

    def restart(self) -> None:
        """Alive again, with its first weights."""
        self.is_dead, self.policy_version = False, -1

    async def load(self, weights: PublishedWeights) -> None:
        if self.is_dead:
            raise EngineError("the server died")
        if self._kind == "merged":
            async with self._gate.load(DRAIN_LIMIT_S):
                await asyncio.sleep(RELOAD_S)
        self.policy_version = weights.version

    async def score(self, ids: list[int], start: int) -> list[float]:
        return [-0.5] * (len(ids) - start)

    async def load_metrics(self) -> EngineLoad:
        self._check()
        running = self._num_running + self.num_foreign
        return EngineLoad(running, self._num_asked - self._num_running, running / self.max_concurrent * 0.9)

    async def close(self) -> None:
        return None


class SlowTools:
    """An environment in this process whose tool takes 0.5 to 3 simulated seconds."""

    def __init__(self, result: str) -> None:
        self.outages, self.result, self.draw = Outages(), result, random.Random(0)

    async def open(self, item: Item, rollout_id: str) -> Session:
        return _SlowSession(self)


class _SlowSession(Session):
    def __init__(self, tools: SlowTools) -> None:
        self._tools = tools

    async def call(self, call: ToolCall) -> ToolResult:
        await asyncio.sleep(self._tools.draw.uniform(0.5, 3.0))
        return ToolResult(call_id=call.call_id, output=self._tools.result)

    async def close(self) -> None:
        return None
