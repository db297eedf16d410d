"""Sampled text as chat completions: thoughts, content and calls told apart, whole or while it is being sampled.

Guarantees: the deltas of a choice add up to its message. Calls come whole, when the turn has ended; a call that cannot
be parsed stays text.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Any

from rft.calls import Dialect, parse_calls
from rft.server.inference.sampler import Delta
from rft.types import Item, Message, ToolCall

_OPENS, _CLOSES = "<think>", "</think>"
_MARKS: dict[Dialect, tuple[str, ...]] = {  # where a call may begin; llama3's may be the whole answer
    "hermes": ("<tool_call>",),
    "llama3": ("<|python_tag|>",),
    "mistral": ("[TOOL_CALLS]",),
}


@dataclass(slots=True)
class Choice:
    """One answer in the making. `is_thinking`: the prompt has opened a thought already."""

    item: Item
    dialect: Dialect
    is_thinking: bool = False
    text: str = ""
    ids: list[int] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None
    prefix: str = field(default_factory=lambda: secrets.token_hex(12))
    _num_sent: dict[str, int] = field(default_factory=lambda: {"reasoning_content": 0, "content": 0})

    def feed(self, delta: Delta) -> list[dict[str, Any]]:
        """What a client that reads along is told of it, as deltas of a message."""
        self.text += delta.text
        self.ids += delta.ids
        self.logprobs += delta.logprobs
        self.finish_reason = delta.finish_reason or self.finish_reason
        if self.finish_reason is None:
            thought, answer = self._parts()
            return self._unsent(_settled(thought, (_CLOSES,)), self._settled_content(answer))
        message = self.message
        calls = [{"index": i, **call.as_chat()} for i, call in enumerate(message.tool_calls)]
        return [
            *self._unsent(message.reasoning, message.content),
            *({"tool_calls": [call]} for call in calls),
        ]

    @property
    def message(self) -> Message:
        """What was said until now, read as training reads it."""
        thought, answer = self._parts()
        content, calls = answer.strip(), list[ToolCall]()
        if self.item.tools:
            content, calls = self._with_calls(answer)
        return Message(role="assistant", content=content, reasoning=thought.strip(), tool_calls=calls)

    @property
    def wire_finish_reason(self) -> str | None:
        return "tool_calls" if self.finish_reason == "stop" and self.message.tool_calls else self.finish_reason

    def body(self, index: int) -> dict[str, Any]:
        """As an entry of a completion's `choices`."""
        said = self.message
        message: dict[str, Any] = {"role": "assistant", "content": said.content, "refusal": None, "annotations": []}
        if said.reasoning:
            message["reasoning_content"] = said.reasoning
        if said.tool_calls:
            message["tool_calls"] = [call.as_chat() for call in said.tool_calls]
            message["content"] = said.content or None
        logprobs = {"content": self.logprobs, "refusal": None} if self.logprobs else None
        return {"index": index, "message": message, "finish_reason": self.wire_finish_reason, "logprobs": logprobs}

    def _parts(self) -> tuple[str, str]:
        """Thought and answer. A thought that does not end is all there is."""
        start = self.text.lstrip()
        if not self.is_thinking and not start.startswith(_OPENS):
            is_undecided = self.finish_reason is None and _OPENS.startswith(start)
            return "", "" if is_undecided else self.text
        thought, _, answer = start.removeprefix(_OPENS).partition(_CLOSES)
        return thought, answer

    def _with_calls(self, answer: str) -> tuple[str, list[ToolCall]]:
        content, found = parse_calls(answer, self.dialect, self.item, self.prefix)
        if not self.item.parallel_tool_calls:
            found = found[:1]
        calls = [call for call in found if call.error is None]
        if not calls:
            return answer.strip(), []
        broken = [call.arguments for call in found if call.error is not None]
        return "\n".join([content.strip(), *broken]).strip(), calls

    def _settled_content(self, answer: str) -> str:
        """What of the answer is content whatever follows."""
        if not self.item.tools:
            return _settled(answer, ())
        if self.dialect == "llama3" and answer.lstrip()[:1] in ("{", "<", ""):
            return ""
        marks = _MARKS[self.dialect]
        for mark in marks:
            answer = answer.partition(mark)[0]
        return _settled(answer, marks)

    def _unsent(self, thought: str, content: str) -> list[dict[str, Any]]:
        deltas = []
        for key, text in (("reasoning_content", thought), ("content", content)):
            if len(text) > self._num_sent[key]:
                deltas.append({key: text[self._num_sent[key] :]})
                self._num_sent[key] = len(text)
        return deltas


def _settled(text: str, marks: tuple[str, ...]) -> str:
    """The text without the white space around it and without what may be the beginning of a mark."""
    held = max((size for mark in marks for size in range(1, len(mark)) if text.endswith(mark[:size])), default=0)
    return text[: len(text) - held].strip()
