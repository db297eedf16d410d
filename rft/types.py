"""The words of rft as records: Item, Message, ToolCall, ToolResult, Turn, Grade, Rollout, Group.

One Rollout record serves sampling, training, disk and pages: its fields are facts, everything that follows
from them is a property. Records are pydantic models (they cross disk and wire) that refuse unknown keys.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

Role = Literal["system", "developer", "user", "assistant", "tool"]
Split = Literal["train", "validation", "test"]


class Record(BaseModel):
    """A value that crosses disk or wire: unknown keys are errors, never ignored."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")


class ToolCall(Record):
    """One call as the model wrote it.

    `arguments` is a JSON string, as on the wire. A call the model malformed keeps its place in the turn with
    `error` set: it is never executed, and its result tells the model what was wrong.
    """

    id: str  # fc_..., unique per call
    call_id: str  # call_..., what the result refers to
    name: str
    arguments: str
    error: str | None = None

    def as_chat(self) -> dict[str, Any]:
        """The call in the shape of a chat-completions `message.tool_calls` entry."""
        return {
            "id": self.call_id,
            "type": "function",
            "function": {"name": self.name, "arguments": self.arguments},
        }


class ToolResult(Record):
    """What a call returned, as the model sees it. `is_error` marks answers that report a failure to the model."""

    call_id: str
    output: str
    is_error: bool = False
    latency_s: float = 0.0
    num_attempts: int = 1


class Message(Record):
    """One chat message; `tool_calls` on assistant messages, `tool_call_id` on tool messages."""

    role: Role
    content: str = ""
    reasoning: str = ""  # what a thinking model wrote before its answer; never shown to tools or graders
    name: str | None = None
    tool_calls: list[ToolCall] = Field(default_factory=list)
    tool_call_id: str | None = None

    def as_chat(self) -> dict[str, Any]:
        """The message as a chat-completions dict, without empty optional keys."""
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.name:
            message["name"] = self.name
        if self.tool_calls:
            message["tool_calls"] = [call.as_chat() for call in self.tool_calls]
        if self.tool_call_id:
            message["tool_call_id"] = self.tool_call_id
        return message


class Item(Record):
    """One dataset row. `row` is the whole row as the user wrote it: what tools and graders receive as `item`."""

    id: str
    row: dict[str, Any]
    messages: list[Message]
    tools: list[dict[str, Any]] = Field(default_factory=list)  # [{"type": "function", "function": {...}}]
    parallel_tool_calls: bool = True

    @property
    def tool_names(self) -> list[str]:
        return [tool["function"]["name"] for tool in self.tools]


class StopReason(StrEnum):
    """Why a rollout ended: a closed set, every rollout has exactly one."""

    ANSWERED = "answered"  # a turn without tool calls: the final answer
    EPISODE_OVER = "episode_over"  # the environment ended it
    MAX_TURNS = "max_turns"
    MAX_TOKENS = "max_tokens"  # a turn, or the whole rollout, met its token limit
    TIME_LIMIT = "time_limit"
    TOOL_FAILED = "tool_failed"
    GRADER_FAILED = "grader_failed"
    ENGINE_FAILED = "engine_failed"
    CANCELLED = "cancelled"

    @property
    def is_discarded(self) -> bool:
        """True for the world's failures: such a rollout has no grade and is replaced by another attempt."""
        return self in _DISCARDED

    @property
    def is_truncated(self) -> bool:
        """True when a limit ended the rollout."""
        return self in (StopReason.MAX_TURNS, StopReason.MAX_TOKENS, StopReason.TIME_LIMIT)


_DISCARDED = {
    StopReason.TOOL_FAILED,
    StopReason.GRADER_FAILED,
    StopReason.ENGINE_FAILED,
    StopReason.CANCELLED,
}


