"""One contract for all engines, what each adds to it, and that no process survives its run.

The contract runs on a tiny random model in float32; with `-m slow` also on a real vLLM server, one for the module.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from rft.config import ModelConfig, TransformersEngineConfig, VllmEngineConfig, validate_config
from rft.engines import Completion, Engine, PublishedWeights, SamplingParams, build_engine
from rft.engines.launch import ServerProcess, launch, make_scratch
from rft.engines.pool import EnginePool
from rft.engines.transformers import TransformersEngine
from rft.engines.vllm import VllmEngine
from rft.engines.vllm_server import server_command, wait_until_ready
from rft.errors import EngineAwayError, EngineError
from tests.tiny import tiny_model_folder

T = TypeVar("T")
CONTEXT = 160
TOLERANCE = 2e-3  # float32 on both sides
ROOT = Path(__file__).resolve().parent.parent
PROMPTS = [[5, 6, 7], list(range(20, 90)), [200, 3], list(range(20, 90)), list(range(40, 57))]


@dataclass
class Rig:
    """A started engine and the loop it lives on."""

    runner: asyncio.Runner
    engine: Engine
    folder: Path

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(asyncio.wait_for(work, 60))

    def sample(self, requests: list[tuple[list[int], SamplingParams]]) -> list[Completion]:
        async def all_at_once() -> list[Completion]:
            tasks = [self.engine.generate(ids, params, f"r{n:03}") for n, (ids, params) in enumerate(requests)]
            return await asyncio.gather(*tasks)

        return self.run(all_at_once())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model") / "tiny", hidden_size=128, num_attention_heads=4)


@pytest.fixture(scope="module", params=["transformers", pytest.param("vllm", marks=pytest.mark.slow)])
def rig(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    engine: Engine
    if request.param == "vllm":
        engine = vllm_engine(folder, tmp_path_factory.mktemp("vllm") / "engine.log")
    else:
        engine = transformers_engine(folder)
    with asyncio.Runner() as runner:
        try:
            runner.run(engine.start())
            yield Rig(runner, engine, folder)
        finally:
            runner.run(engine.close())


def transformers_engine(folder: Path, max_concurrent: int = 16) -> TransformersEngine:
    config = TransformersEngineConfig(max_model_len=CONTEXT, max_concurrent=max_concurrent)
    return TransformersEngine(config, ModelConfig(path=folder, dtype="float32"))


def vllm_engine(folder: Path, log_path: Path, **changes: Any) -> VllmEngine:
    values = {"max_model_len": CONTEXT, "max_concurrent": 16, "kv_cache_gib": 0.125, "start_timeout_s": 180.0}
    return VllmEngine(VllmEngineConfig(**values | changes), ModelConfig(path=folder, dtype="float32"), log_path)


def sampling(max_tokens: int = 12, temperature: float = 1.0, seed: int = 1, stop: tuple[int, ...] = ()) -> Any:
    return SamplingParams(max_tokens, temperature, seed, stop)


def reference(folder: Path, ids: list[int], start: int, temperature: float = 1.0) -> list[float]:
    """Log-probabilities of `ids[start:]` by the plain model."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0, :-1] / temperature, -1)
    scores: list[float] = logprobs.gather(-1, torch.tensor(ids)[1:, None])[start - 1 :, 0].tolist()
    return scores


def changed_weights(folder: Path, path: Path, scale: float) -> Path:
    """A copy of the model folder with the linear layers scaled: what a merged adapter changes."""
    path.mkdir()
    for file in folder.glob("*.json"):
        (path / file.name).write_bytes(file.read_bytes())
    state = load_file(folder / "model.safetensors")
    scaled = {name: value * scale if "_proj" in name else value for name, value in state.items()}
    save_file(scaled, path / "model.safetensors", metadata={"format": "pt"})
    return path


def adapter(folder: Path, path: Path, seed: int) -> tuple[Path, list[float]]:
    """A peft folder of a random adapter, and the log-probabilities it gives `PROMPTS[1]`."""
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(base, config).eval()
    model.save_pretrained(str(path))
    with torch.no_grad():
        logprobs = torch.log_softmax(model(torch.tensor([PROMPTS[1]])).logits[0, :-1], -1)
    scores: list[float] = logprobs.gather(-1, torch.tensor(PROMPTS[1])[1:, None])[:, 0].tolist()
    return path, scores


