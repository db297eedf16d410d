"""Runs for the doctor, made without a model: a healthy one, and what makes it ill."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from run_folders import a_rollout, an_item

from rft.doctor import diagnose
from rft.doctor.finding import Severity
from rft.store import RunStore
from rft.types import Grade, Message, Rollout, StopReason, ToolCall, ToolResult

NUM_STEPS, NUM_ITEMS, SIZE = 8, 6, 4
Rows = Callable[[int], dict[str, Any]]
Change = Callable[[Rollout], Rollout]


def a_row(step: int, **changes: Any) -> dict[str, Any]:
    """Of a healthy run: its grade rises slowly."""
    row: dict[str, Any] = {
        "step": step, "kind": "training", "groups/total": 6, "groups/no_signal": 1, "budget/rollouts": 48,
        "update/grad_norm": 0.2, "update/entropy": 1.0, "update/clip_share": 0.01, "update/is_skipped": False,
        "logprob_gap/mean": 1e-4, "probe/mean": 1e-4, "groups/stale": 0, "staleness/mean": 0.0,
        "time/sampling_s": 10.0, "time/training_s": 9.0, "time/sync_s": 1.0, "time/step_s": 20.0,
        "train/grade": 0.3 + 0.04 * step, "train/grade_ci95": 0.05, "train/valid_call_share": 0.9,
        "train/tool_calls": 1.0, "train/sampled_tokens": 60.0, "train/turns": 2.0, "train/reasoning_tokens": 0.0,
        "train/tool_latency_s": 0.1, "train/duration_s": 5.0, "train/grader/latency_s": 0.01,
        "train/stop/answered": 0.9, "train/stop/max_tokens": 0.1, "train/num_rollouts": 48, "train/num_graded": 48,
        "train/unresponsive_share": 0.0,
    }  # fmt: skip
    return row | changes


def rising(first: float, last: float) -> Callable[[int], float]:
    """From the first to the last step."""
    return lambda step: first + (last - first) * (step - 1) / (NUM_STEPS - 1)


def answered(rollout: Rollout, text: str, tokens: list[int] | None = None) -> Rollout:
    """With another answer."""
    last = rollout.turns[-1]
    ids = last.output_ids if tokens is None else tokens
    turn = last.model_copy(
        update={"message": Message(role="assistant", content=text), "output_ids": ids, "logprobs": [-0.1] * len(ids)}
    )
    return rollout.model_copy(update={"turns": [*rollout.turns[:-1], turn]})


def healthy(rollout: Rollout) -> Rollout:
    text = f"{rollout.item_id} is number {rollout.attempt * 7919 % 97}"
    return answered(rollout, text)


def graded(rollout: Rollout, score: float, **fields: Any) -> Rollout:
    return rollout.model_copy(update={"grade": Grade(score=score, **fields)})


def a_store(
    folder: Path,
    rows: Rows = lambda step: {},
    change: Change = lambda rollout: rollout,
    *,
    config: dict[str, Any] | None = None,
    state: dict[str, Any] | None = None,
    steps: int = NUM_STEPS,
    messages: tuple[str, ...] = (),
) -> RunStore:
    """A run of `steps` steps. rows: what differs from a healthy row; change: of all but the first step's rollouts."""
    settings = {"environment": {"type": "http"}, "training": {"learning_rate": 1e-4}, "model": {"lora": {"rank": 4}}}
    store = RunStore.create(folder, "run", settings | (config or {}))
    for message in messages:
        store.append_event("info", message)
    for step in range(1, steps + 1):
        if step == 1 or step > steps - 2:
            for index in range(NUM_ITEMS):
                for attempt in range(SIZE):
                    rollout = healthy(a_rollout(an_item(index), "train", step, attempt, 0.0))
                    rollout = graded(rollout, float(attempt % 2))
                    store.append_rollout(change(rollout) if step > 1 else rollout)
        store.append_metrics(a_row(step) | rows(step))
    store.write_state({"status": "succeeded", "step": steps, "steps": steps} | (state or {}))
    store.close()
    return store


def found(store: RunStore) -> dict[str, Severity]:
    return {finding.check: finding.severity for finding in diagnose(store).findings}


def failing_tool(rollout: Rollout) -> Rollout:
    """Of every fourth rollout: no result, no grade."""
    if rollout.attempt:
        return rollout
    cut = rollout.turns[0].model_copy(update={"results": []})
    error = "tool search: http://x/search failed 4 times: HTTP 500: \x1b[2Jboom"
    changes = {"turns": [cut], "stop_reason": StopReason.TOOL_FAILED, "grade": None, "error": error}
    return rollout.model_copy(update=changes)


def called(rollout: Rollout, *, is_error: bool = False, error: str | None = None, output: str = "no key") -> Rollout:
    call = ToolCall(id="fc_1", call_id="call_1", name="search", arguments="{}", error=error)
    result = ToolResult(call_id="call_1", output=output, is_error=is_error or error is not None)
    turn = rollout.turns[0].model_copy(
        update={"message": Message(role="assistant", tool_calls=[call]), "results": [result]}
    )
    return rollout.model_copy(update={"turns": [turn, *rollout.turns[1:]]})


def every(num: int, change: Change) -> Change:
    """Only every `num`-th attempt."""
    return lambda rollout: change(rollout) if rollout.attempt % num == 0 else rollout


def repeating(rollout: Rollout) -> Rollout:
    return graded(answered(rollout, f"{rollout.item_id} yes yes yes yes yes yes yes yes yes yes"), 1.0)


def without_call(rollout: Rollout) -> Rollout:
    return graded(rollout.model_copy(update={"turns": rollout.turns[1:]}), 1.0)


def framed(rollout: Rollout) -> Rollout:
    """A long text that is the same for all items, but for its end."""
    text = f"After a very careful search of all tables it is {rollout.item_id[-5:]}{rollout.attempt}"
    return graded(answered(rollout, text), 1.0)
