"""The checkpoints of a job as the wire lists them: those of validation steps with the best grades, and the last one.

Derived from the run folder each time, ids included: what was removed from disk is in no list.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from rft import checkpoints
from rft.metrics import best_steps
from rft.server.models import checkpoint_name, tuned_name
from rft.server.views.grader_numbers import parse_error_share
from rft.server.views.metrics import step_data, supervised_metrics, warmup_rows
from rft.server.views.steps import Step, steps_of, total_steps
from rft.store import RunStore

NUM_BEST = 3
_OF_STEP = (
    "train_mean_reward",
    "full_valid_mean_reward",
    "full_valid_mean_parse_error",
    "completion_tokens_mean",
    "reasoning_tokens_mean",
    "valid_reasoning_tokens_mean",
    "mean_unresponsive_rewards",
)


def checkpoint_objects(store: RunStore, job: dict[str, Any], organization: str | None = None) -> list[dict[str, Any]]:
    """Newest first. organization: in the models' names; None: the job's `organization_id`."""
    saved = {checkpoints.step_of(path): path for path in checkpoints.complete(store.checkpoints)}
    if not saved:
        return []
    rows = list(store.metrics())
    chosen = best_steps(rows, NUM_BEST, saved.keys()) | {max(saved)}
    model = job.get("fine_tuned_model") or tuned_name(job, organization or str(job.get("organization_id") or "rft"))
    metrics = _metrics(store, job, rows, chosen)
    found = (_object(job, model, step, saved[step], metrics.get(step, {})) for step in sorted(chosen, reverse=True))
    return [checkpoint for checkpoint in found if checkpoint is not None]


def checkpoint_id(job_id: str, step: int) -> str:
    """The same for the same step of the same job."""
    return "ftckpt_" + hashlib.sha256(f"{job_id}\x1f{step}".encode()).hexdigest()[:24]


def _object(job: dict[str, Any], model: str, step: int, path: Path, metrics: dict[str, Any]) -> dict[str, Any] | None:
    """None for one that the run has removed meanwhile."""
    try:
        created_at = int((path / checkpoints.MANIFEST).stat().st_mtime)
    except FileNotFoundError:
        return None
    return {
        "object": "fine_tuning.job.checkpoint",
        "id": checkpoint_id(job["id"], step),
        "created_at": created_at,
        "fine_tuned_model_checkpoint": checkpoint_name(model, step),
        "fine_tuning_job_id": job["id"],
        "metrics": {"step": step, **metrics},
        "step_number": step,
    }


def _metrics(
    store: RunStore, job: dict[str, Any], rows: list[dict[str, Any]], chosen: set[int]
) -> dict[int, dict[str, Any]]:
    """By step; `rows` are the run's."""
    if (job.get("method") or {}).get("type") == "supervised":
        return {step: supervised_metrics(row) for step, row in warmup_rows(store).items() if step in chosen}
    total = total_steps(store.config())
    return {step.number: _of_step(step, job, total) for step in steps_of(rows) if step.number in chosen}


def _of_step(step: Step, job: dict[str, Any], total: int) -> dict[str, Any]:
    """The names that the SDK types, which are those of supervised jobs, and those of reinforcement."""
    data = step_data(step, job, total)
    return {
        "train_loss": step.training.get("update/loss"),
        "train_reward_mean": data["train_mean_reward"],
        "valid_reward_mean": data["full_valid_mean_reward"],
        "valid_parse_error_mean": parse_error_share(step),
        **{name: data[name] for name in _OF_STEP},
    }
