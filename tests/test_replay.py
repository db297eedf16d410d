"""Sampling without training, training without sampling: together they are a run."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from test_collect import a_collector
from test_job import a_config, stable, weights
from test_rollout import RecordingGrader, a_workshop, an_item, say

from rft.budget import StepBudget
from rft.errors import EngineError, UserError
from rft.job import run_job, run_sampling
from rft.replay import stored_groups
from rft.store import RunStore
from rft.types import Grade, Group, Item

TRAINING = {"steps": 2, "items_per_step": 2, "base_rollouts": 4, "learning_rate": 0.01}


@pytest.mark.parametrize("allocation", ["uniform", "adaptive"])
def test_training_on_what_a_run_stored_makes_its_weights_bit_for_bit(tmp_path: Path, allocation: str) -> None:
    config = a_config(tmp_path, training=TRAINING | {"allocation": allocation, "first_rollouts": 2})
    first = run_job(config, run_id="first")
    again = run_job(config, run_id="again", replay=first)
    made, remade = weights(first), weights(again)
    assert made.keys() == remade.keys() and all(torch.equal(made[name], remade[name]) for name in made)
    assert training_rows(first) == training_rows(again)
    assert not list(RunStore.open(again).rollouts()), "nothing is sampled"


def training_rows(run: Path) -> list[dict[str, Any]]:
    """Without times, and without what only an engine can bring: the probe, groups with tokens that are too old."""
    rows = [stable(row) for row in RunStore.open(run).metrics() if row["kind"] == "training"]
    return [
        {key: value for key, value in row.items() if not key.startswith(("probe/", "groups/stale"))} for row in rows
    ]


@pytest.mark.slow
def test_a_run_that_only_samples_fills_the_folder_and_can_be_trained_on(tmp_path: Path) -> None:
    config = a_config(tmp_path, training=TRAINING)
    sampled = run_sampling(config, run_id="sampled")
    store = RunStore.open(sampled)
    assert store.is_done and store.read_state()["status"] == "succeeded"
    assert [(row["kind"], row["step"]) for row in store.metrics()] == [("sampling", 1), ("sampling", 2)]
    assert {rollout.step for rollout in store.rollouts()} == {1, 2}
    assert {turn.policy_version for rollout in store.rollouts() for turn in rollout.turns} == {0}
    assert not list(store.checkpoints.iterdir())
    trained = RunStore.open(run_job(config, run_id="trained", replay=sampled))
    assert [row["step"] for row in trained.metrics()] == [1, 2]
    whole = RunStore.open(run_job(config, run_id="whole"))
    first = [next(row for row in each.metrics() if row["kind"] == "training") for each in (trained, whole)]
    assert first[0]["update/loss"] == first[1]["update/loss"], "step 1 has the same rollouts either way"


def test_sampling_goes_on_after_its_last_step(tmp_path: Path) -> None:
    one, two = (a_config(tmp_path, training=TRAINING | {"steps": steps}) for steps in (1, 2))
    run_sampling(one, run_id="sampled")
    store = RunStore.open(run_sampling(two, run_id="sampled", resume=True))
    assert [row["step"] for row in store.metrics()] == [1, 2]
    assert len(list(store.rollouts())) == 2 * 2 * 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"training": TRAINING | {"steps": 3}}, "holds no rollouts of step 3"),
        ({"training": TRAINING, "seed": 1}, "has rollouts of other data|holds no rollouts"),
    ],
)
def test_what_a_run_does_not_hold_is_said(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    sampled = run_sampling(a_config(tmp_path, training=TRAINING), run_id="sampled")
    short = RunStore.open(sampled)
    if "seed" in changes:  # rows that this data does not have
        path = short.rollout_folder / "step_000001.jsonl"
        path.write_text(path.read_text().replace('"item_id":"rows-', '"item_id":"other-'))
    with pytest.raises(UserError, match=words):
        run_job(a_config(tmp_path, **changes), run_id="trained", replay=sampled)


def test_a_folder_that_is_no_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no run here"):
        run_job(a_config(tmp_path), replay=tmp_path)


class AlternatingGrader(RecordingGrader):
    """Items with an even number vary, others do not."""

    async def grade(self, item: Item, sample: dict[str, object], trace_id: str = "") -> Grade:
        return Grade(score=float(int(trace_id[-1], 16) % 2) if int(item.id[2:]) % 2 == 0 else 0.0)


def test_groups_come_back_as_they_were(tmp_path: Path) -> None:
    """Discards, replacements, second rounds and further items: the same groups, in the same order."""
    items = [an_item(id=f"x-{index}") for index in range(30)]
    config = a_config(tmp_path, training=TRAINING | {"items_per_step": 4})
    store = RunStore.create(tmp_path, "run", {})
    workshop = a_workshop(say("I21.9"), grader=AlternatingGrader())
    workshop.engine.failures = {number: EngineError("reset", retryable=True) for number in (1, 2, 9, 17)}
    collector = dataclasses.replace(a_collector(workshop)[0], on_rollout=store.append_rollout)

    async def sample() -> tuple[list[Group], list[Group]]:
        from rft.data import further_items, items_for_step

        first = items_for_step(items, 0, 4, config.seed)
        uniform = await collector.collect(first, "train", 1, 4)
        second = items_for_step(items, 1, 4, config.seed)
        further = further_items(items, second, 1, config.seed)
        return uniform, await collector.collect_adaptive(second, further, 2, StepBudget(64, 2))

    with store:
        groups = asyncio.run(sample())
    assert sum(group.num_discarded for both in groups for group in both) == 4
    assert any(len(group.round_sizes) == 2 for group in groups[1])
    for step, made in enumerate(groups, 1):
        found = stored_groups(store, items, config, step)
        assert [group.item.id for group in found] == [group.item.id for group in made]
        assert [[r.id for r in group.rollouts] for group in found] == [[r.id for r in group.rollouts] for group in made]
        assert [group.round_sizes for group in found] == [group.round_sizes for group in made]
        assert [sorted(group.discards) for group in found] == [sorted(group.discards) for group in made]
