"""Evaluation: sample a split with the current policy and say how well it does, with intervals."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rft.collect import Collector
from rft.metrics import rollout_metrics
from rft.types import Item, Split


async def evaluate(
    collector: Collector, items: Sequence[Item], split: Split, step: int, rollouts_per_item: int
) -> dict[str, Any]:
    """The metrics row of one evaluation at policy version `step`, sampled exactly as training samples."""
    started = time.perf_counter()
    groups = await collector.collect(items, split, step, rollouts_per_item)
    return {
        "step": step,
        "kind": "evaluation",
        "split": split,
        **rollout_metrics(groups),
        "seconds": time.perf_counter() - started,
    }
