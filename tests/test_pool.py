"""Several engines as one: affinity, bounded loads, failures, weights that reach all of them."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest
from scale_parts import SimulatedLoop
from scripted_engine import ScriptedEngine
from test_collect import a_collector, collect
from test_rollout import CALL, a_workshop, an_item, say
from tiny import tiny_tokenizer

from rft.chat import Chat
from rft.config import RolloutConfig
from rft.engines import Engine, EngineLoad, PublishedWeights, SamplingParams
from rft.engines.health import Health, Member
from rft.engines.placement import choose, prompt_key
from rft.engines.pool import EnginePool
from rft.errors import EngineAwayError, EngineBehindError, EngineError
from rft.types import Rollout, StopReason

T = TypeVar("T")
PARAMS = SamplingParams(max_tokens=8, temperature=1.0, seed=0, stop_token_ids=())


class Dying(ScriptedEngine):
    """Answers until `is_dead`, then fails for good; once alive again it has no weights but its first ones.

    is_away: it cannot be reached. is_restarted: it was dead for a moment, which the next request finds out.
    """

    is_dead = is_away = is_restarted = False

    async def generate(self, prompt_ids, params, rollout_id):  # type: ignore[no-untyped-def]
        completion = await super().generate(prompt_ids, params, rollout_id)
        self._check()
        self._check_weights()
        return completion

    async def score(self, ids: list[int], start: int) -> list[float]:
        self._check_weights()
        return await super().score(ids, start)

    async def load(self, weights: PublishedWeights) -> None:
        self._check()
        self.is_restarted = False
        await super().load(weights)

    async def load_metrics(self):  # type: ignore[no-untyped-def]
        self._check()
        return await super().load_metrics()

    def _check(self) -> None:
        if self.is_away:
            raise EngineAwayError("the server cannot be reached")
        if self.is_dead:
            raise EngineError("the server died")

    def _check_weights(self) -> None:
        if self.is_restarted:
            self.policy_version = -1
            raise EngineBehindError("it was restarted")


def run(story: Coroutine[Any, Any, T]) -> T:
    """The story on a clock that jumps: what it sleeps takes no time, and how busy the machine is changes nothing."""
    with asyncio.Runner(loop_factory=SimulatedLoop) as runner:
        return runner.run(story)


def a_pool(size: int = 3, names: list[str] | None = None, limit_s: float = 60.0) -> tuple[EnginePool, list[Dying]]:
    chat = Chat(tiny_tokenizer())
    engines = [Dying(chat, lambda prompt, rollout_id, turn: "I21.9", first_token_s=0.001) for _ in range(size)]
    return EnginePool(engines, names or [], limit_s), engines


async def until(condition: Callable[[], bool]) -> None:
    """Return once it is so; the deadline is far."""
    async with asyncio.timeout(1000):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.1)


def version(number: int) -> PublishedWeights:
    return PublishedWeights(number, Path("unused"))


def homes(engines: list[Dying]) -> dict[str, set[int]]:
    """Rollout -> the engines that sampled it."""
    found: dict[str, set[int]] = {}
    for index, engine in enumerate(engines):
        for rollout_id, _, _ in engine.requests:
            found.setdefault(rollout_id, set()).add(index)
    return found


def test_a_rollout_stays_where_it_began_and_siblings_share_an_engine() -> None:
    pool, engines = a_pool()

    async def sample() -> None:
        for item in range(30):
            for sibling in range(4):
                for turn in range(3):
                    await pool.generate([5, item + 1] + [7] * turn, PARAMS, f"{item}-{sibling}")

    run(sample())
    found = homes(engines)
    assert all(len(at) == 1 for at in found.values())
    assert all(found[f"{item}-0"] == found[f"{item}-{sibling}"] for item in range(30) for sibling in range(4))
    assert len(set().union(*found.values())) == 3, "different prompts are spread"


def test_no_engine_gets_much_more_than_its_share() -> None:
    pool, engines = a_pool()

    async def sample() -> None:
        await asyncio.gather(*(pool.generate([5, 6], PARAMS, f"r{i}") for i in range(90)))

    run(sample())
    counts = Counter({index: len(engine.requests) for index, engine in enumerate(engines)})
    assert sum(counts.values()) == 90 and max(counts.values()) <= 1.25 * 30 + 1


def test_what_a_dead_engine_was_sampling_is_sampled_elsewhere() -> None:
    pool, engines = a_pool(2)

    async def sample() -> None:
        tasks = [asyncio.create_task(pool.generate([5, i + 1], PARAMS, f"r{i}")) for i in range(40)]
        await asyncio.sleep(0)
        engines[0].is_dead = True
        await asyncio.gather(*tasks)
        assert pool.members == [engines[1]]
        await pool.generate([5, 6], PARAMS, "later")
        await pool.close()

    run(sample())
    assert engines[0].requests and engines[1].requests[-1][0] == "later"


def test_the_last_engine_that_dies_ends_the_run() -> None:
    pool, engines = a_pool(2)

    async def sample() -> None:
        for engine in engines:
            engine.is_dead = True
        try:
            with pytest.raises(EngineError, match="the server died"):
                await pool.generate([5, 6], PARAMS, "r")
        finally:
            await pool.close()

    run(sample())


def test_an_engine_comes_back_with_the_weights_that_the_others_have() -> None:
    pool, engines = a_pool(2)

    async def story() -> None:
        await pool.load(version(1))
        engines[0].is_dead = True
        await pool.load(version(2))
        assert pool.members == [engines[1]] and pool.policy_version == 2
        assert engines[0].policy_version == 1
        engines[0].is_dead = False
        await until(lambda: pool.health[0].state is Health.SERVING)
        assert pool.members == engines
        assert engines[0].policy_version == 2
        await pool.close()

    run(story())


def test_weights_that_no_engine_takes_are_an_error() -> None:
    pool, engines = a_pool(2)
    for engine in engines:
        engine.is_dead = True

    async def story() -> None:
        with pytest.raises(EngineError, match="died"):
            await pool.load(version(1))
        await pool.close()

    run(story())
    assert pool.policy_version == 0


def test_a_step_goes_on_when_an_engine_dies_in_the_middle_of_a_turn() -> None:
    workshop = a_workshop(say(CALL, "I21.9"))
    engines = [Dying(workshop.chat, workshop.engine.script, first_token_s=0.002) for _ in range(2)]
    collector, seen = a_collector(a_workshop(say(), engine=EnginePool(engines), chat=workshop.chat))
    number = 0

    def die_at_the_fifth(rollout_text: str, rollout_id: str, turn: int) -> str:
        nonlocal number
        number += 1
        engines[0].is_dead = number > 5
        return CALL if "tool_response" not in rollout_text.rpartition("<tool_call>")[2] else "I21.9"

    for engine in engines:
        engine.script = die_at_the_fifth
    groups = collect(collector, num_items=6, size=4)
    assert [len(group.rollouts) for group in groups] == [4] * 6
    assert len(seen) == 24 and not any(group.num_discarded for group in groups), "sampled elsewhere, not discarded"
    assert len({rollout.id for rollout in seen}) == 24


# --- balance by what engines say -----------------------------------------------------------------------------------


def members(size: int) -> list[Member]:
    pool, _ = a_pool(size)
    return pool.health


def shares(engines: list[Member], num_prompts: int = 3000) -> list[float]:
    """Of the prompts, by engine, when nothing is in flight."""
    counts = Counter(choose(prompt_key([5, number]), engines).index for number in range(num_prompts))
    return [counts[member.index] / num_prompts for member in engines]


def test_prompts_are_spread_evenly_over_64_engines() -> None:
    found = shares(members(64), 32_000)
    assert min(found) > 0.8 / 64 and max(found) < 1.2 / 64


def test_an_engine_that_leaves_moves_no_prompt_of_the_others() -> None:
    engines = members(8)
    keys = [prompt_key([5, number]) for number in range(4000)]
    before = {key: choose(key, engines).index for key in keys}
    after = {key: choose(key, engines[:-1]).index for key in keys}
    assert all(after[key] == index for key, index in before.items() if index != 7)
    heirs = Counter(after[key] for key, index in before.items() if index == 7)
    assert set(heirs) == set(range(7)) and max(heirs.values()) < 2 * min(heirs.values()), "all get a part of its own"


def test_what_other_clients_send_and_a_queue_count_as_load() -> None:
    _, shared, slow, full = engines = members(4)
    shared.report(EngineLoad(40, 0, 0.5))
    slow.report(EngineLoad(10, 15, 0.5))
    full.report(EngineLoad(0, 0, 0.99))
    assert [member.load for member in engines] == [0, 40, 40, 0]
    assert shares(engines) == [1.0, 0.0, 0.0, 0.0]


def test_our_own_requests_are_not_taken_for_foreign_ones() -> None:
    async def story() -> tuple[int, int]:
        (member,) = members(1)
        member.requests = {asyncio.timeout(None) for _ in range(8)}
        member.report(EngineLoad(8, 2, 0.1))
        return member.num_foreign, member.load

    assert run(story()) == (2, 12)


def test_a_slow_engine_gets_less() -> None:
    """Four engines that sample 8 at once; one takes five times as long, and says what waits there."""
    chat = Chat(tiny_tokenizer())
    engines = [Queueing(chat, say("I21.9"), first_token_s=5 if index == 0 else 1) for index in range(4)]
    pool = EnginePool(engines)

    async def client(number: int) -> None:
        for turn in range(6):
            await pool.generate([5, number + 1, turn + 1], PARAMS, f"{number}-{turn}")

    async def story() -> None:
        await asyncio.gather(*(client(number) for number in range(64)))
        await pool.close()

    run(story())
    counts = [len(engine.requests) for engine in engines]
    assert sum(counts) == 64 * 6 and counts[0] < 0.6 * min(counts[1:])


class Queueing(ScriptedEngine):
    """Samples 8 at once and says how many wait."""

    num_asked = 0

    async def generate(self, prompt_ids, params, rollout_id):  # type: ignore[no-untyped-def]
        self.places = getattr(self, "places", None) or asyncio.Semaphore(8)
        self.num_asked += 1
        try:
            async with self.places:
                return await super().generate(prompt_ids, params, rollout_id)
        finally:
            self.num_asked -= 1

    async def load_metrics(self) -> EngineLoad:
        return EngineLoad(self.num_running, self.num_asked - self.num_running, 0.0)


def test_a_rollout_leaves_a_home_that_is_swamped_and_stays_at_the_new_one() -> None:
    pool, engines = a_pool(3)

    async def swamped() -> EngineLoad:
        return EngineLoad(20, 20, 0.5)

    async def story() -> None:
        await pool.generate([5, 6], PARAMS, "r")
        (first,) = homes(engines)["r"]
        await pool.generate([5, 6, 7], PARAMS, "r")
        assert homes(engines)["r"] == {first}
        engines[first].load_metrics = swamped  # type: ignore[method-assign]
        await asyncio.sleep(2)  # for the pool to look
        for _ in range(3):
            await pool.generate([5, 6, 7, 8], PARAMS, "r")
        await pool.close()

    run(story())
    assert len(homes(engines)["r"]) == 2
    assert sorted(len(engine.requests) for engine in engines) == [0, 2, 3]


# --- health --------------------------------------------------------------------------------------------------------


def states(pool: EnginePool) -> list[Health]:
    return [member.state for member in pool.health]


def test_weights_are_loading_until_they_are_there() -> None:
    pool, engines = a_pool(2)
    seen: list[list[Health]] = []

    async def story() -> None:
        load = engines[1].load

        async def slowly(weights: PublishedWeights) -> None:
            seen.append(states(pool))
            await load(weights)

        engines[1].load = slowly  # type: ignore[method-assign]
        await pool.load(version(1))

    run(story())
    assert seen == [[Health.LOADING, Health.LOADING]] and states(pool) == [Health.SERVING] * 2


def test_an_engine_with_other_weights_serves_nobody_until_it_has_loaded() -> None:
    """A server that was restarted: it has its first weights, and nobody said so."""
    pool, engines = a_pool(2)
    said: list[str] = []
    pool.on_change = said.append

    async def story() -> None:
        await pool.load(version(3))
        engines[0].policy_version = 0
        completions = await asyncio.gather(*(pool.generate([5, i + 1], PARAMS, f"r{i}") for i in range(20)))
        assert {completion.policy_version for completion in completions} == {3}
        await until(lambda: states(pool) == [Health.SERVING] * 2)
        await pool.close()

    run(story())
    assert engines[0].policy_version == 3
    assert said == ["engine 0 is behind: it has version 0, not 3", "engine 0 is serving again"]


def test_a_server_that_says_it_was_restarted_loads_and_the_request_goes_on_elsewhere() -> None:
    pool, engines = a_pool(2)

    async def story() -> None:
        await pool.load(version(1))
        await pool.generate([5, 6], PARAMS, "r")
        (home,) = (index for index, engine in enumerate(engines) if engine.requests)
        engines[home].failures = {1: EngineBehindError("it was restarted")}
        engines[home].policy_version = -1
        assert (await pool.generate([5, 6, 7], PARAMS, "r")).policy_version == 1
        await until(lambda: states(pool) == [Health.SERVING] * 2)
        assert engines[home].policy_version == 1 and pool.num_moved == 0, "it was not asked at all"
        await pool.close()

    run(story())


@pytest.mark.parametrize("size", [1, 2])
def test_when_all_were_restarted_what_was_asked_of_them_waits_until_they_have_loaded(size: int) -> None:
    pool, engines = a_pool(size)

    def restart() -> None:
        for engine in engines:
            engine.is_restarted = True

    async def story() -> None:
        await pool.load(version(1))
        restart()
        assert (await pool.generate([5, 6], PARAMS, "r")).policy_version == 1
        restart()
        assert (await pool.each(lambda engine: engine.score([5, 6, 7], 1)))[0] == [-0.5, -0.5]
        await until(lambda: states(pool) == [Health.SERVING] * size)
        await pool.close()

    run(story())


def test_an_engine_that_loses_its_weights_again_and_again_ends_the_request() -> None:
    pool, (engine,) = a_pool(1)

    async def story() -> None:
        async def ask(engine: Engine) -> None:
            engine.is_restarted = True  # type: ignore[attr-defined]
            await engine.score([5, 6], 1)

        await pool.load(version(1))
        with pytest.raises(EngineError, match="lost the engine 0 3 times at one request"):
            await pool.each(ask)
        await until(lambda: states(pool) == [Health.SERVING])
        assert engine.policy_version == 1
        await pool.close()

    run(story())


def test_newer_weights_that_come_while_an_engine_is_brought_back_are_loaded_too() -> None:
    pool, engines = a_pool(2)

    async def story() -> None:
        await pool.load(version(1))
        engines[0].is_dead = True
        await pool.load(version(2))
        reached, release, load = asyncio.Event(), asyncio.Event(), engines[0].load

        async def slowly(weights: PublishedWeights) -> None:
            reached.set()
            await release.wait()
            await load(weights)

        engines[0].load, engines[0].is_dead = slowly, False  # type: ignore[method-assign]
        async with asyncio.timeout(1000):
            await reached.wait()
        assert states(pool) == [Health.BEHIND, Health.SERVING]
        async with asyncio.timeout(1000):
            await pool.load(version(3))  # does not wait for it
        assert pool.members == [engines[1]]
        release.set()
        await until(lambda: states(pool) == [Health.SERVING] * 2)
        assert engines[0].policy_version == 3
        await pool.close()

    run(story())


def test_an_error_that_passes_is_tried_elsewhere_and_costs_the_engine_nothing() -> None:
    pool, engines = a_pool(2)

    async def story() -> None:
        for engine in engines:
            engine.failures = {0: EngineError("timed out", retryable=True)}
        await pool.generate([5, 6], PARAMS, "warm")  # meets the failure of one, and of the other

    with pytest.raises(EngineError, match=r"timed out \(tried: engine \d, engine \d\)") as failure:
        run(story())
    assert failure.value.retryable, "its rollout is replaced, the run goes on"
    assert states(pool) == [Health.SERVING] * 2 and [len(engine.requests) for engine in engines] == [1, 1]


def test_an_engine_whose_requests_fail_again_and_again_is_left_out_for_longer_each_time() -> None:
    pool, engines = a_pool(3)
    engines[0].failures = dict.fromkeys(range(1000), EngineError("timed out", retryable=True))

    async def story() -> None:
        for number in range(400):  # one a second
            await pool.generate([5, number + 1], PARAMS, f"r{number}")
            await asyncio.sleep(1)
        failed = len(engines[0].requests)
        assert 3 + 4 < failed < 3 + 8, "three strikes, then one after 5, 10, 20, 40, ... seconds"
        engines[0].failures = {}
        await until(lambda: states(pool) == [Health.SERVING] * 3)
        number = 100
        while len(engines[0].requests) == failed:
            number += 1
            await pool.generate([5, number], PARAMS, f"r{number}")
        assert (pool.health[0].num_outs, pool.health[0].num_strikes) == (0, 0), "a success closes the case"
        await pool.close()

    run(story())


def test_requests_in_a_server_that_went_silent_are_sampled_elsewhere() -> None:
    """A node that is lost sends no reset: its requests would wait for their own long deadline."""
    pool, engines = a_pool(3)

    async def silence(*_: object) -> EngineLoad:
        await asyncio.Event().wait()
        raise AssertionError

    async def story() -> None:
        await pool.generate([5, 6], PARAMS, "r")
        (home,) = (index for index, engine in enumerate(engines) if engine.requests)
        engines[home].hold = engines[home].load_metrics = silence  # type: ignore[assignment,method-assign]
        async with asyncio.timeout(1000):
            await pool.generate([5, 6, 7], PARAMS, "r")
        assert pool.health[home].state is Health.DOWN and "did not say" in pool.health[home].reason
        assert not pool.health[home].requests and pool.num_moved == 1
        await pool.close()

    run(story())


# --- engines that cannot be reached ----------------------------------------------------------------------------------


def away(size: int, limit_s: float = 60.0) -> tuple[EnginePool, list[Dying], list[str]]:
    """A pool, its engines, and what it says of their outages."""
    pool, engines = a_pool(size, [f"http://host{index}" for index in range(size)], limit_s)
    heard: list[str] = []
    pool.outages.on_change = heard.append
    return pool, engines, heard


@pytest.mark.parametrize("size", [1, 2, 4])
def test_requests_wait_while_no_engine_can_be_reached(size: int) -> None:
    pool, engines, heard = away(size)

    async def story() -> None:
        await pool.load(version(1))
        for engine in engines:
            engine.is_away = True
        requests = [asyncio.create_task(pool.generate([5, i + 1], PARAMS, f"r{i}")) for i in range(8)]
        await until(lambda: len(heard) == 1)
        assert pool.members == [] and not any(request.done() for request in requests)
        for engine in engines:
            engine.is_away, engine.policy_version = False, 0  # started anew, with the weights it was started with
        answers = await asyncio.gather(*requests)
        assert [answer.policy_version for answer in answers] == [1] * 8
        await until(lambda: len(heard) == 2)
        await pool.close()

    run(story())
    names = f"s {', '.join(f'http://host{index}' for index in range(size))}" if size > 1 else " http://host0"
    assert heard[0].startswith(f"the engine{names} is down: sampling pauses") and "is back after" in heard[1]


def test_engines_that_stay_away_end_the_run_with_the_cause() -> None:
    pool, (engine,), heard = away(1, limit_s=30.0)
    engine.is_away = True

    async def story() -> None:
        with pytest.raises(EngineError) as failure:
            await pool.generate([5, 6], PARAMS, "r")
        assert str(failure.value) == (
            "the engine http://host0 was down for 30 s: the server cannot be reached\n"
            "  cure: start it, then continue with --resume; or raise engine.outage_limit_s"
        )
        assert not failure.value.retryable
        await pool.close()

    run(story())
    assert len(heard) == 1


def test_weights_wait_for_an_engine_that_cannot_be_reached() -> None:
    pool, (engine,), heard = away(1)

    async def story() -> None:
        engine.is_away = True
        loading = asyncio.create_task(pool.load(version(1)))
        await until(lambda: len(heard) == 1)
        assert not loading.done()
        engine.is_away = False
        await loading
        assert engine.policy_version == pool.policy_version == 1
        await pool.close()

    run(story())


def test_all_engines_are_asked_again_when_none_could_be_reached() -> None:
    pool, engines, heard = away(2)

    async def score(engine: Engine) -> int:
        return (await engine.generate([5, 6], PARAMS, "r")).policy_version

    async def story() -> None:
        await pool.load(version(1))
        assert await pool.each(score) == [1, 1]
        engines[0].is_away = True
        assert await pool.each(score) == [1] and not heard, "the other goes on"
        engines[1].is_away = True
        asking = asyncio.create_task(pool.each(score))
        await until(lambda: len(heard) == 1)
        engines[1].is_away = False
        assert await asking == [1]
        await pool.close()

    run(story())


def test_a_prompt_at_which_the_only_engine_dies_again_and_again_fails() -> None:
    """Somebody starts it again each time: the run must not go on like that for ever."""
    pool, (engine,), heard = away(1)

    async def die(_: str) -> None:
        engine.is_away = True

    async def supervise() -> None:
        while True:
            await asyncio.sleep(20)
            engine.is_away = False

    async def story() -> None:
        supervisor = asyncio.create_task(supervise())
        with pytest.raises(EngineError, match=r"lost the engine.* 3 times at one request") as failure:
            await pool.generate([5, 6], PARAMS, "r")
        assert failure.value.retryable, "its rollout is discarded, the run goes on"
        supervisor.cancel()
        await pool.close()

    engine.hold = die
    run(story())
    assert len(heard) == 6


def test_the_time_of_a_rollout_stands_still_while_the_engine_is_away() -> None:
    pool, (engine,), heard = away(1)
    engine.is_away = True

    async def story() -> list[Rollout]:
        limits = RolloutConfig(max_tokens_per_turn=400, time_limit_s=8)
        collector, seen = a_collector(a_workshop(say("I21.9"), engine=pool, environment=None, limits=limits))
        collecting = asyncio.create_task(collector.collect([an_item()], "train", 1, 4))
        await until(lambda: len(heard) == 1)
        await asyncio.sleep(20)  # more than twice the time limit of a rollout
        engine.is_away = False
        await collecting
        await pool.close()
        return seen

    assert {rollout.stop_reason for rollout in run(story())} == {StopReason.ANSWERED}


def test_closing_ends_the_wait_for_an_engine() -> None:
    pool, (engine,), heard = away(1)
    engine.is_away = True

    async def story() -> None:
        request = asyncio.create_task(pool.generate([5, 6], PARAMS, "r"))
        await until(lambda: len(heard) == 1)
        await pool.close()
        with pytest.raises(EngineError):
            await request

    run(story())


# --- requests that break engines -------------------------------------------------------------------------------------


class Fragile(ScriptedEngine):
    """Dies of a prompt with the id 200 in it, at once, with all that is in flight; refuses one with 201."""

    is_dead = False

    async def generate(self, prompt_ids, params, rollout_id):  # type: ignore[no-untyped-def]
        if 201 in prompt_ids:
            raise EngineError("refused a request: HTTP 400")
        self.is_dead = self.is_dead or 200 in prompt_ids
        if self.is_dead:
            raise EngineError("the server died")
        completion = await super().generate(prompt_ids, params, rollout_id)
        if self.is_dead:
            raise EngineError("the server died")
        return completion

    async def load_metrics(self) -> EngineLoad:
        if self.is_dead:
            raise EngineError("the server died")
        return await super().load_metrics()


def a_fragile_pool(size: int) -> tuple[EnginePool, list[Fragile]]:
    chat = Chat(tiny_tokenizer())
    engines = [Fragile(chat, say("I21.9"), first_token_s=0.001) for _ in range(size)]
    return EnginePool(engines), engines


@pytest.mark.parametrize(("size", "num_dead"), [(3, 2), (8, 3)])
def test_a_request_that_kills_engines_fails_its_rollouts_and_not_the_pool(size: int, num_dead: int) -> None:
    pool, engines = a_fragile_pool(size)

    async def poison(attempt: int) -> EngineError:
        with pytest.raises(EngineError) as failure:
            await pool.generate([5, 200], PARAMS, f"poison-{attempt}")
        return failure.value

    async def story() -> None:
        others = [asyncio.create_task(pool.generate([5, i + 1], PARAMS, f"r{i}")) for i in range(30)]
        errors = [await poison(attempt) for attempt in range(10)]  # a rollout that is discarded is attempted again
        assert all(error.retryable for error in errors)
        assert "died while they sampled rollouts of this prompt" in str(errors[-1])
        assert len(await asyncio.gather(*others)) == 30
        assert sum(engine.is_dead for engine in engines) == num_dead
        assert states(pool).count(Health.SERVING) == size - num_dead
        await pool.close()

    run(story())


def test_a_request_that_is_refused_everywhere_fails_its_rollout_and_takes_no_engine_out() -> None:
    pool, _ = a_fragile_pool(3)

    async def story() -> None:
        await pool.generate([5, 6], PARAMS, "r")
        with pytest.raises(EngineError, match="HTTP 400") as failure:
            await pool.generate([5, 201], PARAMS, "refused")
        assert failure.value.retryable and states(pool) == [Health.SERVING] * 3
        await pool.close()

    run(story())


def test_a_prompt_that_was_at_deaths_by_chance_is_sampled_again_with_new_weights() -> None:
    pool, engines = a_fragile_pool(4)

    async def story() -> None:
        with pytest.raises(EngineError):
            await pool.generate([5, 200], PARAMS, "r")
        engines[-1].is_dead = False
        with pytest.raises(EngineError, match="of this prompt"):
            await pool.generate([5, 200], PARAMS, "s")
        await pool.load(version(1))
        with pytest.raises(EngineError, match="the server died"):
            await pool.generate([5, 200], PARAMS, "t")
        await pool.close()

    run(story())


def test_a_rollout_goes_on_with_its_ids_when_its_engine_dies_between_two_turns() -> None:
    """The next engine gets exactly what the first one read and said; the turn is counted once."""
    workshop = a_workshop(say(CALL, "I21.9"))
    engines = [Dying(workshop.chat, by_prompt, first_token_s=0.002) for _ in range(3)]
    pool = EnginePool(engines)
    collector, seen = a_collector(a_workshop(say(), engine=pool, chat=workshop.chat))

    def die_after_a_turn(prompt: str, rollout_id: str, turn: int) -> str:
        for engine in engines:
            if len(engine.requests) == 4 and not any(other.is_dead for other in engines):
                engine.is_dead = True
        return by_prompt(prompt, rollout_id, turn)

    for engine in engines:
        engine.script = die_after_a_turn
    groups = collect(collector, num_items=6, size=4)
    assert sum(engine.is_dead for engine in engines) == 1 and pool.num_moved > 0
    assert [len(group.rollouts) for group in groups] == [4] * 6 and not any(group.discards for group in groups)
    moved = [rollout for rollout in seen if len(homes(engines)[rollout.id]) > 1]
    assert moved
    for rollout in seen:
        sampled_from = [ids for engine in engines for name, ids, _ in engine.requests if name == rollout.id]
        first, second = rollout.turns
        assert first.input_ids in sampled_from
        assert first.input_ids + first.output_ids + second.input_ids in sampled_from
        assert rollout.num_sampled_tokens == len(first.output_ids) + len(second.output_ids)


def by_prompt(prompt: str, rollout_id: str, turn: int) -> str:
    return "I21.9" if "</tool_call>" in prompt.rpartition("Heart attack")[2] else CALL
