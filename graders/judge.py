"""Asking a judge model: one chat completion whose answer is forced into a JSON schema.

A judge is any server that speaks OpenAI's chat completions with `response_format: json_schema` (OpenAI, vLLM, SGLang,
llama.cpp, Ollama). `JudgeConfig` says where the model that a grader names is; a judge given by a folder is served by
a process of its own, so that its weights never move with the policy's.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rft.errors import GraderError
from rft.graders.template import check_template, render
from rft.types import TokenUsage
from rft.wire import Client, Reply, RetryPolicy, WireError, post_json, without_secrets

SERVER_ERROR = "model_grader_server_error"
REFUSAL = "model_grader_refusal_error"
PARSE_ERROR = "model_grader_parse_error"
TOO_LONG = "model_grader_exceeded_max_tokens_error"
_MAX_STEPS, _MAX_STEP_CHARS = 4, 200  # of a local judge's reasoning


class JudgeConfig(BaseModel):
    """Where a judge model is: `url` of a server, or `path` of a model folder that the run serves."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str | None = None  # up to and with /v1
    path: Path | None = None
    model: str | None = None  # its name at `url`; null: the name graders use
    api_key_env: str | None = None  # the environment variable that holds the key
    max_concurrent: int = Field(16, ge=1)
    timeout_s: float = Field(120.0, gt=0)
    max_model_len: int = Field(4096, ge=16, description="context of a judge given by path, tokens")
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    kv_cache_gib: float = Field(1.0, gt=0)
    gpu_memory_share: float = Field(0.2, gt=0, le=1)

    @model_validator(mode="after")
    def _is_somewhere(self) -> JudgeConfig:
        if (self.url is None) == (self.path is None):
            raise ValueError("give either url (a server) or path (a model folder)")
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise ValueError("url must start with http:// or https://")
        if self.path is not None and not (self.path / "config.json").is_file():
            raise ValueError(f"path: {self.path} is not a model folder: no config.json")
        if self.path is not None and (self.model or self.api_key_env):
            raise ValueError("model and api_key_env are for a judge given by url")
        return self


class Block(BaseModel):
    """One block of a message's content; texts are templates."""

    model_config = ConfigDict(extra="allow", frozen=True)

    type: Literal["input_text", "output_text", "input_image", "input_audio", "text"]
    text: str | None = None


class JudgeMessage(BaseModel):
    """One message to a judge, as the contract writes it; texts are templates."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Block | list[str | Block]
    type: Literal["message"] | None = None


class SamplingParams(BaseModel):
    """The contract's, with its spelling of `max_completions_tokens`; null: the server's default."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = None
    max_completions_tokens: int | None = Field(None, ge=1)
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """Where to send requests: an URL, or the Unix socket of a server of our own."""

    url: str
    model: str
    socket: Path | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a judge said: `answer` is its JSON object, or None with `errors` saying in the contract's words why."""

    answer: dict[str, Any] | None
    usage: TokenUsage
    errors: dict[str, str] = field(default_factory=dict)


