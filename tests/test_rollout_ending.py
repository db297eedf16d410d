"""What a session is told during a rollout, and asked at its end."""

from __future__ import annotations

import asyncio
from typing import Any

from test_rollout import CALL, RecordingEnvironment, RecordingGrader, RecordingSession, a_workshop, an_item, run, say

from rft.config import RolloutConfig
from rft.errors import ToolError
from rft.rollout import Attempt, run_rollout
from rft.types import Item, Message, StopReason


class EndingEnvironment(RecordingEnvironment):
    """Its sessions note what they are told, and may fail to say how it went."""

    def __init__(self, failure: str = "", delay_s: float = 0.0) -> None:
        super().__init__(lambda call: "ok", delay_s)
        self.failure = failure
        self.events: list[str] = []
        self.heard = asyncio.Event()

    async def open(self, item: Item, rollout_id: str) -> EndingSession:
        self.num_open += 1
        return EndingSession(self, rollout_id)


class EndingSession(RecordingSession):
    environment: EndingEnvironment

    def hear(self, message: Message) -> None:
        self.environment.events.append(f"hear {len(message.tool_calls)}")
        self.environment.heard.set()

    async def finish(self) -> None:
        self.environment.events.append("finish")
        await asyncio.sleep(0)
        if self.environment.failure:
            raise ToolError(self.environment.failure)

    def outcome(self) -> dict[str, Any]:
        self.environment.events.append("outcome")
        return {"reward": 1.0}

    async def close(self) -> None:
        self.environment.events.append("close")
        await super().close()


def test_a_session_hears_every_message_and_finishes_before_it_is_asked() -> None:
    environment = EndingEnvironment()
    rollout = run(a_workshop(say(CALL, "I21.9"), environment=environment))
    assert environment.events == ["hear 1", "hear 0", "finish", "outcome", "close"]
    assert rollout.environment == {"reward": 1.0}


def test_a_message_that_met_its_limit_is_heard() -> None:
    environment = EndingEnvironment()
    limits = RolloutConfig(max_turns=3, max_tokens_per_turn=2, time_limit_s=5)
    rollout = run(a_workshop(say("I21.9 and more"), environment=environment, limits=limits))
    assert rollout.stop_reason is StopReason.MAX_TOKENS
    assert environment.events == ["hear 0", "finish", "outcome", "close"]


def test_an_ending_that_is_not_known_discards() -> None:
    environment = EndingEnvironment("no reward")
    rollout = run(a_workshop(say("I21.9"), environment=environment))
    assert (rollout.stop_reason, rollout.error) == (StopReason.TOOL_FAILED, "no reward")
    assert environment.num_open == 0


def test_at_the_time_limit_the_session_is_asked_too() -> None:
    limits = RolloutConfig(max_turns=3, max_tokens_per_turn=400, time_limit_s=0.2)
    for failure in ("", "no reward"):  # a failure must not take the place of what stopped the rollout
        environment = EndingEnvironment(failure, delay_s=30)
        rollout = run(a_workshop(say(CALL), environment=environment, limits=limits))
        assert rollout.stop_reason is StopReason.TIME_LIMIT
        assert rollout.environment == {"reward": 1.0}
        assert environment.num_open == 0


def test_a_cancelled_rollout_stays_cancelled() -> None:
    async def body() -> bool:
        environment = EndingEnvironment("no reward", delay_s=30)
        workshop = a_workshop(say(CALL), environment=environment, grader=RecordingGrader())
        task = asyncio.create_task(run_rollout(Attempt("trace_1", an_item(), "train", 1, 0, seed=0), workshop))
        await environment.heard.wait()
        task.cancel()
        await asyncio.wait([task])
        return task.cancelled() and environment.num_open == 0

    assert asyncio.run(body())
