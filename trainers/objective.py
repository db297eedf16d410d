"""Advantages and the policy loss: pure functions of tensors, no model, no distribution.

All log-probabilities are natural logs at the sampling temperature over the full vocabulary. Formulas follow
"DAPO" (arXiv:2503.14476, token-level loss, decoupled clipping) as TRL's GRPOTrainer implements it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

_STD_EPSILON = 1e-4  # TRL's: keeps a nearly equal group from being blown up


@dataclass(frozen=True, slots=True)
class LossStats:
    """What one micro-batch says of the policy, averaged over its tokens (0 for a micro-batch without tokens)."""

    num_tokens: int
    clip_share: float  # tokens whose gradient the clip removed
    mean_ratio: float  # pi / mu
    approx_kl: float  # KL(mu || pi), k3 estimator: mean of r - 1 - log r
    mean_gap: float  # |log mu - log pi|
    max_gap: float


def advantages(scores: Tensor, scale: Literal["none", "group"], round_sizes: tuple[int, ...] = ()) -> Tensor:
    """A_i = r_i - mean(r); with "group" divided by (std(r) + 1e-4), std with n - 1, as TRL's `scale_rewards`.

    scores: [n] float32, the grades of one group -> [n] float32. Equal grades give exactly zero.
    round_sizes: where the group was sampled in rounds, each decided on by the ones before, the mean is over the
    rollouts up to and with a rollout's own round (rft/budget.py says why); empty is one round.
    """
    if bool((scores == scores[0]).all()):  # the mean of equal floats need not be that float
        return torch.zeros_like(scores)
    sizes = round_sizes or (scores.numel(),)
    ends = list(accumulate(sizes))
    centred = torch.cat([scores[end - size : end] - scores[:end].mean() for size, end in zip(sizes, ends, strict=True)])
    return centred / (scores.std() + _STD_EPSILON) if scale == "group" else centred


def dapo_loss(
    logprobs: Tensor, sampled_logprobs: Tensor, advantages: Tensor, clip_low: float, clip_high: float, num_tokens: int
) -> tuple[Tensor, LossStats]:
    """sum_t -min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t) / num_tokens, r_t = exp(log pi_t - log mu_t).

    logprobs (log pi, carries the gradient), sampled_logprobs (log mu), advantages: [N] float32; num_tokens: the
    loss-bearing tokens of the whole optimizer window, over all micro-batches and ranks, so that the sum over any
    split of the window is the same loss. Returns a scalar (0 with a graph when N is 0) and detached statistics.
    """
    log_ratio = logprobs - sampled_logprobs
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -torch.min(ratio * advantages, clipped * advantages).sum() / num_tokens
    return loss, _stats(log_ratio.detach(), advantages, clip_low, clip_high)


def _stats(log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> LossStats:
    num_tokens = log_ratio.numel()
    if num_tokens == 0:
        return LossStats(0, 0.0, 0.0, 0.0, 0.0, 0.0)
    ratio = log_ratio.exp()
    is_clipped = ((ratio < 1 - clip_low) & (advantages < 0)) | ((ratio > 1 + clip_high) & (advantages > 0))
    means = torch.stack(
        [is_clipped.float().mean(), ratio.mean(), (ratio - 1 - log_ratio).mean(), log_ratio.abs().mean()]
    )
    clip_share, mean_ratio, approx_kl, mean_gap = means.tolist()
    return LossStats(num_tokens, clip_share, mean_ratio, approx_kl, mean_gap, log_ratio.abs().max().item())
