"""GRPO, told top to bottom: sample groups, drop those that teach nothing, one optimizer step, sync, measure.

Rank 0 tells it, with a `Leader` (engine, collector, run folder): it alone samples and writes. The other ranks take
part in `Policy.update`, each with its share of the window's micro-batches (ranks.py). What takes long is done `beside`
the sampling of the next steps, when training.staleness allows that.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from rft.checkpoints import MANIFEST, complete, name_of, step_of
from rft.config import RunConfig
from rft.errors import NumericsError, Paused
from rft.metrics import Clock, best_steps
from rft.shaping import shaped_scores
from rft.trainers import checkpoint
from rft.trainers.batch import MicroBatch, count_tokens, split_over_ranks, weigh
from rft.trainers.leader import Leader
from rft.trainers.objective import advantages
from rft.trainers.policy import Policy
from rft.trainers.update import StepStats
from rft.types import Group

logger = logging.getLogger(__name__)

_MAX_NAMED = 5
_TOLD_APART = {"mean_logprob_gap", "max_logprob_gap", "bad_rollouts"}  # in the metrics
_MAX_SKIPPED = 3  # non-finite steps in a row before the run stops


def train(config: RunConfig, policy: Policy, leader: Leader, first_step: int) -> None:
    """Run steps `first_step` to `training.steps`, then the test split.

    Step s samples with policy version s-1 and makes version s. Raises NumericsError, SyncError, EngineError,
    MemoryLimitError or NoProgressError; the run folder then holds everything up to the last completed step. Raises
    Paused between two steps when that was asked for.
    """
    _pause_if_asked(config, policy, leader, first_step - 1)
    leader.begin(policy, first_step)
    _prune(config, leader)  # a run that ended between saving and here left one too many
    skips: list[StepStats] = []
    for step in _steps(config, leader, first_step):
        _pause_if_asked(config, policy, leader, step - 1)
        clock = Clock()
        groups = leader.groups(step)
        clock.lap("sampling")
        window = leader.beside(partial(_window, config, policy, groups))
        stats = _update(policy, window, leader, step)
        clock.lap("training")
        _check_skips(skips, stats, window)
        update = leader.beside(partial(_update_metrics, policy, groups, stats))
        leader.check_gap(update["logprob_gap/mean"], step)
        update |= leader.publish(policy, step, groups)
        clock.lap("sync")
        leader.record(step, groups, update, clock)
        _save_and_evaluate(config, policy, leader, step)
    leader.evaluate("test", config.training.steps)


def _steps(config: RunConfig, leader: Leader, first_step: int) -> Iterator[int]:
    """The numbers of the steps to do, with a bar over the whole training."""
    last = config.training.steps
    with leader.display.phase("training", last, keep=False) as phase:
        phase.advance(first_step - 1)
        for step in range(first_step, last + 1):
            yield step
            phase.advance()


@dataclass(frozen=True, slots=True)
class Window:
    """What one optimizer step trains on: each rank's share, the tokens of all of them, and whose they are."""

    shares: list[list[MicroBatch]]
    num_tokens: int
    rollout_ids: list[str]  # as `MicroBatch.rollout_index` counts them


def _window(config: RunConfig, policy: Policy, groups: list[Group]) -> Window:
    """Groups with equal (shaped) grades are dropped here: their advantages are zero."""
    training = config.training
    shaped = [(group, shaped_scores(group, training.costs)) for group in groups]
    useful = [(group, scores) for group, scores in shaped if len(set(scores)) > 1]
    found = [
        advantages(torch.tensor(scores), training.advantage_scale, group.round_sizes, training.baseline)
        for group, scores in useful
    ]
    micro_batches = policy.micro_batches([group for group, _ in useful], found)
    micro_batches = weigh(micro_batches, training.loss, config.rollout.max_sampled_tokens)
    rollout_ids = [rollout.id for group, _ in useful for rollout in group.rollouts]
    return Window(split_over_ranks(micro_batches, policy.ranks.num), count_tokens(micro_batches), rollout_ids)


def _update(policy: Policy, window: Window, leader: Leader, step: int) -> StepStats | None:
    """One optimizer step; None when no group carried signal."""
    if window.num_tokens == 0:
        return None
    with leader.training(step, len(window.shares[0])) as on_micro_batch:
        return leader.beside(lambda: policy.update(window.shares, window.num_tokens, on_micro_batch))


def _check_skips(skips: list[StepStats], stats: StepStats | None, window: Window) -> None:
    """Count steps that were skipped in a row; raises NumericsError, naming the rollouts of the last one."""
    if stats is None or not stats.is_skipped:
        skips.clear()
        return
    skips.append(stats)
    names = [window.rollout_ids[index] for index in stats.bad_rollouts]
    told = ", ".join(names[:_MAX_NAMED]) + (f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else "")
    logger.warning("step skipped: its loss or gradient is not finite; it comes from the rollouts %s", told)
    if len(skips) >= _MAX_SKIPPED:
        raise NumericsError(
            f"the loss or its gradient was not finite in {_MAX_SKIPPED} steps in a row; in the last one it came from"
            f" the rollouts {told}",
            cure="lower training.learning_rate, or set model.dtype=float32; `rft show RUN --rollout ID` shows one",
        )


def _update_metrics(policy: Policy, groups: list[Group], stats: StepStats | None) -> dict[str, float]:
    """What the update says of itself; without one, at least how far engine and trainer are apart."""
    if stats is None:
        mean, largest = policy.logprob_gap(groups[0])
        return {"logprob_gap/mean": mean, "logprob_gap/max": largest}
    row = {f"update/{name}": value for name, value in dataclasses.asdict(stats).items() if name not in _TOLD_APART}
    return row | {"logprob_gap/mean": stats.mean_logprob_gap, "logprob_gap/max": stats.max_logprob_gap}


def _save_and_evaluate(config: RunConfig, policy: Policy, leader: Leader, step: int) -> None:
    """What is evaluated is saved too, so that the best checkpoints are there to be kept."""
    training, folder = config.training, leader.store.checkpoints
    is_last = step == training.steps
    is_evaluated = is_last or step % config.evaluation.every == 0
    if is_evaluated or step % training.checkpoint_every == 0:
        leader.beside(lambda: checkpoint.save(folder, step, policy, {}))
    if is_evaluated:
        leader.evaluate("validation", step)
    _prune(config, leader)


def _pause_if_asked(config: RunConfig, policy: Policy, leader: Leader, step: int) -> None:
    """Raises Paused, after saving what `step` made where no checkpoint was due."""
    store = leader.store
    if not store.is_pause_asked:
        return
    if step and not (store.checkpoints / name_of(step) / MANIFEST).is_file():
        leader.beside(lambda: checkpoint.save(store.checkpoints, step, policy, {}))
        _prune(config, leader)
    raise Paused(step)


def _prune(config: RunConfig, leader: Leader) -> None:
    """Keep the newest checkpoints and the best ones."""
    training, folder = config.training, leader.store.checkpoints
    saved = [step_of(path) for path in complete(folder)]
    checkpoint.prune(folder, training.keep_checkpoints, best_steps(leader.store.metrics(), training.keep_best, saved))
