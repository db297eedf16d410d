"""Metrics events: every training step once, in the shape that the hosted service gives it.

Numbers that a step does not have are null: the validation keys of a step without an evaluation. Rewards are the
rollouts' grades; `timing` is in seconds; a grader's tokens are those of its judge model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rft.server.views.grader_numbers import (
    error_entry,
    graders_of,
    latency_entry,
    parse_error_share,
    reward_entry,
    sides,
    usage_entry,
)
from rft.server.views.steps import Row, Step, complete_steps, number, share, suffixes, total_steps
from rft.store import RunStore

_USAGE = ("cached", "prompt", "completion")


def metrics_events(store: RunStore, job: dict[str, Any], after: int) -> list[tuple[str, dict[str, Any]]]:
    """(message, data) of each complete step after `after`, in order; of a warm-up's steps for a supervised job.

    Reads the metrics of the whole run: to be called when their file has grown.
    """
    if (job.get("method") or {}).get("type") == "supervised":
        return _supervised(store, after)
    found = [step for step in complete_steps(store) if step.number > after]
    total = total_steps(store.config()) if found else 0
    return [_event(step, job, total) for step in found]


def _event(step: Step, job: dict[str, Any], total: int) -> tuple[str, dict[str, Any]]:
    data = step_data(step, job, total)
    message = f"Step {step.number}/{total} , train mean reward={_shown(data['train_mean_reward'])}"
    if step.evaluation:
        message += f", full validation mean reward={_shown(data['full_valid_mean_reward'])}"
        message += f", full validation mean parse error={_shown(data['full_valid_mean_parse_error'])}"
    return message, data


def _shown(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.2f}"


def step_data(step: Step, job: Mapping[str, Any], total: int) -> dict[str, Any]:
    """The event's `data`: both spellings of the means, and every grader of the job under usage, errors, scores."""
    train, valid, graders = step.training, step.evaluation, graders_of(job)
    reward, valid_reward = number(train, "train/grade"), number(valid, "grade")
    return {
        "step": step.number,
        "usage": {
            "graders": [usage_entry(grader, step) for grader in graders if grader.model is not None],
            "samples": _sample_tokens(step),
        },
        "errors": {"graders": [error_entry(grader, step) for grader in graders]},
        "scores": {
            "graders": [reward_entry(grader, step) for grader in graders],
            "train_reward_mean": reward,
            "valid_reward_mean": valid_reward,
        },
        "timing": {"step": _timing(step), "graders": [latency_entry(grader, step) for grader in graders]},
        "tools": _tools(step),
        "total_steps": total,
        "train_mean_reward": reward,
        "reasoning_tokens_mean": _tokens(train, "train/", "reasoning"),
        "completion_tokens_mean": _tokens(train, "train/", "sampled"),
        "full_valid_mean_reward": valid_reward,
        "mean_unresponsive_rewards": number(train, "train/unresponsive_share"),
        "model_graders_token_usage": _model_usage(step),
        "full_valid_mean_parse_error": parse_error_share(step),
        "valid_reasoning_tokens_mean": _tokens(valid, "", "reasoning"),
    }


def _tokens(row: Row, prefix: str, kind: str) -> float | None:
    """Per rollout."""
    return share(row, f"{prefix}num_{kind}_tokens", f"{prefix}num_rollouts")


def _sample_tokens(step: Step) -> dict[str, Any]:
    entry: dict[str, Any] = {}
    for name, kind in (("reasoning", "reasoning"), ("completion", "sampled")):
        for side, row, prefix in sides(step):
            entry[f"{side}_{name}_tokens_mean"] = _tokens(row, prefix, kind)
            entry[f"{side}_{name}_tokens_count"] = number(row, f"{prefix}num_{kind}_tokens")
    return entry


