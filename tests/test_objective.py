"""Advantages and the loss: worked numbers, parity with TRL, exact zeros."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from rft.trainers.objective import advantages, dapo_loss


def test_advantages_are_centred():
    assert advantages(torch.tensor([1.0, 0.0, 0.5, 0.5]), "none").tolist() == [0.5, -0.5, 0.0, 0.0]


def test_group_scale_divides_by_the_sample_deviation():
    scores = torch.tensor([1.0, 0.0, 0.5])  # mean 0.5, std with n - 1: 0.5
    expected = [0.5 / 0.5001, -0.5 / 0.5001, 0.0]
    assert advantages(scores, "group").tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("scale", ["none", "group"])
@pytest.mark.parametrize("score", [0.1, 1 / 3, 0.7, 1e-8])
def test_equal_grades_give_exactly_zero_gradient(scale, score):
    logprobs = torch.tensor([-1.0, -2.0, -0.5] * 3, requires_grad=True)
    values = advantages(torch.full((9,), score), scale)
    loss, _ = dapo_loss(logprobs, logprobs.detach() - 0.3, values, 0.2, 0.28, 9)
    loss.backward()
    assert loss.item() == 0.0
    assert logprobs.grad.abs().max().item() == 0.0


def test_loss_worked_numbers():
    # ratios 1.5 (clipped for A > 0), 0.5 (clipped for A < 0), 1.1 and 0.5 with A > 0 (not clipped)
    ratio = torch.tensor([1.5, 0.5, 1.1, 0.5])
    values = torch.tensor([1.0, -1.0, -2.0, 1.0])
    logprobs = ratio.log().requires_grad_()
    loss, stats = dapo_loss(logprobs, torch.zeros(4), values, 0.2, 0.28, 8)
    # -(min(1.5, 1.28) + min(-0.5, -0.8) + min(-2.2, -2.2) + min(0.5, 0.8)) / 8
    assert loss.item() == pytest.approx(-(1.28 - 0.8 - 2.2 + 0.5) / 8)
    loss.backward()
    assert logprobs.grad.tolist() == pytest.approx([0.0, 0.0, 2.2 / 8, -0.5 / 8])
    assert stats.num_tokens == 4
    assert stats.clip_share == pytest.approx(0.5)
    assert stats.mean_ratio == pytest.approx(0.9)
    assert stats.approx_kl == pytest.approx(sum(r - 1 - math.log(r) for r in ratio.tolist()) / 4, rel=1e-5)
    assert stats.mean_gap == pytest.approx(sum(abs(math.log(r)) for r in ratio.tolist()) / 4, rel=1e-5)
    assert stats.max_gap == pytest.approx(math.log(2))


def test_a_window_without_tokens_has_a_graph_and_no_loss():
    logprobs = torch.zeros(0, requires_grad=True)
    loss, stats = dapo_loss(logprobs, torch.zeros(0), torch.zeros(0), 0.2, 0.28, 10)
    loss.backward()
    assert loss.item() == 0.0 and stats.num_tokens == 0


def test_loss_of_a_split_is_the_loss_of_the_whole():
    generator = torch.Generator().manual_seed(0)
    logprobs, sampled, values = torch.randn(3, 40, generator=generator)
    whole, _ = dapo_loss(logprobs, sampled, values, 0.2, 0.28, 40)
    cuts = [slice(start, start + 7) for start in range(0, 40, 7)]
    parts = [dapo_loss(logprobs[cut], sampled[cut], values[cut], 0.2, 0.28, 40)[0] for cut in cuts]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-5)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_loss_and_gradient_equal_trl(num_ranks):
    """TRL's own GRPOTrainer._compute_loss on one padded batch, with what it reads of its trainer laid out around it."""
    rows, width = 4, 6
    generator = torch.Generator().manual_seed(1)
    ours = (torch.randn(rows, width, generator=generator) - 2).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    sampled = ours.detach() + 0.3 * torch.randn(rows, width, generator=generator)
    mask = torch.tensor([[1, 1, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 0, 0, 1, 1, 0]])
    values = advantages(torch.tensor([1.0, 0.25, 0.0, 0.5]), "group")
    window = 2 * int(mask.sum())  # this batch is half of what the ranks of a window see

    trl_loss, trl_clip_share = _trl_loss(theirs, sampled, mask, values, window, num_ranks)
    trl_loss.backward()
    is_sampled = mask.bool()
    per_token = values[:, None].expand(rows, width)[is_sampled]
    loss, stats = dapo_loss(ours[is_sampled], sampled[is_sampled], per_token, 0.2, 0.28, window)
    loss = loss * num_ranks  # ranks average their gradients
    loss.backward()
    assert loss.item() == pytest.approx(trl_loss.item(), rel=1e-6)
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-6, atol=1e-8)
    assert stats.clip_share == pytest.approx(trl_clip_share) and trl_clip_share > 0


def _trl_loss(logprobs, sampled, mask, values, window, num_ranks):
    trainer_module = pytest.importorskip("trl.trainer.grpo_trainer", reason="TRL is the oracle of this test")
    trainer = _FakeTrainer(logprobs, num_ranks)
    ids = torch.ones_like(mask)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1],
        "completion_ids": ids,
        "completion_mask": ids,
        "tool_mask": mask,
        "advantages": values,
        "old_per_token_logps": sampled,
        "num_items_in_batch": torch.tensor(window),
    }
    loss = trainer_module.GRPOTrainer._compute_loss(trainer, None, inputs)
    return loss, trainer._metrics["train"]["clip_ratio/region_mean"][0]


class _FakeTrainer:
    """The attributes that TRL's loss reads, at TRL's defaults for `dapo` with one step per generation."""

    aux_loss_enabled = use_vllm = _entropy_bonus_enabled = False
    top_entropy_quantile, off_policy_mask_threshold, beta = 1.0, None, 0.0
    importance_sampling_level, loss_type = "token", "dapo"
    epsilon_low, epsilon_high = 0.2, 0.28
    current_gradient_accumulation_steps = 1
    args = SimpleNamespace(delta=None, steps_per_generation=1, use_bias_correction_kl=False)
    model = SimpleNamespace(training=True)

    def __init__(self, logprobs, num_ranks):
        self._logprobs = logprobs
        self.accelerator = SimpleNamespace(num_processes=num_ranks, gather=lambda x: x, reduce=lambda x, reduction: x)
        self._metrics = defaultdict(lambda: defaultdict(list))

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        return self._logprobs, torch.zeros_like(self._logprobs), None
