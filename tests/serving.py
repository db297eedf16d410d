"""A real server in a thread, on a port that the system chose."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from rft.server.app import build_app
from rft.server.settings import ServerConfig


@contextmanager
def serving(config: ServerConfig, *, has_auth: bool = False) -> Iterator[str]:
    """The base URL, up to and with /v1, of a server that answers until the end."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        options = uvicorn.Config(build_app(config, has_auth=has_auth), log_config=None, access_log=False)
        server = uvicorn.Server(options)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        deadline = time.monotonic() + 30
        while not server.started and thread.is_alive() and time.monotonic() < deadline:
            thread.join(0.01)
        assert server.started, "the server did not start"
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        finally:
            server.should_exit = True
            thread.join(30)
