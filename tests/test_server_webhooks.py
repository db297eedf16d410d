"""Webhooks: a real receiver gets what the real SDK verifies, also one that was away."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from fakes import LoopbackServer
from starlette.testclient import TestClient

from rft.errors import ConfigError
from rft.server.app import build_app
from rft.server.index import Index
from rft.server.outgoing import Outgoing
from rft.server.settings import OutgoingConfig, ServerConfig, WebhookConfig
from rft.server.webhooks import Webhooks
from rft.wire import RetryPolicy

SECRET = "whsec_" + base64.b64encode(b"a secret of thirty-two bytes ....").decode()
JOB = {"id": "ftjob-1", "status": "succeeded", "finished_at": 1_700_000_000}


class Receiver(LoopbackServer):
    """Keeps raw bodies; answers the statuses of `script` in turn, then 200."""

    def __init__(self, *script: int, port: int = 0) -> None:
        super().__init__()
        self.script, self.port = list(script), port
        self.bodies: list[bytes] = []
        self.accepted: list[dict[str, Any]] = []

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {key.lower(): value for key, _, value in (line.partition(": ") for line in head[1:] if line)}
        body = await reader.readexactly(int(headers["content-length"]))
        self.bodies.append(body)
        self.headers.append(headers)
        status = self.script.pop(0) if self.script else 200
        if status == 200:
            self.accepted.append(json.loads(body))
        writer.write(f"HTTP/1.1 {status} X\r\ncontent-length: 0\r\nlocation: http://127.0.0.1:1/\r\n\r\n".encode())
        await writer.drain()


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOOK_SECRET", SECRET)


def webhooks(index: Index, *urls: str, project: str | None = None) -> Webhooks:
    configs = [WebhookConfig(url=url, secret_env="HOOK_SECRET", project=project) for url in urls]
    quick = RetryPolicy(max_attempts=2, first_wait_s=0.01)
    return Webhooks(configs, index, Outgoing(OutgoingConfig()), retry=quick, pause_s=0.05)


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not is_so():  # noqa: ASYNC110 - what another thread and a database say, there is nothing to wait on
            await asyncio.sleep(0.01)


def queued(index: Index) -> int:
    return len(index.every("webhook_delivery"))


@pytest.mark.parametrize("status", ["succeeded", "failed", "cancelled"])
def test_row_40_the_sdk_verifies_what_arrives(tmp_path: Path, status: str) -> None:
    index = Index(tmp_path / "i.sqlite")

    async def run(url: str) -> None:
        async with webhooks(index, url).delivering() as hooks:
            hooks.job_ended(JOB | {"status": "paused"}, "p")
            hooks.job_ended(JOB | {"status": status}, "p")
            await until(lambda: not queued(index))

    with Receiver() as receiver:
        asyncio.run(run(receiver.base_url + "/hook?token=x"))
    client = openai.OpenAI(api_key="none", webhook_secret=SECRET)
    event = client.webhooks.unwrap(receiver.bodies[0], receiver.headers[0])
    assert event.type == f"fine_tuning.job.{status}" and event.data.id == "ftjob-1"  # type: ignore[union-attr]
    assert (event.object, event.created_at) == ("event", 1_700_000_000)  # type: ignore[union-attr]
    assert event.id == receiver.headers[0]["webhook-id"]  # type: ignore[union-attr]
    assert len(receiver.bodies) == 1
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.unwrap(receiver.bodies[0].replace(b"ftjob-1", b"ftjob-2"), receiver.headers[0])


def test_what_is_refused_is_sent_again_with_the_same_id(tmp_path: Path) -> None:
    index = Index(tmp_path / "i.sqlite")

    async def run(url: str) -> None:
        async with webhooks(index, url).delivering() as hooks:
            hooks.job_ended(JOB, "p")
            await until(lambda: not queued(index))

    with Receiver(500, 404, 302, 410) as receiver:
        asyncio.run(run(receiver.base_url))
    assert len(receiver.bodies) == 5 and len(set(receiver.bodies)) == 1
    assert len({headers["webhook-id"] for headers in receiver.headers}) == 1


def test_a_receiver_that_is_away_delays_only_itself(tmp_path: Path) -> None:
    index = Index(tmp_path / "i.sqlite")

    async def run(*urls: str) -> None:
        async with webhooks(index, *urls).delivering() as hooks:
            for number in range(3):
                hooks.job_ended(JOB | {"id": f"ftjob-{number}"}, "p")
            await until(lambda: queued(index) == 3)

    with Receiver() as there:
        asyncio.run(run("http://127.0.0.1:1/", there.base_url))
    assert [event["data"]["id"] for event in there.accepted] == ["ftjob-0", "ftjob-1", "ftjob-2"]


def test_projects_are_told_of_their_own_jobs(tmp_path: Path) -> None:
    index = Index(tmp_path / "i.sqlite")
    hooks = webhooks(index, "http://127.0.0.1:1/", project="mine")
    hooks.job_ended(JOB, "other")
    assert queued(index) == 0
    hooks.job_ended(JOB, "mine")
    hooks.job_ended(JOB, "mine")
    assert queued(index) == 1
    stored = json.dumps(index.every("webhook_delivery"))
    assert "127.0.0.1" not in stored and SECRET not in stored


def test_undelivered_events_outlive_the_server(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with Receiver() as gone:
        url = gone.base_url
    config = ServerConfig.model_validate(
        {
            "data_dir": tmp_path / "data",
            "models": {},
            "webhooks": [{"url": f"{url}/hook?key=KEY", "secret_env": "HOOK_SECRET"}],
        }
    )
    app = build_app(config, has_auth=False)
    with TestClient(app) as client:
        client.portal.call(app.state.services.webhooks.job_ended, JOB, "p")  # type: ignore[union-attr]
    with Receiver(port=gone.port) as back, TestClient(build_app(config, has_auth=False)):
        deadline = time.monotonic() + 20
        while not back.accepted and time.monotonic() < deadline:
            time.sleep(0.01)
    assert [event["data"]["id"] for event in back.accepted] == ["ftjob-1"]
    assert "KEY" not in caplog.text and SECRET not in caplog.text
    index = Index(tmp_path / "data" / "index.sqlite")
    assert queued(index) == 0


@pytest.mark.parametrize(
    ("value", "url", "text"),
    [
        (None, "http://127.0.0.1:1/", r"webhooks\[0\]\.secret_env: the environment variable HOOK_SECRET is not set"),
        ("plain", "http://127.0.0.1:1/", r"does not hold whsec_ and base64"),
        ("whsec_!!!", "http://127.0.0.1:1/", r"does not hold whsec_ and base64"),
        (SECRET, "http://169.254.169.254/", r"webhooks\[0\]\.url: .*outgoing\.deny"),
    ],
)
def test_what_cannot_work_is_said_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str | None, url: str, text: str
) -> None:
    with contextlib.suppress(KeyError):
        monkeypatch.delenv("HOOK_SECRET")
    if value is not None:
        monkeypatch.setenv("HOOK_SECRET", value)
    hook = {"url": url, "secret_env": "HOOK_SECRET"}
    config = ServerConfig.model_validate({"data_dir": tmp_path / "data", "models": {}, "webhooks": [hook]})
    with pytest.raises(ConfigError, match=text) as caught, TestClient(build_app(config)):
        pass
    assert value is None or value not in str(caught.value)
