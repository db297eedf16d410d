"""Places for rollouts in flight: the earlier step first, then first come, as many as the engine can feed.

A rollout that waits for a tool costs the engine nothing, so there may be more rollouts in flight than the engine
samples at once; too many, and their contexts push each other out of its prefix cache. The number therefore follows the
engine's own queue: additive up while nobody waits there, multiplicative down when many do (Chiu and Jain 1989).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from heapq import heappop, heappush
from itertools import count

from rft.engines import EngineLoad
from rft.errors import EngineError

_PERIOD_S = 1.0
_QUEUE_SHARE = 0.5  # of the requests that run: more in the queue are too many
_FULL_CACHE = 0.9
_DOWN = 0.8


class Slots:
    """At most `limit` at once; `limit` moves between `start` and `most` while `adapt` runs.

    start: what the engine samples at once, `most`: what the config allows.
    """

    def __init__(self, start: int, most: int) -> None:
        self.limit = self._least = min(start, most)
        self._most = most
        self.num_taken = 0
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []  # a heap: step, order of arrival
        self._arrivals = count()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    async def acquire(self, step: int = 0) -> None:
        place = asyncio.get_running_loop().create_future()
        heappush(self._waiting, (step, next(self._arrivals), place))
        self._admit()
        try:
            await place
        except asyncio.CancelledError:
            if not place.cancelled():
                self.release()  # it was given to us while we were being cancelled
            raise

    def release(self) -> None:
        self.num_taken -= 1
        self._admit()

    async def adapt(self, load: Callable[[], Awaitable[EngineLoad]]) -> None:
        """Follow the engine until cancelled; it is asked only while somebody waits for a place."""
        while True:
            await asyncio.sleep(_PERIOD_S)
            if self._waiting:
                try:
                    self.follow(await load())
                except EngineError:
                    continue  # who samples meets the same failure, and says so

    def follow(self, load: EngineLoad) -> None:
        """Move the limit by what the engine says of itself."""
        if load.num_waiting > _QUEUE_SHARE * max(1, load.num_running) or load.kv_cache_use > _FULL_CACHE:
            self.limit = max(self._least, int(min(self.limit, self.num_taken) * _DOWN))
        elif load.num_waiting == 0:
            self.limit = min(self._most, self.limit + self._least)
        self._admit()

    def _admit(self) -> None:
        while self._waiting and self.num_taken < self.limit:
            place = heappop(self._waiting)[2]
            if not place.cancelled():
                self.num_taken += 1
                place.set_result(None)
