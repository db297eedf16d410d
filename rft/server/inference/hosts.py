"""The host processes of local models: started when asked for, ended when idle, when room is needed, and with us.

Guarantees: at most `max_loaded` of them; who asks for one that starts waits for the same start; a host in use is not
ended; a dead one is replaced by the next request; nothing of them outlives the server, however it dies.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import shutil
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from rft.engines.launch import ServerProcess, launch, make_scratch
from rft.server.errors import ApiError
from rft.server.inference.model import HostConfig
from rft.server.inference.plans import Plan, plan_of
from rft.server.models import Target
from rft.server.settings import InferenceConfig

logger = logging.getLogger("rft.server.inference")
_POLL_S = 0.1
_TAIL_LINES = 5
_START_SLACK_S = 60.0  # beyond the engine's own deadline: merging weights, ending what it started
_GPU_SHARE = 0.9  # of all hosts together


@dataclass(slots=True)
class Host:
    """One process. `in_use` counts who holds it."""

    key: str
    socket: Path
    process: ServerProcess | None = None
    http: aiohttp.ClientSession | None = None
    ready: asyncio.Task[None] | None = None
    adapters: set[str] = field(default_factory=set)
    in_use: int = 0
    last_used_at: float = field(default_factory=time.monotonic)
    ending: asyncio.Task[None] | None = None
    timer: asyncio.TimerHandle | None = None

    @property
    def is_free(self) -> bool:
        return self.in_use == 0 and self.ending is None

    @property
    def is_dead(self) -> bool:
        if self.ready is None or not self.ready.done():
            return False
        has_failed = self.ready.cancelled() or self.ready.exception() is not None
        return has_failed or self.process is None or not self.process.is_alive


class Hosts:
    """All host processes of a server. One event loop. `logs`: a folder for what they print."""

    def __init__(self, config: InferenceConfig, logs: Path) -> None:
        self._config, self._logs = config, logs
        self._hosts: dict[str, Host] = {}
        self._changed = asyncio.Event()  # a new one after each change
        self._is_closed = False

    @property
    def loaded(self) -> list[str]:
        """The names of the models that are in memory or on their way."""
        return [host.key for host in self._hosts.values()]

    @asynccontextmanager
    async def held(self, target: Target) -> AsyncIterator[tuple[Host, Plan]]:
        """The target's host, ready, and kept until the block ends. Raises ApiError (503 when all stay busy)."""
        plan = plan_of(target, self._config)
        host = await self._acquire(plan, target)
        try:
            await _load_adapter(host, plan)
            yield host, plan
        finally:
            self._release(host)

    async def discard(self, host: Host) -> None:
        """End a host that does not answer: the next request gets a new one."""
        await self._end(host)

    async def close(self) -> None:
        """End them all; returns when they are gone."""
        self._is_closed = True
        await asyncio.gather(*(self._end(host) for host in list(self._hosts.values())))

    async def _acquire(self, plan: Plan, target: Target) -> Host:
        try:
            async with asyncio.timeout(self._config.request_timeout_s):
                while True:
                    host = await self._find(plan, target)
                    if host is not None:
                        break
        except TimeoutError:
            message = "All loaded models are busy; none made room in time. Try again, or raise inference.max_loaded."
            raise ApiError(message, status=503, code="server_busy") from None
        try:
            assert host.ready is not None
            await asyncio.shield(host.ready)
        except BaseException as error:
            self._release(host)
            if isinstance(error, ApiError):
                await self._end(host)
            raise
        return host

    async def _find(self, plan: Plan, target: Target) -> Host | None:
        """The host with one more user, made where there is room; None after something has changed."""
        if self._is_closed:
            raise ApiError("The server is shutting down.", status=503, code="server_error")
        changed, host = self._changed, self._hosts.get(plan.key)
        if host is not None and host.is_dead:
            await self._end(host)
            return None
        if host is None and len(self._hosts) < self._config.max_loaded:
            host = self._start(plan, target)
        if host is not None and host.ending is None:
            host.in_use += 1
            if host.timer is not None:
                host.timer.cancel()
            return host
        free = [other for other in self._hosts.values() if other.is_free]
        if host is None and free:
            await self._end(min(free, key=lambda other: other.last_used_at))
        else:
            await changed.wait()
        return None

    def _release(self, host: Host) -> None:
        host.in_use -= 1
        host.last_used_at = time.monotonic()
        if host.is_free:
            host.timer = asyncio.get_running_loop().call_later(self._config.idle_stop_s, self._end_if_free, host)
            self._notify()

    def _end_if_free(self, host: Host) -> None:
        if host.is_free:
            logger.info("unloading %s: no request for %g s", host.key, self._config.idle_stop_s)
            host.ending = asyncio.create_task(self._finish(host))

    def _start(self, plan: Plan, target: Target) -> Host:
        host = self._hosts[plan.key] = Host(plan.key, make_scratch() / "h")
        host.ready = asyncio.create_task(self._launch(host, plan, target))
        return host

    async def _launch(self, host: Host, plan: Plan, target: Target) -> None:
        """Return when the host answers. Raises ApiError (500) quoting what it printed last."""
        started = time.monotonic()
        log = self._logs / hashlib.sha256(host.key.encode()).hexdigest()[:12]
        for path in (host_log := log.with_suffix(".host.log"), engine_log := log.with_suffix(".engine.log")):
            path.unlink(missing_ok=True)
        config = _host_config(self._config, plan, target, host.socket, engine_log)
        command = [sys.executable, "-W", "ignore", "-m", "rft.server.inference.host", config.model_dump_json()]
        env = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        host.process = await launch(command, env, host.socket.parent, host_log)
        # a connection per request: closing it is how a request is cancelled, and a dead host is seen at once
        connector = aiohttp.UnixConnector(str(host.socket), limit=0, force_close=True)
        host.http = aiohttp.ClientSession(
            "http://host/", connector=connector, timeout=aiohttp.ClientTimeout(total=None)
        )
        deadline = started + self._config.start_timeout_s + _START_SLACK_S
        while not await _answers(host.http):
            if await host.process.has_ended(_POLL_S) or time.monotonic() > deadline:
                is_late = host.process.is_alive
                said = "\n".join(host.process.log_tail(_TAIL_LINES))
                problem = "was not ready in time" if is_late else "could not be loaded"
                logger.error("model %s %s: %s", target.name, problem, said)
                raise ApiError(f"The model {target.name} {problem}: {said}", status=500, code="model_not_loaded")
        logger.info("loaded %s in %.1f s", target.name, time.monotonic() - started)

    async def _end(self, host: Host) -> None:
        """Returns when it is gone; goes on when the caller is cancelled."""
        if host.ending is None:
            host.ending = asyncio.create_task(self._finish(host))
        await asyncio.shield(host.ending)

    async def _finish(self, host: Host) -> None:
        if host.timer is not None:
            host.timer.cancel()
        if host.ready is not None and not host.ready.done():
            host.ready.cancel()
            await asyncio.wait([host.ready])
        if host.http is not None:
            await host.http.close()
        if host.process is not None:
            await host.process.close()
        shutil.rmtree(host.socket.parent, ignore_errors=True)  # where no process came to do it
        self._hosts.pop(host.key, None)
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


