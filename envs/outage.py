"""Endpoints that are down, tools or engines: who waits for them, how long, and what is said.

While an endpoint is down, calls to it wait instead of failing, no new rollout starts, and the time limits of rollouts
stand still. When it answers again, everything goes on; when it stays away too long, the run ends with the cause.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rft.errors import ToolsDownError, WorldError

logger = logging.getLogger(__name__)

_FIRST_PROBE_S, _MAX_PROBE_S = 0.5, 10.0  # between two looks, doubled each time


@dataclass(frozen=True, slots=True)
class OutageLimit:
    """How long an endpoint may be down, the field of the config that says so, and what is raised beyond it."""

    seconds: float = 600.0
    field: str = "environment.outage_limit_s"
    error: type[WorldError] = ToolsDownError


class Outages:
    """What is down now. `on_change` gets a sentence when an endpoint goes and when it is back."""

    def __init__(self, limit_s: float = 600.0) -> None:
        self.on_change: Callable[[str], None] = logger.warning
        self.num_reported = 0  # so far: who fails can tell that something was down meanwhile
        self._limit = OutageLimit(limit_s)
        self._down: dict[str, asyncio.Task[None]] = {}  # endpoint -> who looks after it
        self._failure: WorldError | None = None
        self._changed = asyncio.Condition()
        self._timers: dict[asyncio.Timeout, float] = {}  # a rollout's time limit -> seconds left when it was stopped

    @property
    def down(self) -> list[str]:
        """The endpoints that are down."""
        return list(self._down)

    async def none(self) -> None:
        """Wait until nothing is down. Raises what its limit names when something stays down too long."""
        await self._wait(lambda: not self._down)

    async def over(self, place: str) -> None:
        """Wait until `place` is up; at once when it is. Raises as `none` does."""
        await self._wait(lambda: place not in self._down)

    def report(self, place: str, probe: Callable[[], Awaitable[str | None]], limit: OutageLimit | None = None) -> None:
        """`place` is down: look at it with `probe` (None: it is up) until it is back.

        limit: another than that of the tools.
        """
        if place not in self._down and self._failure is None:
            if not self._down:
                self._stop_timers()
            limit = limit or self._limit
            self.num_reported += 1
            self._down[place] = asyncio.create_task(self._watch(place, probe, limit))
            self.on_change(f"{place} is down: sampling pauses until it is back, at most {limit.seconds:.0f} s")

    @contextmanager
    def patience(self, timer: asyncio.Timeout) -> Iterator[None]:
        """While it lasts, the timer stands still during outages."""
        self._timers[timer] = 0.0
        if self._down:
            self._stop(timer)
        try:
            yield
        finally:
            del self._timers[timer]

    async def close(self) -> None:
        """Stop looking; whoever still waits gets an error."""
        for task in list(self._down.values()):
            task.cancel()
        await asyncio.gather(*self._down.values(), return_exceptions=True)

    async def _wait(self, is_over: Callable[[], bool]) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._failure is not None or is_over())
        if self._failure is not None:
            raise self._failure

    async def _watch(self, place: str, probe: Callable[[], Awaitable[str | None]], limit: OutageLimit) -> None:
        clock = asyncio.get_running_loop().time
        started, pause_s, problem = clock(), _FIRST_PROBE_S, ""
        try:
            while (down_s := clock() - started) < limit.seconds:
                await asyncio.sleep(min(pause_s, limit.seconds - down_s))
                pause_s = min(_MAX_PROBE_S, 2 * pause_s)
                problem = await probe() or ""
                if not problem:
                    self.on_change(f"{place} is back after {clock() - started:.0f} s: sampling goes on")
                    return
            self._failure = limit.error(
                f"{place} was down for {limit.seconds:.0f} s: {problem}",
                cure=f"start it, then continue with --resume; or raise {limit.field}",
            )
        finally:
            del self._down[place]
            if not self._down:
                self._start_timers()
            async with self._changed:
                self._changed.notify_all()

    def _stop_timers(self) -> None:
        for timer in self._timers:
            self._stop(timer)

    def _stop(self, timer: asyncio.Timeout) -> None:
        when = timer.when()
        if when is not None and not timer.expired():
            self._timers[timer] = when - asyncio.get_running_loop().time()
            timer.reschedule(None)

    def _start_timers(self) -> None:
        now = asyncio.get_running_loop().time()
        for timer, left_s in self._timers.items():
            if timer.when() is None and not timer.expired():
                timer.reschedule(now + left_s)