class TokenUsage(Record):
    """Tokens that a model behind a chat API took: a judge for its judgements, or the evaluated model for a turn."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0  # of the prompt tokens

    def __add__(self, other: TokenUsage) -> TokenUsage:
        return TokenUsage(
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            completion_tokens=self.completion_tokens + other.completion_tokens,
            cached_tokens=self.cached_tokens + other.cached_tokens,
        )


class Turn(Record):
    """One sampled message and the tool results it caused.

    `input_ids` were appended by rft before sampling: the first prompt on turn 0, rendered tool results later.
    With `is_fork` they replace the history instead of extending it (the template was not prefix-preserving).
    `logprobs` are natural logs, one per output id, at the sampling temperature over the full vocabulary.
    A model behind a chat API gives no ids: the three lists are empty then, and `usage` holds its counts.
    """

    input_ids: list[int]
    output_ids: list[int]
    logprobs: list[float]
    finish_reason: Literal["stop", "length"]
    policy_version: int
    message: Message
    results: list[ToolResult] = Field(default_factory=list)
    replies: list[Message] = Field(default_factory=list)  # of the environment, to a message without calls
    is_fork: bool = False
    reasoning_tokens: int = 0  # of the output ids, those inside <think>
    usage: TokenUsage | None = None  # where there are no ids; its prompt is the whole history
    started_s: float = 0.0  # seconds since the rollout started
    sampled_s: float = 0.0  # seconds the engine took

    @property
    def num_output_tokens(self) -> int:
        return len(self.output_ids) if self.usage is None else self.usage.completion_tokens


_ANSWER_ERRORS = frozenset({"invalid_variable_error", "sample_parse_error"})  # flags that are the model's doing


class Grade(Record):
    """What a grader says of a rollout. `errors` holds the contract's error flags that are set, with details."""

    score: float
    parts: dict[str, Grade] = Field(default_factory=dict)  # of a multi grader, by key
    shadow: dict[str, float] = Field(default_factory=dict)  # graders that are logged and never optimised
    errors: dict[str, str] = Field(default_factory=dict)
    usage: dict[str, TokenUsage] = Field(default_factory=dict)  # by judge model
    shadow_errors: dict[str, str] = Field(default_factory=dict)  # shadow graders that failed, and why
    spread: float | None = None  # standard deviation of several judgements of the same answer
    latency_s: float = 0.0
    is_cached: bool = False

    @field_validator("score")
    @classmethod
    def _finite(cls, score: float) -> float:
        if not math.isfinite(score):
            raise ValueError(f"a grade must be a finite number, got {score}")
        return score

    @property
    def sub_scores(self) -> dict[str, float]:
        return {key: part.score for key, part in self.parts.items()}

    @property
    def all_errors(self) -> list[tuple[str, str]]:
        """(flag, detail) of this grade and its parts."""
        return [*self.errors.items(), *(error for part in self.parts.values() for error in part.all_errors)]

    @property
    def failure(self) -> str | None:
        """What went wrong in the grader itself, where that became a score; a bad answer is no failure."""
        return next((detail for flag, detail in self.all_errors if flag not in _ANSWER_ERRORS), None)

    @property
    def leaves(self) -> list[Grade]:
        """The grades that were given and not computed: the parts of a multi grader, else itself."""
        return [leaf for part in self.parts.values() for leaf in part.leaves] or [self]

    @property
    def all_usage(self) -> dict[str, TokenUsage]:
        """Tokens per judge model, of this grade and its parts."""
        total = dict(self.usage)
        for part in self.parts.values():
            for model, usage in part.all_usage.items():
                total[model] = total.get(model, TokenUsage()) + usage
        return total


@dataclass(frozen=True, slots=True)
class Sequence:
    """One training sequence of a rollout; all lists have one entry per token.

    `mask` is True only on ids the policy sampled; `logprobs` is 0.0 and `versions` is -1 where it is False.
    """

    ids: list[int]
    mask: list[bool]
    logprobs: list[float]
    versions: list[int]


