"""`rft ui`: the page of a folder of runs, for whoever sits at this machine."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import uvicorn

from rft.errors import UserError
from rft.listener import bound, is_loopback, url_of
from rft.ui.app import build_ui

_GRACE_S = 3  # what requests in flight get at the end


def serve(path: Path, host: str, port: int, on_ready: Callable[[str], None]) -> None:
    """Serve until interrupted. `on_ready` gets the page's address when the port is ours.

    Raises UserError when the port is taken, when there are no runs, or when others than this machine would be served.
    """
    if not is_loopback(host):
        problem = f"the page has no keys here, and everybody who reaches {host} could use it"
        cure = "leave out --host and reach it through ssh -L 8001:127.0.0.1:8001, or use `rft serve`, which has keys"
        raise UserError(problem, where="--host", cure=cure)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    app = build_ui(path)
    with bound(host, port) as listener:
        listener.listen()  # who comes before the first answer waits for it
        on_ready(f"{url_of(listener)}/ui/")
        options = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=_GRACE_S)
        uvicorn.Server(options).run(sockets=[listener])