async def check_adapters(engine: Engine, folder: Path, path: Path) -> None:
    """Four versions of an adapter, each under its own name, each with its own log-probabilities."""
    plain = await engine.score(PROMPTS[1], 1)
    for version in range(1, 5):
        weights, expected = adapter(folder, path / f"v{version}", version)
        await engine.load(PublishedWeights(version, weights, "adapter"))
        scores = await engine.score(PROMPTS[1], 1)
        assert scores == close_to(expected)
        assert max(abs(a - b) for a, b in zip(scores, plain, strict=True)) > 10 * TOLERANCE
        completion = await engine.generate(PROMPTS[1], sampling(), "r")
        assert completion.policy_version == version
        assert completion.logprobs == close_to(await engine.score(PROMPTS[1] + completion.ids, len(PROMPTS[1])))


def close_to(expected: list[float]) -> Any:
    return pytest.approx(expected, abs=TOLERANCE)


# The contract.


def test_length_ends_a_completion(rig: Rig) -> None:
    (completion,) = rig.sample([([5, 6, 7], sampling(max_tokens=9))])
    assert completion.finish_reason == "length"
    assert len(completion.ids) == len(completion.logprobs) == 9
    assert completion.policy_version == rig.engine.policy_version == 0


def test_stop_id_is_kept(rig: Rig) -> None:
    stop = tuple(range(0, 256, 2))
    completions = rig.sample([(ids, sampling(max_tokens=60, stop=stop, seed=n)) for n, ids in enumerate(PROMPTS)])
    for completion in completions:
        assert completion.finish_reason == "stop"
        assert completion.ids[-1] in stop
        assert not set(completion.ids[:-1]) & set(stop)
        assert len(completion.ids) == len(completion.logprobs)


def test_model_s_own_end_of_text_does_not_stop(rig: Rig) -> None:
    end = json.loads((rig.folder / "config.json").read_text())["eos_token_id"]
    requests = [([7, n], sampling(max_tokens=100, temperature=2.0, seed=n)) for n in range(12)]
    completions = rig.sample(requests)
    assert [len(completion.ids) for completion in completions] == [100] * 12
    assert any(end in completion.ids[:-1] for completion in completions)


def test_max_tokens_is_cut_to_the_context(rig: Rig) -> None:
    (completion,) = rig.sample([([9] * (CONTEXT - 3), sampling(max_tokens=50))])
    assert len(completion.ids) == 3 and completion.finish_reason == "length"


def test_prompt_without_room_is_the_callers_bug(rig: Rig) -> None:
    with pytest.raises(ValueError, match="leaves no room"):
        rig.sample([([9] * CONTEXT, sampling())])


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_logprobs_are_of_the_sampling_distribution(rig: Rig, temperature: float) -> None:
    requests = [(ids, sampling(temperature=temperature, seed=n)) for n, ids in enumerate(PROMPTS)]
    for (ids, _), completion in zip(requests, rig.sample(requests), strict=True):
        expected = reference(rig.folder, ids + completion.ids, len(ids), temperature)
        assert completion.logprobs == close_to(expected)


def test_score_agrees_with_sampling(rig: Rig) -> None:
    for (ids, _), completion in zip(
        requests := [(ids, sampling()) for ids in PROMPTS], rig.sample(requests), strict=True
    ):
        assert rig.run(rig.engine.score(ids + completion.ids, len(ids))) == close_to(completion.logprobs)
        assert len(rig.run(rig.engine.score(ids, 1))) == len(ids) - 1


def test_samples_differ(rig: Rig) -> None:
    completions = rig.sample([([5, 6, 7], sampling(seed=n)) for n in range(8)])
    assert len({tuple(completion.ids) for completion in completions}) == 8


