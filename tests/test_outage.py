"""A tool server that goes and comes back: nothing fails, nothing starts, no time limit runs meanwhile."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from fakes import FaultyToolServer, ScriptedServer
from test_collect import a_collector
from test_rollout import CALL, a_workshop, an_item, say

from rft.config import RolloutConfig
from rft.envs.http import HttpEnvironment, HttpEnvironmentConfig
from rft.errors import NoProgressError
from rft.rollout import Workshop
from rft.types import Group, Rollout, StopReason
from rft.wire import RetryPolicy


@contextmanager
def a_server(port: int = 0) -> Iterator[FaultyToolServer]:
    server = FaultyToolServer({"search": "ok"})
    server.port = port
    with server:
        yield server


@pytest.fixture
def port() -> int:
    """One on which a server was, and is not any more."""
    with a_server() as server:
        return server.port


def an_environment(port: int, said: Said, max_attempts: int = 2, **fields: Any) -> HttpEnvironment:
    tool = {"name": "search", "server_url": f"http://127.0.0.1:{port}/", "timeout_s": 5, "max_attempts": max_attempts}
    config = HttpEnvironmentConfig.model_validate({"tools": [tool], **fields})
    environment = HttpEnvironment(config, retry=RetryPolicy(first_wait_s=0.01))
    environment.outages.on_change = said.add
    return environment


def workshop(environment: HttpEnvironment, time_limit_s: float = 30.0) -> Workshop:
    limits = RolloutConfig(max_tokens_per_turn=400, time_limit_s=time_limit_s, max_concurrent=4)
    return a_workshop(say(CALL, "I21.9"), environment=environment, limits=limits)


async def collect(shop: Workshop, num_items: int) -> tuple[list[Group], list[Rollout]]:
    collector, seen = a_collector(shop)
    items = [an_item(id=f"x-{index}") for index in range(num_items)]
    return await collector.collect(items, "train", 1, 2), seen


class Said(list[str]):
    """What the environment said, and an event for the first line."""

    def __init__(self) -> None:
        super().__init__()
        self.first = asyncio.Event()

    def add(self, line: str) -> None:
        self.append(line)
        self.first.set()

    async def wait(self) -> None:
        async with asyncio.timeout(10):
            await self.first.wait()


def test_a_server_that_comes_back_costs_nothing_but_time(port: int) -> None:
    said = Said()

    async def story() -> tuple[list[Rollout], FaultyToolServer]:
        environment = an_environment(port, said)
        shop = workshop(environment, time_limit_s=0.4)
        try:
            collecting = asyncio.create_task(collect(shop, 6))
            await said.wait()
            num_started = len(shop.engine.requests)  # type: ignore[attr-defined]
            await asyncio.sleep(1.0)  # more than twice the time limit of a rollout
            assert len(shop.engine.requests) == num_started <= 4, "nothing new starts"  # type: ignore[attr-defined]
            with a_server(port) as server:
                _, seen = await collecting
                return seen, server
        finally:
            await environment.close()

    seen, server = asyncio.run(story())
    assert [rollout.stop_reason for rollout in seen] == [StopReason.ANSWERED] * 12
    calls = [request["call_id"] for request in server.requests]
    assert len(calls) == len(set(calls)) == 12, "every call was made, and none twice"
    assert ["is down" in said[0], "is back" in said[-1], len(said)] == [True, True, 2]


def test_a_server_that_stays_away_ends_the_step_with_the_cause(port: int) -> None:
    async def story() -> None:
        environment = an_environment(port, Said(), outage_limit_s=0.7)
        try:
            await collect(workshop(environment), 3)
        finally:
            await environment.close()

    with pytest.raises(NoProgressError, match=r"was down for 1 s: .* cannot be reached(.|\n)*outage_limit_s"):
        asyncio.run(story())


def test_time_runs_on_after_an_outage(port: int) -> None:
    """A rollout keeps what was left of its time, not more."""
    said = Said()

    async def story() -> list[Rollout]:
        environment = an_environment(port, said)
        try:
            collecting = asyncio.create_task(collect(workshop(environment, time_limit_s=0.5), 1))
            await said.wait()
            server = FaultyToolServer({"search": "slow:5"})
            server.port = port
            with server:
                return (await collecting)[1]
        finally:
            await environment.close()

    assert [rollout.stop_reason for rollout in asyncio.run(story())] == [StopReason.TIME_LIMIT] * 2


@pytest.mark.parametrize("has_outage", [True, False])
def test_a_call_that_broke_during_an_outage_is_made_again(has_outage: bool) -> None:
    """Also when the server is back before this call has looked: another one saw that it was gone."""

    async def story(server: ScriptedServer) -> list[Rollout]:
        environment = an_environment(server.port, Said(), max_attempts=1)
        try:
            collecting = asyncio.create_task(collect(workshop(environment), 1))
            async with asyncio.timeout(10):
                while not server.requests:  # noqa: ASYNC110 (of another thread)
                    await asyncio.sleep(0.01)
            if has_outage:
                environment.outages.report(f"{server.base_url}/", is_up)
            return (await collecting)[1]
        finally:
            await environment.close()

    async def is_up() -> None:
        return None

    def answer(number: int, body: dict[str, Any]) -> tuple[int, Any] | None:
        return (200, {"output": "ok"}) if number > 1 else None

    with ScriptedServer(answer, delay_s=0.5) as server:
        seen = asyncio.run(story(server))
    counts = Counter(request["call_id"] for request in server.requests)
    num_discarded = sum(rollout.stop_reason.is_discarded for rollout in seen)
    assert num_discarded == (0 if has_outage else 2), "each first call of both rollouts breaks"
    assert sorted(counts.values()) == ([2, 2] if has_outage else [1, 1, 1, 1])


def test_closing_ends_the_wait(port: int) -> None:
    async def story() -> int:
        environment = an_environment(port, Said())
        collecting = asyncio.create_task(collect(workshop(environment), 1))
        await asyncio.sleep(0.3)
        collecting.cancel()
        await asyncio.gather(collecting, return_exceptions=True)
        await environment.close()
        return len([task for task in asyncio.all_tasks() if task is not asyncio.current_task()])

    assert asyncio.run(story()) == 0, "nobody is left who looks"
