"""One optimizer step: gradients of all micro-batches, halved once where memory runs out, clipped, stepped, counted.

The result does not depend on how the window is cut into micro-batches or dealt to ranks. A step whose loss or gradient
is not finite changes nothing, and says which rollouts it came from.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rft.errors import MemoryLimitError
from rft.trainers.batch import MicroBatch
from rft.trainers.halving import free_memory, halve, is_out_of_memory
from rft.trainers.objective import LossStats, Tokens, policy_loss

if TYPE_CHECKING:
    from rft.trainers.policy import Policy

logger = logging.getLogger(__name__)

OnMicroBatch = Callable[[], None] | None


@dataclass(frozen=True, slots=True)
class StepStats:
    """One optimizer step over all ranks; token means are over the loss-bearing tokens."""

    loss: float
    grad_norm: float  # before clipping
    learning_rate: float  # used by this step
    num_tokens: int  # loss-bearing
    num_row_tokens: int  # computed, padding included
    clip_share: float
    mean_ratio: float
    approx_kl: float  # KL(sampling policy || policy)
    mean_logprob_gap: float  # |sampled - current|
    max_logprob_gap: float
    reference_kl: float  # KL(policy || reference), 0 without training.kl_coef
    entropy: float  # mean over the distinct positions that were sampled from, at the sampling temperature
    is_skipped: bool  # a loss or gradient was not finite: nothing was changed
    bad_rollouts: tuple[int, ...] = ()  # then: whose it was, as `MicroBatch.rollout_index` counts them


def update(policy: Policy, micro_batches: list[MicroBatch], num_tokens: int, on_micro_batch: OnMicroBatch) -> StepStats:
    """See `Policy.step`."""
    learning_rate = float(policy.scheduler.get_last_lr()[0])
    totals = _totals(policy, _accumulate(policy, micro_batches, on_micro_batch))
    is_finite = math.isfinite(totals["loss"])
    grad_norm = policy.stepper.step(is_finite=is_finite)
    is_finite = is_finite and math.isfinite(grad_norm)
    if is_finite:
        policy.weights.after_step()
        policy.scheduler.step()
    blamed = set() if is_finite else policy.ranks.union(_bad_rollouts(policy, micro_batches))
    policy.stepper.zero_grad()
    return StepStats(
        grad_norm=grad_norm,
        learning_rate=learning_rate,
        num_tokens=num_tokens,
        num_row_tokens=int(totals.pop("num_row_tokens")),
        is_skipped=not is_finite,
        bad_rollouts=tuple(sorted(blamed)),
        **totals,
    )


def _accumulate(policy: Policy, micro_batches: list[MicroBatch], on_micro_batch: OnMicroBatch) -> list[list[float]]:
    """The gradient of this rank's share; when memory runs out on any rank, all start again on halves, once."""
    rows = _try(policy, micro_batches, on_micro_batch)
    if rows is None:
        policy.max_tokens = max(16, max(batch.num_row_tokens for batch in micro_batches) // 2)
        logger.warning(
            "out of memory: micro-batches are halved; set training.max_tokens_per_micro_batch=%d", policy.max_tokens
        )
        rows = _try(policy, [half for batch in micro_batches for half in halve(batch)], on_micro_batch)
    if rows is None:
        raise MemoryLimitError(
            f"out of memory with micro-batches of {policy.max_tokens} tokens",
            cure=f"set training.max_tokens_per_micro_batch={max(16, policy.max_tokens // 2)} or less, "
            "training.gradient_checkpointing=true, or shorten rollouts (rollout.max_tokens_per_turn)",
        )
    return rows


def _try(policy: Policy, micro_batches: list[MicroBatch], on_micro_batch: OnMicroBatch) -> list[list[float]] | None:
    """The micro-batches' statistics; None when memory ran out on any rank. Gradients are in the parameters."""
    policy.stepper.zero_grad()
    rows: list[list[float]] = []
    is_full = False
    try:
        for index, micro_batch in enumerate(micro_batches):
            rows.append(backward(policy, micro_batch.to(policy.device), is_last=index == len(micro_batches) - 1))
            if on_micro_batch is not None:
                on_micro_batch()
    except RuntimeError as error:
        if not is_out_of_memory(error) or policy.stepper.is_lockstep:
            raise
        is_full = True
    if policy.ranks.any(is_full):
        free_memory()
        return None
    return rows


def backward(policy: Policy, micro_batch: MicroBatch, *, is_last: bool = True) -> list[float]:
    """Accumulate one micro-batch's gradient; returns its share of the step's statistics, as sums but for the last."""
    objective = policy.objective
    reference = policy.reference_logprobs(micro_batch) if objective.kl_coef else None
    has_bonus = objective.entropy_coef > 0
    logprobs, entropies = policy.stepper.forward(micro_batch, policy.temperature, has_bonus)
    tokens = Tokens(
        logprobs,
        micro_batch.sampled_logprobs,
        micro_batch.advantages,
        micro_batch.weights,
        micro_batch.sequence_index,
        reference,
        entropies[micro_batch.predictor_index] if has_bonus else None,
    )
    loss, stats = policy_loss(objective, tokens)
    policy.stepper.backward(loss, is_last=is_last)
    return [
        loss.item(),
        *_sums(stats),
        entropies.sum().item(),
        entropies.numel(),
        micro_batch.num_row_tokens,
        stats.max_gap,
    ]


def _sums(stats: LossStats) -> list[float]:
    means = (stats.clip_share, stats.mean_ratio, stats.approx_kl, stats.mean_gap, stats.reference_kl)
    return [stats.num_tokens, *(mean * stats.num_tokens for mean in means)]


def _totals(policy: Policy, rows: list[list[float]]) -> dict[str, float]:
    """This rank's rows of statistics -> the step's, over all ranks."""
    columns = list(zip(*rows, strict=True))
    (max_gap,) = policy.ranks.max([max(columns.pop())])
    sums = policy.ranks.sum([math.fsum(column) for column in columns])
    loss, tokens, clips, ratios, kls, gaps, references, entropies, positions, row_tokens = sums
    tokens, positions = max(1.0, tokens), max(1.0, positions)
    return {
        "loss": loss,
        "clip_share": clips / tokens,
        "mean_ratio": ratios / tokens,
        "approx_kl": kls / tokens,
        "mean_logprob_gap": gaps / tokens,
        "max_logprob_gap": max_gap,
        "reference_kl": references / tokens,
        "entropy": entropies / positions,
        "num_row_tokens": row_tokens,
    }


def _bad_rollouts(policy: Policy, micro_batches: list[MicroBatch]) -> set[int]:
    """The rollouts (as `rollout_index` counts them) of this rank's micro-batches whose gradient is not finite.

    Where a rollout's own log-probabilities say so it is that one, else all of its micro-batch.
    """
    found: set[int] = set()
    for micro_batch in micro_batches:
        policy.stepper.zero_grad()
        moved = micro_batch.to(policy.device)
        (loss, *_) = backward(policy, moved)
        terms = (policy.logprobs(moved) - moved.sampled_logprobs) * moved.advantages
        is_bad = ~torch.isfinite(terms)
        norm = policy.stepper.norm()
        if bool(is_bad.any()) or not math.isfinite(loss) or (norm is not None and not math.isfinite(norm)):
            found |= set(moved.rollout_index[is_bad if bool(is_bad.any()) else slice(None)].tolist())
    return found
