"""Servers for tests, on loopback and ports of the system's choice: an ASGI application in a thread, `rft serve`."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from rft.server.app import build_app
from rft.server.services import Services
from rft.server.settings import ServerConfig

ROOT = Path(__file__).resolve().parent.parent
_START_S, _END_S = 60.0, 120.0


class _Server(uvicorn.Server):
    def __init__(self, app: Any) -> None:
        super().__init__(uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=5))
        self.is_up = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.is_up.set()


@contextlib.contextmanager
def served(app: Any) -> Iterator[str]:
    """The address of an ASGI application, without /v1, for as long as the block lasts."""
    server = _Server(app)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            assert server.is_up.wait(_START_S) and server.started, "the server did not start"
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(_END_S)
            assert not thread.is_alive(), "the server did not end"


@contextlib.contextmanager
def serving(
    config: ServerConfig, *, has_auth: bool = False, prepare: Callable[[Services], None] = lambda services: None
) -> Iterator[str]:
    """The base URL, with /v1, of the whole server in a thread. `prepare` gets its services before any request does."""
    app = build_app(config, has_auth=has_auth)
    lifespan = app.router.lifespan_context

    @contextlib.asynccontextmanager
    async def prepared(app: FastAPI) -> AsyncIterator[None]:
        async with lifespan(app):
            prepare(app.state.services)
            yield

    app.router.lifespan_context = prepared
    with served(app) as address:
        yield f"{address}/v1"


@contextlib.contextmanager
def rft_serve(config: Path, log: Path, *arguments: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The base URL, with /v1, of a real `rft serve` and its process; `log` gets what it says."""
    command = [sys.executable, "-m", "rft", "serve", str(config), *arguments]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    with (
        log.open("ab") as file,
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=file, text=True, env=environment) as process,
    ):
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("serving "), log.read_text()[-3000:]
            url = line.removeprefix("serving ").strip()
            _wait_until_healthy(url)
            yield url, process
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=_END_S)
            process.kill()


def _wait_until_healthy(url: str) -> None:
    """The address is bound before it is announced; this waits for what starts behind it."""
    deadline = time.monotonic() + _START_S
    while True:
        try:
            with urllib.request.urlopen(url.removesuffix("/v1") + "/health", timeout=5) as answer:
                assert answer.status == 200
                return
        except (urllib.error.URLError, ConnectionError):
            assert time.monotonic() < deadline, f"{url} did not answer within {_START_S:.0f} s"
            threading.Event().wait(0.05)
