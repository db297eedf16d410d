"""Sampling beside training: what it hides, what it may never train on, and how it ends."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelined import SlowPolicy, Stage, chatty, config_of, measure_overlap
from test_job import _train, _train_until, stable, weights
from test_rollout import RecordingEnvironment, an_item

from rft.engines.transformers import TransformersEngine
from rft.errors import EngineError, NoProgressError
from rft.metrics import staleness_metrics
from rft.replay import stored_groups
from rft.slots import Slots
from rft.store import RunStore
from rft.trainers.update import StepStats
from rft.types import Group, Message, Rollout, StopReason, Turn

pytestmark = pytest.mark.slow  # a training each

SECONDS = 0.4


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """On busy cores two threads take seconds to wait for each other over a tiny model."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def versions(groups: list[Group]) -> set[int]:
    return {turn.policy_version for group in groups for rollout in group.rollouts for turn in rollout.turns}


def check_versions(stage: Stage, staleness: int) -> None:
    """No token that was trained on is too old, and each has a version that existed when its step was sampled."""
    assert list(stage.trained) == list(range(1, stage.config.training.steps + 1))
    for step, groups in stage.trained.items():
        assert versions(groups) <= set(range(max(0, step - 1 - staleness), step)), f"step {step}"
        assert all(group.step == step for group in groups)


# --- what it hides ---


def test_sampling_is_hidden_behind_training(tmp_path: Path) -> None:
    """N steps of equal parts T wait for groups about T in all, instead of N T."""
    rare = {"evaluation": {"every": 100, "validation_items": 1}, "training": {"checkpoint_every": 100}}
    found = measure_overlap(config_of(tmp_path, 1, 12, **rare), "k1", SECONDS)
    # scripts/bench_trainer holds it to 0.8; here other processes may have the cores
    assert found.hidden_share >= 0.7, found
    assert found.waited_s < 4 * SECONDS, found


def test_in_turn_nothing_is_hidden(tmp_path: Path) -> None:
    found = measure_overlap(config_of(tmp_path, 0, steps=2), "k0", 0.1)
    assert found.hidden_s == 0
    assert found.waited_s > 2 * 0.1


# --- one path ---


def test_staleness_0_is_the_same_in_a_thread_bit_for_bit(tmp_path: Path) -> None:
    """The policy samples for itself; its work is done in the main thread, then in another while the loop turns."""
    made = []
    for is_threaded in (False, True):
        config = config_of(
            tmp_path,
            0,
            steps=3,
            runs_dir=str(tmp_path / f"threaded-{is_threaded}"),
            engine={"max_concurrent": 1, "max_model_len": 256},
            rollout={"max_tokens_per_turn": 12},
        )
        stage = Stage(config, engine=TransformersEngine(config.engine, config.model), is_threaded=is_threaded)
        stage.train()
        made.append(([stable(row) for row in stage.store.metrics()], weights(stage.store.path), stage.trained))
    (rows, tensors, groups), (threaded_rows, threaded_tensors, threaded_groups) = made
    assert len(rows) == 3 + 3 and rows == threaded_rows
    assert tensors.keys() == threaded_tensors.keys()
    assert all(torch.equal(tensors[name], threaded_tensors[name]) for name in tensors)
    assert [[r.id for g in each for r in g.rollouts] for each in groups.values()] == [
        [r.id for g in each for r in g.rollouts] for each in threaded_groups.values()
    ]


def test_what_a_step_samples_does_not_depend_on_what_runs_beside_it(tmp_path: Path) -> None:
    found = []
    for staleness in (0, 3):
        stage = Stage(config_of(tmp_path, staleness, runs_dir=str(tmp_path / f"k{staleness}")))
        stage.train()
        found.append(
            {
                step: [(r.id, r.seed, r.item_id, r.attempt) for group in groups for r in group.rollouts]
                for step, groups in stage.trained.items()
            }
        )
    assert found[0] == found[1]


# --- versions ---


class Holding:
    """Keeps some rollouts back until the engine has the weights of `version`."""

    def __init__(self, stage: Stage, ids: list[str], version: int) -> None:
        self.stage, self.ids, self.version = stage, ids, version
        stage.engine.hold = self

    async def __call__(self, rollout_id: str) -> None:
        while rollout_id in self.ids and self.stage.engine.policy_version < self.version:  # noqa: ASYNC110
            await asyncio.sleep(0.005)  # an engine tells nobody that it has new weights


