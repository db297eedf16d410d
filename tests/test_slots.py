"""Places for rollouts: their number follows the engine, nobody is forgotten, nobody overtakes."""

from __future__ import annotations

import asyncio
from random import Random

from rft.engines import EngineLoad
from rft.slots import Slots


def load(running: int, waiting: int, cache: float = 0.5) -> EngineLoad:
    return EngineLoad(running, waiting, cache)


def test_the_limit_follows_the_engine() -> None:
    slots = Slots(64, 512)
    assert slots.limit == 64
    slots.follow(load(10, 0))
    assert slots.limit == 128, "the engine has no queue: more"
    slots.num_taken = 128
    slots.follow(load(64, 10))
    assert slots.limit == 128, "a short queue keeps the engine busy"
    slots.follow(load(64, 40))
    assert slots.limit == 102, "a long one: fewer"
    slots.follow(load(64, 0, cache=0.95))
    assert slots.limit == 81, "its cache is full: fewer"
    for _ in range(50):
        slots.follow(load(64, 64))
    assert slots.limit == 64, "never below what the engine samples at once"
    for _ in range(50):
        slots.follow(load(1, 0))
    assert slots.limit == 512


def test_the_configs_limit_counts() -> None:
    slots = Slots(64, 3)
    slots.follow(load(0, 0))
    assert slots.limit == 3


def test_places_are_given_in_order_and_none_is_lost() -> None:
    random = Random(0)

    async def story() -> None:
        slots, order, in_use = Slots(3, 3), [], 0

        async def work(number: int) -> None:
            nonlocal in_use
            await slots.acquire()
            order.append(number)
            in_use += 1
            assert in_use <= 3
            try:
                await asyncio.sleep(0)
            finally:
                in_use -= 1
                slots.release()

        tasks = [asyncio.create_task(work(number)) for number in range(200)]
        await asyncio.sleep(0)
        cancelled = random.sample(range(200), 80)
        for number in cancelled:
            tasks[number].cancel()
            if random.random() < 0.3:
                await asyncio.sleep(0)
        await asyncio.wait(tasks, timeout=10)
        assert all(task.done() for task in tasks)
        assert order == sorted(order)
        assert slots.num_taken == 0 and slots.num_waiting == 0
        await asyncio.wait_for(slots.acquire(), 1)

    asyncio.run(story())


def test_a_place_given_to_somebody_who_is_cancelled_goes_to_the_next() -> None:
    async def story() -> None:
        slots = Slots(1, 1)
        await slots.acquire()
        first, second = (asyncio.create_task(slots.acquire()) for _ in range(2))
        await asyncio.sleep(0)
        slots.release()  # the place is the first one's
        first.cancel()  # before it could run
        await asyncio.wait_for(second, 1)
        assert first.cancelled() and slots.num_taken == 1

    asyncio.run(story())
