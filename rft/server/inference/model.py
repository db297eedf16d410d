"""One local model as a chat model: rendered and read as in training, sampled by vLLM or transformers.

A tuned model is its checkpoint merged into a copy of the base, made at the start in the scratch folder.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from rft.chat import Chat
from rft.config import ModelConfig, TransformersEngineConfig, VllmEngineConfig
from rft.errors import first_cause
from rft.server.errors import ApiError
from rft.server.ids import new_id
from rft.server.inference.answer import Choice
from rft.server.inference.constraint import constraint
from rft.server.inference.conversation import Conversations
from rft.server.inference.request import LocalChat, parse
from rft.server.inference.sampler import Prompt, Sampler, TransformersSampler, VllmSampler
from rft.types import Item


class HostConfig(BaseModel):
    """What a host process is told."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    engine: Literal["vllm", "transformers"]
    path: Path
    dtype: Literal["bfloat16", "float32"]
    max_model_len: int
    kv_cache_gib: float
    gpu_memory_share: float = Field(0.45, gt=0, le=1)
    start_timeout_s: float
    checkpoint: Path | None = None
    max_lora_rank: int | None = None  # of adapters beside the model
    socket: Path
    log_path: Path


class ChatModel:
    """Answers chat completions. Made by `loaded`."""

    def __init__(self, chat: Chat, sampler: Sampler, max_model_len: int) -> None:
        self.sampler = sampler
        self._chat, self._max_model_len = chat, max_model_len
        self._conversations: dict[str | None, Conversations] = {None: Conversations(chat)}  # by adapter

    async def add_adapter(self, name: str, path: Path) -> None:
        """Raises EngineError."""
        if name not in self._conversations:
            await self.sampler.add_adapter(name, path)
            self._conversations[name] = Conversations(self._chat)

    async def complete(self, body: dict[str, Any], adapter: str | None = None) -> dict[str, Any]:
        """A chat completion. Raises ApiError, EngineError."""
        request = parse(body)
        item = request.item()
        prompt = self._prompt(request, item, adapter)
        choices = self._choices(request, item, prompt)
        num_cached = None
        async for delta in self.sampler.sample(prompt, request):
            num_cached = delta.num_cached if delta.num_cached is not None else num_cached
            choices[delta.index].feed(delta)
        self._remember(item, prompt, choices)
        return {
            **_head(request, "chat.completion"),
            "choices": [choice.body(index) for index, choice in enumerate(choices)],
            "usage": self._usage(prompt, choices, num_cached),
        }

    async def stream(self, body: dict[str, Any], adapter: str | None = None) -> AsyncGenerator[dict[str, Any]]:
        """The same as chunks. Raises ApiError before the first."""
        request = parse(body)
        item = request.item()
        prompt = self._prompt(request, item, adapter)
        choices = self._choices(request, item, prompt)
        head = _head(request, "chat.completion.chunk")
        if request.stream_options.include_usage:
            head["usage"] = None
        has_begun = [False] * len(choices)
        num_cached = None
        async for delta in self.sampler.sample(prompt, request):
            choice, index = choices[delta.index], delta.index
            num_cached = delta.num_cached if delta.num_cached is not None else num_cached
            if choice.finish_reason is not None:
                continue
            if not has_begun[index]:
                has_begun[index] = True
                yield head | {"choices": [_chunk(index, {"role": "assistant", "content": "", "refusal": None})]}
            for part in choice.feed(delta):
                yield head | {"choices": [_chunk(index, part)]}
            if delta.logprobs:
                yield head | {"choices": [_chunk(index, {}, logprobs=delta.logprobs)]}
            if choice.finish_reason is not None:
                yield head | {"choices": [_chunk(index, {}, choice.wire_finish_reason)]}
        self._remember(item, prompt, choices)
        if request.stream_options.include_usage:
            yield head | {"choices": [], "usage": self._usage(prompt, choices, num_cached)}

    def _prompt(self, request: LocalChat, item: Item, adapter: str | None) -> Prompt:
        """Raises ApiError (400) when the context leaves no room for an answer."""
        if adapter not in self._conversations:
            raise ApiError(f"There is no adapter {adapter}.", status=404, code="model_not_found", param="model")
        try:
            ids = self._conversations[adapter].prompt(item)
        except Exception as error:  # whatever a template raises about an order or form it cannot write
            message = f"This model's chat template cannot write this conversation: {str(error)[:300]}"
            raise ApiError(message, code="invalid_value", param="messages") from None
        room = self._max_model_len - len(ids)
        if room < 1:
            message = (
                f"This model's maximum context length is {self._max_model_len} tokens. However, your messages resulted"
                f" in {len(ids)} tokens. Please reduce the length of the messages."
            )
            raise ApiError(message, code="context_length_exceeded", param="messages")
        form = constraint(request, self._chat.dialect, is_generic=not self._chat.knows_tools)
        return Prompt(ids, min(request.limit or room, room), self._chat.stop_token_ids, form, adapter)

    def _choices(self, request: LocalChat, item: Item, prompt: Prompt) -> list[Choice]:
        end = str(self._chat.tokenizer.decode(prompt.ids[-8:], skip_special_tokens=False)).rstrip()
        is_thinking = end.endswith("<think>")
        return [Choice(item, self._chat.dialect, is_thinking) for _ in range(request.n)]

    def _remember(self, item: Item, prompt: Prompt, choices: list[Choice]) -> None:
        for choice in choices:
            self._conversations[prompt.adapter].remember(item, choice.message, prompt.ids, choice.ids)

    def _usage(self, prompt: Prompt, choices: list[Choice], num_cached: int | None) -> dict[str, Any]:
        num_sampled = sum(len(choice.ids) for choice in choices)
        num_thought = sum(self._chat.count_tokens(choice.message.reasoning) for choice in choices)
        return {
            "prompt_tokens": len(prompt.ids),
            "completion_tokens": num_sampled,
            "total_tokens": len(prompt.ids) + num_sampled,
            "prompt_tokens_details": {"cached_tokens": num_cached or 0, "audio_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": min(num_thought, num_sampled), "audio_tokens": 0},
        }