def test_two_steps_ahead_with_a_slow_group(tmp_path: Path) -> None:
    """Its first turns are two versions old when it is trained on, its second turns are not: the rollouts span both."""
    config = config_of(tmp_path, 2, steps=6)
    environment = RecordingEnvironment(lambda call: "found")
    stage = Stage(config, script=chatty, environment=environment)
    Holding(stage, stage.first_ids(step=4), version=3)
    stage.train()
    check_versions(stage, 2)
    slow, _ = stage.trained[4]
    assert [[turn.policy_version for turn in rollout.turns] for rollout in slow.rollouts] == [[1, 3]] * 4
    row = stage.rows[3]
    assert row["staleness/max"] == 2 and 0 < row["staleness/mean"] < 2
    assert [row["groups/stale"] for row in stage.rows] == [0] * 6
    assert stage.rows[0]["staleness/max"] == 0


@pytest.mark.parametrize("staleness", [0, 1, 5])
def test_no_token_is_older_than_allowed_and_an_evaluation_sees_one_version(tmp_path: Path, staleness: int) -> None:
    stage = Stage(config_of(tmp_path, staleness, steps=4), script=chatty, environment=RecordingEnvironment(str))
    thresholds = gc.get_threshold()
    stage.train()
    check_versions(stage, staleness)
    for rollout in stage.store.rollouts(split="validation"):
        assert {turn.policy_version for turn in rollout.turns} == {rollout.step}
    assert set(stage.engine.answered) <= {0, 1, 2, 3, 4}
    assert stage.engine.max_running <= 8, "rollout.max_concurrent bounds all steps together"
    assert gc.get_threshold() == thresholds and stage.collector.slots.num_taken == 0
    assert stage.num_left == 0


def test_adaptive_allocation_runs_ahead_too(tmp_path: Path) -> None:
    stage = Stage(config_of(tmp_path, 1, steps=3, training={"allocation": "adaptive", "first_rollouts": 2}))
    stage.train()
    check_versions(stage, 1)
    assert all(group.round_sizes == (2, 2) for groups in stage.trained.values() for group in groups)


# --- groups that are too old ---


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_group_that_is_too_old_is_sampled_anew(tmp_path: Path, staleness: int) -> None:
    """One answer of step 4 comes from weights that are older than allowed, as from a server that lags."""
    stage = Stage(config_of(tmp_path, staleness, steps=4))
    old = stage.first_ids(step=4, place=1)
    stage.engine.lag = lambda rollout_id: 2 if rollout_id == old[2] else 0
    stage.train()
    check_versions(stage, staleness)
    assert [row["groups/stale"] for row in stage.rows] == [0, 0, 0, 1]
    stored = list(stage.store.rollouts(4, "train"))
    assert len(stored) == len({rollout.id for rollout in stored}) == 8 + 4, "the old ones are kept"
    trained = [[rollout.id for rollout in group.rollouts] for group in stage.trained[4]]
    assert not set(old) & set(trained[1]) and set(trained[0]) == set(stage.first_ids(4))
    replayed = stored_groups(stage.store, stage.items, stage.config, 4)
    assert [[rollout.id for rollout in group.rollouts] for group in replayed] == trained


def test_an_engine_that_keeps_its_old_weights_ends_the_run(tmp_path: Path) -> None:
    stage = Stage(config_of(tmp_path, 1, steps=5))
    stage.engine.lag = lambda rollout_id: 100
    with pytest.raises(EngineError, match=r"still samples from policy version 0: step 3 needs 1 or later"):
        stage.train()
    assert [row["step"] for row in stage.rows] == [1, 2]
    assert len(stage.waits) == 0 and stage.collector.slots.num_taken == 0


# --- how it ends ---


class EndlessPolicy(SlowPolicy):
    """Goes from micro-batch to micro-batch for ever, from step `endless` on; `began` is called when that begins."""

    endless = 2
    began = staticmethod(lambda: None)
    num_steps, ended_with = 0, ""

    def step(self, micro_batches: Any, num_tokens: int, on_micro_batch: Any = None) -> StepStats:
        self.num_steps += 1
        if self.num_steps < self.endless:
            return super().step(micro_batches, num_tokens, on_micro_batch)
        assert threading.current_thread() is not threading.main_thread()
        self.began()
        deadline = time.monotonic() + 60
        try:
            while time.monotonic() < deadline:
                on_micro_batch()
                time.sleep(0.002)
        except Exception as error:
            self.ended_with = type(error).__name__
            raise
        raise AssertionError("nobody ended it")


def test_a_failure_ahead_ends_the_training_at_its_next_micro_batch(tmp_path: Path) -> None:
    """As itself, while the trainer is in the middle of a step; nothing is left behind, and the run can go on."""
    stage = Stage(config_of(tmp_path, 1, steps=4), policy_class=EndlessPolicy)
    training, doomed = threading.Event(), stage.first_ids(step=3)[0]

    async def die(rollout_id: str) -> None:
        while rollout_id == doomed:
            await asyncio.sleep(0.005)
            if training.is_set():
                raise EngineError("the engine died")

    stage.engine.hold, stage.policy.began = die, training.set
    with pytest.raises(EngineError, match="the engine died"):
        stage.train()
    assert stage.policy.ended_with == "Ending"
    assert (len(stage.waits), stage.collector.slots.num_taken) == (0, 0)
    again = Stage(stage.config)
    again.train()
    assert [row["step"] for row in again.rows] == [1, 2, 3, 4]
    assert list(again.trained) == [2, 3, 4]


