"""The gate: never a request and a load at once, and no cost for those who wait."""

from __future__ import annotations

import asyncio
import random

import pytest
from scale_parts import SimulatedLoop

from rft.engines.gate import Gate
from rft.errors import EngineError


def test_requests_and_loads_exclude_each_other() -> None:
    gate, draw = Gate(), random.Random(0)
    inside = {"requests": 0, "loads": 0}
    done = {"requests": 0, "loads": 0}

    async def user(kind: str, num_times: int) -> None:
        for _ in range(num_times):
            await asyncio.sleep(draw.random())
            async with gate.request() if kind == "requests" else gate.load(100):
                inside[kind] += 1
                assert inside["loads"] <= 1 and not (inside["requests"] and inside["loads"])
                await asyncio.sleep(draw.random())
                inside[kind] -= 1
            done[kind] += 1

    async def story() -> None:
        async with asyncio.timeout(10_000), asyncio.TaskGroup() as tasks:
            for _ in range(20):
                tasks.create_task(user("requests", 30))
            for _ in range(3):
                tasks.create_task(user("loads", 10))

    with asyncio.Runner(loop_factory=SimulatedLoop) as runner:
        runner.run(story())
    assert done == {"requests": 600, "loads": 30}


def test_a_load_that_waits_too_long_lets_requests_in_again() -> None:
    async def story() -> None:
        gate, release = Gate(), asyncio.Event()

        async def hold() -> None:
            async with gate.request():
                await release.wait()

        holding = asyncio.create_task(hold())
        await asyncio.sleep(0)
        with pytest.raises(EngineError, match="1 requests were still in flight 5 s after"):
            async with gate.load(5):
                raise AssertionError("it is not empty")
        async with asyncio.timeout(1), gate.request():
            pass
        release.set()
        await holding

    with asyncio.Runner(loop_factory=SimulatedLoop) as runner:
        runner.run(story())


def test_who_waits_for_a_load_is_not_woken_by_every_request_that_ends() -> None:
    """With thousands in flight, waking all that wait each time would cost more than all else together."""

    async def story() -> int:
        gate, num_steps = Gate(), 0

        async def request(seconds: float) -> None:
            async with gate.request():
                await asyncio.sleep(seconds)

        async def load() -> None:
            async with gate.load(1000):
                await asyncio.sleep(1)

        first = [asyncio.create_task(request(1 + number / 100)) for number in range(100)]
        await asyncio.sleep(0.5)
        loading = asyncio.create_task(load())
        await asyncio.sleep(0)
        waiting = [asyncio.create_task(request(0)) for _ in range(100)]
        loop = asyncio.get_running_loop()
        run_once, loop.call_soon = loop.call_soon, counted(loop.call_soon)  # type: ignore[method-assign]
        await asyncio.gather(*first, loading, *waiting)
        num_steps = loop.call_soon.count  # type: ignore[attr-defined]
        loop.call_soon = run_once  # type: ignore[method-assign]
        return num_steps

    with asyncio.Runner(loop_factory=SimulatedLoop) as runner:
        assert 200 < runner.run(story()) < 20 * 200


def counted(call):  # type: ignore[no-untyped-def]
    """The function, with the number of its calls in `count`."""

    def counting(*arguments, **named):  # type: ignore[no-untyped-def]
        counting.count += 1
        return call(*arguments, **named)

    counting.count = 0
    return counting
