"""A vLLM server for other machines: the one that a run would launch, on a TCP port.

Whoever reaches the port can sample, load weights and end the server: for networks of people who trust each other.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp

from rft.config import RunConfig, VllmEngineConfig
from rft.engines import max_lora_rank
from rft.engines.launch import ServerProcess, launch, make_scratch
from rft.engines.vllm_server import is_cpu_build, server_command, server_env, server_error, wait_until_ready
from rft.errors import ConfigError

_PROBE_S = 30.0


@asynccontextmanager
async def served(
    config: RunConfig,
    address: tuple[str, int],
    log_path: Path,
    extra: tuple[list[str], dict[str, str]] = ([], {}),
    on_status: Callable[[str], None] = lambda _: None,
) -> AsyncIterator[tuple[str, ServerProcess]]:
    """A server that answers, and its URL; it and all it started is gone when the context ends.

    extra: further flags and environment. Raises ConfigError for another engine, EngineError quoting the server's log.
    """
    engine, model = config.engine, config.model
    if not isinstance(engine, VllmEngineConfig):
        cure = "set engine.type=vllm, or do without engine nodes"
        raise ConfigError(f"{engine.type} samples inside the run, not as a server", where="engine.type", cure=cure)
    is_cpu = is_cpu_build()
    backend = "nccl" if config.training.sync == "transfer" else None
    command = server_command(engine, model, address, is_cpu, max_lora_rank(config), backend)
    environment = server_env(is_cpu, backend) | extra[1]
    url = f"http://{f'[{address[0]}]' if ':' in address[0] else address[0]}:{address[1]}"
    server = await launch([*command, *extra[0]], environment, make_scratch(), log_path)
    try:
        async with aiohttp.ClientSession(url + "/", timeout=aiohttp.ClientTimeout(total=_PROBE_S)) as http:
            await wait_until_ready(server, http, engine.start_timeout_s, on_status)
        yield url, server
    finally:
        await server.close()


async def serve(config: RunConfig, address: tuple[str, int], log_path: Path, on_ready: Callable[[str], None]) -> None:
    """Serve until cancelled. Raises EngineError when the server ends by itself."""
    async with served(config, address, log_path) as (url, server):
        on_ready(url)
        while not await server.has_ended(_PROBE_S):
            pass
        raise server_error(server, "the vLLM server ended")
