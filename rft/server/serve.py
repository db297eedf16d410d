"""`rft serve`: one process, one event loop; a second `rft serve --create-key` beside it makes keys."""

from __future__ import annotations

import ipaddress
import logging
import socket
from collections.abc import Callable

import uvicorn

from rft.errors import UserError
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
    """Serve until interrupted. `on_ready` gets the base URL when the port is ours.

    Raises UserError when the port is taken, or when anybody on the network could use a server without keys.
    """
    if not has_auth and not is_loopback(config.host):
        problem = f"without keys everybody who reaches {config.host} could use this server"
        raise UserError(problem, where="--no-auth", cure="set host=127.0.0.1, or make a key with --create-key")
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    with _bound(config) as listener:
        app = build_app(config, has_auth=has_auth)
        host, port = listener.getsockname()[:2]
        on_ready(f"http://{f'[{host}]' if ':' in host else host}:{port}/v1")
        options = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=_GRACE_S)
        uvicorn.Server(options).run(sockets=[listener])


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _bound(config: ServerConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
    except OSError as error:
        listener.close()
        cure = "choose another port (port=0: any free one)"
        raise UserError(f"cannot listen: {error.strerror}", where=f"{config.host}:{config.port}", cure=cure) from None
    return listener
