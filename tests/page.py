"""Asking the page as nobody's library does: raw paths, any Host, any header; and what every answer must have."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from serving import ROOT

from rft.ui.security import HEADERS

JSON = {"content-type": "application/json"}
TIMEOUT_S = 90.0
INDEX = "<!doctype html><title>the page</title>"


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        return str(self.json["error"]["code"])

    @property
    def message(self) -> str:
        return str(self.json["error"]["message"])


def ask(address: str, path: str, *, method: str = "GET", body: Any = None, **headers: str) -> Answer:
    """One request, its path sent as it is. Headers by their names, `_` for `-`; a body that is no bytes as JSON."""
    place = urlsplit(address)
    assert place.hostname is not None
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=TIMEOUT_S)
    try:
        connection.putrequest(method, path, skip_host="host" in headers, skip_accept_encoding=True)
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        length = {"content-length": str(len(data))} if method != "GET" else {}
        for name, value in (length | given).items():
            connection.putheader(name, value)
        connection.endheaders(data or None)
        answer = connection.getresponse()
        return Answer(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())
    finally:
        connection.close()


def post(address: str, path: str, body: Any = None, **headers: str) -> Answer:
    """As the page itself does it."""
    return ask(
        address,
        path,
        method="POST",
        body={} if body is None else body,
        **{**{"content_type": JSON["content-type"]}, **headers},
    )


@contextmanager
def rft_ui(runs: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The page's address as a real `rft ui` says it, and its process."""
    command = [sys.executable, "-m", "rft", "ui", str(runs), "--port", "0"]
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().removeprefix("serving ").strip(), process
        finally:
            process.kill()


def children(pid: int) -> set[int]:
    """The processes that a process started, and those that they started."""
    found = (path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children"))
    direct = {int(child) for line in found for child in line.split()}
    return direct.union(*(children(child) for child in direct))


def assert_guarded(answer: Answer) -> None:
    """Every security header is there."""
    assert HEADERS.items() <= answer.headers.items(), answer


def a_static_folder(folder: Path) -> Path:
    """What the front end ships, in small."""
    folder.mkdir()
    (folder / "index.html").write_text(INDEX)
    (folder / "app.js").write_text("export const a = 1;")
    (folder / "app.css").write_text("body {}")
    return folder
