"""How each engine of a pool is: a closed set of states, and what is known of one engine. Decides nothing.

| from | to | when |
|---|---|---|
| SERVING | LOADING | the pool loads new weights |
| LOADING | SERVING | the engine has them |
| SERVING, LOADING | SUSPECT | requests failed, for good or again and again, or others are away: it is asked how it is |
| SERVING, LOADING | BEHIND | it has other weights than the pool: a restarted server has its first ones |
| SERVING, LOADING | DOWN | it could not load, or several looks in a row had no answer |
| SUSPECT, DOWN | SERVING | it answers and has the pool's weights |
| SUSPECT, DOWN | BEHIND | it answers and has others |
| SUSPECT | DOWN | it does not answer, or requests in a row failed whatever it says of itself |
| BEHIND | SERVING | it has loaded the pool's weights |
| BEHIND | DOWN | it could not load them |
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import blake2b

from rft.engines import Engine, EngineLoad
from rft.errors import EngineAwayError, EngineError


class Health(StrEnum):
    """Engines that are SERVING or LOADING get requests: an engine keeps its requests apart from its load itself."""

    SERVING = "serving"
    LOADING = "loading"
    SUSPECT = "suspect"
    BEHIND = "behind"
    DOWN = "down"

    @property
    def is_asked(self) -> bool:
        return self is Health.SERVING or self is Health.LOADING


@dataclass(slots=True, eq=False)
class Member:
    """One engine of a pool. `name` is for people."""

    index: int
    name: str
    engine: Engine
    state: Health = Health.SERVING
    since: float = field(default_factory=time.monotonic)  # when it entered the state
    failure: EngineError | None = None  # why it gets no requests
    reported: EngineLoad = field(default_factory=lambda: EngineLoad(0, 0, 0.0))  # when it last said
    num_foreign: int = 0  # requests of other clients then
    num_strikes: int = 0  # requests that failed since one succeeded
    num_missed: int = 0  # looks without an answer since one had an answer
    num_outs: int = 0  # how often it got out since a request succeeded
    requests: set[asyncio.Timeout] = field(default_factory=set)  # ours, in flight
    salt: int = field(init=False)  # makes every prompt's order of the engines another one

    def __post_init__(self) -> None:
        self.salt = int.from_bytes(blake2b(b"%d" % self.index, digest_size=8).digest(), "big")

    @property
    def load(self) -> int:
        """Requests that a further one competes with; those in the engine's queue count twice."""
        return len(self.requests) + self.num_foreign + self.reported.num_waiting

    @property
    def reason(self) -> str:
        """Why it gets no requests; nothing where it does."""
        return self.failure.problem if self.failure is not None else ""

    @property
    def is_away(self) -> bool:
        """It is down because nothing answers there, which may pass."""
        return self.state is Health.DOWN and isinstance(self.failure, EngineAwayError)

    def report(self, load: EngineLoad) -> None:
        """What the engine says of itself now."""
        self.reported, self.num_missed = load, 0
        self.num_foreign = max(0, load.num_running + load.num_waiting - len(self.requests))

    def succeed(self) -> None:
        """A request ended well."""
        self.num_strikes = self.num_outs = 0

    def call_off(self) -> None:
        """End what is in flight: who waits for it gets a TimeoutError of the request's own."""
        now = asyncio.get_running_loop().time()
        for request in self.requests:
            if not request.expired():
                request.reschedule(now)