async def _load_adapter(host: Host, plan: Plan) -> None:
    """Raises ApiError."""
    if plan.adapter is None or plan.name in host.adapters:
        return
    assert host.http is not None
    try:
        async with host.http.put(f"adapters/{plan.name}", json={"path": str(plan.adapter)}) as response:
            status, said = response.status, (await response.text())[:500]
    except (aiohttp.ClientError, OSError):
        raise ApiError("The model's process ended. Send the request again.", status=503, code="server_error") from None
    if status != 200:
        raise ApiError(f"The tuned model could not be loaded: {said}", status=500, code="model_not_loaded")
    host.adapters.add(plan.name)


def _host_config(config: InferenceConfig, plan: Plan, target: Target, socket: Path, log_path: Path) -> HostConfig:
    base = target.local
    return HostConfig(
        engine=config.engine,
        path=base.path.resolve(),
        dtype=base.dtype,
        max_model_len=base.max_model_len,
        kv_cache_gib=base.kv_cache_gib,
        gpu_memory_share=_GPU_SHARE / config.max_loaded,
        start_timeout_s=config.start_timeout_s,
        checkpoint=plan.checkpoint,
        max_lora_rank=plan.max_lora_rank,
        socket=socket,
        log_path=log_path,
    )


async def _answers(http: aiohttp.ClientSession) -> bool:
    try:
        async with asyncio.timeout(5), http.get("health") as response:
            return response.status == 200
    except (aiohttp.ClientError, OSError):
        return False
