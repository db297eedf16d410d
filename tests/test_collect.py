"""Many rollouts: complete groups, replaced discards, no barrier, nothing left running."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from typing import Any

import pytest
from scripted_engine import ScriptedEngine
from test_rollout import CALL, RecordingEnvironment, RecordingGrader, a_workshop, an_item, say

from rft.collect import Collector
from rft.config import RolloutConfig
from rft.engines import Completion, SamplingParams
from rft.errors import EngineError, NoProgressError
from rft.rollout import Workshop
from rft.types import Grade, Group, Item, Rollout, StopReason


def a_collector(workshop: Workshop) -> tuple[Collector, list[Rollout]]:
    seen: list[Rollout] = []
    return Collector(workshop, "run-1", 0, seen.append), seen


def collect(collector: Collector, num_items: int = 3, size: int = 4) -> list[Group]:
    items = [an_item(id=f"x-{index}") for index in range(num_items)]
    return asyncio.run(collector.collect(items, "train", 1, size))


def test_groups_come_back_complete_and_in_order() -> None:
    collector, seen = a_collector(a_workshop(say(CALL, "I21.9")))
    groups = collect(collector)
    assert [group.item.id for group in groups] == ["x-0", "x-1", "x-2"]
    assert all([r.attempt for r in group.rollouts] == [0, 1, 2, 3] for group in groups)
    assert len({rollout.id for rollout in seen}) == 12


def test_ids_and_seeds_derive_from_the_place_in_the_run() -> None:
    first, _ = a_collector(a_workshop(say("I21.9")))
    second, _ = a_collector(a_workshop(say("I21.9")))
    ids = [[(r.id, r.seed) for g in collect(c) for r in g.rollouts] for c in (first, second)]
    assert ids[0] == ids[1]
    assert len({seed for _, seed in ids[0]}) == 12


def test_a_discarded_rollout_is_replaced_and_counted() -> None:
    workshop = a_workshop(say("I21.9"))
    workshop.engine.failures = {2: EngineError("reset", retryable=True), 5: EngineError("reset", retryable=True)}
    collector, seen = a_collector(workshop)
    groups = collect(collector)
    assert [len(group.rollouts) for group in groups] == [4, 4, 4]
    assert [reason for group in groups for reason in group.discards] == [StopReason.ENGINE_FAILED] * 2
    assert len(seen) == 14
    assert sum(rollout.stop_reason is StopReason.ENGINE_FAILED for rollout in seen) == 2
    assert len({rollout.id for rollout in seen}) == 14


def test_too_many_discards_end_the_step_with_the_cause() -> None:
    workshop = a_workshop(say("I21.9"))
    workshop.engine.failures = {number: EngineError("reset by peer", retryable=True) for number in range(1000)}
    collector, _ = a_collector(workshop)
    with pytest.raises(NoProgressError, match=r"engine_failed: reset by peer"):
        collect(collector)


class FailingGrader(RecordingGrader):
    """Every grade is a 0 with an error flag."""

    def __init__(self, flag: str) -> None:
        super().__init__()
        self.flag = flag

    async def grade(self, item: Item, sample: dict[str, Any], trace_id: str = "") -> Grade:
        return Grade(score=0.0, errors={self.flag: f"line {len(self.samples) % 2}: KeyError: 'gold'"})


def test_too_many_failed_grades_end_the_step_with_tracebacks() -> None:
    collector, seen = a_collector(a_workshop(say("I21.9"), grader=FailingGrader("python_grader_runtime_error")))
    with pytest.raises(NoProgressError, match=r"the grader failed on 9 rollouts of step 1(.|\n)*KeyError: 'gold'"):
        collect(collector, num_items=4)
    assert len(seen) >= 9


def test_few_failed_grades_and_bad_answers_do_not() -> None:
    broken, patient = FailingGrader("python_grader_runtime_error"), RolloutConfig(max_failed_grade_share=1.0)
    collect(a_collector(a_workshop(say("I21.9"), grader=broken))[0], num_items=2)  # 8: a share says nothing yet
    collect(a_collector(a_workshop(say("I21.9"), grader=broken, limits=patient))[0], num_items=4)
    answers = FailingGrader("invalid_variable_error")  # the answer had no such field: the model's doing
    collect(a_collector(a_workshop(say("I21.9"), grader=answers))[0], num_items=4)


def test_a_dead_engine_ends_the_step_and_cancels_the_rest() -> None:
    environment = RecordingEnvironment(lambda call: "x", delay_s=30)
    workshop = a_workshop(say(CALL, "I21.9"), environment=environment)
    workshop.engine.failures = {11: EngineError("the engine died")}
    collector, _ = a_collector(workshop)
    started = time.perf_counter()
    with pytest.raises(EngineError, match="the engine died"):
        collect(collector)
    assert time.perf_counter() - started < 5
    assert environment.num_open == 0


def test_concurrency_is_bounded() -> None:
    workshop = a_workshop(say("I21.9"), limits=RolloutConfig(max_concurrent=3, max_tokens_per_turn=200))
    workshop.engine.first_token_s = 0.01
    collector, _ = a_collector(workshop)
    collect(collector)
    assert workshop.engine.max_running == 3


class GatedEngine(ScriptedEngine):
    """Holds back the first turn of the first rollout until `gate` opens."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.gate = asyncio.Event()

    async def generate(self, prompt_ids: list[int], params: SamplingParams, rollout_id: str) -> Completion:
        is_first = not self.requests
        completion = await super().generate(prompt_ids, params, rollout_id)
        if is_first:
            await self.gate.wait()
        return completion


