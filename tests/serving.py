"""Servers for tests, on loopback and ports of the system's choice: an ASGI application in a thread, `rft serve`."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn

ROOT = Path(__file__).resolve().parent.parent
_START_S, _END_S = 60.0, 120.0


@contextlib.contextmanager
def served(app: Any) -> Iterator[str]:
    """The address of `app`, without /v1, for as long as the block lasts."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + _START_S
    while not server.started and thread.is_alive() and time.monotonic() < deadline:
        thread.join(0.01)
    assert server.started, "the server did not start"
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(_END_S)


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
