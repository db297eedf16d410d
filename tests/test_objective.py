"""Advantages and the loss: worked numbers, parity with TRL, exact zeros."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from rft.trainers.objective import Objective, Tokens, advantages, policy_loss, token_weights


def dapo_loss(logprobs, sampled, values, clip_low, clip_high, num_tokens):
    """The default loss over a window of `num_tokens`."""
    weights = torch.full(logprobs.shape, 1 / num_tokens)
    index = torch.zeros(logprobs.shape, dtype=torch.int64)
    objective = Objective(clip_low=clip_low, clip_high=clip_high)
    return policy_loss(objective, Tokens(logprobs, sampled, values, weights, index))


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


def test_leave_one_out_is_the_mean_of_the_others():
    scores = torch.tensor([1.0, 0.0, 0.5, 0.25])
    expected = [score - (1.75 - score) / 3 for score in scores.tolist()]
    assert advantages(scores, "none", baseline="leave_one_out").tolist() == pytest.approx(expected)
    second = advantages(scores, "none", (2, 2), "leave_one_out")  # the first round knows nothing of the second
    assert second.tolist() == pytest.approx([1.0, -1.0, 0.5 - 1.25 / 3, 0.25 - 1.5 / 3])


# two rollouts; the first forked after 2 of its 3 tokens
ROLLOUTS, SEQUENCES = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 1, 2])


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ("dapo", [1 / 4] * 4),
        ("cispo", [1 / 4] * 4),
        ("grpo", [1 / 6, 1 / 6, 1 / 6, 1 / 2]),
        ("gspo", [1 / 6, 1 / 6, 1 / 3, 1 / 3]),
        ("dr_grpo", [1 / 20] * 4),
    ],
)
def test_weights_worked_numbers(loss, expected):
    assert token_weights(loss, ROLLOUTS, SEQUENCES, 10).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo", "gspo", "cispo"])
def test_a_window_without_tokens_weighs_nothing(loss):
    nothing = torch.zeros(0, dtype=torch.int64)
    assert token_weights(loss, nothing, nothing, 10).numel() == 0


def test_gspo_worked_numbers():
    # a sequence with ratios 2 and 1/2 has the ratio 1: not clipped, and both tokens get half of its gradient
    logprobs = torch.tensor([2.0, 0.5, 1.5]).log().requires_grad_()
    tokens = Tokens(logprobs, torch.zeros(3), torch.tensor([1.0, 1.0, 1.0]), torch.tensor([0.25, 0.25, 0.5]),
                    torch.tensor([0, 0, 1]))  # fmt: skip
    loss, stats = policy_loss(Objective(loss="gspo"), tokens)
    assert loss.item() == pytest.approx(-(0.5 * 1.0 + 0.5 * 1.28))
    loss.backward()
    assert logprobs.grad.tolist() == pytest.approx([-0.25, -0.25, 0.0])
    assert stats.clip_share == pytest.approx(1 / 3)


def test_cispo_worked_numbers():
    ratio = torch.tensor([8.0, 0.1])
    logprobs = ratio.log().requires_grad_()
    tokens = Tokens(logprobs, torch.zeros(2), torch.tensor([1.0, -2.0]), torch.full((2,), 0.5), torch.zeros(2))
    loss, stats = policy_loss(Objective(loss="cispo"), tokens)
    loss.backward()
    assert logprobs.grad.tolist() == pytest.approx([-0.5 * 5.0, 0.5 * 0.1 * 2.0])  # no token's gradient is lost
    assert stats.clip_share == 0.5


def test_the_second_clip_counts_where_the_advantage_is_negative():
    logprobs = torch.tensor([6.0, 6.0]).log().requires_grad_()
    tokens = Tokens(logprobs, torch.zeros(2), torch.tensor([-1.0, 1.0]), torch.ones(2), torch.zeros(2))
    loss, _ = policy_loss(Objective(max_ratio=3.0), tokens)
    assert loss.item() == pytest.approx(3.0 - 1.28)
    loss.backward()
    assert logprobs.grad.tolist() == [0.0, 0.0]


def test_kl_worked_numbers():
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    reference = torch.tensor([-1.5, -2.0])
    tokens = Tokens(logprobs, logprobs.detach(), torch.zeros(2), torch.full((2,), 0.5), torch.zeros(2), reference)
    loss, stats = policy_loss(Objective(kl_coef=0.1), tokens)
    kl = math.exp(-0.5) + 0.5 - 1
    assert loss.item() == pytest.approx(0.1 * kl / 2) and stats.reference_kl == pytest.approx(kl / 2)
    loss.backward()
    assert logprobs.grad.tolist() == pytest.approx([0.05 * (1 - math.exp(-0.5)), 0.0])


@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo", "gspo", "cispo"])
def test_any_split_of_a_window_has_its_gradient(loss):
    generator = torch.Generator().manual_seed(0)
    sampled, values = torch.randn(2, 40, generator=generator)
    rollouts = torch.arange(40) // 8
    sequences = torch.arange(40) // 4
    weights = token_weights(loss, rollouts, sequences, 9)
    start = sampled + 0.3 * torch.randn(40, generator=generator)
    gradients = []
    for size in (40, 8, 4):  # a sequence is never cut
        logprobs = start.clone().requires_grad_()
        for cut in (slice(begin, begin + size) for begin in range(0, 40, size)):
            tokens = Tokens(logprobs[cut], sampled[cut], values[cut], weights[cut], sequences[cut])
            policy_loss(Objective(loss=loss), tokens)[0].backward()
        gradients.append(logprobs.grad)
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-6, atol=1e-9)
    assert torch.allclose(gradients[0], gradients[2], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("max_ratio", [None, 1.4])
@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo", "gspo", "cispo"])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_loss_and_gradient_equal_trl(num_ranks, loss, kl_coef, max_ratio):
    """TRL's own GRPOTrainer._compute_loss on one padded batch, with what it reads of its trainer laid out around it."""
    rows, width, max_length = 4, 6, 9
    generator = torch.Generator().manual_seed(1)
    ours = (torch.randn(rows, width, generator=generator) - 2).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    sampled = ours.detach() + 0.3 * torch.randn(rows, width, generator=generator)
    reference = ours.detach() + 0.2 * torch.randn(rows, width, generator=generator)
    mask = torch.tensor([[1, 1, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 0, 0, 1, 1, 0]])
    values = advantages(torch.tensor([1.0, 0.25, 0.0, 0.5]), "group")
    is_window_split = loss in ("dapo", "cispo")  # this batch is half of what the ranks of a window see
    window = (2 if is_window_split else 1) * int(mask.sum())
    objective = Objective(loss=loss, kl_coef=kl_coef, max_ratio=max_ratio, cispo_max_ratio=1.2)

    trainer = _FakeTrainer(theirs, num_ranks, objective, max_length)
    trl_loss = _trl_loss(trainer, sampled, mask, values, window, reference)
    trl_loss.backward()
    is_sampled = mask.bool()
    per_token = values[:, None].expand(rows, width)[is_sampled]
    sequences = torch.arange(rows)[:, None].expand(rows, width)[is_sampled]
    weights = token_weights(loss, sequences, sequences, max_length) / (2 if is_window_split else 1)
    tokens = Tokens(ours[is_sampled], sampled[is_sampled], per_token, weights, sequences,
                    reference[is_sampled] if kl_coef else None)  # fmt: skip
    found, stats = policy_loss(objective, tokens)
    found = found * (num_ranks if is_window_split else 1)  # ranks average their gradients
    found.backward()
    assert found.item() == pytest.approx(trl_loss.item(), rel=1e-5)
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-5, atol=1e-8)
    if loss == "dapo":
        clip_share = trainer._metrics["train"]["clip_ratio/region_mean"][0]
        assert stats.clip_share == pytest.approx(clip_share) and clip_share > 0


