"""Weights from memory to memory: the calls and their order, what happens when either side fails, a real server."""

from __future__ import annotations

import asyncio
import json
import queue
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from aiohttp import web
from safetensors.torch import save_file
from torch import Tensor

from rft.config import ModelConfig, RunConfig, VllmEngineConfig, validate_config
from rft.engines import PublishedWeights, SamplingParams, build_engine
from rft.engines.transfer import Named, _chunks
from rft.engines.transports import described, packed
from rft.engines.vllm import VllmEngine
from rft.engines.vllm_server import server_command, server_env
from rft.errors import ConfigError, EngineError, SyncError
from rft.trainers.sync import Sync
from tests.test_sync import PROMPTS, PlainPolicy
from tests.tiny import tiny_model_folder

INIT, START, UPDATE = "/init_weight_transfer_engine", "/start_weight_update", "/update_weights"
FINISH, RESET = "/finish_weight_update", "/reset_prefix_cache"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model") / "tiny")


class QueueTransport:
    """Chunks go through a queue that the server reads: `send` returns when they are taken, as a broadcast does."""

    backend = "queue"
    chunk_bytes = 20_000  # several chunks, and a tensor that is larger than one

    def __init__(self) -> None:
        self.chunks: queue.Queue[list[Tensor]] = queue.Queue(1)
        self.num_workers = self.num_sent = self.num_finished = 0
        self.is_connected = False
        self._offered: list[Tensor] = []

    def init_info(self, num_workers: int) -> dict[str, Any]:
        self.num_workers = num_workers
        return {"world_size": 1 + num_workers}

    def connect(self, timeout_s: float) -> None:
        self.is_connected = True

    def offer(self, chunk: list[Named]) -> dict[str, Any]:
        self._offered = [tensor.clone() for _, tensor in chunk]
        return described(chunk)

    def send(self) -> None:
        self.chunks.put(self._offered)
        self.chunks.join()
        self.num_sent += 1

    def finish(self) -> None:
        self.num_finished += 1


class TransferServer:
    """A vLLM server, as far as a transfer and a probe need one, on a real socket. It computes with what it received.

    faults: path -> what the server does there: a status, "hang", or "lose" (the last tensor of every update).
    """

    def __init__(self, folder: Path, transport: QueueTransport, faults: dict[str, int | str]) -> None:
        self.model = PlainPolicy(folder)
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.url = ""
        self._transport, self._faults = transport, faults
        self._num_sampling = 0
        self._gone = asyncio.Event()
        self.had_company = False  # a control call came while a completion was sampled

    @asynccontextmanager
    async def running(self) -> AsyncIterator[TransferServer]:
        app = web.Application()
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/get_world_size", self._world_size)
        app.router.add_post("/v1/completions", self._complete)
        handlers = {INIT: self._ok, START: self._ok, UPDATE: self._update, FINISH: self._ok, RESET: self._ok}
        for path, handler in handlers.items():
            app.router.add_post(path, self._recorded(path, handler))
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield self
        finally:
            self._gone.set()
            await runner.cleanup()

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self.calls]

    def _recorded(self, path: str, handler: Callable[[dict[str, Any]], Awaitable[None]]) -> Any:
        async def answer(request: web.Request) -> web.Response:
            body = await request.json()
            self.calls.append((path, body))
            self.had_company |= self._num_sampling > 0
            fault = self._faults.get(path)
            if fault == "hang":
                await self._gone.wait()
            if isinstance(fault, int):
                return web.Response(status=fault, text="it will not")
            await handler(body)
            return web.json_response({"message": "done"})

        return answer

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "tiny", "max_model_len": 128}]})

    async def _world_size(self, _: web.Request) -> web.Response:
        return web.json_response({"world_size": 2})

    async def _ok(self, _: dict[str, Any]) -> None:
        pass

    async def _update(self, body: dict[str, Any]) -> None:
        info = body["update_info"]
        tensors = await asyncio.to_thread(self._transport.chunks.get, timeout=10)
        received = dict(zip(info["names"], tensors, strict=True))
        assert [list(tensor.shape) for tensor in tensors] == info["shapes"]
        if self._faults.get(UPDATE) == "lose":
            received.popitem()
        self.model.model.load_state_dict(received, strict=False)
        self._transport.chunks.task_done()

    async def _complete(self, request: web.Request) -> web.Response:
        body = await request.json()
        self._num_sampling += 1
        await asyncio.sleep(0)
        ids = body["prompt"]
        scores = self.model.score(ids, 1) if "prompt_logprobs" in body else []
        positions = [None, *({str(ids[i + 1]): {"logprob": score}} for i, score in enumerate(scores))]
        choice = {"token_ids": [4], "logprobs": {"token_logprobs": [-1.5]}, "finish_reason": "stop"}
        self._num_sampling -= 1
        return web.json_response({"choices": [choice | {"prompt_logprobs": positions}]})


