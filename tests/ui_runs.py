"""Run folders for the page's tests: several tools, parts, shadow grades, discards, long texts, and hostile ones."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from run_folders import an_item, save_checkpoint, write_data

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
    ToolCall,
    ToolResult,
    Turn,
    rollout_id,
)

# Each would set `window.hacked`, move a terminal's cursor, or turn the text around, were it taken for more than text.
HOSTILE = (
    "<script>window.hacked = 1</script>",
    "<img src=x onerror=\"window.hacked = 2\"><svg onload='window.hacked = 3'>",
    "javascript:window.hacked=4 </textarea></title></style><script>hacked=5</script>",
    "\x1b[31mred\x1b[2J\x07 bell \x00 null",
    "user\u202efdp.exe\u2066 isolate \u200bzero width",
)
ANSWER = "The code is I27.2, pulmonary hypertension."
LONG = "w\u00f6rd\U0001f40d " * 7_500  # 45,000 code points: more than two answers carry
HUGE = "data " * 1_000_000  # 5 MB
GRADER = {
    "type": "multi",
    "name": "both",
    "graders": {
        "exact": {
            "type": "string_check",
            "name": "exact",
            "input": "{{ sample.output_text }}",
            "reference": "{{ item.answer }}",
            "operation": "eq",
        },
        "near": {
            "type": "text_similarity",
            "name": "near",
            "input": "{{ sample.output_text }}",
            "reference": "{{ item.answer }}",
            "evaluation_metric": "fuzzy_match",
        },
    },
    "calculate_output": "(exact + near) / 2",
}
STEPS, ITEMS, ATTEMPTS, EVERY = 8, 4, 6, 4


def a_folder_of_runs(runs: Path) -> Path:
    """Two finished runs to compare, and one that only began."""
    lively_run(runs, "lively", name="lively")
    lively_run(runs, "gentle", name="gentle", gain=0.02)
    store = RunStore.create(runs, "young", {"name": "young", "training": {"steps": 5}})
    store.write_state({"status": "failed", "step": 0, "steps": 5})
    store.append_event("error", "the engine ended: " + HOSTILE[3])
    store.close()
    return runs


def lively_run(runs: Path, run_id: str, *, name: str, gain: float = 0.08, steps: int = STEPS) -> RunStore:
    """A run whose grade rises by about `gain` a step. Attempt 0 of item 0 at step 2 is hostile all over."""
    runs.mkdir(parents=True, exist_ok=True)
    data = write_data(runs / f"{run_id}.jsonl", ITEMS)
    store = RunStore.create(runs, run_id, _config(name, data, steps))
    items = [an_item(index) for index in range(ITEMS)]
    write_step(store, items, "validation", 0, gain)
    for step in range(1, steps + 1):
        write_step(store, items, "train", step, gain)
        store.write_state({"status": "running", "step": step, "steps": steps})
        if step % EVERY == 0:
            write_step(store, items, "validation", step, gain)
            save_checkpoint(store, step)
    store.append_event("info", "python graders run in a sandbox")
    store.append_event("warn", f"a tool answered oddly: {HOSTILE[0]}")
    store.append_event("error", f"a grader said: {HOSTILE[3]}")
    store.write_state({"status": "succeeded", "step": steps, "steps": steps})
    store.mark_done()
    store.close()
    return store


def _config(name: str, data: Path, steps: int) -> dict[str, Any]:
    return {
        "name": name,
        "seed": 0,
        "data": {"train": str(data), "validation": str(data), "test": None},
        "environment": {"type": "http", "tools": [{"name": "search", "server_url": "/search"}], "serve": "icd10"},
        "grader": GRADER,
        "shadow_graders": {"strict": {"type": "string_check", "name": "strict"}},
        "training": {"steps": steps, "base_rollouts": ATTEMPTS, "loss": "dapo", "note": HOSTILE[1]},
        "evaluation": {"every": EVERY},
    }


def write_step(store: RunStore, items: list[Item], split: Split, step: int, gain: float) -> None:
    groups, clock = [], Clock()
    for index, item in enumerate(items):
        rollouts = [_rollout(store.run_id, item, split, step, index, attempt, gain) for attempt in range(ATTEMPTS)]
        if index == 0 and step == 2:
            rollouts[0] = _hostile(rollouts[0])
        if index == 1 and split == "train":
            rollouts[-1] = _discarded(rollouts[-1])
        for rollout in rollouts:
            store.append_rollout(rollout)
        kept = [rollout for rollout in rollouts if not rollout.stop_reason.is_discarded]
        reasons = tuple(rollout.stop_reason for rollout in rollouts if rollout.stop_reason.is_discarded)
        groups.append(Group(item, step, kept, reasons))
    for phase in ("sampling", "training", "sync"):
        clock.lap(phase)
    if split != "train":
        row = {"step": step, "kind": "evaluation", "split": split, **rollout_metrics(groups), "seconds": 3.0}
        return store.append_metrics(row)
    row = {"step": step, "kind": "training", **group_metrics(groups), **clock.metrics()}
    row |= {"time/sampling_s": 20.0 + step % 3, "time/training_s": 9.0, "time/sync_s": 2.0, "time/step_s": 33.0}
    row |= {"update/loss": -0.5 + 0.02 * step, "update/entropy": 2.0 - 0.1 * step, "update/clip_share": 0.04}
    return store.append_metrics(row | {f"train/{key}": value for key, value in rollout_metrics(groups).items()})


def _wave(*seeds: int) -> float:
    """A number from 0 to 1 that looks drawn, and is the same every time."""
    return math.sin(sum((at + 1) * 12.9898 * (seed + 1) for at, seed in enumerate(seeds))) * 43758.5453 % 1.0


def _rollout(run_id: str, item: Item, split: Split, step: int, index: int, attempt: int, gain: float) -> Rollout:
    luck = _wave(step, index, attempt)
    exact = float(luck < 0.2 + gain * step)
    near = min(1.0, 0.3 + 0.5 * luck + gain * step / 2)
    turns = [_calling_turn(number, step, index, attempt) for number in range(1 + round(luck))]
    answer = f"{ANSWER} Attempt {attempt} is {'sure' if exact else 'not sure'} of it."
    last = _turn(len(turns), answer, reasoning="", step=step)
    shadow = {"strict": exact * 0.9}
    parts = {"exact": Grade(score=exact), "near": Grade(score=near, latency_s=0.004)}
    return Rollout(
        id=rollout_id(run_id, split, step, item.id, attempt),
        item_id=item.id,
        split=split,
        step=step,
        attempt=attempt,
        seed=attempt,
        turns=[*turns, last],
        stop_reason=StopReason.MAX_TOKENS if luck > 0.93 else StopReason.ANSWERED,
        grade=Grade(score=(exact + near) / 2, parts=parts, shadow=shadow, latency_s=0.05),
        started_at=time.time() - 60.0 * (STEPS - step) - attempt,
        duration_s=last.started_s + last.sampled_s + 0.05,
    )


def _calling_turn(number: int, step: int, index: int, attempt: int) -> Turn:
    names = ["search", "lookup"][: 1 + (attempt + number) % 2]
    calls = [
        ToolCall(id=f"fc_{number}{at}", call_id=f"call_{number}{at}", name=name, arguments=json.dumps({"query": "I27"}))
        for at, name in enumerate(names)
    ]
    results = [
        ToolResult(
            call_id=call.call_id,
            output=json.dumps({"code": "I27.2", "title": "Other secondary pulmonary hypertension"}),
            latency_s=0.2 + _wave(step, index, attempt, number),
            is_error=call.name == "lookup" and attempt == 3,
            num_attempts=1 + (attempt == 4),
        )
        for call in calls
    ]
    turn = _turn(number, "Let me look that up.", reasoning="The item names a lung. I should search first.", step=step)
    message = turn.message.model_copy(update={"tool_calls": calls})
    return turn.model_copy(update={"message": message, "results": results})


def _turn(number: int, content: str, *, reasoning: str, step: int) -> Turn:
    num = 24 + 3 * step
    return Turn(
        input_ids=list(range(100, 140)) if number == 0 else [7, 8, 9],
        output_ids=list(range(200, 200 + num)),
        logprobs=[-0.02 - 5 * _wave(number, step, at) ** 3 for at in range(num)],
        finish_reason="stop",
        policy_version=max(0, step - 1),
        message=Message(role="assistant", content=content, reasoning=reasoning),
        reasoning_tokens=9 if reasoning else 0,
        started_s=1.8 * number,
        sampled_s=0.5,
    )


def _hostile(rollout: Rollout) -> Rollout:
    """Everything that a model, a tool or a grader writes is hostile; one text is long."""
    call = ToolCall(id="fc_h", call_id="call_h", name=f"search{HOSTILE[1]}", arguments=json.dumps({"q": HOSTILE[0]}))
    bad = ToolCall(id="fc_m", call_id="call_m", name="lookup", arguments=HOSTILE[2], error=f"no JSON: {HOSTILE[4]}")
    results = [ToolResult(call_id="call_h", output="\n".join(HOSTILE) + HUGE, latency_s=0.4, is_error=True)]
    results.append(ToolResult(call_id="call_m", output=LONG, latency_s=0.0))
    first = rollout.turns[0]
    message = Message(role="assistant", content=HOSTILE[1], reasoning=HOSTILE[4], tool_calls=[call, bad])
    first = first.model_copy(update={"message": message, "results": results})
    last = rollout.turns[-1]
    said = Message(role="assistant", content=" ".join(HOSTILE))
    last = last.model_copy(update={"message": said, "replies": [Message(role="user", content=HOSTILE[0])]})
    grade = Grade(
        score=0.25,
        parts={f"part{HOSTILE[1]}": Grade(score=0.5, errors={"other_error": HOSTILE[0]})},
        shadow={f"shadow{HOSTILE[4]}": 0.125},
        shadow_errors={"strict": HOSTILE[3]},
        latency_s=0.05,
    )
    return rollout.model_copy(update={"turns": [first, last], "grade": grade, "environment": {"said": HOSTILE[0]}})


def _discarded(rollout: Rollout) -> Rollout:
    error = f"search: connection refused {HOSTILE[3]}"
    changes = {"grade": None, "stop_reason": StopReason.TOOL_FAILED, "error": error, "turns": rollout.turns[:1]}
    return rollout.model_copy(update=changes)