def test_load_changes_what_is_sampled(rig: Rig, tmp_path: Path) -> None:
    ids = PROMPTS[1] + [1, 2, 3, 4]
    before = rig.run(rig.engine.score(ids, 1))
    rig.sample([(ids, sampling())])  # its prefix is cached now
    changed = changed_weights(rig.folder, tmp_path / "v1", 3.0)
    rig.run(rig.engine.load(PublishedWeights(1, changed)))
    try:
        after = rig.run(rig.engine.score(ids, 1))
        assert max(abs(a - b) for a, b in zip(before, after, strict=True)) > 100 * TOLERANCE
        assert after == close_to(reference(changed, ids, 1))
        (completion,) = rig.sample([(ids, sampling())])
        assert completion.policy_version == rig.engine.policy_version == 1
        assert completion.logprobs == close_to(reference(changed, ids + completion.ids, len(ids)))
    finally:
        rig.run(rig.engine.load(PublishedWeights(0, rig.folder)))
    assert rig.run(rig.engine.score(ids, 1)) == before


def test_load_does_not_mix_versions(rig: Rig, tmp_path: Path) -> None:
    folders = {0: rig.folder, 1: changed_weights(rig.folder, tmp_path / "v1", 3.0)}

    async def load_while_sampling() -> list[Completion]:
        first = [asyncio.create_task(rig.engine.generate([n, 8], sampling(60), f"a{n}")) for n in range(6)]
        await asyncio.sleep(0.05)
        load = asyncio.create_task(rig.engine.load(PublishedWeights(1, folders[1])))
        await asyncio.sleep(0)
        second = [asyncio.create_task(rig.engine.generate([n, 8], sampling(20), f"b{n}")) for n in range(6)]
        await load
        return await asyncio.gather(*first, *second)

    try:
        completions = rig.run(load_while_sampling())
    finally:
        rig.run(rig.engine.load(PublishedWeights(0, rig.folder)))
    assert {completion.policy_version for completion in completions[6:]} == {1}
    for n, completion in enumerate(completions):
        ids = [n % 6, 8]
        expected = reference(folders[completion.policy_version], ids + completion.ids, len(ids))
        assert completion.logprobs == close_to(expected)


def test_load_metrics_of_an_idle_engine(rig: Rig) -> None:
    load = rig.run(rig.engine.load_metrics())
    assert (load.num_running, load.num_waiting) == (0, 0)
    assert 0 <= load.kv_cache_use <= 1


# What the transformers engine adds: reproducible samples.


def test_adapters_of_the_transformers_engine(folder: Path, tmp_path: Path) -> None:
    engine = transformers_engine(folder)
    with asyncio.Runner() as runner:
        runner.run(engine.start())
        runner.run(check_adapters(engine, folder, tmp_path))
        runner.run(engine.close())


@pytest.fixture(scope="module")
def local(folder: Path) -> Iterator[Rig]:
    engine = transformers_engine(folder)
    with asyncio.Runner() as runner:
        runner.run(engine.start())
        yield Rig(runner, engine, folder)
        runner.run(engine.close())


def test_same_set_same_bits(local: Rig) -> None:
    requests = [(ids, sampling(temperature=0.8, seed=n)) for n, ids in enumerate(PROMPTS * 2)]
    assert local.sample(requests) == local.sample(requests)


def test_order_of_arrival_does_not_matter(local: Rig) -> None:
    async def ask(order: list[int]) -> dict[int, Completion]:
        tasks = {n: local.engine.generate(PROMPTS[n], sampling(seed=n), f"r{n}") for n in order}
        return dict(zip(tasks, await asyncio.gather(*tasks.values()), strict=True))

    assert local.run(ask([0, 1, 2, 3, 4])) == local.run(ask([3, 1, 4, 0, 2]))


def test_alone_or_together_the_same_ids(local: Rig) -> None:
    requests = [(ids, sampling(seed=n)) for n, ids in enumerate(PROMPTS)]
    alone = [local.sample([request])[0] for request in requests]
    together = local.sample(requests)
    assert [completion.ids for completion in alone] == [completion.ids for completion in together]


def test_one_at_a_time_is_bit_exact_whatever_the_company(folder: Path) -> None:
    engine = transformers_engine(folder, max_concurrent=1)
    requests = [(ids, sampling(seed=n)) for n, ids in enumerate(PROMPTS)]
    with asyncio.Runner() as runner:
        runner.run(engine.start())
        rig = Rig(runner, engine, folder)
        assert rig.sample(requests) == [rig.sample([request])[0] for request in requests]
        runner.run(engine.close())