def _trl_loss(trainer, sampled, mask, values, window, reference):
    trainer_module = pytest.importorskip("trl.trainer.grpo_trainer", reason="TRL is the oracle of this test")
    ids = torch.ones_like(mask)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1],
        "completion_ids": ids,
        "completion_mask": ids,
        "tool_mask": mask,
        "advantages": values,
        "old_per_token_logps": sampled,
        "ref_per_token_logps": reference,
        "num_items_in_batch": torch.tensor(window),
    }
    return trainer_module.GRPOTrainer._compute_loss(trainer, None, inputs)


class _FakeTrainer:
    """The attributes that TRL's loss reads, at TRL's defaults with one step per generation."""

    aux_loss_enabled = use_vllm = _entropy_bonus_enabled = False
    top_entropy_quantile, off_policy_mask_threshold = 1.0, None
    current_gradient_accumulation_steps = 1
    model = SimpleNamespace(training=True)

    def __init__(self, logprobs, num_ranks, objective, max_length):
        self._logprobs = logprobs
        is_gspo = objective.loss == "gspo"
        self.importance_sampling_level = "sequence" if is_gspo else "token"
        self.loss_type = "grpo" if is_gspo else objective.loss
        self.beta, self.max_completion_length = objective.kl_coef, max_length
        self.epsilon_low = objective.clip_low
        self.epsilon_high = objective.cispo_max_ratio if objective.loss == "cispo" else objective.clip_high
        self.args = SimpleNamespace(delta=objective.max_ratio, steps_per_generation=1, use_bias_correction_kl=False)
        self.accelerator = SimpleNamespace(
            num_processes=num_ranks,
            gather=lambda x: x,
            gather_for_metrics=lambda x: x,
            reduce=lambda x, reduction: x,
        )
        self._metrics = defaultdict(lambda: defaultdict(list))

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        return self._logprobs, torch.zeros_like(self._logprobs), None