class Judge:
    """One judge model. `place` is set when its server is known: at once for a URL, after the start for a folder."""

    def __init__(self, name: str, config: JudgeConfig) -> None:
        self.name, self.config = name, config
        self.place = Place(config.url.rstrip("/"), config.model or name) if config.url else None
        self._http: Client | None = None
        self._slots = asyncio.Semaphore(config.max_concurrent)

    @property
    def is_own(self) -> bool:
        """Whether a server of ours answers, with a model that may be small."""
        return self.place is not None and self.place.socket is not None

    async def ask(self, messages: list[dict[str, Any]], schema: dict[str, Any], params: SamplingParams) -> Verdict:
        """One judgement. Raises GraderError when the server fails or refuses the request."""
        body = self._body(messages, schema, params)
        async with self._slots:
            reply = await self._send(body)
        if reply.status != 200:
            said = without_secrets(reply.text, self._headers())[:300]
            raise GraderError(
                f"the judge {self.name} refused a request: HTTP {reply.status}: {said}",
                flag=SERVER_ERROR,
                cure=f"check judges.{self.name}: its url, model and api_key_env",
            )
        return _verdict(reply.json())

    async def check(self) -> None:
        """One small judgement. Raises GraderError when the judge does not answer, or not in the form asked for."""
        schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
        question = [{"role": "user", "content": 'Answer with the JSON object {"ok": true}.'}]
        verdict = await self.ask(question, schema | {"additionalProperties": False}, SamplingParams())
        if verdict.answer is None or "ok" not in verdict.answer:
            reason = next(iter(verdict.errors.values()), "the key it was asked for is missing")
            raise GraderError(
                f"the judge {self.name} does not answer in the form asked for: {reason}",
                flag=PARSE_ERROR,
                cure="use a server and a model with structured output (response_format of type json_schema)",
            )

    async def close(self) -> None:
        if self._http is not None:
            await self._http.close()
            self._http = None

    def _body(self, messages: list[dict[str, Any]], schema: dict[str, Any], params: SamplingParams) -> bytes:
        if self.place is None:
            raise GraderError(f"the judge {self.name} has not been started", flag=SERVER_ERROR)
        given = params.model_dump(exclude_none=True)
        if "max_completions_tokens" in given:
            given["max_completion_tokens"] = given.pop("max_completions_tokens")
        if self.is_own:
            given.pop("seed", None)  # a seeded request can end a vLLM server on a CPU (rft/engines/vllm.py)
            schema = _bounded(schema)
        form = {"type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": schema}}
        body = {"model": self.place.model, "messages": messages, "response_format": form, **given}
        return json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")

    async def _send(self, body: bytes) -> Reply:
        assert self.place is not None
        if self._http is None:
            self._http = Client(max_connections=self.config.max_concurrent, socket=self.place.socket)
        try:
            return await post_json(
                self._http,
                f"{self.place.url}/chat/completions",
                body,
                headers=self._headers(),
                timeout_s=self.config.timeout_s,
                retry=RetryPolicy(),
                problem_of=lambda reply: "HTTP 429: too many requests" if reply.status == 429 else None,
            )
        except WireError as error:
            raise GraderError(f"the judge {self.name}: {error.problem}", flag=SERVER_ERROR, retryable=True) from error

    def _headers(self) -> dict[str, str]:
        name = self.config.api_key_env
        if name is None:
            return {}
        if not os.environ.get(name):
            raise GraderError(f"the judge {self.name} needs a key", flag=SERVER_ERROR, cure=f"set {name}")
        return {"Authorization": f"Bearer {os.environ[name]}"}


class Judges:
    """The judges of a run by the names that graders use."""

    def __init__(self, configs: dict[str, JudgeConfig] | None = None) -> None:
        self._judges = {name: Judge(name, config) for name, config in (configs or {}).items()}

    def __getitem__(self, name: str) -> Judge:
        """Raises GraderError for a model that no judge is configured for."""
        if name not in self._judges:
            known = ", ".join(sorted(self._judges)) or "none"
            raise GraderError(
                f"no judge is configured for the model {name} (configured: {known})",
                flag=SERVER_ERROR,
                cure=f"add judges: {{{name}: {{url: ...}}}} or {{{name}: {{path: ...}}}} to the config",
            )
        return self._judges[name]

    def add(self, judge: Judge) -> None:
        self._judges[judge.name] = judge

    def __iter__(self) -> Iterator[Judge]:
        return iter(self._judges.values())

    async def close(self) -> None:
        for judge in self._judges.values():
            await judge.close()


def check_messages(messages: list[JudgeMessage]) -> list[JudgeMessage]:
    """The messages themselves; ValueError naming the placeholder that can never have a value."""
    for message in messages:
        for block in message.content if isinstance(message.content, list) else [message.content]:
            check_template(block if isinstance(block, str) else block.text or "")
    return messages