class Rig:
    """A policy, an engine and the server between them, in one running loop."""

    def __init__(self, folder: Path, tmp_path: Path, faults: dict[str, int | str], timeout_s: float = 20.0) -> None:
        self.transport = QueueTransport()
        self.server = TransferServer(folder, self.transport, faults)
        self.policy = PlainPolicy(folder)
        self.sync = Sync("transfer", tmp_path / "weights", folder, "float32")
        self._config = VllmEngineConfig(max_model_len=128, request_timeout_s=timeout_s)
        self._folder = folder
        self.engine: VllmEngine

    def run(self, work: Callable[[], Awaitable[None]], *, starts: bool = True) -> None:
        async def all_of_it() -> None:
            async with self.server.running():
                model = ModelConfig(path=self._folder, dtype="float32", lora=None)
                self.engine = VllmEngine(
                    self._config, model, Path("unused.log"), url=self.server.url, transport=self.transport
                )
                try:
                    if starts:
                        await self.engine.start()
                    await work()
                finally:
                    await self.engine.close()

        asyncio.run(asyncio.wait_for(all_of_it(), 60))

    async def publish(self, version: int) -> None:
        await self.engine.load(self.sync.publish(self.policy, version))

    async def probe(self) -> float:
        return (await self.sync.probe(self.policy, self.engine, PROMPTS)).max_gap


def test_weights_arrive_in_the_order_of_calls_that_vllm_wants(folder: Path, tmp_path: Path) -> None:
    rig = Rig(folder, tmp_path, {})

    async def work() -> None:
        assert await rig.probe() < 1e-4
        for version in (1, 2):
            rig.policy.move(0.3)
            await rig.publish(version)
            assert await rig.probe() < 1e-4
            assert rig.engine.policy_version == version

    rig.run(work)
    num_updates = rig.transport.num_sent // 2
    assert rig.server.paths == [INIT, *2 * [START, *num_updates * [UPDATE], FINISH, RESET]]
    assert num_updates > 2 and rig.transport.num_finished == 2
    assert rig.transport.num_workers == 2 and rig.server.calls[0][1] == {"init_info": {"world_size": 3}}
    names = [name for path, body in rig.server.calls if path == UPDATE for name in body["update_info"]["names"]]
    assert names == 2 * list(rig.policy.full_state_dict())
    assert not (tmp_path / "weights").exists()  # nothing is written


def test_no_request_is_in_flight_while_weights_travel(folder: Path, tmp_path: Path) -> None:
    rig = Rig(folder, tmp_path, {})
    versions: list[int] = []

    async def sample() -> None:
        for _ in range(20):
            versions.append((await rig.engine.generate([1, 2], SamplingParams(1, 1.0, 0, ()), "r")).policy_version)

    async def work() -> None:
        sampling = [asyncio.create_task(sample()) for _ in range(3)]
        for version in (1, 2, 3):
            await rig.publish(version)
        await asyncio.gather(*sampling)

    rig.run(work)
    assert not rig.server.had_company and versions == sorted(versions)


def test_a_lost_tensor_is_found_by_the_probe(folder: Path, tmp_path: Path) -> None:
    rig = Rig(folder, tmp_path, {UPDATE: "lose"})

    async def work() -> None:
        await rig.probe()
        rig.policy.move(0.5)
        await rig.publish(1)
        with pytest.raises(SyncError, match="log-probabilities differ"):
            await rig.probe()

    rig.run(work)


