"""The endpoint grader of the hosted contract: POST {sample, item, trace_id}, answered by {"score": number}.

A call that fails for any reason (no connection, no answer in time, a status that is not 200, an answer without a finite
score) is tried again three times with growing pauses; then GraderError discards the rollout. Never a grade of 0.
"""

from __future__ import annotations

import json
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator

from rft.errors import GraderError
from rft.graders.base import BaseGrader, Spec, is_finite
from rft.types import Grade, Item
from rft.wire import (
    MAX_BODY_BYTES,
    Client,
    Reply,
    RetryPolicy,
    WireError,
    connection_problem,
    post_json,
    rate_limiter,
    safe_url,
)

SERVER_ERROR = "endpoint_grader_server_error"
INTERNAL_ERROR = "endpoint_grader_internal_error"
_MAX_CONNECTIONS = 256


class EndpointSpec(Spec):
    """`rate_limit`: requests per second. `timeout_s` is ours; `pass_threshold` changes no score."""

    type: Literal["endpoint"] = "endpoint"
    url: str
    headers: dict[str, SecretStr] = Field(default_factory=dict)
    rate_limit: float | None = Field(None, gt=0)
    timeout_s: float = Field(600.0, gt=0)
    pass_threshold: float | None = Field(None, allow_inf_nan=False)

    @field_validator("url")
    @classmethod
    def _is_http(cls, url: str) -> str:
        try:
            parts = urlsplit(url)
            is_complete = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            is_complete = False
        if not is_complete:
            raise ValueError("the url must be complete, e.g. https://host/grade")
        return url


class EndpointGrader(BaseGrader):
    """Calls `spec.url`. Its grades are not cached unless asked for: an endpoint may know more than it was sent."""

    def __init__(self, spec: EndpointSpec, retry: RetryPolicy | None = None) -> None:
        self.spec, self._retry = spec, retry or RetryPolicy()
        self._http = Client(max_connections=_MAX_CONNECTIONS)
        self._rate = rate_limiter(spec.rate_limit)

    async def start(self) -> list[str]:
        """Raises GraderError when nothing listens at the URL."""
        problem = await connection_problem(self.spec.url)
        if problem:
            raise GraderError(f"endpoint grader: {problem}", flag=SERVER_ERROR, cure="start it, or correct its url")
        return []

    async def grade(self, item: Item, sample: dict[str, Any], trace_id: str = "") -> Grade:
        payload = {"sample": sample, "item": item.row, "trace_id": trace_id}
        body = json.dumps(payload, ensure_ascii=False).encode("utf-8", "replace")
        if len(body) > MAX_BODY_BYTES:
            raise GraderError(
                f"a sample of {len(body)} bytes is more than the endpoint grader sends ({MAX_BODY_BYTES})",
                flag=INTERNAL_ERROR,
                cure="lower rollout.max_tokens_per_turn or the size of the tools' answers",
            )
        try:
            reply = await post_json(
                self._http,
                self.spec.url,
                body,
                headers={name: value.get_secret_value() for name, value in self.spec.headers.items()},
                timeout_s=self.spec.timeout_s,
                retry=self._retry,
                problem_of=_problem,
                before_attempt=self._rate,
            )
        except WireError as error:
            cure = f"check that {safe_url(self.spec.url)} is up"
            raise GraderError(
                f"endpoint grader: {error.problem}", flag=SERVER_ERROR, retryable=True, cure=cure
            ) from error
        return Grade(score=float(reply.json()["score"]), latency_s=reply.latency_s)

    async def close(self) -> None:
        await self._http.close()


def _problem(reply: Reply) -> str | None:
    """Why a reply is no grade."""
    if reply.status != 200:
        return f"HTTP {reply.status}: {reply.text[:200]}"
    if reply.is_too_large:
        return f"the answer is larger than {MAX_BODY_BYTES} bytes"
    answer = reply.json()
    score = answer.get("score") if isinstance(answer, dict) else None
    if isinstance(score, bool) or not isinstance(score, int | float) or not is_finite(score):
        return f'the answer is not {{"score": number}}: {reply.text[:200]}'
    return None
