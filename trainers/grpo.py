"""GRPO, told top to bottom: sample groups, drop those that teach nothing, one optimizer step, sync, measure.

Every rank runs `train`. Rank 0 has a `Leader` (engine, collector, run folder); it alone samples and writes, and
shares the window's micro-batches, so no collective depends on what a rollout contains.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from rft.config import RunConfig
from rft.errors import NumericsError
from rft.metrics import Clock
from rft.shaping import shaped_scores
from rft.trainers import checkpoint
from rft.trainers.batch import MicroBatch, count_tokens, split_over_ranks, weigh
from rft.trainers.leader import Leader
from rft.trainers.objective import advantages
from rft.trainers.policy import Policy, StepStats
from rft.types import Group

_MAX_SKIPPED = 3  # non-finite steps in a row before the run stops


@dataclass(frozen=True, slots=True)
class Window:
    """What one optimizer step trains on: this rank's micro-batches and the token count over all ranks."""

    micro_batches: list[MicroBatch]
    num_tokens: int


def train(config: RunConfig, policy: Policy, accelerator: Accelerator, leader: Leader | None, first_step: int) -> None:
    """Run steps `first_step` to `training.steps`, then the test split.

    Step s samples with policy version s-1 and makes version s. Raises NumericsError, SyncError, EngineError or
    NoProgressError; the run folder then holds everything up to the last completed step.
    """
    if leader is not None:
        leader.begin(policy, first_step)
    num_skipped = 0
    for step in _steps(config, leader, first_step):
        clock = Clock()
        groups = leader.groups(step) if leader is not None else []
        clock.lap("sampling")
        window = _share(_window(config, policy, groups, accelerator.num_processes), accelerator)
        stats = _update(policy, window, leader, step)
        clock.lap("training")
        num_skipped = _count_skips(stats, num_skipped)
        if leader is not None:
            update = _update_metrics(policy, groups, stats)
            leader.check_gap(update["logprob_gap/mean"], step)
            update |= leader.publish(policy, step, groups)
            clock.lap("sync")
            leader.record(step, groups, update, clock)
            _save(config, policy, leader, step)
            if step % config.evaluation.every == 0 or step == config.training.steps:
                leader.evaluate("validation", step)
    if leader is not None:
        leader.evaluate("test", config.training.steps)


def _steps(config: RunConfig, leader: Leader | None, first_step: int) -> Iterator[int]:
    """The numbers of the steps to do, with a bar over the whole training on rank 0."""
    last = config.training.steps
    if leader is None:
        yield from range(first_step, last + 1)
        return
    with leader.display.phase("training", last, keep=False) as phase:
        phase.advance(first_step - 1)
        for step in range(first_step, last + 1):
            yield step
            phase.advance()


def _window(config: RunConfig, policy: Policy, groups: list[Group], num_ranks: int) -> list[Window]:
    """One window per rank. Groups with equal (shaped) grades are dropped here: their advantages are zero."""
    training = config.training
    shaped = [(group, shaped_scores(group, training.costs)) for group in groups]
    useful = [(group, scores) for group, scores in shaped if len(set(scores)) > 1]
    found = [
        advantages(torch.tensor(scores), training.advantage_scale, group.round_sizes, training.baseline)
        for group, scores in useful
    ]
    micro_batches = policy.micro_batches([group for group, _ in useful], found)
    micro_batches = weigh(micro_batches, training.loss, config.rollout.max_sampled_tokens)
    num_tokens = count_tokens(micro_batches)
    return [Window(share, num_tokens) for share in split_over_ranks(micro_batches, num_ranks)]


def _share(windows: list[Window], accelerator: Accelerator) -> Window:
    """Rank 0's windows to all ranks; each takes its own."""
    if accelerator.num_processes == 1:
        return windows[0]
    own: Window = broadcast_object_list(windows, from_process=0)[accelerator.process_index]
    return own


def _update(policy: Policy, window: Window, leader: Leader | None, step: int) -> StepStats | None:
    """One optimizer step; None when no group carried signal."""
    if window.num_tokens == 0:
        return None
    if leader is None:
        return policy.step(window.micro_batches, window.num_tokens)
    with leader.display.phase(f"step {step}: training", len(window.micro_batches), keep=False) as phase:
        return policy.step(window.micro_batches, window.num_tokens, on_micro_batch=phase.advance)


def _count_skips(stats: StepStats | None, num_skipped: int) -> int:
    if stats is None or not stats.is_skipped:
        return 0
    if num_skipped + 1 >= _MAX_SKIPPED:
        raise NumericsError(
            f"the loss or its gradient was not finite in {_MAX_SKIPPED} steps in a row",
            cure="lower training.learning_rate, or set model.dtype=float32",
        )
    return num_skipped + 1


def _update_metrics(policy: Policy, groups: list[Group], stats: StepStats | None) -> dict[str, float]:
    """What the update says of itself; without one, at least how far engine and trainer are apart."""
    if stats is None:
        mean, largest = policy.logprob_gap(groups[0])
        return {"logprob_gap/mean": mean, "logprob_gap/max": largest}
    row = {f"update/{name}": value for name, value in dataclasses.asdict(stats).items() if "logprob_gap" not in name}
    return row | {"logprob_gap/mean": stats.mean_logprob_gap, "logprob_gap/max": stats.max_logprob_gap}


def _save(config: RunConfig, policy: Policy, leader: Leader, step: int) -> None:
    if step % config.training.checkpoint_every == 0 or step == config.training.steps:
        checkpoint.save(leader.store.checkpoints, step, policy, {})
        checkpoint.prune(leader.store.checkpoints, config.training.keep_checkpoints)
