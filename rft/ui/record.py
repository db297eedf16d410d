"""A stored rollout as the page reads it: what any version of rft wrote, as far as it goes.

Missing keys have defaults and unknown ones are skipped; token ids and log-probabilities stay undecoded until somebody
asks, which makes reading a row ten times as fast as making a Rollout of it.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

import msgspec

from rft.files import finite, parsed

_EMPTY = msgspec.Raw(b"[]")
_LARGEST = 2**53  # what every reader of JSON can hold, and SQLite
Int = Annotated[int, msgspec.Meta(ge=-_LARGEST, le=_LARGEST)]


class CallRow(msgspec.Struct, gc=False):
    name: str = ""
    arguments: str = ""
    call_id: str = ""
    error: str | None = None


class ResultRow(msgspec.Struct, gc=False):
    output: str = ""
    call_id: str = ""
    is_error: bool = False
    latency_s: float = 0.0
    num_attempts: Int = 1


class ReplyRow(msgspec.Struct, gc=False):
    role: str = ""
    content: str = ""


class MessageRow(msgspec.Struct, gc=False):
    content: str = ""
    reasoning: str = ""
    tool_calls: list[CallRow] = []


class UsageRow(msgspec.Struct, gc=False):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class TurnRow(msgspec.Struct, gc=False):
    input_ids: msgspec.Raw = _EMPTY
    output_ids: msgspec.Raw = _EMPTY
    logprobs: msgspec.Raw = _EMPTY
    message: MessageRow = msgspec.field(default_factory=MessageRow)
    results: list[ResultRow] = []
    replies: list[ReplyRow] = []
    finish_reason: str = ""
    policy_version: Int = 0
    is_fork: bool = False
    reasoning_tokens: Int = 0
    started_s: float = 0.0
    sampled_s: float = 0.0
    usage: UsageRow | None = None  # of a model behind a chat API, which gives no ids

    @property
    def num_output_tokens(self) -> int:
        return count(self.output_ids) if self.usage is None else self.usage.completion_tokens

    @property
    def num_input_tokens(self) -> int:
        return count(self.input_ids) if self.usage is None else self.usage.prompt_tokens


class GradeRow(msgspec.Struct, gc=False):
    score: float | None = None
    parts: dict[str, GradeRow] = {}
    shadow: dict[str, float | None] = {}
    errors: dict[str, str] = {}
    shadow_errors: dict[str, str] = {}
    latency_s: float = 0.0
    is_cached: bool = False

    @property
    def all_errors(self) -> list[tuple[str, str]]:
        """(flag, detail) of this grade and its parts."""
        return [*self.errors.items(), *(error for part in self.parts.values() for error in part.all_errors)]


class RolloutRow(msgspec.Struct, gc=False):
    """The fields of rft.types.Rollout."""

    id: str
    item_id: str = ""
    split: str = "train"
    step: Int = 0
    attempt: Int = 0
    seed: Int = 0
    turns: list[TurnRow] = []
    stop_reason: str = "unknown"
    grade: GradeRow | None = None
    error: str | None = None
    environment: msgspec.Raw = msgspec.Raw(b"{}")
    started_at: float = 0.0
    duration_s: float = 0.0


_decoder = msgspec.json.Decoder(RolloutRow)


def read_row(line: bytes) -> RolloutRow | None:
    """The rollout on a line; None when it was cut off or is nothing that any version of rft writes."""
    try:
        return _decoder.decode(line)
    except (msgspec.MsgspecError, RecursionError):
        return _read_leniently(line)


def _read_leniently(line: bytes) -> RolloutRow | None:
    """Half surrogate pairs and numbers that are not finite, which Python's own JSON writes and others refuse."""
    try:
        row = parsed(line)
        if row is None:
            return None
        return _decoder.decode(json.dumps(finite(row), ensure_ascii=False).encode("utf-8", "replace"))
    except (msgspec.MsgspecError, RecursionError):
        return None


def count(numbers: msgspec.Raw) -> int:
    """How many entries a list of numbers has."""
    data = bytes(numbers)
    return data.count(b",") + 1 if len(data.strip(b"[] ")) else 0


def decoded(value: msgspec.Raw) -> Any:
    return msgspec.json.decode(value)


def calls_of(turn: TurnRow) -> list[tuple[CallRow, ResultRow | None]]:
    """Every call of a turn with its result."""
    results = {result.call_id: result for result in turn.results}
    return [(call, results.get(call.call_id)) for call in turn.message.tool_calls]
