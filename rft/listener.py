"""The socket that a server of ours listens on, taken before anything starts: a port in use is said first."""

from __future__ import annotations

import ipaddress
import socket

from rft.errors import UserError


def bound(host: str, port: int) -> socket.socket:
    """A TCP socket of that address; port 0 lets the system choose. Raises UserError when the address is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        cure = "choose another port (0: any free one)"
        raise UserError(f"cannot listen: {error.strerror}", where=f"{host}:{port}", cure=cure) from None
    return listener


def url_of(listener: socket.socket) -> str:
    """http://host:port, as a browser reads it."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def is_loopback(host: str) -> bool:
    """True for `localhost` and for addresses that only this machine reaches."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