@pytest.mark.parametrize("path", [START, UPDATE, FINISH])
def test_a_server_that_never_answers_meets_the_deadline(folder: Path, tmp_path: Path, path: str) -> None:
    rig = Rig(folder, tmp_path, {path: "hang"}, timeout_s=0.5)

    async def work() -> None:
        with pytest.raises(EngineError, match=r"did not take the new weights: .* within 0 s(.|\n)*reload") as failure:
            await rig.publish(1)
        assert not failure.value.retryable and rig.engine.policy_version == 0

    started = time.monotonic()
    rig.run(work)
    assert time.monotonic() - started < 20


def test_a_refusal_ends_our_half_too(folder: Path, tmp_path: Path) -> None:
    rig = Rig(folder, tmp_path, {UPDATE: 400})  # nobody takes what `send` puts: it would wait for ever

    async def work() -> None:
        with pytest.raises(EngineError, match=r"did not take the new weights: .*HTTP 400: it will not"):
            await rig.publish(1)

    started = time.monotonic()
    rig.run(work)
    assert time.monotonic() - started < 15  # less than the deadline of 20 s


def test_a_failing_transport_ends_the_server_s_half_too(folder: Path, tmp_path: Path) -> None:
    rig = Rig(folder, tmp_path, {})

    def fail() -> None:
        raise RuntimeError("NCCL error: unhandled system error")

    rig.transport.send = fail  # type: ignore[method-assign]

    async def work() -> None:
        with pytest.raises(EngineError, match="RuntimeError: NCCL error: unhandled system error"):
            await rig.publish(1)
        rig.transport.chunks.put([])  # lets the server's half go

    rig.run(work)


def test_what_gathering_raises_is_no_failure_of_the_server(folder: Path, tmp_path: Path) -> None:
    rig = Rig(folder, tmp_path, {})
    closed: list[bool] = []

    def broken() -> Any:
        try:
            yield "a", torch.zeros(3)
            raise ZeroDivisionError
        finally:
            closed.append(True)

    async def work() -> None:
        with pytest.raises(ZeroDivisionError):
            await rig.engine.load(PublishedWeights(1, folder, "transfer", broken))

    rig.run(work)
    assert closed == [True]


@pytest.mark.parametrize("fault", [404, "hang"])
def test_a_server_without_the_switch_is_named_at_the_start(folder: Path, tmp_path: Path, fault: int | str) -> None:
    rig = Rig(folder, tmp_path, {INIT: fault}, timeout_s=1.0)

    async def work() -> None:
        with pytest.raises(EngineError, match=r"cannot be given weights(.|\n)*VLLM_SERVER_DEV_MODE(.|\n)*queue"):
            await rig.engine.start()

    rig.run(work, starts=False)


def test_chunks_hold_one_dtype_and_at_most_their_size() -> None:
    sizes = [10, 10, 30, 100, 10]
    tensors = [(str(n), torch.zeros(size, dtype=torch.int8)) for n, size in enumerate(sizes)]
    tensors += [("half", torch.zeros(3, dtype=torch.bfloat16)), ("whole", torch.zeros((), dtype=torch.float32))]
    chunks = [[name for name, _ in chunk] for chunk in _chunks(tensors, 50)]
    assert chunks == [["0", "1", "2"], ["3"], ["4"], ["half"], ["whole"]]
    assert list(_chunks([], 50)) == []


def test_a_packed_chunk_is_the_bytes_of_its_tensors() -> None:
    chunk = [("a", torch.arange(6.0).reshape(2, 3).T), ("b", torch.tensor(7.0))]
    flat = packed(chunk, "cpu").view(torch.float32)
    assert flat.tolist() == [0, 3, 1, 4, 2, 5, 7]
    assert described(chunk) == {"names": ["a", "b"], "dtype_names": ["float32"] * 2, "shapes": [[3, 2], []]}