def _timing(step: Step) -> dict[str, float | None]:
    """Training includes bringing the new weights to the engine; the iteration is the step and its evaluation."""
    row, evaluation_s = step.training, number(step.evaluation, "seconds")
    training_s, sync_s, step_s = (number(row, f"time/{phase}_s") for phase in ("training", "sync", "step"))
    return {
        "eval": evaluation_s,
        "sampling": number(row, "time/sampling_s"),
        "training": None if training_s is None else training_s + (sync_s or 0.0),
        "full_iteration": None if step_s is None else step_s + (evaluation_s or 0.0),
    }


def _tools(step: Step) -> dict[str, Any]:
    """Calls per rollout, their errors, seconds and tokens; {} for a job without tools."""
    names = sorted({name for _, row, prefix in sides(step) for name in suffixes(row, f"{prefix}tool_num/")})
    if not names and not any(number(row, f"{prefix}tool_calls") for _, row, prefix in sides(step)):
        return {}
    entry: dict[str, Any] = {}
    for side, row, prefix in sides(step):
        entry[f"{side}_tool_calls_mean"] = number(row, f"{prefix}tool_calls")
        entry[f"{side}_tokens_per_call_mean"] = number(row, f"{prefix}tool_answer_tokens")
        entry[f"{side}_unknown_tool_calls_count"] = number(row, f"{prefix}unknown_tool_calls")
    return entry | {"tools": [_tool(name, step) for name in names]}


def _tool(name: str, step: Step) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": name}
    for side, row, prefix in sides(step):
        entry[f"{side}_calls_mean"] = share(row, f"{prefix}tool_num/{name}", f"{prefix}num_rollouts")
        entry[f"{side}_calls_count"] = number(row, f"{prefix}tool_num/{name}")
        entry[f"{side}_error_count"] = number(row, f"{prefix}tool_errors/{name}")
        entry[f"{side}_execution_latency_mean"] = number(row, f"{prefix}tool_latency_s/{name}")
    return entry


def _model_usage(step: Step) -> dict[str, dict[str, int]]:
    """Tokens by judge model. `eval_` here is what is `valid_` elsewhere: that is how the service writes it."""
    found: dict[str, dict[str, int]] = {}
    for side, (_, row, prefix) in zip(("train", "eval"), sides(step), strict=True):
        for model in suffixes(row, f"{prefix}judge_num/"):
            entry = found.setdefault(
                model, {f"{part}_{kind}_tokens": 0 for kind in _USAGE for part in ("eval", "train")}
            )
            for kind in _USAGE:
                entry[f"{side}_{kind}_tokens"] = int(number(row, f"{prefix}judge_{kind}_tokens/{model}") or 0)
    return found


def _supervised(store: RunStore, after: int) -> list[tuple[str, dict[str, Any]]]:
    """Steps of a warm-up. Where a share is held out, the newest waits for the next: it may yet be measured."""
    rows, config = warmup_rows(store), store.config()
    if rows and (config.get("warmup") or {}).get("held_out_share") and not store.is_done:
        rows.pop(max(rows))
    total = int(store.read_state().get("steps") or 0)
    return [_supervised_event(step, rows[step], total) for step in sorted(rows) if step > after]


def warmup_rows(store: RunStore) -> dict[int, dict[str, Any]]:
    """By step; what was measured on the held-out share is part of the step it was measured at."""
    found: dict[int, dict[str, Any]] = {}
    for row in store.metrics():
        if row.get("kind") == "warmup" and isinstance(row.get("step"), int):
            found.setdefault(row["step"], {}).update(row)
    return found


def _supervised_event(step: int, row: Row, total: int) -> tuple[str, dict[str, Any]]:
    loss = number(row, "update/loss")
    data = {"step": step, "total_steps": total, **supervised_metrics(row)}
    return f"Step {step}/{total}: training loss={_shown(loss)}", data


def supervised_metrics(row: Row) -> dict[str, float | None]:
    """The hosted names of a warm-up's numbers."""
    return {
        "train_loss": number(row, "update/loss"),
        "train_mean_token_accuracy": number(row, "update/token_accuracy"),
        "full_valid_loss": number(row, "held_out/loss"),
        "full_valid_mean_token_accuracy": number(row, "held_out/token_accuracy"),
    }
