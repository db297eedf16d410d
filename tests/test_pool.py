"""Several engines as one: affinity, bounded loads, failures, weights that reach all of them."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import pytest
from scripted_engine import ScriptedEngine
from test_collect import a_collector, collect
from test_rollout import CALL, a_workshop, an_item, say
from tiny import tiny_tokenizer

from rft.chat import Chat
from rft.config import RolloutConfig
from rft.engines import PublishedWeights, SamplingParams
from rft.engines.pool import EnginePool
from rft.errors import EngineAwayError, EngineError
from rft.types import Rollout, StopReason

PARAMS = SamplingParams(max_tokens=8, temperature=1.0, seed=0, stop_token_ids=())


class Dying(ScriptedEngine):
    """Answers until `is_dead`, then fails for good; once alive again it has no weights but its first ones.

    is_away: it cannot be reached.
    """

    is_dead = is_away = False

    async def generate(self, prompt_ids, params, rollout_id):  # type: ignore[no-untyped-def]
        completion = await super().generate(prompt_ids, params, rollout_id)
        self._check()
        return completion

    async def load(self, weights: PublishedWeights) -> None:
        self._check()
        await super().load(weights)

    async def load_metrics(self):  # type: ignore[no-untyped-def]
        self._check()
        return await super().load_metrics()

    def _check(self) -> None:
        if self.is_away:
            raise EngineAwayError("the server cannot be reached")
        if self.is_dead:
            raise EngineError("the server died")


def a_pool(size: int = 3, limit_s: float = 60.0) -> tuple[EnginePool, list[Dying]]:
    chat = Chat(tiny_tokenizer())
    engines = [Dying(chat, lambda prompt, rollout_id, turn: "I21.9", first_token_s=0.001) for _ in range(size)]
    return EnginePool(engines, [f"http://host{index}" for index in range(size)], limit_s), engines


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

    asyncio.run(sample())
    found = homes(engines)
    assert all(len(at) == 1 for at in found.values())
    assert all(found[f"{item}-0"] == found[f"{item}-{sibling}"] for item in range(30) for sibling in range(4))
    assert len(set().union(*found.values())) == 3, "different prompts are spread"


def test_no_engine_gets_much_more_than_its_share() -> None:
    pool, engines = a_pool()

    async def sample() -> None:
        await asyncio.gather(*(pool.generate([5, 6], PARAMS, f"r{i}") for i in range(90)))

    asyncio.run(sample())
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

    asyncio.run(sample())
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

    asyncio.run(sample())


def test_an_engine_comes_back_with_the_weights_that_the_others_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rft.engines.pool._RETURN_EVERY_S", 0.01)
    pool, engines = a_pool(2)

    async def story() -> None:
        await pool.load(version(1))
        engines[0].is_dead = True
        await pool.load(version(2))
        assert pool.members == [engines[1]] and pool.policy_version == 2
        assert engines[0].policy_version == 1
        engines[0].is_dead = False
        (returning,) = pool._down.values()
        await asyncio.wait_for(returning, 10)
        assert pool.members == engines
        assert engines[0].policy_version == 2
        await pool.close()

    asyncio.run(story())


# --- engines that cannot be reached ---


class Heard(list[str]):
    """What a pool says of its outages."""

    def __init__(self, pool: EnginePool) -> None:
        super().__init__()
        self._changed = asyncio.Event()
        pool.outages.on_change = self.add

    def add(self, line: str) -> None:
        self.append(line)
        self._changed.set()

    async def number(self, count: int) -> None:
        """Wait until it has said so many lines."""
        async with asyncio.timeout(20):
            while len(self) < count:
                self._changed.clear()
                await self._changed.wait()


@pytest.mark.parametrize("size", [1, 2])
def test_requests_wait_while_no_engine_can_be_reached(size: int) -> None:
    pool, engines = a_pool(size)

    async def story() -> None:
        heard = Heard(pool)
        await pool.load(version(1))
        for engine in engines:
            engine.is_away = True
        requests = [asyncio.create_task(pool.generate([5, i + 1], PARAMS, f"r{i}")) for i in range(8)]
        await heard.number(1)
        assert pool.members == [] and not any(request.done() for request in requests)
        with pytest.raises(EngineAwayError):
            await pool.load_metrics()
        for engine in engines:
            engine.is_away, engine.policy_version = False, 0  # started anew, with the weights it was started with
        answers = await asyncio.wait_for(asyncio.gather(*requests), 20)
        assert [answer.policy_version for answer in answers] == [1] * 8
        await heard.number(2)
        names = " http://host0" if size == 1 else "s http://host0, http://host1"
        assert heard[0].startswith(f"the engine{names} is down: sampling pauses") and "is back after" in heard[1]
        await pool.close()

    asyncio.run(story())


def test_engines_that_stay_away_end_the_run_with_the_cause() -> None:
    pool, engines = a_pool(1, limit_s=0.6)
    engines[0].is_away = True

    async def story() -> None:
        heard = Heard(pool)
        with pytest.raises(EngineError) as failure:
            await pool.generate([5, 6], PARAMS, "r")
        assert str(failure.value) == (
            "the engine http://host0 was down for 1 s: the server cannot be reached\n"
            "  cure: start it, then continue with --resume; or raise engine.outage_limit_s"
        )
        assert not failure.value.retryable and len(heard) == 1
        await pool.close()

    asyncio.run(story())


def test_weights_wait_for_an_engine_that_cannot_be_reached() -> None:
    pool, engines = a_pool(1)

    async def story() -> None:
        heard = Heard(pool)
        engines[0].is_away = True
        loading = asyncio.create_task(pool.load(version(1)))
        await heard.number(1)
        assert not loading.done()
        engines[0].is_away = False
        await asyncio.wait_for(loading, 20)
        assert engines[0].policy_version == pool.policy_version == 1
        await pool.close()

    asyncio.run(story())


def test_the_time_of_a_rollout_stands_still_while_the_engine_is_away() -> None:
    pool, (engine,) = a_pool(1)
    engine.is_away = True

    async def story() -> list[Rollout]:
        heard = Heard(pool)
        limits = RolloutConfig(max_tokens_per_turn=400, time_limit_s=0.4)
        collector, seen = a_collector(a_workshop(say("I21.9"), engine=pool, environment=None, limits=limits))
        collecting = asyncio.create_task(collector.collect([an_item()], "train", 1, 4))
        await heard.number(1)
        await asyncio.sleep(1.0)  # more than twice the time limit of a rollout
        engine.is_away = False
        await asyncio.wait_for(collecting, 20)
        await pool.close()
        return seen

    assert {rollout.stop_reason for rollout in asyncio.run(story())} == {StopReason.ANSWERED}


def test_closing_ends_the_wait_for_an_engine() -> None:
    pool, (engine,) = a_pool(1)
    engine.is_away = True

    async def story() -> None:
        heard = Heard(pool)
        request = asyncio.create_task(pool.generate([5, 6], PARAMS, "r"))
        await heard.number(1)
        await pool.close()
        with pytest.raises(EngineAwayError):
            await asyncio.wait_for(request, 20)

    asyncio.run(story())


# --- weights ---


def test_weights_that_no_engine_takes_are_an_error() -> None:
    pool, engines = a_pool(2)
    for engine in engines:
        engine.is_dead = True

    async def story() -> None:
        with pytest.raises(EngineError, match="died"):
            await pool.load(version(1))
        await pool.close()

    asyncio.run(story())
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
