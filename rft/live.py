"""What a run is doing at one moment: the record in live.json, and the table that says who waits for what.

Tool names are a model's words and item ids a dataset's: they are made harmless here, once, for every reader.
"""

from __future__ import annotations

import os
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path

from pydantic import Field

from rft.plain import plain
from rft.types import Record, StopReason
from rft.waits import Wait, Waits

_NUM_EXAMPLES, _NUM_LONGEST = 3, 20
_MAX_OUT = 5  # engines that are named
_MAX_NAME = 60  # characters of a name that a model or a dataset chose
_CONSEQUENCES = ("slot", "outage")  # waits for other rollouts: never why a run stands still
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class LongWait(Record):
    """One wait that is still open."""

    rollout_id: str
    item_id: str
    what: str
    waited_s: float


class Waiting(Record):
    """All that wait for one thing, the longest first among the examples."""

    what: str
    num_waits: int
    longest_s: float
    examples: list[LongWait]


class EngineHealth(Record):
    """One engine of several (rft/engines/health.py)."""

    name: str
    state: str
    for_s: float  # how long it has been in that state
    reason: str = ""  # why it gets no requests
    num_in_flight: int  # our requests
    num_foreign: int  # those of other clients
    num_waiting: int  # of all, in its queue
    kv_cache_use: float  # a share


class Live(Record):
    """A moment of a run. Counts of rollouts are those of the phase."""

    time: float  # Unix seconds
    pid: int
    phase: str
    is_active: bool  # whether the loop runs: rollouts are sampled, an engine starts; else the trainer alone computes
    num_in_flight: int
    num_finished: int
    num_discarded: int
    stops: dict[str, int]  # rollouts that ended, by stop reason
    still_s: float  # since when no wait ended, while somebody waits and nothing is down
    down: list[str]  # endpoints that are down
    waiting: list[Waiting] = Field(default_factory=list)  # causes first, then who waits for other rollouts
    longest: list[LongWait] = Field(default_factory=list)
    engine: dict[str, float] | None = None  # null: it did not say
    engines: list[EngineHealth] = Field(default_factory=list)  # where there are several
    memory_bytes: int = 0  # resident, of the process that leads the run
    num_tasks: int = 0


def waiting_for(waits: Waits) -> tuple[list[Waiting], list[LongWait], int]:
    """The open waits by what they wait for, the longest ones, and how many rollouts are in flight."""
    now, open_waits = time.monotonic(), sorted(waits, key=lambda wait: wait.since)
    kinds: dict[str, list[Wait]] = defaultdict(list)
    for wait in open_waits:
        kinds[wait.what].append(wait)
    found = [
        Waiting(
            what=_name(what),
            num_waits=len(kind),
            longest_s=round(now - kind[0].since, 1),
            examples=[_long(wait, now) for wait in kind[:_NUM_EXAMPLES]],
        )
        for what, kind in kinds.items()
    ]
    found.sort(key=lambda kind: (kind.what in _CONSEQUENCES, -kind.longest_s))
    causes = [wait for wait in open_waits if wait.what not in _CONSEQUENCES]
    longest = [_long(wait, now) for wait in causes[:_NUM_LONGEST]]
    return found, longest, len({wait.rollout_id for wait in causes})


def _long(wait: Wait, now: float) -> LongWait:
    return LongWait(
        rollout_id=wait.rollout_id,
        item_id=_name(wait.item_id),
        what=_name(wait.what),
        waited_s=round(now - wait.since, 1),
    )


def _name(text: str) -> str:
    return plain(text, max_chars=_MAX_NAME)


def count_stops(before: Mapping[StopReason, int], now: Mapping[StopReason, int]) -> dict[StopReason, int]:
    """What was added since `before`."""
    return {reason: num - before.get(reason, 0) for reason, num in now.items() if num > before.get(reason, 0)}


def memory_bytes() -> int:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * _PAGE_BYTES


def waits_table(waiting: list[Waiting]) -> list[str]:
    """Who waits for what, one line per thing."""
    width = max((len(kind.what) for kind in waiting), default=0)
    return [
        f"{kind.num_waits:>5} wait for {kind.what:<{width}}  longest {kind.longest_s:,.1f} s, e.g. "
        + ", ".join(f"{wait.rollout_id} ({wait.item_id})" for wait in kind.examples)
        for kind in waiting
    ]


def live_lines(live: Live) -> list[str]:
    """The moment in a few lines, as a person reads it."""
    when = time.strftime("%H:%M:%S", time.localtime(live.time))
    activity = "" if live.is_active or live.num_in_flight else " (the trainer computes, nothing is sampled)"
    lines = [
        f"rft process {live.pid} at {when}: {live.phase or 'between two phases'}{activity}",
        f"  rollouts: {live.num_in_flight} in flight, {live.num_finished} finished, {live.num_discarded} discarded"
        + (f"; ended: {shares(live.stops)}" if live.stops else ""),
    ]
    if live.down:
        lines.append(f"  down, sampling pauses: {', '.join(live.down)}")
    lines += [f"  {line}" for line in waits_table(live.waiting)] or ["  nobody waits"]
    if live.waiting:
        lines.append(f"  the last wait ended {live.still_s:,.0f} s ago")
    if live.engine is not None:
        engine = live.engine
        load = f"{engine['num_running']:.0f} running, {engine['num_waiting']:.0f} waiting"
        lines.append(f"  engine: {load}, {engine['kv_cache_use']:.0%} of its cache in use")
    lines += engine_lines(live.engines)
    lines.append(f"  {live.memory_bytes / 2**20:,.0f} MiB in this process, {live.num_tasks} open tasks")
    return lines


def engine_lines(engines: list[EngineHealth]) -> list[str]:
    """How several engines are: how many are in each state, how the requests lie on them, and which are out."""
    if not engines:
        return []
    states, loads = Counter(engine.state for engine in engines), [engine.num_in_flight for engine in engines]
    lines = [f"  engines: {shares(states)}; our requests on one: {min(loads)} to {max(loads)}"]
    out = [engine for engine in engines if engine.reason]
    lines += [f"  {one.name} is {one.state} for {one.for_s:,.0f} s: {one.reason}" for one in out[:_MAX_OUT]]
    return lines + ([f"  and {len(out) - _MAX_OUT} more"] if len(out) > _MAX_OUT else [])


def shares(stops: Mapping[str, int]) -> str:
    """Counts as words, the most first: `answered 12, max_turns 3`."""
    ordered = sorted(stops.items(), key=lambda entry: (-entry[1], entry[0]))
    return ", ".join(f"{reason} {num}" for reason, num in ordered)
