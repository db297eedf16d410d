"""The model's side of one conversation: turn after turn, from token ids with an engine, or from messages over an API.

Guarantees: the ids sent to an engine are the ids recorded; nothing sampled is re-tokenised. Knows no tools' servers,
no limits but the context, and no clock: the rollout adds those.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from rft.calls import read_call
from rft.chat import Chat
from rft.engines import Engine, SamplingParams
from rft.engines.remote import RemoteModel
from rft.types import Item, Message, Turn


class Speaker(Protocol):
    """Single use. Raises EngineError."""

    async def say(self, item: Item, messages: Sequence[Message], max_tokens: int) -> Turn | None:
        """The next turn; None when the context has no room for one. `messages` are all after the item's own."""
        ...


@dataclass(slots=True)
class TokenSpeaker:
    """A policy served by an engine. `_context` is exactly what the engine has seen and said."""

    engine: Engine
    chat: Chat
    max_model_len: int
    temperature: float
    rollout_id: str
    seed: int
    _context: list[int] = field(default_factory=list, init=False)
    _last: list[int] = field(default_factory=list, init=False)  # the ids of the last turn
    _num_turns: int = field(default=0, init=False)

    async def say(self, item: Item, messages: Sequence[Message], max_tokens: int) -> Turn | None:
        if self._num_turns == 0:
            ids, is_fork = self.chat.first_prompt(item), False
        else:
            continuation = self.chat.continuation(item, list(messages), self._last)
            ids, is_fork = continuation.ids, continuation.is_fork
        prompt = ids if is_fork else self._context + ids
        max_tokens = min(max_tokens, self.max_model_len - len(prompt))
        if max_tokens < 1:
            return None
        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=self.temperature,
            seed=self.seed + self._num_turns,
            stop_token_ids=self.chat.stop_token_ids,
        )
        completion = await self.engine.generate(prompt, params, self.rollout_id)
        message = self.chat.parse(completion.ids, item, _call_prefix(self.rollout_id, self._num_turns))
        self._context, self._last = prompt + completion.ids, completion.ids
        self._num_turns += 1
        return Turn(
            input_ids=ids,
            output_ids=completion.ids,
            logprobs=completion.logprobs,
            finish_reason=completion.finish_reason,
            policy_version=completion.policy_version,
            message=message,
            is_fork=is_fork,
            reasoning_tokens=self.chat.count_tokens(message.reasoning),
        )


@dataclass(slots=True)
class MessageSpeaker:
    """A model behind a URL. Its calls get ids of ours, so that they are unique whatever the server does."""

    model: RemoteModel
    temperature: float
    rollout_id: str
    _num_turns: int = field(default=0, init=False)

    async def say(self, item: Item, messages: Sequence[Message], max_tokens: int) -> Turn | None:
        chat = [_as_sent(message) for message in (*item.messages, *messages)]
        answer = await self.model.complete(chat, _options(item), max_tokens, self.temperature)
        if answer is None:
            return None
        prefix = _call_prefix(self.rollout_id, self._num_turns)
        calls = [read_call(name, said, item, prefix, index) for index, (name, said) in enumerate(answer.calls)]
        self._num_turns += 1
        return Turn(
            input_ids=[],
            output_ids=[],
            logprobs=[],
            finish_reason=answer.finish_reason,
            policy_version=0,
            message=Message(role="assistant", content=answer.content, reasoning=answer.reasoning, tool_calls=calls),
            reasoning_tokens=answer.reasoning_tokens,
            usage=answer.usage,
        )


def _call_prefix(rollout_id: str, num_turns: int) -> str:
    return f"{rollout_id[-16:]}_{num_turns}"


def _options(item: Item) -> dict[str, Any]:
    """Only what the item needs: services refuse options that a model does not have."""
    if not item.tools:
        return {}
    return {"tools": item.tools} | ({} if item.parallel_tool_calls else {"parallel_tool_calls": False})


def _as_sent(message: Message) -> dict[str, Any]:
    """Roles that every server knows; arguments that every server can read, also of a call that is no JSON."""
    chat = message.as_chat()
    if message.role == "developer":
        chat["role"] = "system"
    for call in chat.get("tool_calls", []):
        if not _is_object(call["function"]["arguments"]):
            call["function"]["arguments"] = json.dumps({"malformed": call["function"]["arguments"]})
    return chat


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
