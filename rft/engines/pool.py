"""Several engines as one: every turn of a rollout, and the rollouts of one prompt, go to the engine that knows them.

Where a rollout begins is placement.py, which engines are asked is caretaker.py. Guarantees: nothing is sampled by an
engine whose weights are not the pool's; a request that an engine lost is sampled by another, so that its rollout goes
on; a prompt at which engines die fails its rollouts and leaves engines to the others, where there are more than two;
when none can be reached, that is an outage: requests wait, up to a limit.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, defaultdict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from rft.engines import Completion, Engine, EngineLoad, PublishedWeights, SamplingParams, SleepingEngine
from rft.engines.caretaker import Caretaker, logger
from rft.engines.health import Health, Member
from rft.engines.placement import choose, is_swamped, prompt_key
from rft.engines.remote import Sampler
from rft.envs.base import Environment
from rft.envs.outage import OutageLimit, Outages
from rft.errors import EngineAwayError, EngineBehindError, EngineError

T = TypeVar("T")

OUR_PLACE = "the engine"  # how the name of an outage of ours begins

_NUM_KEPT_HOMES = 65_536
_MAX_MOVES = 2  # of one request, to other engines
_MAX_OUTAGES = 3  # and losses of weights that one request waits for: what it asks may be what the engines die of
_VERDICT_LIMIT_S = 600.0  # while no engine serves and one is being loaded


@dataclass(frozen=True, slots=True)
class _Home:
    """Where a rollout is sampled. key: of its first prompt, which its siblings share."""

    member: Member
    key: int


class EnginePool:
    """Engines of the same model. Needs at least one that works.

    names: what people call them, by default their numbers. limit_s: how long all of them may be away. outages: where
    that is said and waited for; the run shares it with its tools.
    """

    def __init__(self, engines: Sequence[Engine], names: Sequence[str] = (), limit_s: float = 600.0) -> None:
        if not engines:
            raise ValueError("a pool needs an engine")
        names = names or [str(index) for index in range(len(engines))]
        pairs = enumerate(zip(names, engines, strict=True))
        self.health = [Member(index, f"engine {name}", engine) for index, (name, engine) in pairs]
        self.outages = Outages()
        self._limit = OutageLimit(limit_s, "engine.outage_limit_s", EngineError)
        self._place_of_all = f"{OUR_PLACE}{'s' * (len(names) > 1)} {', '.join(names)}"
        self.num_moved = 0  # requests that went on elsewhere
        self.policy_version = engines[0].policy_version
        self.max_model_len = min(engine.max_model_len for engine in engines)
        self.max_concurrent = sum(engine.max_concurrent for engine in engines)
        self.on_status: Callable[[str], None] = logger.debug
        self._caretaker = Caretaker(self.health)
        self._max_moves = min(_MAX_MOVES, max(1, len(engines) - 2))
        self._homes: OrderedDict[str, _Home] = OrderedDict()  # by rollout
        self._deaths: defaultdict[int, set[tuple[Member, float]]] = defaultdict(set)  # of engines, by prompt
        self._loading = asyncio.Lock()
        self._sleeping: list[tuple[Member, SleepingEngine]] = []

    @property
    def members(self) -> list[Engine]:
        """The engines that are asked."""
        return [member.engine for member in self.health if member.state.is_asked]

    @property
    def on_change(self) -> Callable[[str], None]:
        """Gets a line when an engine leaves or is back."""
        return self._caretaker.on_change

    @on_change.setter
    def on_change(self, tell: Callable[[str], None]) -> None:
        self._caretaker.on_change = tell

    async def start(self) -> None:
        """Start all of them; raises EngineError when one cannot be."""
        for member in self.health:
            member.engine.on_status = self.on_status
        await asyncio.gather(*(member.engine.start() for member in self.health))

    async def generate(self, prompt_ids: list[int], params: SamplingParams, rollout_id: str) -> Completion:
        """Sample where the rollout is at home, or elsewhere when that fails.

        Raises EngineError: retryable when this request failed wherever it was tried, not retryable when no engine is
        left.
        """
        self._caretaker.begin()
        return await self._patiently(lambda: self._generate(prompt_ids, params, rollout_id))

    async def _generate(self, prompt_ids: list[int], params: SamplingParams, rollout_id: str) -> Completion:
        """As `generate` does. Raises EngineAwayError when no engine can be reached, EngineBehindError when one has
        lost its weights: neither says anything of the request.
        """
        tried: list[Member] = []
        while True:
            home = await self._place(prompt_ids, rollout_id, tried)
            try:
                completion = await self._ask(home.member, prompt_ids, params, rollout_id)
            except EngineBehindError as error:
                self._caretaker.fail(home.member, error)
                raise
            except EngineError as error:
                tried.append(home.member)
                await self._note(home, error)
                if len(tried) > self._max_moves and not await self._are_all_away():
                    where = ", ".join(member.name for member in tried)
                    raise EngineError(f"{error.problem} (tried: {where})", retryable=True, cure=error.cure) from error
            else:
                home.member.succeed()
                self._deaths.pop(home.key, None)
                self.num_moved += bool(tried)
                return completion

    async def _ask(self, member: Member, ids: list[int], params: SamplingParams, rollout_id: str) -> Completion:
        """Raises EngineError also when the engine goes down before it has answered."""
        request = asyncio.timeout(None)
        try:
            async with request:
                member.requests.add(request)
                return await member.engine.generate(ids, params, rollout_id)
        except TimeoutError:
            if not request.expired():
                raise
            raise EngineError(f"{member.name} is {member.state}: {member.reason}", retryable=True) from None
        finally:
            member.requests.discard(request)

    async def _note(self, home: _Home, error: EngineError) -> None:
        """What a failed request says of its engine, and of its prompt."""
        self._caretaker.fail(home.member, error)
        if await self._caretaker.settled(home.member) is Health.DOWN:
            self._deaths[home.key].add((home.member, home.member.since))

    async def _place(self, prompt_ids: list[int], rollout_id: str, tried: list[Member]) -> _Home:
        """Raises EngineError when no engine is there to take the request."""
        home = self._homes.get(rollout_id)
        key = prompt_key(prompt_ids) if home is None else home.key
        if len(self._deaths.get(key, ())) > self._max_moves and not await self._are_all_away():
            raise EngineError("engines died while they sampled rollouts of this prompt", retryable=True)
        if home is None or not self._is_good(home, tried):
            candidates = await self._candidates(tried)
            home = self._homes[rollout_id] = _Home(choose(key, candidates), key)
            if len(self._homes) > _NUM_KEPT_HOMES:
                self._homes.popitem(last=False)
        self._homes.move_to_end(rollout_id)
        return home

    def _is_good(self, home: _Home, tried: list[Member]) -> bool:
        if home.member in tried or not self._caretaker.is_askable(home.member):
            return False
        return not is_swamped(home.member, self._caretaker.mean_load)

    async def _candidates(self, tried: list[Member]) -> list[Member]:
        """Engines that were not tried yet, once there are any. Raises EngineError when none will be there soon."""
        if found := [member for member in self._asked() if member not in tried]:
            return found
        try:
            async with asyncio.timeout(_VERDICT_LIMIT_S):
                while any(member.state is not Health.DOWN for member in self.health if member not in tried):
                    await self._caretaker.change()
                    if found := [member for member in self._asked() if member not in tried]:
                        return found
        except TimeoutError:
            pass  # those that were to load did not in time
        raise self._none_left()

    def _none_left(self) -> EngineError:
        if all(member.is_away for member in self.health):
            return EngineAwayError(f"{self._place_of_all} cannot be reached")
        is_any_left = any(member.state.is_asked for member in self.health)
        reasons = "; ".join(f"{member.name}: {member.reason}" for member in self.health if member.reason)
        problem = f"no engine is left to try: {reasons}" if is_any_left else f"all engines are down: {reasons}"
        cures = {member.failure.cure for member in self.health if member.failure is not None}
        cure = cures.pop() if len(cures) == 1 else ""
        cure = cure or "see the engines' logs, continue with --resume"
        return EngineError(problem, retryable=is_any_left, cure=cure)

    async def score(self, ids: list[int], start: int) -> list[float]:
        """What one of the engines says; the sync's probe asks each of them instead."""
        return (await self.each(lambda engine: engine.score(ids, start)))[0]

    async def each(self, ask: Callable[[Engine], Awaitable[T]]) -> list[T]:
        """What every engine that is asked says, at least one; those that fail are noted, the others go on.

        Raises what `ask` does: EngineError only when every engine failed.
        """
        return await self._patiently(lambda: self._each(ask))

    async def _each(self, ask: Callable[[Engine], Awaitable[T]]) -> list[T]:
        members = await self._candidates([])
        answers = await asyncio.gather(*(ask(member.engine) for member in members), return_exceptions=True)
        found: list[T] = []
        failures: list[EngineError] = []
        for member, answer in zip(members, answers, strict=True):
            if isinstance(answer, EngineError):
                self._caretaker.fail(member, answer)  # it loads before it serves again
                failures.append(answer)
            elif isinstance(answer, BaseException):
                raise answer
            else:
                found.append(answer)
        if not found:
            await self._are_all_away()
            raise min(failures, key=_patience)
        return found

    async def sleep(self) -> None:
        """Raises EngineError when one that serves does not: its memory would be missed."""
        self._sleeping = [(one, one.engine) for one in self._asked() if isinstance(one.engine, SleepingEngine)]
        await asyncio.gather(*(engine.sleep() for _, engine in self._sleeping))

    async def wake(self) -> None:
        """One that does not wake is left out."""
        failures = await asyncio.gather(*(engine.wake() for _, engine in self._sleeping), return_exceptions=True)
        for (member, _), failure in zip(self._sleeping, failures, strict=True):
            if isinstance(failure, EngineError):
                self._caretaker.fail(member, failure)
            elif failure is not None:
                raise failure
        self._sleeping = []

    async def load(self, weights: PublishedWeights) -> None:
        """All engines sample from `weights` from now on; one that cannot load them is left out until it can."""
        async with self._loading:
            self._deaths.clear()
            members = await self._patiently(lambda: self._candidates([]))
            self._caretaker.published, self._caretaker.version = weights, weights.version
            for member in members:
                self._caretaker.enter(member, Health.LOADING)
            failures = await asyncio.gather(
                *(member.engine.load(weights) for member in members), return_exceptions=True
            )
            for member, failure in zip(members, failures, strict=True):
                if failure is None and member.state is Health.LOADING:
                    self._caretaker.enter(member, Health.SERVING)
                elif isinstance(failure, EngineError):
                    self._caretaker.enter(member, Health.DOWN, failure)
                elif failure is not None:
                    raise failure
            await self._patiently(lambda: self._candidates([]))
            self.policy_version = weights.version

    async def _patiently(self, ask: Callable[[], Awaitable[T]]) -> T:
        """What `ask` gives, asked again after an outage, and of an engine that had to load its weights again.

        Raises what `ask` does, and what a long outage ends with.
        """
        for _ in range(_MAX_OUTAGES):
            with suppress(EngineAwayError, EngineBehindError):
                return await ask()
            if all(member.is_away for member in self.health):
                self.outages.report(self._place_of_all, self._caretaker.hurry, self._limit)
                await self.outages.over(self._place_of_all)
                self._deaths.clear()  # all of them at once: of the network, or of a machine
        raise EngineError(f"lost {self._place_of_all} {_MAX_OUTAGES} times at one request", retryable=True)

    async def _are_all_away(self) -> bool:
        """Asks those of which nobody knows, where some are away."""
        if any(member.is_away for member in self.health):
            self._caretaker.suspect_all(EngineAwayError("others cannot be reached"))
        for member in self.health:
            await self._caretaker.settled(member)
        return all(member.is_away for member in self.health)

    async def load_metrics(self) -> EngineLoad:
        """Requests of all engines together, as they last said; of the KV caches the fullest."""
        self._caretaker.begin()
        if not self._caretaker.has_looked:
            await self._caretaker.look()
        loads = [member.reported for member in self._asked()]
        return EngineLoad(
            num_running=sum(load.num_running for load in loads),
            num_waiting=sum(load.num_waiting for load in loads),
            kv_cache_use=max((load.kv_cache_use for load in loads), default=0.0),
        )

    async def close(self) -> None:
        await self.outages.close()
        await self._caretaker.close()
        await asyncio.gather(*(member.engine.close() for member in self.health))

    def _asked(self) -> list[Member]:
        return [member for member in self.health if self._caretaker.is_askable(member)]


def _patience(failure: EngineError) -> int:
    """Of failures of all engines the one to go by is the least: who has to load serves again soonest."""
    if isinstance(failure, EngineBehindError):
        return 0
    return 2 if isinstance(failure, EngineAwayError) else 1


def outages_of(engine: Sampler, environment: Environment | None) -> Outages | None:
    """Where is said what is down of both; None where neither can be."""
    if environment is not None:
        return environment.outages
    return engine.outages if isinstance(engine, EnginePool) else None
