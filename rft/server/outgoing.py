"""Which URLs of users the server and its jobs may send requests to.

Guarantees: a host is judged as the HTTP client will read it, in whatever spelling, and by every address it stands for.
It judges when it is asked: a name whose addresses change later is judged by those it had.
"""

from __future__ import annotations

import concurrent.futures
import ipaddress
import re
import socket
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

import yarl

from rft.errors import ConfigError
from rft.server.errors import ApiError
from rft.server.settings import OutgoingConfig
from rft.threads import DaemonThreads

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_RESOLVE_S = 2.0
_NAME = re.compile(r"(?=.{1,253}$)[a-z0-9_]([a-z0-9_-]{0,62}[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]{0,62}[a-z0-9_])?)*")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_COMPATIBLE = ipaddress.IPv6Network("::/96")


class Outgoing:
    """The rules of one server. Thread-safe."""

    def __init__(self, config: OutgoingConfig) -> None:
        """Raises ConfigError naming the entry that is neither a name nor a network."""
        self._allowed = None if config.allow is None else _Hosts(config.allow, "outgoing.allow")
        self._denied = _Hosts(config.deny, "outgoing.deny")
        self._threads = DaemonThreads()

    def check(self, url: str, param: str) -> None:
        """Raises ApiError (400) for a URL that may not be used. Blocks while a name is looked up, at most 2 s."""
        host = _host(url, param)
        address = _literal(host)
        addresses = [address] if address else self._resolved(host)
        every = [form for found in addresses for form in _forms(found)]
        if self._denied.has_name(host) or any(self._denied.has_address(form) for form in every):
            raise _refused(param, f"the host {host} is denied by this server's outgoing.deny")
        if self._allowed is None or self._allowed.has_name(host):
            return
        if not addresses or not all(self._allowed.has_address(found) for found in addresses):
            raise _refused(param, f"the host {host} is not in this server's outgoing.allow")

    def _resolved(self, name: str) -> list[Address]:
        """None of a name that cannot be looked up here and now: the machine that trains may know it."""
        lookup = self._threads.submit(socket.getaddrinfo, name, None, type=socket.SOCK_STREAM)
        try:
            found = lookup.result(_RESOLVE_S)
        except (OSError, UnicodeError, concurrent.futures.TimeoutError):
            return []
        return [ipaddress.ip_address(str(sockaddr[0]).partition("%")[0]) for *_, sockaddr in found]


class _Hosts:
    """A list of names, `*.suffix`, addresses and networks."""

    def __init__(self, entries: Sequence[str], field: str) -> None:
        self._names: set[str] = set()
        self._suffixes: list[str] = []
        self._networks: list[Network] = []
        for number, entry in enumerate(entries):
            self._add(entry.strip().lower().removesuffix("."), f"{field}[{number}]")

    def has_name(self, host: str) -> bool:
        return host in self._names or any(host.endswith(suffix) for suffix in self._suffixes)

    def has_address(self, address: Address) -> bool:
        return any(address.version == network.version and address in network for network in self._networks)

    def _add(self, entry: str, where: str) -> None:
        try:
            self._networks.append(ipaddress.ip_network(entry.strip("[]"), strict=False))
        except ValueError:
            name = entry.removeprefix("*.")
            if not _NAME.fullmatch(name) or name.replace(".", "").isdigit():
                cure = "write a host name, *.host.name, an address, or a network like 10.0.0.0/8"
                raise ConfigError(f"{entry!r} is none of these", where=where, cure=cure) from None
            if name == entry:
                self._names.add(name)
            else:
                self._suffixes.append(f".{name}")


def _host(url: str, param: str) -> str:
    """The host as aiohttp, which sends the requests, reads it: lower case, ASCII, without a final dot."""
    if any(letter.isspace() or not letter.isprintable() for letter in url):
        raise _refused(param, "it holds white space or control characters")
    try:
        authority, parsed = urlsplit(url).netloc, yarl.URL(url)
        host = (parsed.raw_host or "").lower()
    except ValueError:
        raise _refused(param, "it cannot be read") from None
    if parsed.scheme not in ("http", "https"):
        raise _refused(param, "it must start with http:// or https://")
    if "@" in authority:
        raise _refused(param, "it holds a user name or a password; send them in headers")
    host = host.removesuffix(".")
    is_name = _NAME.fullmatch(host) and "[" not in authority
    if not is_name and _literal(host) is None:
        raise _refused(param, "its host is not a name or an address")
    return host


def _literal(host: str) -> Address | None:
    """The address that a host is, in any form the resolver takes: 169.254.169.254, 0xa9fea9fe, 0251.0376.43518."""
    try:
        return ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        pass
    try:
        return ipaddress.IPv4Address(socket.inet_aton(host))
    except (OSError, UnicodeError):
        return None


def _forms(address: Address) -> Iterator[Address]:
    """The address, and the IPv4 addresses that requests to it end at."""
    yield address
    if address.is_unspecified:  # reaches this machine itself
        yield ipaddress.IPv4Address("127.0.0.1")
        yield ipaddress.IPv6Address("::1")
    if isinstance(address, ipaddress.IPv6Address):
        embedded = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
        if address in _NAT64 or address in _COMPATIBLE:
            embedded.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        yield from (found for found in embedded if found is not None)


def _refused(param: str, why: str) -> ApiError:
    """Says nothing of the URL but its host: the rest may hold keys."""
    return ApiError(f"This URL cannot be used: {why}.", code="url_not_allowed", param=param)
