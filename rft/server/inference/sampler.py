"""What samples for a host: vLLM in a process of its own, or transformers in this one. Token ids in, deltas out.

Both sample as the engines of training do: only the ids that end a turn stop, the model folder shapes nothing.
`seed` goes to transformers only: on a CPU a seeded request can end a vLLM server (rft/engines/vllm.py).
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import aiohttp

from rft.config import ModelConfig, TransformersEngineConfig, VllmEngineConfig
from rft.engines import SamplingParams
from rft.engines.launch import ServerProcess
from rft.errors import EngineError
from rft.server.errors import ApiError
from rft.server.inference import sse
from rft.server.inference.request import LocalChat

_ALL_AT_ONCE = 100_000  # tokens a chunk, where nobody reads along
_ALIVE_CHECK_S = 3600.0
_COLDEST = 1e-4  # what temperature 0 is to transformers


@dataclass(frozen=True, slots=True)
class Prompt:
    """What to sample after, and how."""

    ids: list[int]
    max_tokens: int
    stop_token_ids: tuple[int, ...]
    constraint: dict[str, Any] | None  # as vLLM's response_format
    adapter: str | None = None  # the name of one that was added


@dataclass(frozen=True, slots=True)
class Delta:
    """What was sampled next for one of the `n` choices; `text` leaves out what stopped it."""

    index: int
    text: str
    ids: list[int]
    finish_reason: Literal["stop", "length"] | None
    logprobs: list[dict[str, Any]] = field(default_factory=list)  # as chat completions have them
    num_cached: int | None = None  # of the prompt's ids; known at the end


class Sampler(Protocol):
    async def start(self) -> None: ...

    def sample(self, prompt: Prompt, chat: LocalChat) -> AsyncGenerator[Delta]:
        """Deltas until all choices have ended; ended early when closed. Raises ApiError, EngineError."""
        ...

    async def add_adapter(self, name: str, path: Path) -> None:
        """Make a peft folder answer to `name` from now on."""
        ...

    async def died(self) -> None:
        """Returns when it cannot sample any more."""
        ...

    async def close(self) -> None: ...


class VllmSampler:
    """A vLLM server on a Unix socket of its own. `max_lora_rank`: it takes adapters."""

    def __init__(
        self, config: VllmEngineConfig, model: ModelConfig, log_path: Path, max_lora_rank: int | None = None
    ) -> None:
        self._config, self._model, self._log_path = config, model, log_path
        self._max_lora_rank = max_lora_rank
        self._server: ServerProcess | None = None
        self._http: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        """Raises EngineError quoting the server's log."""
        from rft.engines.vllm_server import launch_server, wait_until_ready

        self._server = await launch_server(self._config, self._model, self._log_path, self._max_lora_rank)
        # a connection per request: closing it is how a request is cancelled
        connector = aiohttp.UnixConnector(str(self._server.scratch / "s"), limit=0, force_close=True)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=30)
        self._http = aiohttp.ClientSession("http://vllm/", connector=connector, timeout=timeout)
        await wait_until_ready(self._server, self._http, self._config.start_timeout_s, lambda _: None)

    async def sample(self, prompt: Prompt, chat: LocalChat) -> AsyncGenerator[Delta]:
        assert self._http is not None
        try:
            async with self._http.post("v1/completions", json=_body(prompt, chat)) as response:
                if response.status != 200:
                    raise _refusal(response.status, await response.read())
                async for payload in sse.payloads(response.content.iter_any()):
                    for delta in _deltas(payload, prompt, chat):
                        yield delta
        except (aiohttp.ClientError, OSError) as error:
            raise EngineError(f"the vLLM server broke off ({type(error).__name__})", retryable=True) from None

    async def add_adapter(self, name: str, path: Path) -> None:
        """Raises EngineError."""
        assert self._http is not None
        try:
            async with self._http.post(
                "v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path)}
            ) as response:
                said = await response.text()
        except (aiohttp.ClientError, OSError) as error:
            raise EngineError(f"the vLLM server broke off ({type(error).__name__})", retryable=True) from None
        if response.status != 200 and "already" not in said:
            raise EngineError(f"the vLLM server refused the adapter {path}: {said[:300]}")

    async def died(self) -> None:
        assert self._server is not None
        while not await self._server.has_ended(_ALIVE_CHECK_S):
            pass

    async def close(self) -> None:
        if self._http is not None:
            await self._http.close()
        if self._server is not None:
            await self._server.close()


def _body(prompt: Prompt, chat: LocalChat) -> dict[str, Any]:
    from rft.engines.vllm import PLAIN_SAMPLING
    from rft.engines.vllm_server import MODEL_NAME

    body: dict[str, Any] = {
        **PLAIN_SAMPLING,
        "model": prompt.adapter or MODEL_NAME,
        "prompt": prompt.ids,
        "max_tokens": prompt.max_tokens,
        "stop_token_ids": list(prompt.stop_token_ids),
        "ignore_eos": True,
        "spaces_between_special_tokens": False,
        "stream": True,
        "stream_options": {"include_usage": True},
        "n": chat.n,
        "temperature": chat.temperature,
        "top_p": chat.top_p,
        "frequency_penalty": chat.frequency_penalty,
        "presence_penalty": chat.presence_penalty,
        "stop": chat.stop,
    }
    if chat.logprobs:
        body["logprobs"] = chat.top_logprobs
    elif not chat.stream:
        body["stream_interval"] = _ALL_AT_ONCE
    return body | ({"response_format": prompt.constraint} if prompt.constraint is not None else {})


