"""Outgoing URLs: what a rule denies is denied in every spelling, and redirects lead nowhere."""

from __future__ import annotations

import asyncio
import ipaddress
import random
import socket
from typing import Any

import pytest
from fakes import LoopbackServer

from rft.errors import ConfigError
from rft.server.errors import ApiError
from rft.server.outgoing import Outgoing
from rft.server.settings import OutgoingConfig
from rft.wire import Client, RetryPolicy, post_json

METADATA = ipaddress.IPv4Address("169.254.169.254")


def is_allowed(url: str, **rules: list[str]) -> bool:
    try:
        Outgoing(OutgoingConfig(**rules)).check(url, "method.url")  # type: ignore[arg-type]
    except ApiError as error:
        assert (error.status, error.code, error.param) == (400, "url_not_allowed", "method.url")
        return False
    return True


def spellings(address: ipaddress.IPv4Address, chance: random.Random) -> list[str]:
    """Of one address, as resolvers, browsers and attackers write it."""
    number, parts = int(address), [int(part) for part in str(address).split(".")]
    ways = (str, hex, lambda value: f"0{value:o}", lambda value: f"0x{value:08X}")
    mixed = ".".join(chance.choice(ways)(part) for part in parts)
    return [
        str(address),
        f"{address}.",
        str(number),
        hex(number),
        f"0{number:o}",
        mixed,
        f"{parts[0]}.{number & 0xFFFFFF}",
        f"{hex(parts[0])}.{parts[1]}.{number & 0xFFFF}",
        f"[::ffff:{address}]",
        f"[::ffff:{number >> 16:x}:{number & 0xFFFF:x}]",
        f"[0:0:0:0:0:FFFF:{address}]",
        f"[::{address}]",
        f"[64:ff9b::{address}]",
        f"[2002:{number >> 16:x}:{number & 0xFFFF:x}::1]",
        "".join(chr(ord(letter) + 0xFEE0) if letter.isdigit() else letter for letter in str(address)),  # full width
        str(address).replace(".", "\u3002"),
        "".join(f"%{ord(letter):02x}" for letter in str(address)),
    ]


@pytest.mark.parametrize("seed", range(20))
def test_an_address_that_is_denied_is_denied_in_every_spelling(seed: int) -> None:
    chance = random.Random(seed)
    address = METADATA if seed == 0 else ipaddress.IPv4Address(chance.randrange(1 << 24, 224 << 24))
    network = str(ipaddress.ip_network(f"{address}/{chance.randint(9, 32)}", strict=False))
    for host in spellings(address, chance):
        for scheme, tail in (("http", ""), ("https", "/x?y=1"), ("HTTP", ":8080/")):
            assert not is_allowed(f"{scheme}://{host}{tail}", deny=[network]), host


@pytest.mark.parametrize("seed", range(20))
def test_the_resolver_takes_no_spelling_that_we_read_differently(seed: int) -> None:
    chance = random.Random(seed)
    address = ipaddress.IPv4Address(chance.randrange(1 << 24, 224 << 24))
    for host in spellings(address, chance)[:8]:
        try:
            found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)[0][4][0]
        except OSError:
            continue
        assert not is_allowed(f"http://{host}/", deny=[str(found)])
        assert is_allowed(f"http://{host}/", allow=[str(found)], deny=[])


@pytest.mark.parametrize(
    "host",
    [
        "169.254.169.254",
        "[fe80::1]",
        "[fe80::1%25eth0]",
        "[fd00:ec2::254]",
        "100.100.100.200",
        "metadata.google.internal",
        "METADATA.google.Internal.",
        "metadata\u3002google\u3002internal",
        "169.254.0.1:80",
    ],
)
def test_link_local_and_metadata_are_denied_by_default(host: str) -> None:
    assert not is_allowed(f"http://{host}/latest/meta-data")


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:8000/tool",
        "http://localhost:1/",
        "https://[::1]/x",
        "http://10.1.2.3/",
        "http://no-such-host.invalid/tool",
        "http://tool_server:80/x",
        "https://xn--e1afmkfd.example/",
        "https://пример.example/x",
    ],
)
def test_local_tools_and_names_that_do_not_resolve_are_allowed_by_default(url: str) -> None:
    assert is_allowed(url)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "ftp://host/x",
        "file:///etc/passwd",
        "//host/x",
        "host/x",
        "http:host/x",
        "http:///x",
        "http://user@host/",
        "http://user:SECRET@host/",
        "http://:SECRET@host/",
        "http://@host/",
        "http://ho st/",
        "http://host\r\nx: y/",
        "http://host\\@other/",
        "http://host%00/",
        "http://host:99999/",
        "http://[::1/",
        "http://[v1.x]/",
        "http://a,b/",
        "http://-/",
        "http://a..b/",
        "http://\u200b169.254.169.254/",
        "javascript:alert(1)",
        "http://" + "a" * 300 + "/",
    ],
)
def test_what_is_no_plain_url_is_refused(url: str) -> None:
    with pytest.raises(ApiError, match="This URL cannot be used") as caught:
        Outgoing(OutgoingConfig()).check(url, "p")
    assert "SECRET" not in str(caught.value.body())


def test_names_are_matched_whole_or_by_suffix() -> None:
    rules = {"allow": ["tools.example", "*.corp.invalid", "10.0.0.0/8", "::1"], "deny": ["bad.corp.invalid"]}
    for host, verdict in {
        "tools.example": True,
        "TOOLS.example.": True,
        "x.tools.example": False,
        "a.b.corp.invalid": True,
        "corp.invalid": False,
        "evilcorp.invalid": False,
        "bad.corp.invalid": False,
        "10.255.0.1": True,
        "167772161": True,  # 10.0.0.1
        "[::ffff:10.0.0.1]": False,  # an IPv6 address: only its own network allows it
        "[::1]": True,
        "11.0.0.1": False,
        "unknown.invalid": False,
    }.items():
        assert is_allowed(f"http://{host}/", **rules) == verdict, host


def test_names_are_judged_by_their_addresses() -> None:
    assert not is_allowed("http://localhost/", deny=["127.0.0.0/8", "::1"])
    assert is_allowed("http://localhost/", allow=["127.0.0.0/8", "::1"])
    assert not is_allowed("http://0.0.0.0/", deny=["127.0.0.0/8"])
    assert not is_allowed("http://[::]/", deny=["::1/128"])


@pytest.mark.parametrize("entry", ["10.0.0.0/33", "a b", "http://x", "", "*", "1.2.3", "x/8"])
def test_rules_that_mean_nothing_are_refused(entry: str) -> None:
    with pytest.raises(ConfigError, match=r"outgoing\.deny\[1\]"):
        Outgoing(OutgoingConfig(deny=["10.0.0.0/8", entry]))


class Redirecting(LoopbackServer):
    """Sends everybody elsewhere."""

    target = ""

    async def _respond(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        status = b"HTTP/1.1 307 Temporary Redirect\r\n"
        writer.write(status + f"location: {self.target}\r\ncontent-length: 0\r\n\r\n".encode())


def test_redirects_are_not_followed() -> None:
    """So a host that is allowed cannot send us to one that is not."""

    async def post(url: str) -> int:
        http = Client(max_connections=1)
        try:
            return (
                await post_json(http, url, b"{}", headers={}, timeout_s=5, retry=RetryPolicy(max_attempts=1))
            ).status
        finally:
            await http.close()

    with Redirecting() as target, Redirecting() as first:
        first.target = f"{target.base_url}/secret"
        assert asyncio.run(post(f"{first.base_url}/tool")) == 307
        assert first.paths == ["/tool"] and target.paths == []
