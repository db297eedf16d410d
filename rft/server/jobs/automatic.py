"""What `auto` comes to: hyperparameters as numbers, once the rows of a job's training file are counted.

Heuristics, for runs on a few devices (R rows, all rounded): batch_size = R / 16, within 4..32 and at most R;
n_epochs = what makes about 20 steps, within 1..50; eval_interval = a fifth of the steps; eval_samples = 1; both
multipliers 1; reasoning_effort `default` is `medium`. Supervised jobs: 3 epochs, 8 rows a batch.
A number that the client gave stays as it is.
"""

from __future__ import annotations

import math
from typing import Any

_STEPS = 20
_EVALUATIONS = 5
_SUPERVISED = {"n_epochs": 3, "batch_size": 8, "learning_rate_multiplier": 1.0}


def resolved(hyperparameters: dict[str, Any], num_rows: int, *, is_supervised: bool = False) -> dict[str, Any]:
    """The same keys, none of them auto."""
    if is_supervised:
        return _filled(hyperparameters, {**_SUPERVISED, "batch_size": min(8, num_rows)})
    batch = hyperparameters["batch_size"]
    if batch == "auto":
        batch = min(num_rows, 32, max(4, round(num_rows / 16)))
    epochs = hyperparameters["n_epochs"]
    if epochs == "auto":
        epochs = min(50, max(1, round(_STEPS * batch / num_rows)))
    steps = num_steps(num_rows, epochs, batch)
    found = {
        "n_epochs": epochs,
        "batch_size": batch,
        "learning_rate_multiplier": 1.0,
        "compute_multiplier": 1.0,
        "eval_interval": max(1, round(steps / _EVALUATIONS)),
        "eval_samples": 1,
    }
    effort = hyperparameters["reasoning_effort"]
    return _filled(hyperparameters, found) | {"reasoning_effort": "medium" if effort == "default" else effort}


def items_per_step(num_rows: int, batch_size: int) -> int:
    """A batch holds no row twice."""
    return min(num_rows, batch_size)


def num_steps(num_rows: int, n_epochs: int, batch_size: int) -> int:
    return math.ceil(num_rows * n_epochs / items_per_step(num_rows, batch_size))


def _filled(given: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    return {key: found[key] if value == "auto" else value for key, value in given.items()}
