"""A server behind a URL may be restarted by whoever runs it: it has its first weights again, and says nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from test_engines import FaultyVllm, sampling

from rft.config import ModelConfig, VllmEngineConfig
from rft.engines import EngineLoad, PublishedWeights
from rft.engines.lifetime import read_gauges, read_load
from rft.engines.pool import EnginePool
from rft.engines.vllm import VllmEngine
from rft.errors import EngineBehindError

Story = Callable[[VllmEngine, FaultyVllm], Awaitable[None]]
CONFIG, MODEL = VllmEngineConfig(max_model_len=64, request_timeout_s=20.0), ModelConfig(path=Path("m"))
STARTED, RESTARTED = "process_start_time_seconds 1.79e+09\n", "process_start_time_seconds 1.790001e+09\n"
COUNTED = 'process_virtual_memory_bytes 7.0\nvllm:prompt_tokens_total{{engine="0",model_name="m"}} {}\n'


def tell(story: Story, metrics: str = STARTED, rank: int | None = None) -> FaultyVllm:
    """The story of an engine and the server it samples with."""

    async def run() -> FaultyVllm:
        async with FaultyVllm(200) as server, asyncio.timeout(30):
            server.metrics = metrics
            engine = VllmEngine(CONFIG, MODEL, Path("unused.log"), rank, url=server.url)
            try:
                await engine.start()
                await story(engine, server)
            finally:
                await engine.close()
        return server

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (STARTED, RESTARTED),
        (
            COUNTED.format("812.0"),
            COUNTED.format("3.0"),
        ),  # several API processes share their metrics, and have no start
    ],
)
def test_a_restarted_server_is_not_sampled_from_until_it_has_loaded(
    before: str, after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rft.engines.lifetime._RESTART_S", 0.0)  # every pause is long enough for a restart

    async def story(engine: VllmEngine, server: FaultyVllm) -> None:
        await engine.generate([1], sampling(), "r")
        await engine.load(PublishedWeights(7, Path("v7")))
        assert (await engine.generate([1], sampling(), "r")).policy_version == 7
        server.metrics = after
        with pytest.raises(EngineBehindError, match="was restarted and has its first weights") as failure:
            await engine.generate([1], sampling(), "r")  # what it said was sampled from weights of another version
        assert not failure.value.retryable and engine.policy_version == -1
        with pytest.raises(EngineBehindError):
            await engine.load_metrics()
        await engine.load(PublishedWeights(7, Path("v7")))
        assert (await engine.generate([1], sampling(), "r")).policy_version == 7
        assert server.loads == ["v7", "v7"] and len(server.bodies) == 4

    tell(story, before)


def test_a_server_that_answers_all_the_time_is_not_asked_whether_it_was_restarted() -> None:
    async def story(engine: VllmEngine, server: FaultyVllm) -> None:
        for _ in range(20):
            await engine.generate([1], sampling(), "r")

    assert tell(story).num_looks == 1, "at the start"


def test_a_server_restarted_before_its_first_weights_has_lost_nothing() -> None:
    async def story(engine: VllmEngine, server: FaultyVllm) -> None:
        await engine.load_metrics()
        server.metrics = RESTARTED
        await engine.load_metrics()
        assert (await engine.generate([1], sampling(), "r")).policy_version == 0

    tell(story)


def test_a_server_that_stops_saying_is_not_taken_for_another() -> None:
    async def story(engine: VllmEngine, server: FaultyVllm) -> None:
        await engine.load_metrics()
        await engine.load(PublishedWeights(7, Path("v7")))
        server.metrics = ""
        await engine.load_metrics()
        server.metrics = COUNTED.format("3.0")
        with pytest.raises(EngineBehindError):
            await engine.load_metrics()

    tell(story, COUNTED.format("812.0"))


@pytest.mark.parametrize("silent", ["", "vllm:num_requests_running 0.0\n"])
def test_a_server_that_says_nothing_of_itself_is_another_one_after_a_connection_broke(silent: str) -> None:
    """It may be; what it then samples could be of its first weights."""

    async def story(engine: VllmEngine, server: FaultyVllm) -> None:
        await engine.load(PublishedWeights(7, Path("v7")))
        assert (await engine.generate([1], sampling(), "r")).policy_version == 7
        server.replies = ["drop", 200]
        with pytest.raises(EngineBehindError):
            await engine.generate([1], sampling(), "r")
        await engine.load(PublishedWeights(7, Path("v7")))
        assert (await engine.generate([1], sampling(), "r")).policy_version == 7

    tell(story, silent)


def test_a_server_that_says_nothing_of_itself_is_believed_after_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rft.engines.lifetime._RESTART_S", 0.0)  # every pause is long enough for a restart

    async def story(engine: VllmEngine, server: FaultyVllm) -> None:
        await engine.load(PublishedWeights(7, Path("v7")))
        for _ in range(3):
            assert (await engine.generate([1], sampling(), "r")).policy_version == 7
        assert server.loads == ["v7"]

    tell(story, "")


def test_adapters_are_registered_again_with_a_restarted_server() -> None:
    async def story(engine: VllmEngine, server: FaultyVllm) -> None:
        await engine.load_metrics()
        await engine.load(PublishedWeights(1, Path("v1"), "adapter"))
        server.metrics = RESTARTED
        with pytest.raises(EngineBehindError):
            await engine.load_metrics()
        await engine.load(PublishedWeights(1, Path("v1"), "adapter"))
        await engine.generate([1], sampling(), "r")
        assert server.adapters == ["load m-v000001"] * 2 and server.bodies[0]["model"] == "m-v000001"

    tell(story, rank=8)


def test_of_several_servers_the_restarted_one_gets_the_weights_before_it_serves_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rft.engines.caretaker._LOOK_EVERY_S", 0.02)

    async def run() -> None:
        async with FaultyVllm(200) as one, FaultyVllm(200) as other:
            pool = EnginePool([VllmEngine(CONFIG, MODEL, Path("unused.log"), url=s.url) for s in (one, other)])
            try:
                async with asyncio.timeout(30):
                    await pool.start()
                    await pool.load_metrics()
                    await pool.load(PublishedWeights(4, Path("v4")))
                    one.metrics = RESTARTED
                    while len(one.loads) < 2 or len(pool.members) < 2:
                        completion = await pool.generate([1, len(one.bodies) + 1], sampling(), f"r{len(one.bodies)}")
                        assert completion.policy_version == 4
                assert (one.loads, other.loads) == (["v4", "v4"], ["v4"])
            finally:
                await pool.close()

    asyncio.run(run())


def test_what_a_server_says_of_its_load() -> None:
    text = """# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a} b"} 3.0
vllm:num_requests_running{engine="1",model_name="a} b"} 2.0
vllm:num_requests_waiting{engine="0",model_name="a} b"} 4.0
vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 9.0
vllm:kv_cache_usage_perc{engine="0",model_name="a} b"} 0.25
"""
    assert read_load(read_gauges(text), 0) == EngineLoad(5, 4, 0.25)
    assert read_load(read_gauges(text), 30) == EngineLoad(5, 25, 0.25), "what has not reached it yet waits too"
    assert read_load(read_gauges('{"data": []}'), 0) == EngineLoad(0, 0, 0.0)
