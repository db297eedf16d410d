"""ONE rollout: sample a turn, run its tool calls, append the results, until it ends; then grade it.

Guarantees: always returns a Rollout with a StopReason; the session is closed on every path. Failures of the world
become the rollout's stop reason (it is discarded and has no grade); a dead engine and bugs propagate.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from rft.chat import Chat, tool_message
from rft.config import RolloutConfig
from rft.engines.pool import outages_of
from rft.engines.remote import RemoteModel, Sampler
from rft.envs import Environment, Session
from rft.envs.outage import Outages
from rft.episode import Episode, an_episode
from rft.errors import EngineError, GraderError, WorldError, attribute, first_cause
from rft.graders import Grader
from rft.graders.sample import sample_of
from rft.speaker import MessageSpeaker, Speaker, TokenSpeaker
from rft.types import Grade, Item, Message, Rollout, Split, StopReason, ToolCall, ToolResult, Turn
from rft.waits import Waits


@dataclass(frozen=True, slots=True)
class Attempt:
    """Which rollout to make: its place in the run and what is derived from it."""

    id: str
    item: Item
    split: Split
    step: int
    index: int
    seed: int


@dataclass(frozen=True, slots=True)
class Workshop:
    """What a rollout works with; shared by all rollouts of a run. A remote model needs no `chat`."""

    engine: Sampler
    chat: Chat | None
    environment: Environment | None
    grader: Grader
    shadow_graders: dict[str, Grader]
    limits: RolloutConfig
    max_model_len: int
    waits: Waits = field(default_factory=Waits)

    @property
    def outages(self) -> Outages | None:
        """What is down of the tools and the engines; None where nothing can be."""
        return outages_of(self.engine, self.environment)


@dataclass(slots=True)
class _Conversation:
    """The state of a rollout in flight."""

    started: float
    item: Item  # with the environment's opening
    messages: list[Message] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    episode: Episode | None = None  # None before it is open


async def run_rollout(attempt: Attempt, workshop: Workshop) -> Rollout:
    """Make one attempt. Raises EngineError only when the engine cannot serve any request any more."""
    started_at, conversation, error = time.time(), _Conversation(time.perf_counter(), attempt.item), None
    grade: Grade | None = None
    try:
        stop_reason = await _converse_within_limit(attempt, workshop, conversation)
        grade = await _grade(attempt, workshop, conversation, stop_reason, started_at)
    except WorldError as failure:
        reason = attribute(failure)
        if reason is None or (isinstance(failure, EngineError) and not failure.retryable):
            raise
        stop_reason, error = reason, str(failure)
    workshop.waits.stops[stop_reason] += 1
    return _record(attempt, conversation, stop_reason, started_at, grade, error)


def _record(
    attempt: Attempt,
    conversation: _Conversation,
    stop_reason: StopReason,
    started_at: float,
    grade: Grade | None = None,
    error: str | None = None,
) -> Rollout:
    return Rollout(
        id=attempt.id,
        item_id=attempt.item.id,
        split=attempt.split,
        step=attempt.step,
        attempt=attempt.index,
        seed=attempt.seed,
        turns=conversation.turns,
        stop_reason=stop_reason,
        grade=grade,
        error=error,
        environment=conversation.episode.outcome if conversation.episode is not None else {},
        started_at=started_at,
        duration_s=time.perf_counter() - conversation.started,
    )


async def _converse_within_limit(attempt: Attempt, workshop: Workshop, conversation: _Conversation) -> StopReason:
    try:
        async with asyncio.timeout(workshop.limits.time_limit_s) as timer:
            with workshop.outages.patience(timer) if workshop.outages else nullcontext():
                return await _converse(attempt, workshop, conversation)
    except TimeoutError:
        return StopReason.TIME_LIMIT


async def _converse(attempt: Attempt, workshop: Workshop, conversation: _Conversation) -> StopReason:
    async with an_episode(workshop.environment, attempt.item, attempt.id, workshop.waits) as episode:
        conversation.episode, conversation.item = episode, episode.item
        speaker = _speaker(attempt, workshop)
        for _ in range(workshop.limits.max_turns):
            turn = await _sample_turn(attempt, workshop, conversation, speaker)
            if turn is None or turn.finish_reason == "length":
                return StopReason.MAX_TOKENS
            ending = await _respond(attempt, workshop, conversation, episode.session, turn)
            if ending is not None:
                return ending
        raise AssertionError("the loop ends by returning")


async def _respond(
    attempt: Attempt, workshop: Workshop, conversation: _Conversation, session: Session | None, turn: Turn
) -> StopReason | None:
    """The world's answer to a turn, appended to the conversation; the stop reason when the rollout ends here.

    At the limit of turns the calls are not executed: nobody would read what they return.
    """
    calls, turns_left = turn.message.tool_calls, _turns_left(conversation, workshop.limits)
    if not calls:
        turn.replies = await _reply(attempt, workshop, session, turn)
    elif turns_left > 0:
        turn.results = await _call_tools(attempt, workshop, session, calls)
    if session is not None and session.is_over:
        return StopReason.EPISODE_OVER
    if not calls and not turn.replies:
        return StopReason.ANSWERED
    if turns_left == 0:
        return StopReason.MAX_TURNS
    if turns_left == 1 and workshop.limits.last_turn_message:
        _announce_last_turn(turn, workshop.limits.last_turn_message)
    conversation.messages += [tool_message(result) for result in turn.results] + turn.replies
    return None


async def _reply(attempt: Attempt, workshop: Workshop, session: Session | None, turn: Turn) -> list[Message]:
    if session is None:
        return []
    with workshop.waits.on(attempt.id, attempt.item.id, "environment"):
        return await session.reply(turn.message)


def _announce_last_turn(turn: Turn, text: str) -> None:
    """Add the text to the last thing that the model reads before its last turn."""
    if turn.replies:
        turn.replies[-1] = turn.replies[-1].model_copy(update={"content": f"{turn.replies[-1].content}\n\n{text}"})
    else:
        turn.results[-1] = turn.results[-1].model_copy(update={"output": f"{turn.results[-1].output}\n\n{text}"})


def _turns_left(conversation: _Conversation, limits: RolloutConfig) -> int:
    """How many turns may follow the last one when its tool calls are executed."""
    left = limits.max_turns - len(conversation.turns)
    if limits.max_episode_steps is not None:
        steps = sum(1 + len(turn.message.tool_calls) for turn in conversation.turns)
        left = min(left, max(0, limits.max_episode_steps - steps))
    return left


def _speaker(attempt: Attempt, workshop: Workshop) -> Speaker:
    temperature = workshop.limits.temperature
    if isinstance(workshop.engine, RemoteModel):
        return MessageSpeaker(workshop.engine, temperature, attempt.id)
    assert workshop.chat is not None, "an engine is asked with ids"
    return TokenSpeaker(workshop.engine, workshop.chat, workshop.max_model_len, temperature, attempt.id, attempt.seed)


async def _sample_turn(
    attempt: Attempt, workshop: Workshop, conversation: _Conversation, speaker: Speaker
) -> Turn | None:
    """Sample one turn and append it; None when the context, or the rollout's tokens, leave no room for one."""
    max_tokens = workshop.limits.max_tokens_per_turn
    if workshop.limits.max_tokens_per_rollout is not None:
        num_sampled = sum(turn.num_output_tokens for turn in conversation.turns)
        max_tokens = min(max_tokens, workshop.limits.max_tokens_per_rollout - num_sampled)
    if max_tokens < 1:
        return None
    asked = time.perf_counter()
    with workshop.waits.on(attempt.id, attempt.item.id, "engine"):
        turn = await speaker.say(conversation.item, conversation.messages, max_tokens)
    if turn is None:
        return None
    turn.started_s, turn.sampled_s = asked - conversation.started, time.perf_counter() - asked
    if conversation.episode is not None and conversation.episode.session is not None:
        conversation.episode.session.hear(turn.message)
    conversation.messages.append(turn.message)
    conversation.turns.append(turn)
    return turn