def render_messages(
    messages: Iterable[JudgeMessage], item: dict[str, Any], sample: dict[str, Any]
) -> list[dict[str, Any]]:
    """The contract's messages as chat completions', templates filled in. Raises TemplateError."""
    return [{"role": message.role, "content": _content(message.content, item, sample)} for message in messages]


def _content(content: str | Block | list[str | Block], item: dict[str, Any], sample: dict[str, Any]) -> Any:
    if isinstance(content, str):
        return render(content, item, sample)
    return [_part(block, item, sample) for block in (content if isinstance(content, list) else [content])]


def _part(block: str | Block, item: dict[str, Any], sample: dict[str, Any]) -> dict[str, Any]:
    if isinstance(block, str):
        return {"type": "text", "text": render(block, item, sample)}
    extra = block.model_extra or {}
    if block.type == "input_image":
        url = render(str(extra.get("image_url", "")), item, sample)
        return {
            "type": "image_url",
            "image_url": {"url": url, **({"detail": extra["detail"]} if "detail" in extra else {})},
        }
    if block.type == "input_audio":
        return {"type": "input_audio", "input_audio": extra.get("input_audio", {})}
    return {"type": "text", "text": render(block.text or "", item, sample)}


def _verdict(reply: Any) -> Verdict:
    """The verdict in a chat completion. Raises GraderError when it is no chat completion."""
    try:
        choice = reply["choices"][0]
        content, refusal = choice["message"].get("content"), choice["message"].get("refusal")
        finish_reason, usage = choice.get("finish_reason"), _usage(reply.get("usage") or {})
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError):
        raise GraderError("the judge's reply is not a chat completion", flag=SERVER_ERROR) from None
    if refusal:
        return Verdict(None, usage, {REFUSAL: str(refusal)[:500]})
    answer = _object(content)
    if finish_reason == "length" and answer is None:
        return Verdict(None, usage, {TOO_LONG: "the judge met max_completions_tokens before its answer was complete"})
    if answer is None:
        return Verdict(None, usage, {PARSE_ERROR: f"the judge's answer is not a JSON object: {str(content)[:300]}"})
    return Verdict(answer, usage)


def _object(content: Any) -> dict[str, Any] | None:
    try:
        value = json.loads(content) if isinstance(content, str) else None
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _usage(usage: dict[str, Any]) -> TokenUsage:
    details = usage.get("prompt_tokens_details") or {}
    return TokenUsage(
        prompt_tokens=int(usage.get("prompt_tokens") or 0),
        completion_tokens=int(usage.get("completion_tokens") or 0),
        cached_tokens=int(details.get("cached_tokens") or 0),
    )


def _bounded(schema: Any) -> Any:
    """The schema with an end to every list and free text: small models know none. Some services refuse these keys."""
    if not isinstance(schema, dict):
        return schema
    found = {key: _bounded(value) for key, value in schema.items()}
    if schema.get("type") == "array":
        found["maxItems"] = _MAX_STEPS
    if schema.get("type") == "string" and "enum" not in schema:
        found["maxLength"] = _MAX_STEP_CHARS
    return found


def steps_schema() -> dict[str, Any]:
    """The reasoning that the contract asks of a judge: a list of {description, conclusion}."""
    text = {"type": "string"}
    step = {
        "type": "object",
        "properties": {"description": text, "conclusion": text},
        "required": ["description", "conclusion"],
        "additionalProperties": False,
    }
    return {"type": "array", "items": step}


def verdict_schema(key: str, value: dict[str, Any]) -> dict[str, Any]:
    """`{steps: [...], <key>: value}`; the steps come first, so that the judge reasons before it decides."""
    return {
        "type": "object",
        "properties": {"steps": steps_schema(), key: value},
        "required": ["steps", key],
        "additionalProperties": False,
    }
