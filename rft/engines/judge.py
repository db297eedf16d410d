"""Judges given by a model folder: each is served by a vLLM process of its own, so that its weights never move.

One exception costs nothing: where the run's engine keeps the base model beside its adapters, a judge that is that very
folder is asked there, under the base model's name.
"""

from __future__ import annotations

from pathlib import Path

import aiohttp

from rft.config import ModelConfig, RunConfig, VllmEngineConfig
from rft.engines import sync_kind
from rft.engines.launch import ServerProcess
from rft.engines.remote import Sampler
from rft.engines.vllm_server import MODEL_NAME, StatusCallback, launch_server, wait_until_ready
from rft.graders.judge import Judge, JudgeConfig, Place

_URL = "http://judge/v1"  # the host means nothing: requests go to a Unix socket


async def start_judge(judge: Judge, log_path: Path, on_status: StatusCallback) -> ServerProcess:
    """Serve the judge's folder and set its place; the caller closes the server. Raises EngineError with the cause."""
    config, path = judge.config, judge.config.path
    assert path is not None, "only a judge given by path is started"
    engine = VllmEngineConfig(
        max_model_len=config.max_model_len,
        max_concurrent=config.max_concurrent,
        kv_cache_gib=config.kv_cache_gib,
        gpu_memory_share=config.gpu_memory_share,
    )
    server = await launch_server(engine, ModelConfig(path=path, dtype=config.dtype), log_path, None)
    socket = server.scratch / "s"
    try:
        async with aiohttp.ClientSession("http://judge/", connector=aiohttp.UnixConnector(str(socket))) as http:
            await wait_until_ready(server, http, engine.start_timeout_s, on_status)
    except BaseException:  # also cancellation: no process may be left
        await server.close()
        raise
    judge.place = Place(_URL, MODEL_NAME, socket)
    return server


def place_in_engine(config: RunConfig, judge: JudgeConfig, engine: Sampler) -> Place | None:
    """Where the run's own engine answers as `judge`; None where it has other weights, or will have."""
    from rft.engines.vllm import VllmEngine

    if not isinstance(engine, VllmEngine) or engine.socket is None or judge.path is None:
        return None
    is_base = judge.path.resolve() == config.model.path.resolve() and judge.dtype == config.model.dtype
    has_room = judge.max_model_len <= config.engine.max_model_len
    if is_base and has_room and sync_kind(config.training.sync) == "adapter":
        return Place(_URL, MODEL_NAME, engine.socket)
    return None
