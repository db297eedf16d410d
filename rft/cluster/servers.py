"""The vLLM servers of one node: started together, one per GPU or group of GPUs, told to the others once all answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

from rft.cluster.allocation import Allocation
from rft.cluster.attempt import Announcement, Attempt
from rft.cluster.commands import CONFIG, engine_gpus
from rft.cluster.machine import free_port, visible_gpus
from rft.config import load_config
from rft.engines.launch import ServerProcess
from rft.engines.serving import served

_WATCH_S = 0.5


async def all_served(
    attempt: Attempt,
    me: Announcement,
    allocation: Allocation,
    run: Path,
    stack: AsyncExitStack,
    raise_if_over: Callable[[], None],
) -> list[ServerProcess]:
    """All servers of this node, on the stack. Raises EngineError, or what `raise_if_over` raises meanwhile."""
    config = load_config(run / CONFIG)

    async def start(index: int) -> tuple[str, ServerProcess]:
        gpus = engine_gpus(allocation, index, visible_gpus())
        size = allocation.gpus_per_engine
        flags = ["--tensor-parallel-size", str(size)] if gpus is not None and size > 1 else []
        env = {} if gpus is None else {"CUDA_VISIBLE_DEVICES": gpus}
        port = free_port(me.address, allocation.port + index if allocation.port else 0)
        log = attempt.log(f"engine-{me.node}-{index}")
        return await stack.enter_async_context(served(config, (me.address, port), log, (flags, env)))

    starting = [asyncio.create_task(start(index)) for index in range(allocation.engines_per_node)]
    try:
        while any(not task.done() for task in starting):
            await asyncio.wait(starting, timeout=_WATCH_S, return_when=asyncio.FIRST_EXCEPTION)
            if any(task.done() and task.exception() is not None for task in starting):
                break
            raise_if_over()
        found = [task.result() for task in starting if task.done()]
    finally:
        for task in starting:
            task.cancel()
        await asyncio.gather(*starting, return_exceptions=True)
    attempt.write_engines(me.node, [url for url, _ in found])
    return [server for _, server in found]
