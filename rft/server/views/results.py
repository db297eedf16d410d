"""The result file of a job, and what the job has used. Derived from the run folder; plain CSV as RFC 4180 has it.

Columns are the hosted service's; `entropy_mean` and what follows it are ours. Validation columns are empty on steps
without an evaluation; the row of step 0 has nothing else.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from typing import Any

from rft.server.views.grader_numbers import GraderView, error_entry, graders_of, reward_entry, sides
from rft.server.views.metrics import step_data, supervised_metrics, warmup_rows
from rft.server.views.steps import Row, Step, complete_steps, number, steps_of, suffixes, total_steps
from rft.store import RunStore

_MEANS = (
    "train_mean_reward",
    "full_valid_mean_reward",
    "completion_tokens_mean",
    "reasoning_tokens_mean",
    "mean_unresponsive_rewards",
)


def result_csv(store: RunStore, job: dict[str, Any]) -> str:
    """A row per step that is complete, from step 0 where the run was evaluated before training."""
    if (job.get("method") or {}).get("type") == "supervised":
        rows = warmup_rows(store)
        return _text([{"step": step, **supervised_metrics(rows[step])} for step in sorted(rows)])
    config = store.config()
    before = [step for step in steps_of(store.metrics()) if step.number == 0 and step.evaluation]
    steps = [*before, *complete_steps(store)]
    tools = sorted(
        {name for step in steps for _, row, prefix in sides(step) for name in suffixes(row, f"{prefix}tool_num/")}
    )
    return _text([_row(step, job, config, tools) for step in steps])


def _text(rows: Iterable[dict[str, Any]]) -> str:
    """Every column that any row has, in the order of their first appearance."""
    rows = list(rows)
    columns = list(dict.fromkeys(["step", *(name for row in rows for name in row)]))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _row(step: Step, job: dict[str, Any], config: dict[str, Any], tools: list[str]) -> dict[str, Any]:
    data, graders = step_data(step, job, total_steps(config)), graders_of(job)
    timing = data["timing"]["step"]
    row: dict[str, Any] = {"step": step.number, **{name: data[name] for name in _MEANS}}
    row |= {
        "sampling_duration": timing["sampling"],
        "training_duration": timing["training"],
        "eval_duration": timing["eval"],
        "total_duration": timing["full_iteration"],
    }
    row |= _losses(step.training, config)
    for grader in graders:
        row |= _grader(grader, step)
    for name in tools:
        row[f"train_error_count_{name}"] = number(step.training, f"train/tool_errors/{name}")
        row[f"tool_calls_to_{name}"] = number(step.training, f"train/tool_num/{name}")
    return row | {
        "grader_error_count": number(step.training, "train/grader_errors"),
        "entropy_mean": number(step.training, "update/entropy"),
        "no_signal_fraction": _no_signal(step.training),
        "full_valid_mean_parse_error": data["full_valid_mean_parse_error"],
        "valid_reasoning_tokens_mean": data["valid_reasoning_tokens_mean"],
    }


def _losses(row: Row, config: dict[str, Any]) -> dict[str, float | None]:
    """The policy-gradient part is known where nothing is added to it: without entropy bonus and KL penalty."""
    training, total, entropy = config.get("training") or {}, number(row, "update/loss"), number(row, "update/entropy")
    entropy_coef = float(training.get("entropy_coef") or 0.0)
    is_pure = not entropy_coef and not training.get("kl_coef")
    return {
        "pg_loss_sum": total if is_pure else None,
        "total_loss_sum": total,
        "entropy_loss_sum": None if entropy is None else 0.0 - entropy_coef * entropy,
    }


def _no_signal(row: Row) -> float | None:
    num, total = number(row, "groups/no_signal"), number(row, "groups/total")
    return num / total if num is not None and total else None


def _grader(grader: GraderView, step: Step) -> dict[str, Any]:
    place = f"{grader.type}/{grader.name}"
    rewards, errors = reward_entry(grader, step), error_entry(grader, step)
    row = {f"scores/graders/{place}/{name}": rewards[name] for name in ("train_reward_mean", "valid_reward_mean")}
    found = {name: value for name, value in errors.items() if name not in grader.head}
    return row | {f"errors/graders/{place}/errors/{name}": value for name, value in found.items()}


def usage_metrics(store: RunStore) -> dict[str, Any]:
    """Seconds per phase, tokens that were sampled, and tokens per judge model, up to the last row.

    `grading` is the sum over single grades: many run at once, and all of them during sampling or evaluation, so it is
    no part of `total`.
    """
    seconds = dict.fromkeys(("sampling", "grading", "training", "sync", "evaluation", "total"), 0.0)
    sampled = {"train": 0, "evaluation": 0}
    judges: dict[str, dict[str, int]] = {}
    num_steps = 0
    for row in store.metrics():
        is_training = row.get("kind") == "training"
        if not is_training and row.get("kind") != "evaluation":
            continue
        prefix = "train/" if is_training else ""
        num_steps += is_training
        _add_seconds(seconds, row, prefix, is_training=is_training)
        sampled["train" if is_training else "evaluation"] += int(number(row, f"{prefix}num_sampled_tokens") or 0)
        _add_judges(judges, row, prefix)
    return {"steps": num_steps, "seconds": seconds, "sampled_tokens": sampled, "grader_tokens": judges}


def _add_seconds(seconds: dict[str, float], row: Row, prefix: str, *, is_training: bool) -> None:
    graded = (number(row, f"{prefix}grader/latency_s") or 0.0) * (number(row, f"{prefix}num_graded") or 0.0)
    seconds["grading"] += graded
    if not is_training:
        seconds["evaluation"] += number(row, "seconds") or 0.0
        seconds["total"] += number(row, "seconds") or 0.0
        return
    for phase in ("sampling", "training", "sync"):
        seconds[phase] += number(row, f"time/{phase}_s") or 0.0
    seconds["total"] += number(row, "time/step_s") or 0.0


def _add_judges(judges: dict[str, dict[str, int]], row: Row, prefix: str) -> None:
    for model in suffixes(row, f"{prefix}judge_num/"):
        used = judges.setdefault(
            model, {"prompt_tokens": 0, "completion_tokens": 0, "cached_tokens": 0, "num_grades": 0}
        )
        used["num_grades"] += int(number(row, f"{prefix}judge_num/{model}") or 0)
        for kind in ("prompt", "completion", "cached"):
            used[f"{kind}_tokens"] += int(number(row, f"{prefix}judge_{kind}_tokens/{model}") or 0)
