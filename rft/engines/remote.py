"""A model behind any OpenAI-compatible URL: messages in, a message out. For evaluation only: it gives no token ids.

Guarantees: every request has a deadline and a bounded number of attempts, no more than `max_concurrent` are under way,
and the key, read from the environment, reaches no error, log or file.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ConfigDict, Field

from rft.chat import split_reasoning
from rft.engines import Engine, EngineLoad
from rft.errors import EngineError, UserError
from rft.types import Record, TokenUsage
from rft.wire import Client, Reply, RetryPolicy, WireError, connection_problem, post_json, safe_url, without_secrets

_RETRY = RetryPolicy(max_attempts=6, first_wait_s=1.0, max_wait_s=30.0)  # services limit requests per minute
_MAX_QUOTED = 300
_TOO_LONG = ("context_length_exceeded", "maximum context length", "context length", "context window")
_CURE = "check --url, --model and --api-key-env"


class RemoteConfig(Record):
    """Where the model is. `api_key_env` names the environment variable that holds the key."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str  # up to and with /v1
    model: str
    api_key_env: str | None = None
    max_concurrent: int = Field(32, ge=1)
    timeout_s: float = Field(300.0, gt=0)

    def headers(self) -> dict[str, str]:
        """Raises UserError when the variable is not set."""
        if self.api_key_env is None:
            return {}
        key = os.environ.get(self.api_key_env, "").strip()
        if not key:
            cure = f"set {self.api_key_env} to the key of {safe_url(self.url)}"
            raise UserError("the environment has no such variable", where="--api-key-env", cure=cure)
        return {"Authorization": f"Bearer {key}"}


@dataclass(frozen=True, slots=True)
class Answer:
    """One chat completion. `calls` are (name, arguments as they came)."""

    content: str
    reasoning: str
    calls: list[tuple[str, str]]
    finish_reason: Literal["stop", "length"]
    usage: TokenUsage
    reasoning_tokens: int


class RemoteModel:
    """Asks with the config's place. Sends no seed: a seeded request can end a vLLM server on a CPU."""

    def __init__(self, config: RemoteConfig) -> None:
        self.config = config
        self.max_concurrent = config.max_concurrent
        self.on_status: Callable[[str], None] = lambda _: None
        self._headers = config.headers()
        self._http = Client(max_connections=config.max_concurrent)
        self._num_asked = 0
        self._slots = asyncio.Semaphore(config.max_concurrent)

    async def start(self) -> None:
        """Raises EngineError when nothing listens there. Asks the model nothing: that could cost."""
        self.on_status(f"reaching {safe_url(self.config.url)}")
        if problem := await connection_problem(self.config.url):
            raise EngineError(problem, cure=_CURE)

    async def complete(
        self, messages: list[dict[str, Any]], options: dict[str, Any], max_tokens: int, temperature: float
    ) -> Answer | None:
        """One answer; None when the conversation is longer than the model's context.

        Raises EngineError: retryable when this request failed, not retryable when none can succeed.
        """
        body = {
            "model": self.config.model,
            "messages": messages,
            "max_completion_tokens": max_tokens,
            "temperature": temperature,
            **options,
        }
        self._num_asked += 1
        try:
            async with self._slots:
                reply = await self._send(json.dumps(body, ensure_ascii=False).encode("utf-8", "replace"))
        finally:
            self._num_asked -= 1
        if reply.status == 200 and not reply.is_too_large:
            return _answer(reply.json())
        if reply.status in (400, 413, 422) and any(text in reply.text.lower() for text in _TOO_LONG):
            return None
        raise self._refusal(reply)

    async def load_metrics(self) -> EngineLoad:
        num_running = min(self._num_asked, self.max_concurrent)
        return EngineLoad(num_running, self._num_asked - num_running, 0.0)

    async def close(self) -> None:
        await self._http.close()

    async def _send(self, body: bytes) -> Reply:
        try:
            return await post_json(
                self._http,
                f"{self.config.url.rstrip('/')}/chat/completions",
                body,
                headers=self._headers,
                timeout_s=self.config.timeout_s,
                retry=_RETRY,
                problem_of=lambda reply: "HTTP 429: too many requests" if reply.status == 429 else None,
            )
        except WireError as error:
            raise EngineError(error.problem, retryable=not error.is_unreachable, cure=_CURE) from error

    def _refusal(self, reply: Reply) -> EngineError:
        said = without_secrets(reply.text, self._headers)[:_MAX_QUOTED] if not reply.is_too_large else "too long"
        problem = f"{safe_url(self.config.url)} answered HTTP {reply.status}: {said}"
        cure = _CURE if reply.status != 400 else "where it names temperature, add rollout.temperature=1"
        return EngineError(problem, retryable=reply.status not in (401, 403, 404), cure=cure)


Sampler = Engine | RemoteModel
"""What rollouts are sampled with."""


def _answer(reply: Any) -> Answer:
    """Raises EngineError when it is no chat completion."""
    try:
        choice = reply["choices"][0]
        message = choice["message"]
        calls = [
            (str(call["function"]["name"]), _arguments(call["function"].get("arguments")))
            for call in message.get("tool_calls") or []
        ]
        content, thought = _text(message.get("content")), message.get("reasoning_content") or message.get("reasoning")
        counts = reply.get("usage") or {}
        usage = _usage(counts)
        counted = (counts.get("completion_tokens_details") or {}).get("reasoning_tokens")
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError):
        raise EngineError("the model's reply is not a chat completion", retryable=True, cure=_CURE) from None
    reasoning, said = (_text(thought), content) if thought else split_reasoning(content)
    answer = said.strip() or _text(message.get("refusal"))
    num_other = len(answer) + sum(len(name) + len(arguments) for name, arguments in calls)
    # a server that does not count them: their share of the characters
    share = len(reasoning) / (len(reasoning) + num_other) if reasoning else 0.0
    num_reasoning = counted if isinstance(counted, int) else round(usage.completion_tokens * share)
    finish: Literal["stop", "length"] = "length" if choice.get("finish_reason") == "length" else "stop"
    return Answer(answer, reasoning.strip(), calls, finish, usage, num_reasoning)


def _usage(counts: dict[str, Any]) -> TokenUsage:
    cached = (counts.get("prompt_tokens_details") or {}).get("cached_tokens")
    return TokenUsage(
        prompt_tokens=int(counts.get("prompt_tokens") or 0),
        completion_tokens=int(counts.get("completion_tokens") or 0),
        cached_tokens=int(cached or 0),
    )


def _arguments(value: Any) -> str:
    """A string on the wire; some servers send the object itself."""
    return value if isinstance(value, str) else json.dumps(value) if value is not None else ""


def _text(content: Any) -> str:
    """The text of a message's content, which may come in parts."""
    if isinstance(content, list):
        return "".join(_text(part.get("text")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""