def test_there_is_no_barrier_between_turns() -> None:
    """While one rollout is stuck in its first turn, all others finish all of theirs."""
    finished: list[str] = []

    async def go() -> str:
        workshop = a_workshop(say(CALL, "I21.9"))
        engine = GatedEngine(workshop.chat, say(CALL, "I21.9"))

        def on_rollout(rollout: Rollout) -> None:
            finished.append(rollout.id)
            if len(finished) == 5:
                engine.gate.set()

        collector = Collector(dataclasses.replace(workshop, engine=engine), "run-1", 0, on_rollout)
        await asyncio.wait_for(collector.collect([an_item()], "train", 1, 6), timeout=5)
        return engine.requests[0][0]

    stuck = asyncio.run(go())
    assert len(finished) == 6
    assert finished[-1] == stuck


def test_groups_stream_out_as_they_finish() -> None:
    """The group of a stuck rollout comes last, the others are there before it is freed."""

    async def go() -> list[str]:
        workshop = a_workshop(say("I21.9"))
        engine = GatedEngine(workshop.chat, say("I21.9"))
        collector, _ = a_collector(dataclasses.replace(workshop, engine=engine))
        seen: list[str] = []
        async for group in collector.stream([an_item(id=f"x-{index}") for index in range(3)], "train", 1, 2):
            seen.append(group.item.id)
            if len(seen) == 2:
                engine.gate.set()
        return seen

    seen = asyncio.run(asyncio.wait_for(go(), 5))
    assert seen[-1] == "x-0" and sorted(seen) == ["x-0", "x-1", "x-2"]


def test_a_stream_that_is_left_leaves_nothing_behind() -> None:
    environment = RecordingEnvironment(lambda call: "x", delay_s=30)

    async def go() -> None:
        workshop = a_workshop(lambda prompt, rollout_id, turn: CALL if "x-1" in prompt else "I21.9")
        items = [an_item(id="x-0"), an_item(id="x-1", messages=[{"role": "user", "content": "x-1"}])]
        collector, _ = a_collector(dataclasses.replace(workshop, environment=environment))
        stream = collector.stream(items, "train", 1, 2)
        assert (await anext(stream)).item.id == "x-0"
        assert environment.num_open == 2
        await stream.aclose()
        assert environment.num_open == 0 and collector.slots.num_taken == 0
        assert len(collector.workshop.waits) == 0
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(go())
