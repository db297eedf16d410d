"""Finished rollouts after an interruption: which are used, that none is lost or written twice; right indexes."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from test_collect import a_collector
from test_rollout import a_workshop, an_item, say
from test_store import reopen
from test_store import rollout as a_rollout

from rft.errors import EngineError
from rft.reuse import StoredRollouts, Usable
from rft.store import RunStore
from rft.types import Grade, Rollout, Split, StopReason, rollout_id


def graded(step: int, attempt: int, version: int | None = None, split: Split = "train", **changes: Any) -> Rollout:
    """A rollout of the run `run`, sampled by the version it should be sampled by unless told otherwise."""
    made = a_rollout(step, attempt, split).model_copy(update={"grade": Grade(score=0.5), **changes})
    version = (step - (split == "train")) if version is None else version
    return made.model_copy(
        update={"turns": [turn.model_copy(update={"policy_version": version}) for turn in made.turns]}
    )


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore.create(tmp_path / "runs", "run", {"name": "run"})


FAILED = Grade(score=0.0, errors={"python_grader_runtime_error": "KeyError"})
DISCARDED = {"stop_reason": StopReason.ENGINE_FAILED, "grade": None, "turns": []}


@pytest.mark.parametrize(
    ("rollout", "staleness", "is_usable"),
    [
        (graded(8, 0), 0, True),
        (graded(8, 0, version=6), 0, False),
        (graded(8, 0, version=6), 1, True),
        (graded(9, 0, version=7), 0, False),  # cannot be: an edited file
        (graded(9, 0, version=7), 1, True),
        (graded(9, 0, version=8), 1, False),  # that version is gone
        (graded(10, 0, version=7), 1, False),
        (graded(7, 0), 0, False),  # trained on already
        (graded(8, 0, **DISCARDED), 0, True),
        (graded(12, 0, **DISCARDED), 1, False),
        (graded(8, 0, grade=FAILED), 0, False),  # graders may have been repaired
        (graded(8, 0, id="trace_of_another_run"), 0, False),
        (graded(7, 0, split="validation"), 0, True),
        (graded(7, 0, split="test"), 0, False),  # that evaluation is complete
        (graded(8, 0, split="validation"), 5, False),
        (graded(7, 0, version=6, split="validation"), 5, False),
        (graded(8, 0, version=0), None, True),  # a run that only samples
    ],
)
def test_what_a_run_that_goes_on_after_step_7_may_use(rollout: Rollout, staleness: int | None, is_usable: bool) -> None:
    assert Usable("run", 7, staleness, ["validation"])(rollout) is is_usable


def test_a_mixture_is_sifted_and_nothing_is_lost(store: RunStore) -> None:
    """A rollout written twice, a cut line, one of a version that is gone, an index that lies."""
    for entry in (graded(2, 0, version=9), graded(2, 0), graded(2, 1, version=2), graded(2, 2), graded(3, 0)):
        store.append_rollout(entry)
    path = store.rollout_folder / "step_000002.jsonl"
    with path.open("a") as file:
        file.write('{"id": "trace_cut", "item')
    path.with_suffix(".idx").write_text(f"{graded(2, 2).id} 3\n")
    before = path.read_text().splitlines()
    resumed = reopen(store)
    kept = resumed.rewind(1, Usable("run", 1, 0))
    assert kept == [graded(2, 0), graded(2, 2)]
    assert list(resumed.rollouts()) == kept
    offsets = dict(line.split() for line in path.with_suffix(".idx").read_text().splitlines())
    assert {json.loads(path.read_bytes()[int(at) :].split(b"\n")[0])["id"] for at in offsets.values()} == offsets.keys()
    superseded = store.rollout_folder / "superseded"
    assert sorted(before) == sorted(path.read_text().splitlines() + (superseded / path.name).read_text().splitlines())
    assert (superseded / "step_000003.jsonl").exists() and (superseded / "step_000003.idx").exists()
    resumed.append_rollout(graded(2, 1))
    assert [resumed.find(graded(2, attempt).id) for attempt in range(3)] == [graded(2, attempt) for attempt in range(3)]
    assert reopen(resumed).rewind(1, Usable("run", 1, 0)) == [graded(2, 0), graded(2, 2), graded(2, 1)]


def test_half_published_weights_of_a_killed_run_go(store: RunStore) -> None:
    (store.weights / ".v000002.77").mkdir()
    (store.weights / "v000001").mkdir()
    store.rewind(0)
    assert [path.name for path in store.weights.iterdir()] == ["v000001"]


def test_what_nobody_asked_for_is_moved_aside(store: RunStore) -> None:
    for attempt in range(3):
        store.append_rollout(graded(1, attempt))
    store.set_aside(1, {graded(1, 1).id})
    store.append_rollout(graded(1, 3))
    assert [entry.attempt for entry in store.rollouts()] == [0, 2, 3]
    assert store.find(graded(1, 1).id) is None and store.find(graded(1, 3).id) == graded(1, 3)


def test_a_group_is_completed_with_what_is_there() -> None:
    """The same group as without an interruption, discarded attempts counted again, and only what lacks is sampled."""
    whole, seen = a_collector(a_workshop(say("I21.9")))
    whole.workshop.engine.failures = {1: EngineError("reset", retryable=True)}
    (expected,) = asyncio.run(whole.collect([an_item()], "train", 1, 4))
    resumed, again = a_collector(a_workshop(say("I21.9")))
    resumed.stored.fill(rollout for rollout in seen if rollout.attempt != 3)
    (group,) = asyncio.run(resumed.collect([an_item()], "train", 1, 4))
    assert [r.id for r in group.rollouts] == [r.id for r in expected.rollouts]
    assert group.discards == expected.discards == (StopReason.ENGINE_FAILED,)
    assert len(resumed.workshop.engine.requests) == 1
    assert sorted(r.id for r in again) == sorted(r.id for r in seen)
    assert resumed.stored.settle("train", 1) == (4, [])


def test_failures_before_a_resume_do_not_end_the_step_again() -> None:
    """The tools were down, the run stopped, the person repaired them."""
    collector, _ = a_collector(a_workshop(say("I21.9")))
    discarded = [
        graded(1, attempt, **DISCARDED).model_copy(
            update={"id": rollout_id("run-1", "train", 1, "x-1", attempt), "item_id": "x-1"}
        )
        for attempt in range(20)
    ]
    collector.stored.fill(discarded)
    (group,) = asyncio.run(collector.collect([an_item(id="x-1")], "train", 1, 2))
    assert len(group.rollouts) == 2 and len(group.discards) == 20


def test_what_is_told() -> None:
    stored = StoredRollouts()
    assert stored.told() == ""
    stored.fill([graded(8, 0), graded(8, 1), graded(7, 0, split="test")])
    assert stored.told() == "1 finished rollout of the evaluation at step 7, 2 finished rollouts of step 8"
    assert stored.take(graded(8, 1).id) == graded(8, 1) and stored.take(graded(8, 1).id) is None
    assert stored.settle("train", 8) == (1, [graded(8, 0).id])
