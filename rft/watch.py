"""The watchdog: runs a run's work on the event loop and, beside it, says what everybody waits for.

Writes live.json once a second while the loop runs, answers SIGUSR1 at any time (stderr and an event), reports a loop
that is blocked, and ends work that makes no progress. An outage is progress: it has a limit of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any, Self, TypeVar

from rft.engines.pool import EnginePool
from rft.engines.remote import Sampler
from rft.envs.outage import Outages
from rft.errors import NoProgressError, StorageError, WorldError
from rft.live import EngineHealth, Live, count_stops, live_lines, memory_bytes, waiting_for, waits_table
from rft.lookout import Lookout
from rft.plain import plain
from rft.store import RunStore
from rft.threads import DaemonThreads
from rft.types import StopReason
from rft.waits import Waits

T = TypeVar("T")
logger = logging.getLogger(__name__)

_LOAD_TIMEOUT_S = 1.0
_MAX_REASON = 200
_CANCEL_TIMEOUT_S = 120.0  # more than a session may take to end and to close


class Watchdog:
    """Use as a context around all that the run does on `loop`; `run` takes the place of the loop's own.

    phase: says what the run is doing. tick_s: between two looks; a loop that misses five of them is blocked.
    """

    def __init__(self, loop: asyncio.Runner, store: RunStore, phase: Callable[[], str], tick_s: float = 1.0) -> None:
        self.waits = Waits()
        self._loop, self._store, self._phase, self._tick_s = loop, store, phase, tick_s
        self._engine: Sampler | None = None
        self._outages: Outages | None = None
        self._limit_s = math.inf
        self._still_s = 0.0  # how long the loop turned and no wait ended
        self._num_ended = 0
        self._load: dict[str, float] | None = None
        self._stops_before: Counter[StopReason] = Counter()
        self._lookout = Lookout(self._report, self._report_block, 5 * tick_s)

    def __enter__(self) -> Self:
        self._loop.get_loop().set_default_executor(DaemonThreads())  # a tool that never returns must not hold the run
        self._lookout.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._lookout.__exit__(*exception)

    def attach(self, engine: Sampler, outages: Outages | None, stall_limit_s: float) -> None:
        """What the work to come samples with, and after how many seconds without progress it ends."""
        self._engine, self._outages, self._limit_s = engine, outages, stall_limit_s
        self._tick_s = min(self._tick_s, stall_limit_s / 4)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run work to its end. Raises what it raises; NoProgressError, with who waits for what, when it stands still.

        The work has then been cancelled, and what it opened is closed.
        """
        return self._loop.run(self._watched(work))

    async def _watched(self, work: Coroutine[Any, Any, T]) -> T:
        self._stops_before = Counter(self.waits.stops)
        self._still_s = 0.0
        self._lookout.beat = time.monotonic()
        working, watching = asyncio.create_task(work), asyncio.create_task(self._watch())
        try:
            await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            raise watching.result()
        finally:
            await _end(working, watching)
            self._lookout.beat = None
            with contextlib.suppress(StorageError):  # how the work ended matters more
                self._write(is_active=False)

    async def _watch(self) -> NoProgressError:
        """Look every tick; returns when the work stands still for too long."""
        looked = time.monotonic()
        while self._still_s < self._limit_s:
            await asyncio.sleep(self._tick_s)
            self._lookout.beat = time.monotonic()
            self._load = await self._ask_load()
            now = time.monotonic()
            self._note_progress(now - looked)  # nothing is awaited between this and the decision
            looked = now
            self._write(is_active=True)
        return self._no_progress()

    def _note_progress(self, elapsed_s: float) -> None:
        """Count the time in which nothing happened; time in which the loop was blocked or stopped is not counted."""
        is_down = self._outages is not None and bool(self._outages.down)
        if self.waits.num_ended != self._num_ended or not self.waits or is_down:
            self._num_ended, self._still_s = self.waits.num_ended, 0.0
        else:
            self._still_s += min(elapsed_s, 2 * self._tick_s + _LOAD_TIMEOUT_S)

    async def _ask_load(self) -> dict[str, float] | None:
        if self._engine is None:
            return None
        try:
            async with asyncio.timeout(_LOAD_TIMEOUT_S):
                return dataclasses.asdict(await self._engine.load_metrics())
        except (WorldError, OSError, TimeoutError):
            return None

    def _no_progress(self) -> NoProgressError:
        waiting, _, num_in_flight = waiting_for(self.waits)
        causes = "\n".join(f"  {line}" for line in waits_table(waiting))
        return NoProgressError(
            f"{self._phase() or 'the run'}: {num_in_flight} rollouts are in flight and none got any further for "
            f"{self._still_s:.0f} s:\n{causes}",
            cure="look at what stands first (its log, its load) and repair it, then continue with --resume; "
            "or raise rollout.stall_limit_s if such a wait is normal",
        )

    # --- what it says ---

    def live(self, *, is_active: bool) -> Live:
        """This moment. Safe in any thread."""
        waiting, longest, num_in_flight = waiting_for(self.waits)
        stops = count_stops(self._stops_before, dict(self.waits.stops))
        num_discarded = sum(num for reason, num in stops.items() if reason.is_discarded)
        return Live(
            time=time.time(),
            pid=os.getpid(),
            phase=self._phase(),
            is_active=is_active,
            num_in_flight=num_in_flight,
            num_finished=sum(stops.values()) - num_discarded,
            num_discarded=num_discarded,
            stops={reason.value: num for reason, num in stops.items()},
            still_s=round(self._still_s, 1),
            down=list(self._outages.down) if self._outages is not None else [],
            waiting=waiting,
            longest=longest,
            engine=self._load if is_active else None,
            engines=_health(self._engine),
            memory_bytes=memory_bytes(),
            num_tasks=len(asyncio.all_tasks(self._loop.get_loop())) if is_active else 0,
        )

    def _write(self, *, is_active: bool) -> None:
        self._store.write_live(self.live(is_active=is_active).model_dump())

    def _report(self) -> None:
        """Answer SIGUSR1, in the lookout's thread."""
        live = self.live(is_active=self._lookout.beat is not None)
        sys.stderr.write("\n".join(live_lines(live)) + "\n")
        sys.stderr.flush()
        self._note("info", "who waits for what (SIGUSR1)", live.model_dump())

    def _report_block(self, seconds: float, place: str) -> None:
        """In the lookout's thread. A loop that is blocked while no rollout waits costs nobody: the probe's forward."""
        if not self.waits:
            return
        text = f"the event loop has not turned for {seconds:.0f} s, all rollouts wait: the main thread is in {place}"
        logger.warning(text)
        self._note("warn", text, None)

    def _note(self, level: str, message: str, data: dict[str, Any] | None) -> None:
        with contextlib.suppress(StorageError):  # a full disk ends the run elsewhere, not the lookout
            self._store.append_event_apart("warn" if level == "warn" else "info", message, data)


def _health(engine: Sampler | None) -> list[EngineHealth]:
    """How each engine of several is."""
    now = time.monotonic()
    return [
        EngineHealth(
            name=member.name,
            state=member.state,
            for_s=round(now - member.since, 1),
            reason=plain(member.reason, max_chars=_MAX_REASON),
            num_in_flight=len(member.requests),
            num_foreign=member.num_foreign,
            num_waiting=member.reported.num_waiting,
            kv_cache_use=member.reported.kv_cache_use,
        )
        for member in (engine.health if isinstance(engine, EnginePool) else ())
    ]


async def _end(*tasks: asyncio.Task[Any]) -> None:
    """Cancel what still runs and wait until it has cleaned up; what does not end in time is left to the loop's end."""
    for task in tasks:
        task.cancel()
    done, left = await asyncio.wait(tasks, timeout=_CANCEL_TIMEOUT_S)
    for task in done:
        if not task.cancelled():
            task.exception()  # looked at, so that asyncio does not report it a second time
    if left:
        logger.warning("%d tasks did not end within %.0f s of their cancellation", len(left), _CANCEL_TIMEOUT_S)