async def loaded(config: HostConfig) -> ChatModel:
    """The model, ready to answer. Raises UserError, EngineError."""
    path = config.path
    if config.checkpoint is not None:
        from rft.export import merge

        path = config.socket.parent / "merged"
        await asyncio.to_thread(merge, config.path, config.checkpoint, path, config.dtype)
    model = ModelConfig(path=path, dtype=config.dtype)
    sampler: Sampler
    if config.engine == "vllm":
        engine = VllmEngineConfig(
            max_model_len=config.max_model_len,
            kv_cache_gib=config.kv_cache_gib,
            gpu_memory_share=config.gpu_memory_share,
            start_timeout_s=config.start_timeout_s,
            args=["--enable-prompt-tokens-details"],
        )
        sampler = VllmSampler(engine, model, config.log_path, config.max_lora_rank)
    else:
        sampler = TransformersSampler(TransformersEngineConfig(max_model_len=config.max_model_len), model)
    try:
        async with asyncio.TaskGroup() as group:  # both import for seconds
            chat = group.create_task(asyncio.to_thread(Chat.from_folder, path))
            group.create_task(sampler.start())
    except BaseException as error:  # also cancellation: no process may be left
        await sampler.close()
        raise first_cause(error) if isinstance(error, BaseExceptionGroup) else error from None
    return ChatModel(chat.result(), sampler, config.max_model_len)


def _head(request: LocalChat, kind: str) -> dict[str, Any]:
    return {"id": new_id("chatcmpl-"), "object": kind, "created": int(time.time()), "model": request.model}


def _chunk(
    index: int, delta: dict[str, Any], finish_reason: str | None = None, logprobs: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    found = {"content": logprobs, "refusal": None} if logprobs else None
    return {"index": index, "delta": delta, "finish_reason": finish_reason, "logprobs": found}