def config(tmp_path: Path, **changes: Any) -> RunConfig:
    tree = {
        "model": {"path": str(tmp_path), "lora": None},
        "engine": {"type": "vllm"},
        "data": {"train": "train.jsonl"},
        "grader": {"type": "string_check", "name": "g", "operation": "eq", "input": "a", "reference": "b"},
        "training": {"steps": 1, "sync": "transfer"},
    }
    return validate_config({**tree, **changes}, "test")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {"path": "m"}}, "model.lora: null"),
        ({"engine": {"type": "transformers"}}, "engine.type is transformers; use reload"),
        ({"engine": {"type": "vllm", "url": ["http://a", "http://b"]}}, "one engine.url"),
    ],
)
def test_what_transfer_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config(tmp_path, **changes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_transfer_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"training.sync: transfer needs a GPU(.|\n)*training.sync=reload"):
        build_engine(config(tmp_path), tmp_path / "engine.log")


def test_a_launched_server_is_told_how_weights_come(folder: Path) -> None:
    model = ModelConfig(path=folder, lora=None)
    command = server_command(VllmEngineConfig(), model, Path("/s"), False, None, "ipc")
    assert json.loads(command[command.index("--weight-transfer-config") + 1]) == {"backend": "ipc"}
    assert server_env(False, "ipc")["VLLM_ALLOW_INSECURE_SERIALIZATION"] == "1"
    for backend in (None, "nccl"):
        assert "VLLM_ALLOW_INSECURE_SERIALIZATION" not in server_env(False, backend)
    assert "--weight-transfer-config" not in server_command(VllmEngineConfig(), model, Path("/s"), False, None)


# A real server, with a backend that needs no GPU (transfer_worker.py).


class FileTransport:
    """Chunks as files in memory; everything else is as on a GPU."""

    backend = "files"
    chunk_bytes = 100_000

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.num_sent = 0

    def init_info(self, num_workers: int) -> dict[str, Any]:
        assert num_workers == 1
        return {"greeting": str(self._folder / "hello")}

    def connect(self, timeout_s: float) -> None:
        pass

    def offer(self, chunk: list[Named]) -> dict[str, Any]:
        path = self._folder / "chunk.safetensors"
        save_file({"packed": packed(chunk, "cpu")}, path)
        return described(chunk) | {"path": str(path)}

    def send(self) -> None:
        self.num_sent += 1

    def finish(self) -> None:
        (self._folder / "chunk.safetensors").unlink()


@pytest.fixture
def pythonpath(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parent.parent))
    yield


@pytest.mark.slow
@pytest.mark.parametrize("is_tied", [True, False])
def test_a_real_server_takes_weights_from_memory(tmp_path: Path, pythonpath: None, is_tied: bool) -> None:
    """The whole life cycle in vLLM's worker, reloading layer by layer, with every weight changed, the head too."""
    shape = {"hidden_size": 128, "num_attention_heads": 4, "tie_word_embeddings": is_tied}
    folder = tiny_model_folder(tmp_path / "tiny", **shape)
    args = ["--worker-extension-cls", "tests.transfer_worker.Extension"]
    limits = {"max_model_len": 160, "max_concurrent": 4, "kv_cache_gib": 0.125, "start_timeout_s": 300.0}
    transport = FileTransport(tmp_path)
    model = ModelConfig(path=folder, dtype="float32", lora=None)
    engine = VllmEngine(VllmEngineConfig(**limits, args=args), model, tmp_path / "engine.log", transport=transport)
    policy, sync = PlainPolicy(folder), Sync("transfer", tmp_path / "weights", folder, "float32")

    async def work() -> None:
        try:
            await engine.start()
            assert (tmp_path / "hello").exists()
            await sync.probe(policy, engine, PROMPTS)
            for version in (1, 2, 3):
                with torch.no_grad():
                    for weight in policy.model.parameters():
                        weight.mul_(1.0 + 0.1 * torch.rand_like(weight))
                await engine.load(sync.publish(policy, version))
                assert (await sync.probe(policy, engine, PROMPTS)).max_gap < 2e-3
        finally:
            await engine.close()

    asyncio.run(asyncio.wait_for(work(), 500))
    assert transport.num_sent > 3
