"""A real server on loopback, in a thread: what the real SDK talks to."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from rft.server.app import build_app
from rft.server.settings import ServerConfig


@contextmanager
def serving(config: ServerConfig, *, has_auth: bool = False) -> Iterator[str]:
    """The base URL of a server that has started; it ends with the context."""
    listener = socket.create_server(("127.0.0.1", 0))
    app = build_app(config, has_auth=has_auth)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=5))
    failures: list[BaseException] = []

    def run() -> None:
        try:
            server.run(sockets=[listener])
        except BaseException as error:  # shown by whoever waits, below
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            thread.join(0.01)
        assert server.started, f"the server did not start: {failures}"
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()
        assert not thread.is_alive(), "the server did not end"
