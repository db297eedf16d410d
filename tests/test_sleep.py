"""GPUs that sampling and training use in turn: when servers sleep, and what waits for them meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from pipelined import HonestEngine, SlowPolicy, Stage, answering, config_of

from rft.chat import Chat
from rft.config import ModelConfig, VllmEngineConfig
from rft.engines import Completion, PublishedWeights, SamplingParams
from rft.engines.pool import EnginePool
from rft.engines.vllm import VllmEngine
from rft.engines.vllm_server import is_cpu_build, server_command
from rft.errors import ConfigError, EngineError
from rft.trainers.update import StepStats

CONFIG = VllmEngineConfig(max_model_len=64, sleep=True, url="http://given")
PARAMS = SamplingParams(max_tokens=8, temperature=1.0, seed=0, stop_token_ids=())


class SleepingServer:
    """What a run uses of vLLM's HTTP interface, in its order. can_sleep: it was started with --enable-sleep-mode."""

    def __init__(self, *, is_asleep: bool = False, can_sleep: bool = True) -> None:
        self.is_asleep, self.can_sleep, self.url = is_asleep, can_sleep, ""
        self.asked: list[str] = []

    async def __aenter__(self) -> SleepingServer:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/v1"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def _answer(self, request: web.Request) -> web.Response:
        path = request.path_qs
        if path == "/v1/models":
            return web.json_response({"data": [{"id": "m", "max_model_len": 64}]})
        if path == "/is_sleeping":
            return web.json_response({"is_sleeping": self.is_asleep})
        if path == "/metrics":
            return web.Response(text="")
        self.asked.append(path)
        if path == "/sleep?level=1" and not self.can_sleep:
            return web.json_response({"error": "sleep mode is not enabled"}, status=400)
        if path in ("/sleep?level=1", "/wake_up"):
            self.is_asleep = path != "/wake_up"
            return web.Response()
        assert not self.is_asleep, f"{path} while it sleeps"
        choice = {"token_ids": [4], "logprobs": {"token_logprobs": [-1.5]}, "finish_reason": "stop"}
        return web.json_response({"choices": [choice], "success": True})


def told(*servers: SleepingServer, story: Callable[[list[VllmEngine]], Coroutine[Any, Any, None]]) -> None:
    """The story with an engine in front of each server."""

    async def whole() -> None:
        engines = []
        for server in servers:
            await server.__aenter__()
            engines.append(VllmEngine(CONFIG, ModelConfig(path=Path("m")), Path("unused.log"), url=server.url))
        try:
            for engine in engines:
                await engine.start()
            await story(engines)
        finally:
            for engine in engines:
                await engine.close()
            for server in servers:
                await server.__aexit__()

    asyncio.run(asyncio.wait_for(whole(), 20))


def test_requests_wait_while_the_server_sleeps() -> None:
    server = SleepingServer()

    async def story(engines: list[VllmEngine]) -> None:
        (engine,) = engines
        await engine.sleep()
        asking = [asyncio.create_task(engine.generate([1, 2], PARAMS, f"r{number}")) for number in range(3)]
        await asyncio.wait(asking, timeout=0.1)
        assert not any(task.done() for task in asking)
        await engine.load_metrics()  # how it is can be asked all the time
        await engine.wake()
        assert [one.ids for one in await asyncio.gather(*asking)] == [[4]] * 3
        await engine.load(PublishedWeights(1, Path("v1")))

    told(server, story=story)
    assert server.asked[:2] == ["/sleep?level=1", "/wake_up"] and "/collective_rpc" in server.asked[2:]


def test_a_server_that_a_dead_run_left_asleep_is_woken_at_the_start() -> None:
    server = SleepingServer(is_asleep=True)

    async def story(engines: list[VllmEngine]) -> None:
        await engines[0].generate([1, 2], PARAMS, "r")

    told(server, story=story)
    assert server.asked == ["/wake_up", "/v1/completions"]


def test_a_server_that_cannot_sleep_says_so_and_keeps_nobody_waiting() -> None:
    server = SleepingServer(can_sleep=False)

    async def story(engines: list[VllmEngine]) -> None:
        with pytest.raises(EngineError, match="sleep mode is not enabled"):
            await engines[0].sleep()
        await engines[0].generate([1, 2], PARAMS, "r")

    told(server, story=story)


