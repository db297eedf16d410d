"""One rollout: every ending, exact ids, nothing left open."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError
from scripted_engine import Script, ScriptedEngine
from tiny import tiny_tokenizer

from rft.chat import Chat
from rft.config import RolloutConfig
from rft.envs import Session, ToolSpecs
from rft.envs.outage import Outages
from rft.errors import EngineError, GraderError, ToolError, WorldError
from rft.rollout import Attempt, Workshop, run_rollout
from rft.types import Grade, Item, Message, Rollout, StopReason, ToolCall, ToolResult

CALL = '<tool_call>{"name": "search", "arguments": {"query": "mi"}}</tool_call>'
ROW = {"messages": [{"role": "user", "content": "Heart attack"}]}
SEARCH = {"type": "function", "function": {"name": "search", "parameters": {"type": "object", "properties": {}}}}


class RecordingEnvironment:
    """Answers every call by `answer`; knows which sessions are open."""

    def __init__(self, answer: Callable[[ToolCall], str], delay_s: float = 0.0) -> None:
        self.answer, self.delay_s = answer, delay_s
        self.calls: list[tuple[str, ToolCall]] = []
        self.num_open = 0
        self.outages = Outages()

    async def discover(self) -> ToolSpecs:
        return {"search": SEARCH}

    async def check(self) -> None:
        return None

    async def open(self, item: Item, rollout_id: str) -> RecordingSession:
        self.num_open += 1
        return RecordingSession(self, rollout_id)

    async def close(self) -> None:
        return None


class RecordingSession(Session):
    def __init__(self, environment: RecordingEnvironment, rollout_id: str) -> None:
        self.environment, self.rollout_id = environment, rollout_id

    async def call(self, call: ToolCall) -> ToolResult:
        self.environment.calls.append((self.rollout_id, call))
        await asyncio.sleep(self.environment.delay_s)
        return ToolResult(call_id=call.call_id, output=self.environment.answer(call))

    async def close(self) -> None:
        self.environment.num_open -= 1


class RecordingGrader:
    """Grades 1 when `right` is in the answer; raises `error` when it has one."""

    def __init__(self, right: str = "I21", error: WorldError | None = None) -> None:
        self.right, self.error = right, error
        self.samples: list[dict[str, Any]] = []
        self.trace_ids: list[str] = []

    async def start(self) -> list[str]:
        return []

    def seen(self, item: Item, sample: dict[str, Any]) -> Any:
        return sample

    async def grade(self, item: Item, sample: dict[str, Any], trace_id: str = "") -> Grade:
        self.samples.append(sample)
        self.trace_ids.append(trace_id)
        if self.error:
            raise self.error
        return Grade(score=float(self.right in sample["output_text"]))

    async def close(self) -> None:
        return None


def say(*turns: str) -> Script:
    return lambda prompt, rollout_id, turn: turns[turn]


def an_item(**changes: Any) -> Item:
    return Item.model_validate({"id": "x-1", "row": ROW, "messages": ROW["messages"], "tools": [SEARCH]} | changes)


def an_attempt(item: Item | None = None, index: int = 0) -> Attempt:
    return Attempt(f"trace_{index:032x}", item or an_item(), "train", 1, index, seed=index * 1000)


def a_workshop(script: Script, **changes: Any) -> Workshop:
    chat = Chat(tiny_tokenizer())
    fields: dict[str, Any] = {
        "engine": ScriptedEngine(chat, script),
        "chat": chat,
        "environment": RecordingEnvironment(lambda call: "I21.9 Acute myocardial infarction"),
        "grader": RecordingGrader(),
        "shadow_graders": {},
        "limits": RolloutConfig(max_turns=3, max_tokens_per_turn=400, time_limit_s=5),
        "max_model_len": 4096,
    }
    return Workshop(**fields | changes)


def run(workshop: Workshop, attempt: Attempt | None = None) -> Rollout:
    return asyncio.run(run_rollout(attempt or an_attempt(), workshop))


def test_a_call_and_an_answer() -> None:
    workshop = a_workshop(say(CALL, "I21.9"))
    rollout = run(workshop)
    assert rollout.stop_reason is StopReason.ANSWERED
    assert rollout.output_text == "I21.9"
    assert rollout.grade is not None and rollout.grade.score == 1.0
    assert rollout.has_valid_call
    ((rollout_id, call),) = workshop.environment.calls
    assert rollout_id == rollout.id and json.loads(call.arguments) == {"query": "mi"}
    assert workshop.environment.num_open == 0


def test_the_ids_sent_are_the_ids_recorded() -> None:
    workshop = a_workshop(say(CALL, CALL, "I21.9"))
    rollout = run(workshop)
    (sequence,) = rollout.sequences
    lengths = {len(sequence.ids), len(sequence.mask), len(sequence.logprobs), len(sequence.versions)}
    assert len(lengths) == 1
    sent = [prompt for _, prompt, _ in workshop.engine.requests]
    for prompt, turn in zip(sent, rollout.turns, strict=True):
        assert sequence.ids[: len(prompt)] == prompt
        assert sequence.ids[len(prompt) : len(prompt) + len(turn.output_ids)] == turn.output_ids
        assert all(sequence.mask[len(prompt) : len(prompt) + len(turn.output_ids)])
    assert sum(sequence.mask) == rollout.num_sampled_tokens


def test_a_malformed_call_is_shown_to_the_model_and_not_executed() -> None:
    workshop = a_workshop(say("<tool_call>{bad}</tool_call>", "I21.9"))
    rollout = run(workshop)
    assert rollout.stop_reason is StopReason.ANSWERED
    assert not rollout.has_valid_call
    assert workshop.environment.calls == []
    (result,) = rollout.turns[0].results
    assert result.is_error and "not valid JSON" in result.output
    assert "not valid JSON" in workshop.chat.tokenizer.decode(rollout.turns[1].input_ids)


def test_calls_of_one_turn_run_at_once() -> None:
    workshop = a_workshop(say(CALL * 4, "I21.9"), environment=RecordingEnvironment(lambda call: "x", delay_s=0.2))
    rollout = run(workshop)
    assert len(rollout.tool_calls) == 4
    assert rollout.duration_s < 0.7  # four in a row would take 0.8 s


@pytest.mark.parametrize(
    ("script", "limits", "reason"),
    [
        (say(CALL, CALL, CALL), {"max_turns": 2}, StopReason.MAX_TURNS),
        (
            say(CALL, CALL, CALL),
            {"max_episode_steps": 4},
            StopReason.MAX_TURNS,
        ),  # turn, call, turn; its call is the fifth
        (say("word " * 40), {"max_tokens_per_turn": 20}, StopReason.MAX_TOKENS),
        (say("word " * 40), {"max_tokens_per_rollout": 20}, StopReason.MAX_TOKENS),
    ],
)
def test_limits_end_a_rollout_and_it_is_graded(script: Script, limits: dict[str, Any], reason: StopReason) -> None:
    rollout = run(a_workshop(script, limits=RolloutConfig(**limits)))
    assert rollout.stop_reason is reason
    assert rollout.grade is not None


def test_a_full_context_ends_the_rollout() -> None:
    workshop = a_workshop(say(CALL, CALL, CALL))
    first = len(workshop.chat.first_prompt(an_item()))
    rollout = run(a_workshop(say(CALL, CALL, CALL), max_model_len=first + len(CALL) + 3))
    assert rollout.stop_reason is StopReason.MAX_TOKENS
    assert len(rollout.turns) == 1


def test_the_time_limit_ends_a_rollout_and_closes_its_session() -> None:
    environment = RecordingEnvironment(lambda call: "x", delay_s=30)
    limits = RolloutConfig(time_limit_s=0.3, max_tokens_per_turn=200)
    rollout = run(a_workshop(say(CALL), environment=environment, limits=limits))
    assert rollout.stop_reason is StopReason.TIME_LIMIT
    assert rollout.duration_s < 5
    assert environment.num_open == 0


def _fail_with(error: WorldError) -> Callable[[ToolCall], str]:
    def answer(call: ToolCall) -> str:
        raise error

    return answer


def test_a_failed_tool_discards_the_rollout() -> None:
    environment = RecordingEnvironment(_fail_with(ToolError("search: HTTP 500")))
    rollout = run(a_workshop(say(CALL), environment=environment))
    assert rollout.stop_reason is StopReason.TOOL_FAILED
    assert rollout.stop_reason.is_discarded
    assert rollout.grade is None and rollout.error == "search: HTTP 500"
    assert environment.num_open == 0


def test_a_failed_grader_discards_the_rollout() -> None:
    rollout = run(a_workshop(say("I21.9"), grader=RecordingGrader(error=GraderError("no answer"))))
    assert rollout.stop_reason is StopReason.GRADER_FAILED
    assert rollout.grade is None


def test_a_passing_engine_failure_discards_and_a_dead_engine_propagates() -> None:
    workshop = a_workshop(say("I21.9"))
    workshop.engine.failures = {0: EngineError("reset", retryable=True), 1: EngineError("engine died")}
    assert run(workshop, an_attempt(index=0)).stop_reason is StopReason.ENGINE_FAILED
    with pytest.raises(EngineError, match="engine died"):
        run(workshop, an_attempt(index=1))


def test_a_bug_propagates() -> None:
    with pytest.raises(IndexError):
        run(a_workshop(say()))


def test_shadow_graders_are_recorded_beside_the_grade() -> None:
    rollout = run(a_workshop(say("I21.9"), shadow_graders={"other": RecordingGrader(right="J45")}))
    assert rollout.grade is not None
    assert (rollout.grade.score, rollout.grade.shadow) == (1.0, {"other": 0.0})


def test_a_failing_shadow_grader_costs_nothing() -> None:
    shadows = {"broken": RecordingGrader(error=GraderError("down")), "other": RecordingGrader(right="J45")}
    rollout = run(a_workshop(say("I21.9"), shadow_graders=shadows))
    assert rollout.grade is not None
    assert (rollout.grade.score, rollout.grade.shadow) == (1.0, {"other": 0.0})
    assert rollout.grade.shadow_errors == {"broken": "down"}


def test_graders_get_the_rollouts_id() -> None:
    grader = RecordingGrader()
    rollout = run(a_workshop(say("I21.9"), grader=grader))
    assert grader.trace_ids == [rollout.id]


def test_sampled_tokens_of_a_rollout_are_limited_over_its_turns() -> None:
    limits = RolloutConfig(max_tokens_per_turn=400, max_tokens_per_rollout=len(CALL) + 10)
    rollout = run(a_workshop(say(CALL, "word " * 40), limits=limits))
    assert (rollout.stop_reason, rollout.num_sampled_tokens) == (StopReason.MAX_TOKENS, len(CALL) + 10)


@pytest.mark.parametrize("limits", [{"max_turns": 3}, {"max_episode_steps": 5}])
def test_the_model_is_told_of_its_last_turn(limits: dict[str, int]) -> None:
    message = "This was your last call: answer now."
    config = RolloutConfig(max_tokens_per_turn=400, last_turn_message=message, **limits)
    rollout = run(a_workshop(say(CALL, CALL, "I21.9"), limits=config))
    told = [message in turn.results[-1].output for turn in rollout.turns if turn.results]
    assert (rollout.stop_reason, told) == (StopReason.ANSWERED, [False, True])


@pytest.mark.parametrize(
    ("kind", "answer", "flags"),
    [
        ("json_object", '{"code": "I21.9"}', set()),
        ("json_object", "I21.9", {"sample_parse_error"}),
        ("json_schema", "I21.9", {"sample_parse_error"}),
        ("text", "I21.9", set()),
    ],
)
def test_an_answer_that_is_not_json_is_flagged_where_json_is_asked_for(kind: str, answer: str, flags: set[str]) -> None:
    schema = {"json_schema": {"name": "a", "schema": {}}} if kind == "json_schema" else {}
    limits = RolloutConfig.model_validate({"max_tokens_per_turn": 400, "response_format": {"type": kind, **schema}})
    grade = run(a_workshop(say(answer), limits=limits)).grade
    assert grade is not None and grade.errors.keys() == flags
    assert grade.score == 1.0 and grade.failure is None


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ({"type": "xml"}, "json_object"),
        ({"type": "json_schema"}, "goes with type json_schema"),
        ({"type": "text", "json_schema": {"name": "a", "schema": {}}}, "goes with type json_schema"),
        ({"type": "json_schema", "json_schema": {"name": "a"}}, "needs a name, and a schema"),
        ({"type": "json_schema", "json_schema": {"name": "a", "schema": {}, "x": 1}}, r"json_schema\.x: unknown key"),
    ],
)
def test_a_response_format_that_is_wrong_is_refused(form: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        RolloutConfig.model_validate({"response_format": form})


def test_the_grade_of_a_truncated_rollout_can_be_fixed() -> None:
    limits = RolloutConfig(max_tokens_per_turn=20, truncated_grade=-1.0)
    shadows = {"other": RecordingGrader(right="word")}
    cut = run(a_workshop(say("word " * 40), limits=limits, shadow_graders=shadows))
    assert cut.grade is not None
    assert (cut.grade.score, cut.grade.shadow) == (-1.0, {"other": 1.0})
    answered = run(a_workshop(say("I21.9"), limits=limits))
    assert answered.grade is not None
    assert answered.grade.score == 1.0


class GameSession(RecordingSession):
    """Speaks first, answers guesses, ends the game when the guess is right."""

    opening = "Guess a number."

    async def reply(self, message: Message) -> list[Message]:
        self.is_over = message.content == "7"
        return [] if self.is_over else [Message(role="user", content="Wrong.")]

    def outcome(self) -> dict[str, Any]:
        return {"reward": float(self.is_over)}


class GameEnvironment(RecordingEnvironment):
    async def open(self, item: Item, rollout_id: str) -> GameSession:
        self.num_open += 1
        return GameSession(self, rollout_id)


def a_game(*guesses: str, **limits: Any) -> tuple[Rollout, Workshop]:
    environment = GameEnvironment(lambda call: "")
    limits = {"max_turns": 3, "max_tokens_per_turn": 400} | limits
    workshop = a_workshop(say(*guesses), environment=environment, limits=RolloutConfig(**limits))
    rollout = run(workshop)
    assert environment.num_open == 0
    return rollout, workshop


def test_an_environment_that_speaks_is_heard_and_may_end_the_rollout() -> None:
    rollout, workshop = a_game("3", "7")
    assert rollout.stop_reason is StopReason.EPISODE_OVER and not rollout.stop_reason.is_truncated
    prompts = [workshop.chat.tokenizer.decode(ids) for _, ids, _ in workshop.engine.requests]
    assert "Heart attack\n\nGuess a number." in prompts[0] and "Wrong." in prompts[1]
    assert prompts[1].startswith(prompts[0]), "what was said before is kept as it was"
    assert rollout.environment == {"reward": 1.0}
    (sample,) = workshop.grader.samples
    assert sample["environment"] == {"reward": 1.0}
    assert [entry["role"] for entry in sample["trace"]] == ["assistant", "user", "assistant"]


def test_a_game_that_is_not_won_ends_at_the_limit_of_turns() -> None:
    rollout, workshop = a_game("3", "4", max_turns=2, last_turn_message="One guess left.")
    assert rollout.stop_reason is StopReason.MAX_TURNS and rollout.environment == {"reward": 0.0}
    assert "Wrong.\n\nOne guess left." in workshop.chat.tokenizer.decode(workshop.engine.requests[1][1])


class StuckSession(RecordingSession):
    async def close(self) -> None:
        await asyncio.Event().wait()


def test_a_session_that_does_not_close_costs_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class StuckEnvironment(RecordingEnvironment):
        async def open(self, item: Item, rollout_id: str) -> StuckSession:
            return StuckSession(self, rollout_id)

    monkeypatch.setattr("rft.episode._CLOSE_TIMEOUT_S", 0.05)
    rollout = run(a_workshop(say("I21.9"), environment=StuckEnvironment(lambda call: "")))
    assert rollout.stop_reason is StopReason.ANSWERED
    assert "did not close" in caplog.text
    caplog.clear()


def test_the_waits_of_a_rollout_are_known_and_end_with_it() -> None:
    seen: list[str] = []

    def answer(call: ToolCall) -> str:
        seen.extend(f"{wait.rollout_id} {wait.item_id} {wait.what}" for wait in workshop.waits)
        return "x"

    workshop = a_workshop(say(CALL, "I21.9"), environment=RecordingEnvironment(answer))
    rollout = run(workshop)
    assert seen == [f"{rollout.id} x-1 tool search"]
    assert workshop.waits.stops == {StopReason.ANSWERED: 1}
    assert len(workshop.waits) == 0 and workshop.waits.num_ended == 7  # open, turn, call, turn, reply, finish, grade