async def _call_tools(
    attempt: Attempt, workshop: Workshop, session: Session | None, calls: list[ToolCall]
) -> list[ToolResult]:
    """All calls of a turn at once, results in the order of the calls; the first failure cancels the others."""
    if len(calls) == 1:
        return [await _call_tool(attempt, workshop, session, calls[0])]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_call_tool(attempt, workshop, session, call)) for call in calls]
    except* WorldError as failures:
        raise first_cause(failures) from None
    return [task.result() for task in tasks]


async def _call_tool(attempt: Attempt, workshop: Workshop, session: Session | None, call: ToolCall) -> ToolResult:
    if call.error is not None or session is None:
        return ToolResult(call_id=call.call_id, output=f"Error: {call.error or 'there are no tools'}", is_error=True)
    with workshop.waits.on(attempt.id, attempt.item.id, f"tool {call.name}"):
        return await session.call(call)


async def _grade(
    attempt: Attempt, workshop: Workshop, conversation: _Conversation, stop_reason: StopReason, started_at: float
) -> Grade:
    """The grade, with the shadow graders' scores beside it."""
    sample = sample_of(_record(attempt, conversation, stop_reason, started_at))
    if stop_reason.is_truncated and workshop.limits.truncated_grade is not None:
        grade = Grade(score=workshop.limits.truncated_grade)
    else:
        with workshop.waits.on(attempt.id, attempt.item.id, "grader"):
            grade = await workshop.grader.grade(attempt.item, sample, attempt.id)
    form = workshop.limits.response_format
    if form is not None and form.type != "text" and sample["output_json"] is None:
        grade.errors.setdefault("sample_parse_error", "the answer is not JSON, as rollout.response_format asks")
    if workshop.shadow_graders:
        shadows = (_shadow(name, grader, grade, attempt, sample) for name, grader in workshop.shadow_graders.items())
        with workshop.waits.on(attempt.id, attempt.item.id, "shadow graders"):
            await asyncio.gather(*shadows)
    return grade


async def _shadow(name: str, grader: Grader, grade: Grade, attempt: Attempt, sample: dict[str, Any]) -> None:
    """Note a shadow grader's score in `grade`; one that fails must not cost the rollout."""
    try:
        grade.shadow[name] = (await grader.grade(attempt.item, sample, attempt.id)).score
    except GraderError as error:
        grade.shadow_errors[name] = error.problem
