"""`rft serve`: one process, one event loop; a second `rft serve --create-key` beside it makes keys."""

from __future__ import annotations

import logging
from collections.abc import Callable

import uvicorn

from rft.errors import UserError
from rft.listener import bound, is_loopback, url_of
from rft.server.app import build_app
from rft.server.index import Index
from rft.server.keys import DEFAULT_PROJECT, Keys
from rft.server.services import INDEX, private_folder
from rft.server.settings import ServerConfig

_GRACE_S = 10  # what requests in flight get at the end


def create_key(config: ServerConfig, project: str = DEFAULT_PROJECT, *, is_admin: bool = False) -> str:
    """A new API key of the data folder; a server that runs on it takes it at once."""
    index = Index(private_folder(config.data_dir) / INDEX)
    try:
        return Keys(index).create(project, is_admin=is_admin)
    finally:
        index.close()


def serve(config: ServerConfig, *, has_auth: bool, on_ready: Callable[[str], None]) -> None:
    """Serve until interrupted. `on_ready` gets the address, without a path, when the port is ours.

    Raises UserError when the port is taken, or when anybody on the network could use a server without keys.
    """
    if not has_auth and not is_loopback(config.host):
        problem = f"without keys everybody who reaches {config.host} could use this server"
        raise UserError(problem, where="--no-auth", cure="set host=127.0.0.1, or make a key with --create-key")
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    with bound(config.host, config.port) as listener:
        app = build_app(config, has_auth=has_auth)
        on_ready(url_of(listener))
        options = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=_GRACE_S)
        uvicorn.Server(options).run(sockets=[listener])
