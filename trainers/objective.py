"""Advantages and the policy losses: pure functions of tensors, no model, no distribution.

All log-probabilities are natural logs at the sampling temperature over the full vocabulary; r_t = pi / mu, with mu what
the engine recorded when it sampled: there is no second pass for "old" log-probabilities. A loss is a sum over tokens of
a weight and a term; the weights are those of the whole optimizer window, so that any split of it has the same gradient.
Parity with TRL 1.16 is a test.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

Loss = Literal["grpo", "dapo", "dr_grpo", "gspo", "cispo"]
_STD_EPSILON = 1e-4  # TRL's: keeps a nearly equal group from being blown up


@dataclass(frozen=True, slots=True)
class Objective:
    """What is minimised; `policy_loss` has the formulas.

    max_ratio: a second clip, of r itself, where A < 0. importance_cap: r is a truncated weight instead of being
    clipped. kl_coef: of the KL to the reference. entropy_coef: of the bonus.
    """

    loss: Loss = "dapo"
    clip_low: float = 0.2
    clip_high: float = 0.28
    max_ratio: float | None = None
    cispo_max_ratio: float = 5.0
    importance_cap: float | None = None
    kl_coef: float = 0.0
    entropy_coef: float = 0.0


@dataclass(frozen=True, slots=True)
class LossStats:
    """What one micro-batch says of the policy, averaged over its tokens (0 for a micro-batch without tokens)."""

    num_tokens: int
    clip_share: float  # tokens whose gradient the clip removed; with importance weights and cispo: whose weight was cut
    mean_ratio: float  # pi / mu
    approx_kl: float  # KL(mu || pi), k3 estimator: mean of r - 1 - log r
    mean_gap: float  # |log mu - log pi|
    max_gap: float
    reference_kl: float = 0.0  # KL(pi || reference), k3 estimator: mean of exp(d) - d - 1, d = log ref - log pi


@dataclass(frozen=True, slots=True)
class Tokens:
    """The loss-bearing tokens of a micro-batch, all [N].

    logprobs (log pi) carries the gradient; sampled_logprobs (log mu), advantages, weights: float32;
    sequence_index: int64, which training sequence a token belongs to; reference: float32 log-probabilities, or None;
    entropies: float32 with a gradient, of the distributions under pi that the tokens were sampled from, or None.
    """

    logprobs: Tensor
    sampled_logprobs: Tensor
    advantages: Tensor
    weights: Tensor
    sequence_index: Tensor
    reference: Tensor | None = None
    entropies: Tensor | None = None


def advantages(
    scores: Tensor,
    scale: Literal["none", "group"],
    round_sizes: tuple[int, ...] = (),
    baseline: Literal["mean", "leave_one_out"] = "mean",
) -> Tensor:
    """A_i = r_i - mean(r); with "group" divided by (std(r) + 1e-4), std with n - 1, as TRL's `scale_rewards`.

    scores: [n] float32, the grades of one group -> [n] float32. Equal grades give exactly zero.
    round_sizes: where the group was sampled in rounds, each decided on by the ones before, the mean is over the
    rollouts up to and with a rollout's own round (rft/budget.py says why); empty is one round.
    baseline: "leave_one_out" takes the mean over the others, n / (n - 1) times as far away (Kool et al. 2019).
    """
    if bool((scores == scores[0]).all()):  # the mean of equal floats need not be that float
        return torch.zeros_like(scores)
    sizes = round_sizes or (scores.numel(),)
    parts: list[Tensor] = []
    for size, end in zip(sizes, accumulate(sizes), strict=True):
        centred = scores[end - size : end] - scores[:end].mean()
        parts.append(centred * (end / (end - 1)) if baseline == "leave_one_out" and end > 1 else centred)
    found: Tensor = torch.cat(parts)
    if scale == "group":
        found /= scores.std() + _STD_EPSILON
    return found


def token_weights(loss: Loss, rollout_index: Tensor, sequence_index: Tensor, max_length: int) -> Tensor:
    """How much each token of an optimizer window counts: [N] int64, twice -> [N] float32.

    dapo, cispo: 1 / tokens. grpo: 1 / (rollouts x tokens of the rollout). gspo: the same of sequences (a rollout has
    several when it forks). dr_grpo: 1 / (rollouts x max_length), max_length the tokens a rollout may sample.
    Rollouts and sequences count when they have a token here.
    """
    if loss in ("dapo", "cispo"):
        return torch.full(rollout_index.shape, 1.0 / max(1, rollout_index.numel()))
    units = sequence_index if loss == "gspo" else rollout_index
    _, inverse, counts = torch.unique(units, return_inverse=True, return_counts=True)
    if loss == "dr_grpo":
        return torch.full(units.shape, 1.0 / max(1, counts.numel() * max_length))
    return torch.reciprocal(max(1, counts.numel()) * counts[inverse].float())


def policy_loss(objective: Objective, tokens: Tokens) -> tuple[Tensor, LossStats]:
    """sum_t w_t (l_t + kl_coef k_t - entropy_coef H_t): a scalar (0 with a graph without tokens), and statistics.

    l of grpo, dapo, dr_grpo: -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), r cut to max_ratio before, which only
    counts where A < 0 (INTELLECT-2's two-sided clip). gspo: the same with the sequence's ratio exp(mean_t log r_t)
    (arXiv:2507.18071). With importance_cap: -stopgrad(min(r, importance_cap)) A pi / stopgrad(pi), for gspo both
    ratios the sequence's; there is one step per window, so pi / stopgrad(pi) is 1 and nothing is left to clip.
    cispo: -stopgrad(min(r, cispo_max_ratio)) A log pi (arXiv:2506.13585).
    k = exp(d) - d - 1, d = log ref - log pi. H: the token's entropy; with dapo's and cispo's weights sum_t w_t H_t is
    its mean over the window (TRL's bonus), with others it is aggregated as the loss is (verl's).
    """
    if objective.loss == "cispo":
        per_token, is_cut = _cispo(objective, tokens)
    elif objective.importance_cap is not None:
        per_token, is_cut = _truncated(objective, objective.importance_cap, tokens)
    else:
        per_token, is_cut = _clipped(objective, tokens)
    kl = torch.zeros(())
    if tokens.reference is not None:
        distance = tokens.reference - tokens.logprobs
        kl = distance.exp() - distance - 1
        per_token = per_token + objective.kl_coef * kl
    if tokens.entropies is not None:
        per_token = per_token - objective.entropy_coef * tokens.entropies
    return (tokens.weights * per_token).sum(), _stats(tokens, is_cut, kl.detach())


def _clipped(objective: Objective, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """[N] terms, and [N] bool: the clip removed the token's gradient."""
    ratio = _ratio(objective, tokens, tokens.sampled_logprobs)
    clipped = ratio.clamp(1 - objective.clip_low, 1 + objective.clip_high)
    bounded = ratio if objective.max_ratio is None else ratio.clamp(max=objective.max_ratio)
    per_token = -torch.min(bounded * tokens.advantages, clipped * tokens.advantages)
    too_low = (ratio < 1 - objective.clip_low) & (tokens.advantages < 0)
    return per_token, too_low | ((ratio > 1 + objective.clip_high) & (tokens.advantages > 0))


def _truncated(objective: Objective, cap: float, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """[N] terms, and [N] bool: the token's weight was cut."""
    weight = _ratio(objective, tokens, tokens.sampled_logprobs).detach()
    unit = _ratio(objective, tokens, tokens.logprobs.detach())
    return -weight.clamp(max=cap) * tokens.advantages * unit, weight > cap


def _cispo(objective: Objective, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """[N] terms, and [N] bool: the token's ratio was cut."""
    ratio = _ratio(objective, tokens, tokens.sampled_logprobs).detach()
    per_token = -ratio.clamp(max=objective.cispo_max_ratio) * tokens.advantages * tokens.logprobs
    return per_token, (ratio > objective.cispo_max_ratio) & (tokens.advantages != 0)


def _ratio(objective: Objective, tokens: Tokens, base: Tensor) -> Tensor:
    """[N]: pi / exp(base) of each token; for gspo the geometric mean over its sequence."""
    log_ratio = tokens.logprobs - base
    return (_sequence_means(log_ratio, tokens.sequence_index) if objective.loss == "gspo" else log_ratio).exp()


def _sequence_means(values: Tensor, index: Tensor) -> Tensor:
    """[N], [N] int64 -> [N]: at each place the mean over all places of the same index."""
    _, inverse, counts = torch.unique(index, return_inverse=True, return_counts=True)
    sums = torch.zeros(counts.numel(), dtype=values.dtype, device=values.device).index_add(0, inverse, values)
    means: Tensor = sums / counts
    return means[inverse]


def _stats(tokens: Tokens, is_cut: Tensor, kl: Tensor) -> LossStats:
    num_tokens = tokens.logprobs.numel()
    if num_tokens == 0:
        return LossStats(0, 0.0, 0.0, 0.0, 0.0, 0.0)
    log_ratio = (tokens.logprobs - tokens.sampled_logprobs).detach()
    ratio = log_ratio.exp()
    means = [is_cut.float().mean(), ratio.mean(), (ratio - 1 - log_ratio).mean(), log_ratio.abs().mean()]
    clip_share, mean_ratio, approx_kl, mean_gap, reference_kl = torch.stack([*means, kl.mean()]).tolist()
    largest = log_ratio.abs().max().item()
    return LossStats(num_tokens, clip_share, mean_ratio, approx_kl, mean_gap, largest, reference_kl)