def test_a_failure_of_the_training_ends_the_sampling(tmp_path: Path) -> None:
    class Broken(SlowPolicy):
        def step(self, *_: Any) -> StepStats:
            raise ValueError("a bug")

    stage = Stage(config_of(tmp_path, 1, steps=3), policy_class=Broken)
    Holding(stage, stage.first_ids(step=2), version=99)
    with pytest.raises(ValueError, match="a bug"):
        stage.train()
    assert stage.num_left > 0, "step 2 was being sampled"
    assert (len(stage.waits), stage.collector.slots.num_taken, stage.engine.num_running) == (0, 0, 0)


@pytest.fixture
def _heard() -> Iterator[None]:
    """SIGINT as in a terminal; a shell's `pytest &` ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_heard")
def test_ctrl_c_while_training_ends_both(tmp_path: Path) -> None:
    stage = Stage(config_of(tmp_path, 1, steps=4), policy_class=EndlessPolicy)
    Holding(stage, stage.first_ids(step=3), version=99)
    stage.policy.began = lambda: os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        stage.train()
    assert stage.policy.ended_with == "Ending"
    assert (len(stage.waits), stage.collector.slots.num_taken, stage.engine.num_running) == (0, 0, 0)


def test_a_rollout_ahead_that_stands_still_is_named_and_training_alone_is_no_stall(tmp_path: Path) -> None:
    calm = Stage(config_of(tmp_path, 1, steps=2), "calm", stall_limit_s=0.2)
    calm.policy.step_s = 0.6
    calm.train()
    stuck = Stage(config_of(tmp_path, 1, steps=3), "stuck", policy_class=EndlessPolicy, stall_limit_s=1.0)
    Holding(stuck, stuck.first_ids(step=3), version=99)
    with pytest.raises(NoProgressError, match=r"step 2: training, sampling ahead: 4 rollouts (.|\n)*4 wait for engine"):
        stuck.train()
    assert stuck.policy.ended_with == "Ending"


@pytest.mark.slow
def test_killed_and_resumed_it_fills_the_pipeline_again(tmp_path: Path) -> None:
    """SIGKILL with the next steps in flight: the resumed run makes every step once, from weights that are allowed."""
    ahead = ("training.staleness=2", "training.steps=6")
    _train_until(tmp_path, 2, *ahead)
    _train(tmp_path, "--resume", *ahead)
    store = RunStore.open(tmp_path / "runs" / "killed")
    assert store.is_done
    assert [row["step"] for row in store.metrics() if row["kind"] == "training"] == [1, 2, 3, 4, 5, 6]
    for rollout in store.rollouts(split="train"):
        assert {turn.policy_version for turn in rollout.turns} <= set(range(max(0, rollout.step - 3), rollout.step))


# --- parts ---


def test_an_earlier_step_has_precedence() -> None:
    async def story() -> list[str]:
        slots, order = Slots(1, 1), []
        await slots.acquire(1)

        async def work(step: int, name: str) -> None:
            await slots.acquire(step)
            order.append(name)
            slots.release()

        tasks = [asyncio.create_task(work(*each)) for each in ((3, "c"), (2, "a"), (3, "d"), (2, "b"))]
        await asyncio.sleep(0)
        slots.release()
        await asyncio.gather(*tasks)
        return order

    assert asyncio.run(story()) == ["a", "b", "c", "d"]


def test_staleness_in_numbers() -> None:
    """Step 4 trains version 3: 4 tokens of version 3, 2 of version 1 are 4/6 of a step behind on average."""
    rollout = Rollout(
        id="trace_1", item_id="x", split="train", step=4, attempt=0, seed=0,
        turns=[a_turn(4, 3), a_turn(2, 1)], stop_reason=StopReason.ANSWERED, started_at=0, duration_s=0,
    )  # fmt: skip
    assert staleness_metrics([Group(an_item(), 4, [rollout])]) == {"staleness/mean": 4 / 6, "staleness/max": 2}
    assert staleness_metrics([]) == {"staleness/mean": 0.0, "staleness/max": 0}


def a_turn(num_tokens: int, version: int) -> Turn:
    return Turn(
        input_ids=[1],
        output_ids=[2] * num_tokens,
        logprobs=[-1.0] * num_tokens,
        finish_reason="stop",
        policy_version=version,
        message=Message(role="assistant", content=""),
    )
