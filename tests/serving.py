"""A server of the API in a thread, on a port chosen by the system."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from rft.server.app import build_app
from rft.server.settings import ServerConfig

START_TIMEOUT_S = 60.0


@contextmanager
def serving(config: ServerConfig, *, has_auth: bool = False) -> Iterator[str]:
    """The base URL of a server that runs until the block ends."""
    started = threading.Event()

    class Server(uvicorn.Server):
        async def startup(self, sockets: list | None = None) -> None:
            await super().startup(sockets)
            started.set()

    options = uvicorn.Config(
        build_app(config, has_auth=has_auth), host="127.0.0.1", port=0, log_config=None, timeout_graceful_shutdown=2
    )
    server = Server(options)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        assert started.wait(START_TIMEOUT_S), "the server did not start"
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.should_exit = True
        thread.join(START_TIMEOUT_S)
        assert not thread.is_alive(), "the server did not end"