def test_cancelled_request_leaves_the_others_alone(local: Rig) -> None:
    async def cancel_one() -> Completion:
        tasks = [asyncio.create_task(local.engine.generate([n], sampling(30), f"r{n}")) for n in range(3)]
        await asyncio.sleep(0)
        tasks[1].cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await tasks[1]
        return (await asyncio.gather(tasks[0], tasks[2]))[1]

    assert len(local.run(cancel_one()).ids) == 30


def test_engines_of_one_process_load_in_turn(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers takes the tying of weights away while it loads: two loads at once may take it away for good."""
    tie, load = PreTrainedModel.tie_weights, AutoModelForCausalLM.from_pretrained
    at_once: list[int] = []
    num_loading = 0

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal num_loading
        num_loading += 1
        at_once.append(num_loading)
        try:
            return load(*arguments, **options)
        finally:
            num_loading -= 1

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", counted)

    async def start_together() -> None:
        engines = [transformers_engine(folder) for _ in range(4)]
        try:
            await asyncio.gather(*(engine.start() for engine in engines))
        finally:
            for engine in engines:
                await engine.close()

    asyncio.run(start_together())
    assert at_once == [1] * 4 and PreTrainedModel.tie_weights is tie


def test_engine_that_was_not_started_says_so(folder: Path) -> None:
    with pytest.raises(EngineError, match="not been started"):
        asyncio.run(transformers_engine(folder).generate([1], sampling(), "r"))


# What the vLLM engine adds: a server that can fail in every way a server can.


class FaultyVllm:
    """A server on loopback that answers `/v1/completions` with each of `replies` in turn, the last one for ever.

    A reply is an HTTP status, "drop" (the connection is closed), "hang", or "wait" for a 200 once `gate` is set; 200
    comes with a completion of one id. `adapters`: what was asked of adapters, in order; `loads`: the folders of merged
    weights. `metrics`: what /metrics says; `num_looks` at it. `refused`: how many times it refuses an adapter first;
    `is_blind`: it does not see the folder of merged weights.
    """

    refused = 0
    is_blind = False

    metrics = "process_start_time_seconds 1.7e+09\n"
    num_looks = 0

    def __init__(self, *replies: int | str) -> None:
        self.replies, self.bodies, self.url = list(replies), list[dict[str, Any]](), ""
        self.adapters: list[str] = []
        self.loads: list[str] = []
        self.gate = asyncio.Event()

    async def __aenter__(self) -> FaultyVllm:
        self._server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            size = next((int(line[15:]) for line in head.splitlines() if line.startswith("content-length:")), 0)
            body = json.loads(await reader.readexactly(size) or b"{}")
            reply: int | str = 200
            if "/completions" in head:
                self.bodies.append(body)
                reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
            if "_lora_adapter" in head:
                self.adapters.append(f"{'unload' if '/unload' in head else 'load'} {body['lora_name']}")
                if "/unload" not in head and self.refused:
                    self.refused, reply = self.refused - 1, 400
            if "/collective_rpc" in head:
                self.loads.append(Path(body["kwargs"]["weights_path"]).name)
                reply = 500 if self.is_blind else 200
            if reply == "wait":
                await self.gate.wait()
                reply = 200
            if reply == "hang":
                await reader.read()
            elif reply != "drop":
                choice = {"token_ids": [4], "logprobs": {"token_logprobs": [-1.5]}, "finish_reason": "stop"}
                content = json.dumps({"data": [{"id": "m", "max_model_len": 64}], "choices": [choice]}).encode()
                if "/metrics" in head:
                    self.num_looks += 1
                    content = self.metrics.encode()
                writer.write(f"HTTP/1.1 {reply} X\r\nContent-Type: application/json\r\nConnection: close\r\n".encode())
                writer.write(f"Content-Length: {len(content)}\r\n\r\n".encode() + content)
                await writer.drain()


def ask_faulty(*replies: int | str, **changes: Any) -> tuple[Completion, list[dict[str, Any]]]:
    async def ask() -> tuple[Completion, list[dict[str, Any]]]:
        async with FaultyVllm(*replies) as server:
            config = VllmEngineConfig(max_model_len=64, request_timeout_s=5.0).model_copy(update=changes)
            engine = VllmEngine(config, ModelConfig(path=Path("m")), Path("unused.log"), url=server.url)
            try:
                await engine.start()
                return await engine.generate([1, 2], sampling(temperature=0.7, stop=(4,)), "trace_1"), server.bodies
            finally:
                await engine.close()

    return asyncio.run(asyncio.wait_for(ask(), 20))


def test_an_adapter_that_is_sampled_from_stays_until_its_requests_end() -> None:
    """A request of version 1 is in flight while versions 2 and 3 arrive: version 3 waits to push version 1 out."""

    async def story() -> tuple[Completion, FaultyVllm]:
        async with FaultyVllm("wait", 200) as server:
            config = VllmEngineConfig(max_model_len=64, request_timeout_s=20.0)
            engine = VllmEngine(config, ModelConfig(path=Path("m")), Path("unused.log"), 8, url=server.url)
            try:
                await engine.start()
                await engine.load(PublishedWeights(1, Path("v1"), "adapter"))
                request = asyncio.create_task(engine.generate([1, 2], sampling(stop=(4,)), "trace_1"))
                while not server.bodies:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)  # until the server has it
                await engine.load(PublishedWeights(2, Path("v2"), "adapter"))
                third = asyncio.create_task(engine.load(PublishedWeights(3, Path("v3"), "adapter")))
                await asyncio.wait([third], timeout=0.2)
                assert not third.done() and server.adapters == [f"load m-v00000{version}" for version in (1, 2, 3)]
                assert (await engine.generate([1, 2], sampling(stop=(4,)), "trace_2")).policy_version == 3
                server.gate.set()
                await third
                return await request, server
            finally:
                await engine.close()

    completion, server = asyncio.run(asyncio.wait_for(story(), 20))
    assert completion.policy_version == 1 and server.bodies[0]["model"] == "m-v000001"
    assert server.adapters[3:] == ["unload m-v000001"]


def test_request_shapes_nothing_but_the_temperature() -> None:
    completion, (body,) = ask_faulty(200)
    assert completion == Completion([4], [-1.5], "stop", 0)
    assert (body["prompt"], body["temperature"], body["stop_token_ids"]) == ([1, 2], 0.7, [4])
    assert (body["top_p"], body["top_k"], body["min_p"], body["repetition_penalty"]) == (1.0, 0, 0.0, 1.0)
    assert body["model"] == "m" and body["ignore_eos"] and "seed" not in body


def with_given(server: FaultyVllm, story: Callable[[VllmEngine], Coroutine[Any, Any, None]]) -> None:
    """The story with an engine in front of the server."""

    async def told() -> None:
        async with server:
            config = VllmEngineConfig(max_model_len=64, request_timeout_s=20.0)
            engine = VllmEngine(config, ModelConfig(path=Path("m")), Path("unused.log"), 8, url=server.url)
            try:
                await engine.start()
                await story(engine)
            finally:
                await engine.close()

    asyncio.run(asyncio.wait_for(told(), 20))


@pytest.mark.parametrize("num_refused", [1, 2])
def test_an_adapter_that_a_server_has_already_is_replaced(num_refused: int, tmp_path: Path) -> None:
    """It is of another run, or the answer to an earlier request was lost; a second refusal has another reason."""
    server = FaultyVllm(200)
    server.refused = num_refused

    async def story(engine: VllmEngine) -> None:
        if num_refused == 1:
            await engine.load(PublishedWeights(1, tmp_path / "v1", "adapter"))
            assert engine.policy_version == 1
        else:
            with pytest.raises(EngineError, match=r"weights did not arrive.*HTTP 400") as failure:
                await engine.load(PublishedWeights(1, tmp_path / "v1", "adapter"))
            assert f"{tmp_path} must be there on the server's machine too" in failure.value.cure

    with_given(server, story)
    assert server.adapters == ["load m-v000001", "unload m-v000001", "load m-v000001"]


def test_a_given_server_that_does_not_see_the_weights_is_named_with_their_folder(tmp_path: Path) -> None:
    server = FaultyVllm(200)
    server.is_blind = True

    async def story(engine: VllmEngine) -> None:
        with pytest.raises(EngineError, match=rf"the weights did not arrive: {server.url}.*HTTP 500") as failure:
            await engine.load(PublishedWeights(1, tmp_path / "v1"))
        assert f"{tmp_path} must be there on the server's machine too" in failure.value.cure
        assert not isinstance(failure.value, EngineAwayError) and engine.policy_version == 0

    with_given(server, story)


def test_a_given_server_whose_connections_break_is_away() -> None:
    server = FaultyVllm("drop")

    async def story(engine: VllmEngine) -> None:
        with pytest.raises(EngineAwayError, match=r"cannot be reached \(ServerDisconnectedError"):
            await engine.generate([1, 2], sampling(stop=(4,)), "trace_1")

    with_given(server, story)
    assert len(server.bodies) == 4, "it is tried again first"


@pytest.mark.parametrize("fault", ["drop", 503, 500])
def test_passing_fault_is_retried(fault: int | str) -> None:
    completion, bodies = ask_faulty(fault, 200)
    assert completion.ids == [4] and len(bodies) == 2


@pytest.mark.slow
def test_lasting_fault_ends_the_run() -> None:
    with pytest.raises(EngineError, match=r"failed 4 times.*HTTP 503") as failure:
        ask_faulty(503)
    assert not failure.value.retryable


def test_refusal_is_not_retried() -> None:
    with pytest.raises(EngineError, match="refused a request: HTTP 400"):
        ask_faulty(400, 200)


def test_silent_server_meets_the_deadline() -> None:
    started = time.monotonic()
    with pytest.raises(EngineError, match="did not answer within 0 s") as failure:
        ask_faulty("hang", request_timeout_s=0.3)
    assert failure.value.retryable and time.monotonic() - started < 5


def test_server_with_a_smaller_context_is_refused() -> None:
    with pytest.raises(EngineError, match=r"context is 64 tokens(.|\n)*lower engine.max_model_len"):
        ask_faulty(200, max_model_len=65)


@pytest.mark.slow
def test_url_where_nobody_listens() -> None:
    model = ModelConfig(path=Path("m"))
    engine = VllmEngine(VllmEngineConfig(), model, Path("unused.log"), url="http://127.0.0.1:9")
    with pytest.raises(EngineError, match=r"http://127.0.0.1:9(.|\n)*engine.url") as failure:
        asyncio.run(asyncio.wait_for(engine.start(), 20))
    assert not failure.value.retryable


def test_command_of_a_launched_server(folder: Path) -> None:
    config = VllmEngineConfig(max_model_len=99, max_concurrent=7, args=["--swap-space", "0"])
    command = server_command(config, ModelConfig(path=folder), Path("/s"), is_cpu=True, max_lora_rank=20)
    flags = dict(itertools.pairwise(command))
    assert (flags["--max-model-len"], flags["--max-num-seqs"], flags["--uds"]) == ("99", "7", "/s")
    assert flags["--max-lora-rank"] == "32" and "--enable-lora" in command  # vLLM knows 8, 16, 32, ...
    assert command[-2:] == ["--swap-space", "0"]


# Processes: whatever happens, nothing is left.

TREE = """
import subprocess, sys, time
child = "import time; time.sleep(600)"
if "stubborn" in sys.argv:
    child = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + child
print("pid", subprocess.Popen([sys.executable, "-c", child]).pid, flush=True)
time.sleep(600)
"""


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # the second: it ends while we read
        return False


def wait_for(condition: Callable[[], bool], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


async def start_tree(log_path: Path, *words: str) -> tuple[ServerProcess, int]:
    server = await launch([sys.executable, "-c", TREE, *words], {}, make_scratch(), log_path)
    async with asyncio.timeout(20):
        while not (lines := server.log_tail(1)):
            assert not await server.has_ended(0.02)
    return server, int(lines[0].split()[1])


def test_close_ends_the_whole_tree(tmp_path: Path) -> None:
    async def start_and_close() -> tuple[int, Path]:
        server, grandchild = await start_tree(tmp_path / "log")
        assert is_running(grandchild)
        await server.close()
        assert not server.is_alive
        return grandchild, server.scratch

    grandchild, scratch = asyncio.run(start_and_close())
    assert not is_running(grandchild)
    assert not scratch.exists()


@pytest.mark.slow  # the supervisor gives processes that ignore SIGTERM eight seconds
def test_close_ends_what_ignores_sigterm(tmp_path: Path) -> None:
    async def start_and_close() -> int:
        server, grandchild = await start_tree(tmp_path / "log", "stubborn")
        await server.close()
        return grandchild

    assert not is_running(asyncio.run(start_and_close()))


@pytest.mark.slow
def test_nothing_survives_sigkill_of_the_parent(tmp_path: Path) -> None:
    code = (
        "import asyncio, pathlib, sys\nfrom tests.test_engines import start_tree\n"
        "async def main():\n"
        "    server, grandchild = await start_tree(pathlib.Path(sys.argv[1]))\n"
        "    print(grandchild, server.scratch, flush=True)\n"
        "    await asyncio.sleep(600)\n"
        "asyncio.run(main())"
    )
    grandchild, scratch = kill_when_it_speaks([sys.executable, "-c", code, str(tmp_path / "log")], tmp_path / "out", 60)
    assert wait_for(lambda: not is_running(int(grandchild)), 10)
    assert wait_for(lambda: not Path(scratch).exists(), 10)


def kill_when_it_speaks(command: list[str], output: Path, timeout_s: float) -> list[str]:
    """Run `command` in the checkout until its first line of output, then SIGKILL it; the line's words."""
    with output.open("w") as file, subprocess.Popen(command, cwd=ROOT, stdout=file) as process:
        try:
            assert wait_for(lambda: output.read_text().endswith("\n"), timeout_s)
        finally:
            process.kill()
    return output.read_text().split()


def test_server_that_ends_while_starting_is_quoted(tmp_path: Path) -> None:
    async def start() -> None:
        code = "print('ValueError: Available memory on node 0 is too small'); raise SystemExit(1)"
        server = await launch([sys.executable, "-c", code], {}, make_scratch(), tmp_path / "engine.log")
        async with aiohttp.ClientSession("http://127.0.0.1:9/") as http:
            await wait_until_ready(server, http, 30, lambda _: None)

    with pytest.raises(EngineError, match=r"Available memory on node 0(.|\n)*lower engine.kv_cache_gib"):
        asyncio.run(start())


def test_the_start_says_how_long_it_will_take(tmp_path: Path) -> None:
    class EstimateSeen(Exception):
        pass

    def on_status(line: str) -> None:
        if re.fullmatch(r"starting vLLM: loading weights \(\d+ s, about \d+ s left\)", line):
            raise EstimateSeen

    async def start() -> None:
        code = "import time; print('Starting to load model', flush=True); time.sleep(600)"
        server = await launch([sys.executable, "-c", code], {}, make_scratch(), tmp_path / "engine.log")
        try:
            async with aiohttp.ClientSession("http://127.0.0.1:9/") as http:
                await wait_until_ready(server, http, 60, on_status)
        finally:
            await server.close()

    with pytest.raises(EstimateSeen):
        asyncio.run(start())


def test_server_that_is_not_ready_in_time(tmp_path: Path) -> None:
    async def start() -> None:
        server, _ = await start_tree(tmp_path / "engine.log")
        try:
            async with aiohttp.ClientSession("http://127.0.0.1:9/") as http:
                await wait_until_ready(server, http, 0.5, lambda _: None)
        finally:
            await server.close()

    with pytest.raises(EngineError, match=r"engine\.start_timeout_s"):
        asyncio.run(start())


@pytest.mark.slow
def test_vllm_does_not_survive_sigkill_of_the_parent(folder: Path, tmp_path: Path) -> None:
    code = (
        "import asyncio, pathlib, sys\nfrom tests.test_engines import descendants, vllm_engine\n"
        "async def main():\n"
        "    engine = vllm_engine(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))\n"
        "    await engine.start()\n"
        "    supervisor = engine._server._process.pid\n"
        "    print(supervisor, *descendants(supervisor), flush=True)\n"
        "    await asyncio.sleep(600)\n"
        "asyncio.run(main())"
    )
    command = [sys.executable, "-c", code, str(folder), str(tmp_path / "engine.log")]
    pids = [int(word) for word in kill_when_it_speaks(command, tmp_path / "out", 180)]
    assert len(pids) >= 3, "a supervisor, a server and its engine"
    assert wait_for(lambda: not any(is_running(pid) for pid in pids), 20)


@pytest.mark.slow
def test_adapters_and_the_death_of_the_server(folder: Path, tmp_path: Path) -> None:
    async def kill_while_sampling() -> tuple[float, dict[int, str]]:
        config = VllmEngineConfig(max_model_len=CONTEXT, max_concurrent=8, kv_cache_gib=0.125)
        engine = VllmEngine(config, ModelConfig(path=folder, dtype="float32"), tmp_path / "engine.log", max_lora_rank=8)
        try:
            await engine.start()
            await check_adapters(engine, folder, tmp_path)
            assert engine._server is not None
            processes = descendants(engine._server._process.pid)
            (worker,) = [pid for pid, name in processes.items() if "EngineCore" in name]
            request = asyncio.create_task(engine.generate([1, 2], sampling(CONTEXT), "r"))
            await asyncio.sleep(0.02)  # the request is on its way or done: the second one below meets the death anyway
            killed = time.monotonic()
            os.kill(worker, signal.SIGKILL)
            with pytest.raises(EngineError, match=r"server died(.|\n)*engine\.log") as failure:
                await asyncio.gather(request, engine.generate([1, 2], sampling(CONTEXT), "s"))
            assert not failure.value.retryable
            return time.monotonic() - killed, processes
        finally:
            await engine.close()

    seconds, processes = asyncio.run(asyncio.wait_for(kill_while_sampling(), 200))
    assert seconds < 15
    assert not any(is_running(pid) for pid in processes)


@pytest.mark.slow
def test_two_servers_are_launched_and_one_may_die(folder: Path, tmp_path: Path) -> None:
    """Real servers: both sample, both load, and what the dead one sampled is sampled by the other."""
    tree = {
        "model": {"path": str(folder), "dtype": "float32", "lora": None},
        "engine": {"type": "vllm", "num_servers": 2, "max_model_len": CONTEXT, "kv_cache_gib": 0.125},
        "data": {"train": "train.jsonl"},
        "grader": {"type": "string_check", "name": "g", "operation": "eq", "input": "a", "reference": "b"},
        "rollout": {"max_tokens_per_turn": 8},
        "training": {"steps": 1},
    }
    pool = build_engine(validate_config(tree, "test"), tmp_path / "engine.log")
    assert isinstance(pool, EnginePool)

    async def ask(first: int) -> list[Completion]:
        prompts = ([number + 1, number + 2] for number in range(first, first + 16))
        return await asyncio.gather(*(pool.generate(ids, sampling(8), f"r{ids[0]}") for ids in prompts))

    async def story() -> None:
        try:
            await pool.start()
            assert len(pool.members) == 2 and (tmp_path / "engine-1.log").exists()
            assert {answer.policy_version for answer in await ask(0)} == {0}
            await pool.load(PublishedWeights(1, changed_weights(folder, tmp_path / "v1", 1.5)))
            asking = asyncio.create_task(ask(16))
            engine = pool.health[1].engine
            assert isinstance(engine, VllmEngine) and engine._server is not None
            os.kill(engine._server._process.pid, signal.SIGKILL)
            assert [answer.policy_version for answer in await asking] == [1] * 16
            assert {answer.policy_version for answer in await ask(32)} == {1} and len(pool.members) == 1
        finally:
            await pool.close()

    asyncio.run(asyncio.wait_for(story(), 300))


def descendants(pid: int) -> dict[int, str]:
    """All processes below `pid`, by id, with their command lines."""
    parents, names = {}, {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit():
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                names[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return {child: names[child] for child in found - {pid}}