def _refusal(status: int, content: bytes) -> Exception:
    try:
        said = json.loads(content)["error"]["message"]
    except (ValueError, LookupError, TypeError):
        said = content[:300].decode(errors="replace")
    if status >= 500:
        return EngineError(f"the vLLM server failed: {str(said)[:300]}", retryable=True)
    return ApiError(f"The model's engine refused the request: {str(said)[:500]}", code="invalid_value")


def _deltas(payload: dict[str, Any], prompt: Prompt, chat: LocalChat) -> list[Delta]:
    if "error" in payload:
        raise _refusal(500, json.dumps(payload).encode())
    usage = payload.get("usage") or {}
    if not payload["choices"] and usage:
        return [Delta(0, "", [], None, num_cached=(usage.get("prompt_tokens_details") or {}).get("cached_tokens"))]
    deltas = []
    for choice in payload["choices"]:
        if choice["finish_reason"] not in (None, "stop", "length"):
            raise EngineError(f"the server ended a request early: {choice['finish_reason']}", retryable=True)
        ids = choice["token_ids"] or []
        logprobs = _logprobs(choice, ids, prompt) if chat.logprobs else []
        deltas.append(Delta(choice["index"], choice["text"], ids, choice["finish_reason"], logprobs))
    return deltas


def _logprobs(choice: dict[str, Any], ids: list[int], prompt: Prompt) -> list[dict[str, Any]]:
    found = choice["logprobs"]
    entries = zip(ids, found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True)
    return [
        _logprob(token, value) | {"top_logprobs": [_logprob(*other) for other in (top or {}).items()]}
        for token_id, token, value, top in entries
        if token_id not in prompt.stop_token_ids
    ]


def _logprob(token: str, value: float | None) -> dict[str, Any]:
    return {"token": token, "logprob": -9999.0 if value is None else value, "bytes": list(token.encode())}


class TransformersSampler:
    """Slow and in this process: an answer comes as one delta."""

    def __init__(self, config: TransformersEngineConfig, model: ModelConfig) -> None:
        from rft.engines.transformers import TransformersEngine

        self._engine = TransformersEngine(config, model)
        self._path = model.path

    async def start(self) -> None:
        from transformers import AutoTokenizer

        self._tokenizer: Any = await asyncio.to_thread(AutoTokenizer.from_pretrained, self._path, local_files_only=True)
        await self._engine.start()

    async def sample(self, prompt: Prompt, chat: LocalChat) -> AsyncGenerator[Delta]:
        _check_plain(prompt, chat)
        seed = chat.seed if chat.seed is not None else random.getrandbits(31)
        tasks = [asyncio.create_task(self._one(index, seed + index, prompt, chat)) for index in range(chat.n)]
        try:
            for task in tasks:
                yield await task
        finally:
            for task in tasks:
                task.cancel()

    async def _one(self, index: int, seed: int, prompt: Prompt, chat: LocalChat) -> Delta:
        temperature = max(chat.temperature, _COLDEST)
        params = SamplingParams(prompt.max_tokens, temperature, seed & 0x7FFFFFFF, prompt.stop_token_ids)
        done = await self._engine.generate(prompt.ids, params, f"chat-{seed}-{index}")
        has_stopped = done.finish_reason == "stop"
        said = done.ids[:-1] if has_stopped else done.ids
        text = self._tokenizer.decode(said, skip_special_tokens=False)
        places = [place for stop in chat.stop if (place := text.find(stop)) >= 0]
        cut = text[: min(places)] if places else text
        logprobs = [
            _logprob(self._tokenizer.decode([token]), value) | {"top_logprobs": []}
            for token, value in zip(said, done.logprobs, strict=False)
        ]
        finish = "stop" if places else done.finish_reason
        return Delta(index, cut, done.ids, finish, logprobs if chat.logprobs else [], num_cached=0)

    async def add_adapter(self, name: str, path: Path) -> None:
        raise EngineError("transformers has no adapters beside the model", cure="set inference.adapters=merged")

    async def died(self) -> None:
        await asyncio.Event().wait()  # it lives as long as this process

    async def close(self) -> None:
        await self._engine.close()


def _check_plain(prompt: Prompt, chat: LocalChat) -> None:
    """What the engine of training cannot do. Raises ApiError (400)."""
    unable = {
        "top_p": chat.top_p != 1,
        "frequency_penalty": chat.frequency_penalty != 0,
        "presence_penalty": chat.presence_penalty != 0,
        "top_logprobs": chat.top_logprobs > 0,
        "tool_choice" if chat.forced_names else "response_format": prompt.constraint is not None,
    }
    name = next((name for name, is_asked in unable.items() if is_asked), None)
    if name is not None:
        message = f"'{name}' needs the engine vllm (inference.engine); this server samples with transformers."
        raise ApiError(message, code="unsupported_parameter", param=name)
