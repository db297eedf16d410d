"""Looks after the engines of a pool: how busy they are, which may be asked, and the way back of one that failed.

Guarantees: an engine that is asked has the pool's weights; every look has a deadline; an engine that is out is tried
until it is back, at growing distances when it fails again before a request succeeded.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from rft.engines import PublishedWeights
from rft.engines.health import Health, Member
from rft.errors import EngineAwayError, EngineBehindError, EngineError

logger = logging.getLogger(__name__)

_LOOK_EVERY_S = 1.0
_LOOK_LIMIT_S = 10.0  # a server that is busy answers late
_HURRY_LIMIT_S = 2.0  # to be refused takes less; a server that takes longer is seen the next time
_MAX_MISSED = 3
_MAX_STRIKES = 3
_RETURN_EVERY_S = 5.0
_MAX_RETURN_S = 160.0
_ABSENT = frozenset({Health.BEHIND, Health.DOWN})


class Caretaker:
    """`on_change` gets a line when an engine leaves or is back."""

    def __init__(self, members: Sequence[Member]) -> None:
        self._members = members
        self.published: PublishedWeights | None = None
        self.version = members[0].engine.policy_version  # of the weights that all must have
        self.on_change: Callable[[str], None] = logger.warning
        self.has_looked, self.mean_load = False, 0.0  # of those that serve, when they were last looked at
        self._changed = asyncio.Event()
        self._hurried = asyncio.Event()
        self._looking: asyncio.Task[None] | None = None
        self._returning: dict[Member, asyncio.Task[None]] = {}

    def begin(self) -> None:
        """Look at them now and then, from now on."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look_on())

    async def close(self) -> None:
        tasks = [*self._returning.values(), *([self._looking] if self._looking is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def is_askable(self, member: Member) -> bool:
        """Whether it gets requests; one whose version is not the pool's gets none, whatever was thought of it."""
        if member.state is Health.SERVING and member.engine.policy_version != self.version:
            failure = EngineBehindError(f"it has version {member.engine.policy_version}, not {self.version}")
            self.enter(member, Health.BEHIND, failure)
        return member.state.is_asked

    def fail(self, member: Member, error: EngineError) -> None:
        """A request failed there; what that means for the engine."""
        if not member.state.is_asked:
            return
        member.num_strikes += 1
        if isinstance(error, EngineBehindError):
            self.enter(member, Health.BEHIND, error)
        elif not error.retryable or member.num_strikes >= _MAX_STRIKES:
            self.enter(member, Health.SUSPECT, error)

    def suspect_all(self, why: EngineError) -> None:
        """Ask all that serve at once how they are."""
        for member in self._members:
            if member.state is Health.SERVING:
                self.enter(member, Health.SUSPECT, why)

    def enter(self, member: Member, state: Health, failure: EngineError | None = None) -> None:
        """Change a member's state. What an engine that is down was asked is called off."""
        was, member.state, member.failure = member.state, state, failure
        if was is state:
            return
        member.since = time.monotonic()
        self._changed.set()
        self._changed = asyncio.Event()
        if state is Health.DOWN:
            member.call_off()
        if (was in _ABSENT) != (state in _ABSENT):
            self.on_change(f"{member.name} is {state}" + (f": {member.reason}" if failure else " again"))
        if was.is_asked and not state.is_asked:
            member.num_outs += 1
            if member not in self._returning:
                self._returning[member] = asyncio.create_task(self._bring_back(member))

    async def settled(self, member: Member) -> Health:
        """What a suspect turns out to be."""
        while member.state is Health.SUSPECT:
            await self._changed.wait()
        return member.state

    async def change(self) -> None:
        """Return when some member has entered another state."""
        await self._changed.wait()

    async def hurry(self) -> str | None:
        """Try all that are out now, and not when it is their time; None once one is asked again, else why not."""
        self._hurried.set()
        self._hurried = asyncio.Event()
        with suppress(TimeoutError):
            async with asyncio.timeout(_HURRY_LIMIT_S):
                while not any(member.state.is_asked for member in self._members):
                    await self.change()
                return None
        return "; ".join(member.reason for member in self._members)

    async def look(self) -> None:
        """Ask all that serve how busy they are."""
        self.has_looked = True
        asked = [member for member in self._members if member.state.is_asked]
        await asyncio.gather(*(self._look(member) for member in asked))
        self.mean_load = sum(member.load for member in asked) / max(1, len(asked))

    async def _look_on(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            await self.look()

    async def _look(self, member: Member) -> None:
        try:
            await _ask(member)
        except EngineBehindError as error:
            if member.state.is_asked:
                self.enter(member, Health.BEHIND, error)
        except EngineError as error:
            member.num_missed += 1
            if member.num_missed >= _MAX_MISSED and member.state.is_asked:
                self.enter(member, Health.DOWN, error)

    async def _bring_back(self, member: Member) -> None:
        try:
            await self._try_until_it_serves(member)
        except Exception as bug:  # of an engine's: it must not leave requests waiting for a verdict
            logger.exception("%s stays out", member.name)
            self.enter(member, Health.DOWN, EngineError(repr(bug)))
        finally:
            del self._returning[member]

    async def _try_until_it_serves(self, member: Member) -> None:
        wait_s = min(_RETURN_EVERY_S * 2 ** (member.num_outs - 1), _MAX_RETURN_S)
        if member.num_strikes >= _MAX_STRIKES:
            member.num_strikes = _MAX_STRIKES - 1  # when it is back, the next failure puts it out again
            self.enter(member, Health.DOWN, member.failure)
        while not member.state.is_asked:
            if member.state is Health.DOWN:
                await self._pause(wait_s)
            try:
                await self._revive(member)
            except EngineError as error:
                logger.debug("%s is still out: %s", member.name, error.problem)
                self.enter(member, Health.DOWN, error)

    async def _pause(self, wait_s: float) -> None:
        """Until the engine is to be tried again: its time has come, or somebody hurries."""
        with suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await self._hurried.wait()

    async def _revive(self, member: Member) -> None:
        """Let it serve once it answers and has the weights. Raises EngineError when it does not, or cannot load."""
        try:
            await _ask(member)
        except EngineBehindError as error:
            self.enter(member, Health.BEHIND, error)
        while member.engine.policy_version != self.version:  # newer weights may come while it loads these
            if self.published is None:
                raise EngineError(f"{member.name} has other weights, and there are none to give it")
            self.enter(member, Health.BEHIND, member.failure)
            await member.engine.load(self.published)
        self.enter(member, Health.SERVING)


async def _ask(member: Member) -> None:
    """Raises EngineError when there is no answer in time."""
    try:
        async with asyncio.timeout(_LOOK_LIMIT_S):
            member.report(await member.engine.load_metrics())
    except TimeoutError:
        raise EngineAwayError(f"{member.name} did not say within {_LOOK_LIMIT_S:.0f} s how it is") from None