def test_all_servers_of_a_pool_sleep_and_one_that_does_not_wake_is_left_out() -> None:
    first, second = SleepingServer(), SleepingServer()

    async def story(engines: list[VllmEngine]) -> None:
        pool = EnginePool(engines)
        await pool.sleep()
        assert first.is_asleep and second.is_asleep
        await second.__aexit__()
        await pool.wake()
        answers = [await pool.generate([1, number], PARAMS, f"r{number}") for number in range(4)]
        assert len(answers) == 4 and pool.members == [engines[0]]
        await pool.close()

    told(first, second, story=story)


# --- in a training ---


class SharingEngine(HonestEngine):
    """Whose GPU the policy uses while it sleeps. Keeps what happened on it, in order."""

    is_asleep = False
    story: list[str]

    async def sleep(self) -> None:
        assert not self.num_running
        self.is_asleep = True
        self._note("sleep")

    async def wake(self) -> None:
        self.is_asleep = False
        self._note("wake")

    async def generate(self, prompt_ids: list[int], params: SamplingParams, rollout_id: str) -> Completion:
        assert not self.is_asleep
        self._note("sample")
        return await super().generate(prompt_ids, params, rollout_id)

    async def load(self, weights: PublishedWeights) -> None:
        assert not self.is_asleep
        self._note(f"load {weights.version}")
        await super().load(weights)

    async def score(self, ids: list[int], start: int) -> list[float]:
        assert not self.is_asleep
        return await super().score(ids, start)

    def _note(self, what: str) -> None:
        told = self.__dict__.setdefault("story", [])
        if not told or told[-1] != what:
            told.append(what)


class SharingPolicy(SlowPolicy):
    engine: SharingEngine  # set where the stage is

    def step(self, *args: Any, **options: Any) -> StepStats:
        assert self.engine.is_asleep
        self.engine._note("train")
        return super().step(*args, **options)

    def release_memory(self) -> None:
        assert self.engine.is_asleep
        self.engine._note("release")
        super().release_memory()


def test_the_engine_sleeps_while_the_policy_trains(tmp_path: Path) -> None:
    config = config_of(tmp_path, staleness=0, steps=2, evaluation={"every": 2})
    config = config.model_copy(update={"engine": VllmEngineConfig(sleep=True, max_model_len=1024)})
    engine = SharingEngine(Chat.from_folder(config.model.path), answering)
    stage = Stage(config, engine=engine, policy_class=SharingPolicy)
    stage.policy.engine = engine
    stage.train()
    turns = [["sleep", "train", "release", "wake", f"load {step}", "sample"] for step in (1, 2)]
    assert engine.story == ["sample", *turns[0], *turns[1]]


# --- configs and command lines ---


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"engine": {"type": "vllm", "sleep": True}, "staleness": 1}, "set training.staleness=0"),
        ({"engine": {"type": "vllm", "url": "http://a", "num_servers": 2}}, "leave them out, or url"),
        ({"engine": {"type": "vllm", "url": "http://a", "devices": ["0"]}}, "leave them out, or url"),
        ({"engine": {"type": "vllm", "num_servers": 2, "devices": ["0"]}}, "devices names 1 servers, num_servers 2"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, sections: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config_of(tmp_path, **{"staleness": 0} | sections)


def test_only_a_server_that_is_to_sleep_gets_the_switch() -> None:
    model, place = ModelConfig(path=Path("m")), Path("s")
    for sleep in (True, False):
        command = server_command(VllmEngineConfig(sleep=sleep), model, place, is_cpu=False, max_lora_rank=None)
        assert ("--enable-sleep-mode" in command) is sleep


@pytest.mark.skipif(not is_cpu_build(), reason="this vLLM is for GPUs, which have the sleep mode")
def test_on_a_cpu_the_sleep_mode_is_refused_before_anything_starts(tmp_path: Path) -> None:
    engine = VllmEngine(VllmEngineConfig(sleep=True), ModelConfig(path=Path("m")), tmp_path / "engine.log")
    with pytest.raises(EngineError, match="no sleep mode on a CPU"):
        asyncio.run(engine.start())
    assert not (tmp_path / "engine.log").exists()
