"""Run folders as training leaves them, made without a model: rollouts, and the rows that rft derives from them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rft.checkpoints import MANIFEST, name_of
from rft.metrics import Clock, group_metrics, rollout_metrics
from rft.store import RunStore
from rft.types import (
    Grade,
    Group,
    Item,
    Message,
    Rollout,
    Split,
    StopReason,
    TokenUsage,
    ToolCall,
    ToolResult,
    Turn,
    rollout_id,
)

TOOL = {"type": "function", "function": {"name": "search", "parameters": {"type": "object", "properties": {}}}}
GRADER = {
    "type": "multi",
    "name": "both",
    "graders": {
        "exact": {"type": "string_check", "name": "is_exact", "input": "a", "reference": "b", "operation": "eq"},
        "judge": {"type": "score_model", "name": "a_judge", "model": "gpt-4o", "input": [], "pass_threshold": 0.25},
    },
    "calculate_output": "(exact + judge) / 2",
}


def a_job(grader: dict[str, Any] | None = None, job_id: str = "ftjob-1") -> dict[str, Any]:
    """The wire's object of a reinforcement job, as far as the views read it."""
    return {
        "id": job_id,
        "object": "fine_tuning.job",
        "model": "m",
        "created_at": 1,
        "organization_id": "org",
        "user_provided_suffix": None,
        "fine_tuned_model": None,
        "eval_id": f"eval_{job_id}",
        "method": {"type": "reinforcement", "reinforcement": {"grader": grader or GRADER}},
    }


def write_data(path: Path, num_rows: int) -> Path:
    row = {"tools": [TOOL], "answer": "yes"}
    lines = [{"messages": [{"role": "user", "content": f"question {index}"}], **row} for index in range(num_rows)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def an_item(index: int) -> Item:
    message = Message(role="user", content=f"question {index}")
    return Item(id=f"validation-{index + 1:05d}", row={"answer": "yes"}, messages=[message], tools=[TOOL])


def a_rollout(item: Item, split: Split, step: int, attempt: int, score: float) -> Rollout:
    """One call of `search`, then an answer; graded by GRADER."""
    call = ToolCall(id="fc_1", call_id="call_1", name="search", arguments='{"q": 1}')
    result = ToolResult(call_id="call_1", output="found", latency_s=0.5)
    first = Turn(
        input_ids=[1, 2],
        output_ids=[3, 4, 5],
        logprobs=[-0.1] * 3,
        finish_reason="stop",
        policy_version=step,
        message=Message(role="assistant", tool_calls=[call]),
        results=[result],
        reasoning_tokens=1,
        sampled_s=0.25,
    )
    answer = Message(role="assistant", content="yes")
    last = first.model_copy(
        update={"message": answer, "results": [], "input_ids": [6, 7], "started_s": 0.75, "reasoning_tokens": 0}
    )
    judge = Grade(score=score, usage={"gpt-4o": TokenUsage(prompt_tokens=10, completion_tokens=4)}, latency_s=0.125)
    return Rollout(
        id=rollout_id("run", split, step, item.id, attempt),
        item_id=item.id,
        split=split,
        step=step,
        attempt=attempt,
        seed=attempt,
        turns=[first, last],
        stop_reason=StopReason.ANSWERED,
        grade=Grade(score=(score + 1) / 2, parts={"exact": Grade(score=1.0), "judge": judge}, latency_s=0.25),
        started_at=1_700_000_000.0,
        duration_s=1.0,
    )


def a_run(
    runs: Path,
    *,
    job_id: str = "ftjob-1",
    steps: int = 4,
    every: int = 2,
    num_items: int = 3,
    num_rollouts: int = 2,
    score: Callable[[int, int], float] = lambda step, attempt: attempt % 2,
) -> RunStore:
    """A finished run that evaluated at step 0, every `every` steps and at the end, and kept what it evaluated."""
    runs.mkdir(parents=True, exist_ok=True)
    data = write_data(runs / "validation.jsonl", num_items)
    config = {
        "data": {"train": str(data), "validation": str(data)},
        "training": {"steps": steps},
        "evaluation": {"every": every},
    }
    store = RunStore.create(runs, job_id, config)
    items = [an_item(index) for index in range(num_items)]
    _evaluate(store, items, 0, num_rollouts, score)
    for step in range(1, steps + 1):
        train_step(store, items, step, num_rollouts, score)
        if step % every == 0 or step == steps:
            _evaluate(store, items, step, num_rollouts, score)
            save_checkpoint(store, step)
    store.mark_done()
    store.close()
    return store


def train_step(
    store: RunStore, items: list[Item], step: int, num_rollouts: int, score: Callable[[int, int], float]
) -> None:
    """The row as trainers/leader.py writes it."""
    groups, clock = _groups(store, items, "train", step, num_rollouts, score), Clock()
    for phase in ("sampling", "training", "sync"):
        clock.lap(phase)
    row = {"step": step, "kind": "training", **group_metrics(groups), **clock.metrics()}
    row |= {"update/loss": -0.5, "update/entropy": 2.0}
    store.append_metrics(row | {f"train/{name}": value for name, value in rollout_metrics(groups).items()})


def save_checkpoint(store: RunStore, step: int) -> None:
    folder = store.checkpoints / name_of(step)
    folder.mkdir()
    (folder / MANIFEST).write_text("")


def _evaluate(
    store: RunStore, items: list[Item], step: int, num_rollouts: int, score: Callable[[int, int], float]
) -> None:
    groups = _groups(store, items, "validation", step, num_rollouts, score)
    row = {"step": step, "kind": "evaluation", "split": "validation", **rollout_metrics(groups), "seconds": 3.0}
    store.append_metrics(row)


def _groups(
    store: RunStore,
    items: list[Item],
    split: Split,
    step: int,
    num_rollouts: int,
    score: Callable[[int, int], float],
) -> list[Group]:
    groups = []
    for item in items:
        rollouts = [a_rollout(item, split, step, attempt, score(step, attempt)) for attempt in range(num_rollouts)]
        for rollout in rollouts:
            store.append_rollout(rollout)
        groups.append(Group(item, step, rollouts))
    return groups