class Rollout(Record):
    """One attempt at an item; `id` is the wire's `trace_id`, the same for all its tool calls and its grader."""

    id: str
    item_id: str
    split: Split
    step: int
    attempt: int
    seed: int
    turns: list[Turn] = Field(default_factory=list)
    stop_reason: StopReason
    grade: Grade | None = None
    error: str | None = None
    environment: dict[str, Any] = Field(default_factory=dict)  # how the environment says it went
    started_at: float  # Unix seconds
    duration_s: float

    @property
    def output_text(self) -> str:
        """The text of the last sampled message, or "" when nothing was sampled."""
        return self.turns[-1].message.content if self.turns else ""

    @property
    def tool_calls(self) -> list[tuple[ToolCall, ToolResult | None]]:
        """Every call of the rollout with its result (None when the rollout ended before the result came)."""
        pairs: list[tuple[ToolCall, ToolResult | None]] = []
        for turn in self.turns:
            results = {result.call_id: result for result in turn.results}
            pairs += [(call, results.get(call.call_id)) for call in turn.message.tool_calls]
        return pairs

    @property
    def has_valid_call(self) -> bool:
        """True when at least one call was well-formed and its tool accepted it."""
        return any(
            call.error is None and result is not None and not result.is_error for call, result in self.tool_calls
        )

    @property
    def num_sampled_tokens(self) -> int:
        return sum(turn.num_output_tokens for turn in self.turns)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens that the model read and did not write, each once. Of a chat API's history it is what is left when the
        turns before the last are taken away.
        """
        num_ids = sum(len(turn.input_ids) for turn in self.turns)
        if num_ids or not self.turns or (last := self.turns[-1].usage) is None:
            return num_ids
        return max(0, last.prompt_tokens - sum(turn.num_output_tokens for turn in self.turns[:-1]))

    @property
    def sequences(self) -> list[Sequence]:
        """The rollout as training sequences: one, plus one for every fork. Turns without ids are in none."""
        sequences: list[Sequence] = []
        for turn in self.turns:
            if turn.usage is not None:
                continue
            if turn.is_fork or not sequences:
                sequences.append(Sequence([], [], [], []))
            last = sequences[-1]
            num_input, num_output = len(turn.input_ids), len(turn.output_ids)
            last.ids.extend(turn.input_ids + turn.output_ids)
            last.mask.extend([False] * num_input + [True] * num_output)
            last.logprobs.extend([0.0] * num_input + turn.logprobs)
            last.versions.extend([-1] * num_input + [turn.policy_version] * num_output)
        return sequences


@dataclass(frozen=True, slots=True)
class Group:
    """The graded rollouts of one item at one step, in order of attempt; discarded ones are not among them."""

    item: Item
    step: int
    rollouts: list[Rollout]
    discards: tuple[StopReason, ...] = ()  # of the rollouts that were replaced
    round_sizes: tuple[int, ...] = ()  # in what rounds they were asked for; empty: all in one

    @property
    def num_discarded(self) -> int:
        return len(self.discards)

    @property
    def scores(self) -> list[float]:
        return [rollout.grade.score for rollout in self.rollouts if rollout.grade is not None]

    @property
    def has_signal(self) -> bool:
        """False when all grades are equal: the advantages are zero and the group teaches nothing."""
        return len(set(self.scores)) > 1


def rollout_id(run_id: str, split: Split, step: int, item_id: str, attempt: int) -> str:
    """`trace_<32 hex>`, derived from what the rollout is, so that any part of a run can be recomputed."""
    key = "\x1f".join([run_id, split, str(step), item_id, str(attempt)])
    return "trace_" + hashlib.sha256(key.encode()).hexdigest()[:32]


def rollout_seed(run_seed: int, split: Split, step: int, item_id: str, attempt: int) -> int:
    """A 31-bit sampling seed derived from the run's seed and the rollout's place, not from the run's name."""
    key = "\x1f".join([str(run_seed), split, str(step), item_id, str(attempt)])
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") >> 1
