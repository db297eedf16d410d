"""Webhooks: whoever is configured hears when a job ends, signed as standard webhooks so that the SDK verifies it.

Guarantees: what is queued survives a restart and is sent until it is accepted, for three days; the same event has the
same id however often it is sent. Neither URLs nor secrets are logged or stored.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hashlib
import hmac
import json
import logging
import os
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from rft.errors import ConfigError
from rft.server.errors import ApiError
from rft.server.index import Index
from rft.server.outgoing import Outgoing
from rft.server.settings import WebhookConfig
from rft.wire import Client, Reply, RetryPolicy, WireError, post_json

EVENTS = ("succeeded", "failed", "cancelled")  # a job's statuses that are told
_DELIVERY = "webhook_delivery"  # kind in the index; its parent is the receiver
_PREFIX = "whsec_"
_TIMEOUT_S = 10.0  # of an attempt; all attempts of a round end within the 5 minutes that a signature is good for
_MAX_PAUSE_S = 3600.0
_GIVE_UP_S = 3 * 86_400.0
_log = logging.getLogger("rft.server")


@dataclass(frozen=True, slots=True)
class _Receiver:
    """One configured webhook. `id` tells it from others without saying its URL, which may hold a key."""

    id: str
    url: str = field(repr=False)
    secret: bytes = field(repr=False)
    project: str | None
    news: asyncio.Event


class Webhooks:
    """Of one server, on its event loop. `pause_s`: before the second round of attempts; each later one is doubled."""

    def __init__(
        self,
        configs: list[WebhookConfig],
        index: Index,
        outgoing: Outgoing,
        *,
        retry: RetryPolicy | None = None,
        pause_s: float = 30.0,
    ) -> None:
        """Raises ConfigError: a URL that is denied, a secret that is missing or no secret."""
        self._index, self._retry, self._pause_s = index, retry or RetryPolicy(), pause_s
        self._receivers = [_receiver(config, outgoing, f"webhooks[{n}]") for n, config in enumerate(configs)]
        self._http = Client(max_connections=max(1, len(configs)))

    def job_ended(self, job: dict[str, Any], project: str) -> None:
        """Queue what is to be told of a job that has ended; to be called when its status is in the index.

        Calling it twice for one job tells the same event, with the same id. A job with another status is not told.
        """
        if job["status"] not in EVENTS:
            return
        kind = f"fine_tuning.job.{job['status']}"
        event = {
            "id": "evt_" + hashlib.sha256(f"{job['id']} {kind}".encode()).hexdigest()[:24],
            "object": "event",
            "created_at": int(job.get("finished_at") or time.time()),
            "type": kind,
            "data": {"id": job["id"]},
        }
        for receiver in self._receivers:
            if receiver.project in (None, project):
                delivery = {"id": f"{receiver.id}-{event['id']}", "event": event, "num_rounds": 0}
                delivery |= {"queued_at": time.time(), "next_at": 0.0}
                self._index.put(_DELIVERY, delivery, project=project, parent=receiver.id)
                receiver.news.set()

    @contextlib.asynccontextmanager
    async def delivering(self) -> AsyncIterator[Webhooks]:
        """Send what is queued, until the context ends."""
        tasks = [asyncio.create_task(self._serve(receiver)) for receiver in self._receivers]
        try:
            yield self
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._http.close()

    async def _serve(self, receiver: _Receiver) -> None:
        """A receiver that does not answer delays its own events only."""
        while True:
            receiver.news.clear()
            try:
                wait_s = await self._round(receiver)
            except Exception:  # one event that cannot be told must not silence all later ones
                _log.exception("webhooks")
                wait_s = self._pause_s
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await receiver.news.wait()

    async def _round(self, receiver: _Receiver) -> float | None:
        """Send what is due; seconds until more is, None when nothing is left."""
        for delivery in self._index.every(_DELIVERY, parent=receiver.id):
            if _wait_s(delivery) <= 0:
                await self._deliver(receiver, delivery)
        return min((_wait_s(left) for left in self._index.every(_DELIVERY, parent=receiver.id)), default=None)

    async def _deliver(self, receiver: _Receiver, delivery: dict[str, Any]) -> None:
        body = json.dumps(delivery["event"]).encode()
        headers = signed(body, delivery["event"]["id"], receiver.secret)
        try:
            await post_json(
                self._http,
                receiver.url,
                body,
                headers=headers,
                timeout_s=_TIMEOUT_S,
                retry=self._retry,
                problem_of=_problem,
            )
        except WireError as error:
            self._put_off(delivery, receiver, str(error))
        else:
            self._index.delete(_DELIVERY, delivery["id"])

    def _put_off(self, delivery: dict[str, Any], receiver: _Receiver, problem: str) -> None:
        now = time.time()
        what = f"webhook {delivery['event']['type']} of {delivery['event']['data']['id']}"
        if now - delivery["queued_at"] > _GIVE_UP_S:
            _log.error("%s was not accepted for three days and is given up: %s", what, problem)
            self._index.delete(_DELIVERY, delivery["id"])
            return
        pause_s = min(self._pause_s * 2 ** delivery["num_rounds"], _MAX_PAUSE_S)
        _log.warning("%s is tried again in %.0f s: %s", what, pause_s, problem)
        delivery |= {"num_rounds": min(delivery["num_rounds"] + 1, 20), "next_at": now + pause_s}
        self._index.put(_DELIVERY, delivery, parent=receiver.id)


def signed(body: bytes, event_id: str, secret: bytes) -> dict[str, str]:
    """The headers of standard webhooks: the signature is of id, time and body."""
    timestamp = str(int(time.time()))
    digest = hmac.new(secret, f"{event_id}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    return {
        "webhook-id": event_id,
        "webhook-timestamp": timestamp,
        "webhook-signature": "v1," + base64.b64encode(digest).decode(),
    }


def _wait_s(delivery: dict[str, Any]) -> float:
    """Until it is due. A time further away than any pause was set by a clock that has been put back: it is due."""
    wait_s: float = delivery["next_at"] - time.time()
    return wait_s if wait_s <= _MAX_PAUSE_S else 0.0


def _problem(reply: Reply) -> str | None:
    return None if 200 <= reply.status < 300 else f"HTTP {reply.status}"


def _receiver(config: WebhookConfig, outgoing: Outgoing, where: str) -> _Receiver:
    try:
        outgoing.check(config.url, f"{where}.url")
    except ApiError as error:
        raise ConfigError(error.message, where=f"{where}.url", cure="correct the URL, or outgoing.deny") from None
    digest = hashlib.sha256(f"{config.project} {config.url}".encode()).hexdigest()[:16]
    secret = _secret(config.secret_env, f"{where}.secret_env")
    return _Receiver(digest, config.url, secret, config.project, asyncio.Event())


def _secret(variable: str, where: str) -> bytes:
    text = os.environ.get(variable, "")
    cure = f"export {variable}=whsec_$(openssl rand -base64 32), and give the receiver the same value"
    if not text:
        raise ConfigError(f"the environment variable {variable} is not set", where=where, cure=cure)
    try:
        secret = base64.b64decode(text.removeprefix(_PREFIX), validate=True) if text.startswith(_PREFIX) else b""
    except binascii.Error:
        secret = b""
    if not secret:
        problem = f"the environment variable {variable} does not hold {_PREFIX} and base64"
        raise ConfigError(problem, where=where, cure=cure)
    return secret
