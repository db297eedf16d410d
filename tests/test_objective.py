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


def test_every_variant_of_advantages_has_a_worked_number():
    """Grades 1, 0, 0.2: mean 0.4; the others' means 0.1, 0.6, 0.5; deviations squared 0.36 + 0.16 + 0.04, over 2: 0.28,
    its root 0.5291503."""
    scores, deviation = torch.tensor([1.0, 0.0, 0.2]), 0.5291503 + 1e-4
    left_out = [0.9, -0.6, -0.3]
    assert advantages(scores, "none").tolist() == pytest.approx([0.6, -0.4, -0.2])
    assert advantages(scores, "none", baseline="leave_one_out").tolist() == pytest.approx(left_out)
    assert advantages(scores, "group").tolist() == pytest.approx([x / deviation for x in (0.6, -0.4, -0.2)])
    both = advantages(scores, "group", baseline="leave_one_out").tolist()
    assert both == pytest.approx([x / deviation for x in left_out])
    rounds = advantages(scores, "none", (2, 1))  # the first two know only each other
    assert rounds.tolist() == pytest.approx([0.5, -0.5, -0.2])


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


@pytest.mark.parametrize(
    ("loss", "expected"),
    [("dapo", -(3.18 - 2) / 4), ("grpo", -(3.18 / 3 - 2) / 2), ("dr_grpo", -(3.18 - 2) / 20)],
)
def test_aggregations_worked_numbers(loss, expected):
    """Rollout 0 (A = 1) has the ratios 1.5 (clipped to 1.28), 1.1, 0.8: 3.18 together; rollout 1 (A = -1) has 2: -2.
    dr_grpo: 2 rollouts of at most 10 tokens."""
    logprobs = torch.tensor([1.5, 1.1, 0.8, 2.0]).log()
    values = torch.tensor([1.0, 1.0, 1.0, -1.0])
    weights = token_weights(loss, ROLLOUTS, SEQUENCES, 10)
    found, _ = policy_loss(Objective(loss=loss), Tokens(logprobs, torch.zeros(4), values, weights, SEQUENCES))
    assert found.item() == pytest.approx(expected)


def test_importance_weights_worked_numbers():
    """Ratios 3, 0.5, 1.5 with a cap of 2 weigh 2, 0.5, 1.5; with A = 1, -2, 1 and dapo's 1/3 the loss is
    -(2 - 1 + 1.5) / 3, and since pi / stopgrad(pi) is 1 the gradient by log pi is each token's own term: none is
    lost to a clip (1.5 is beyond 1.28)."""
    logprobs = torch.tensor([3.0, 0.5, 1.5]).log().requires_grad_()
    tokens = Tokens(logprobs, torch.zeros(3), torch.tensor([1.0, -2.0, 1.0]), torch.full((3,), 1 / 3), torch.zeros(3))
    loss, stats = policy_loss(Objective(importance_cap=2.0), tokens)
    assert loss.item() == pytest.approx(-2.5 / 3)
    loss.backward()
    assert logprobs.grad.tolist() == pytest.approx([-2 / 3, 1 / 3, -0.5])
    assert stats.clip_share == pytest.approx(1 / 3) and stats.mean_ratio == pytest.approx(5 / 3)


def test_importance_weights_of_sequences_worked_numbers():
    """gspo: ratios 8 and 0.5 make sqrt(8 x 0.5) = 2, cut to 1.6; the single 1.5 stays. With A = 1 and weights 1/4,
    1/4, 1/2: -(1.6 / 2 + 1.5 / 2); both tokens of the first get half of its -0.8."""
    logprobs = torch.tensor([8.0, 0.5, 1.5]).log().requires_grad_()
    weights = torch.tensor([0.25, 0.25, 0.5])
    tokens = Tokens(logprobs, torch.zeros(3), torch.ones(3), weights, torch.tensor([0, 0, 1]))
    loss, stats = policy_loss(Objective(loss="gspo", importance_cap=1.6), tokens)
    assert loss.item() == pytest.approx(-1.55)
    loss.backward()
    assert logprobs.grad.tolist() == pytest.approx([-0.4, -0.4, -0.75])
    assert stats.clip_share == pytest.approx(2 / 3)


@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo", "gspo"])
def test_importance_weights_change_nothing_on_policy(loss):
    """Where the policy is what sampled, weighing and clipping have the same gradient."""
    gradients = []
    for cap in (None, 2.0):
        logprobs = torch.linspace(-2, -0.1, 4).requires_grad_()
        tokens = Tokens(logprobs, logprobs.detach(), torch.tensor([1.0, 1.0, -0.5, -2.0]),
                        token_weights(loss, ROLLOUTS, SEQUENCES, 10), SEQUENCES)  # fmt: skip
        policy_loss(Objective(loss=loss, importance_cap=cap), tokens)[0].backward()
        gradients.append(logprobs.grad)
    assert torch.equal(*gradients)


def test_entropy_bonus_worked_numbers():
    """Two tokens with grpo's weights 1/4 and 3/4, entropies 2 and 1, coefficient 0.1: 0.1 (0.5 + 0.75) off the loss."""
    entropies = torch.tensor([2.0, 1.0], requires_grad=True)
    logprobs = torch.zeros(2, requires_grad=True)
    tokens = Tokens(logprobs, torch.zeros(2), torch.tensor([1.0, 0.0]), torch.tensor([0.25, 0.75]), torch.zeros(2),
                    entropies=entropies)  # fmt: skip
    loss, _ = policy_loss(Objective(loss="grpo", entropy_coef=0.1), tokens)
    assert loss.item() == pytest.approx(-0.25 - 0.125)
    loss.backward()
    assert entropies.grad.tolist() == pytest.approx([-0.025, -0.075])
    assert logprobs.grad.tolist() == pytest.approx([-0.25, 0.0])


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


@pytest.mark.parametrize("importance_cap", [None, 1.1])
@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo", "gspo", "cispo"])
def test_any_split_of_a_window_has_its_gradient(loss, importance_cap):
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
            tokens = Tokens(logprobs[cut], sampled[cut], values[cut], weights[cut], sequences[cut],
                            entropies=_entropy(logprobs[cut]))  # fmt: skip
            objective = Objective(loss=loss, importance_cap=importance_cap, entropy_coef=0.1)
            policy_loss(objective, tokens)[0].backward()
        gradients.append(logprobs.grad)
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-6, atol=1e-9)
    assert torch.allclose(gradients[0], gradients[2], rtol=1e-6, atol=1e-9)


@pytest.mark.slow  # TRL takes twenty seconds to import
@pytest.mark.parametrize("max_ratio", [None, 1.4])
@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo", "gspo", "cispo"])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_loss_and_gradient_equal_trl(num_ranks, loss, kl_coef, max_ratio):
    objective = Objective(loss=loss, kl_coef=kl_coef, max_ratio=max_ratio, cispo_max_ratio=1.2)
    stats, metrics = _check_parity(objective, num_ranks)
    if loss == "dapo":
        assert stats.clip_share == pytest.approx(metrics["clip_ratio/region_mean"][0]) and stats.clip_share > 0


@pytest.mark.slow  # TRL takes twenty seconds to import
@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo", "gspo"])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_importance_weights_equal_trl(num_ranks, loss, kl_coef):
    """`vllm_importance_sampling_mode: token_truncate`; gspo's weight is the mean's, where TRL's has the sum's."""
    stats, _ = _check_parity(Objective(loss=loss, kl_coef=kl_coef, importance_cap=1.05), num_ranks)
    assert 0 < stats.clip_share < 1


@pytest.mark.slow  # TRL takes twenty seconds to import
@pytest.mark.parametrize("importance_cap", [None, 1.05])
@pytest.mark.parametrize("loss", ["dapo", "cispo"])
def test_entropy_bonus_equals_trl(loss, importance_cap):
    """Where a window is one batch: TRL's bonus is a mean over each batch, ours one over the window."""
    objective = Objective(loss=loss, entropy_coef=0.3, importance_cap=importance_cap, cispo_max_ratio=1.2)
    _check_parity(objective, num_ranks=1, num_batches=1)


def _check_parity(objective, num_ranks, num_batches=2):
    """TRL's own GRPOTrainer._compute_loss on one padded batch, with what it reads of its trainer laid out around it.

    num_batches: how many like this one the window of dapo and cispo holds.
    """
    rows, width, max_length = 4, 6, 9
    generator = torch.Generator().manual_seed(1)
    ours = (torch.randn(rows, width, generator=generator) - 2).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    sampled = ours.detach() + 0.3 * torch.randn(rows, width, generator=generator)
    reference = ours.detach() + 0.2 * torch.randn(rows, width, generator=generator)
    mask = torch.tensor([[1, 1, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 0, 0, 1, 1, 0]])
    values = advantages(torch.tensor([1.0, 0.25, 0.0, 0.5]), "group")
    parts = num_batches if objective.loss in ("dapo", "cispo") else 1

    trainer = _FakeTrainer(theirs, num_ranks, objective, max_length)
    trl_loss = _trl_loss(trainer, sampled, mask, values, parts * int(mask.sum()), reference)
    trl_loss.backward()
    is_sampled = mask.bool()
    per_token = values[:, None].expand(rows, width)[is_sampled]
    sequences = torch.arange(rows)[:, None].expand(rows, width)[is_sampled]
    weights = token_weights(objective.loss, sequences, sequences, max_length) / parts
    tokens = Tokens(ours[is_sampled], sampled[is_sampled], per_token, weights, sequences,
                    reference[is_sampled] if objective.kl_coef else None,
                    _entropy(ours[is_sampled]) if objective.entropy_coef else None)  # fmt: skip
    found, stats = policy_loss(objective, tokens)
    found = found * (num_ranks if parts > 1 else 1)  # ranks average their gradients
    found.backward()
    assert found.item() == pytest.approx(trl_loss.item(), rel=1e-5)
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-5, atol=1e-8)
    return stats, trainer._metrics["train"]


def _entropy(logprobs):
    """Stands for an entropy: any function of what is trained."""
    return -logprobs.exp() * logprobs


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
    if trainer.use_vllm:  # as `token_truncate`, whose ratio is computed after sampling, with the policy as it is then
        gaps = (trainer._logprobs.detach() - sampled) * mask
        if trainer.importance_sampling_level == "sequence":
            gaps = gaps.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)
        inputs["importance_sampling_ratio"] = gaps.exp().clamp(max=trainer.importance_cap)
        inputs["old_per_token_logps"] = trainer._logprobs.detach()
    return trainer_module.GRPOTrainer._compute_loss(trainer, None, inputs)


class _FakeTrainer:
    """The attributes that TRL's loss reads, at TRL's defaults with one step per generation."""

    aux_loss_enabled = use_adaptive_entropy = False
    top_entropy_quantile, off_policy_mask_threshold = 1.0, None
    current_gradient_accumulation_steps = 1
    model = SimpleNamespace(training=True)

    def __init__(self, logprobs, num_ranks, objective, max_length):
        self._logprobs = logprobs
        self.importance_cap, self.entropy_coef = objective.importance_cap, objective.entropy_coef
        self._entropy_bonus_enabled = self.entropy_coef != 0.0
        self.use_vllm = self.vllm_importance_sampling_correction = (
            self.importance_cap is not None and objective.loss != "cispo"
        )
        is_gspo = objective.loss == "gspo"
        self.importance_sampling_level = "sequence" if is_gspo else "token"
        self.loss_type = "grpo" if is_gspo else objective.loss
        self.beta, self.max_completion_length = objective.kl_coef, max_length
        self.epsilon_low = objective.clip_low
        self.epsilon_high = objective.cispo_max_ratio if objective.loss == "cispo" else objective.clip_high
        self.args = SimpleNamespace(delta=objective.max_ratio, steps_per_generation=1, use_bias_correction_kl=False)
        self.accelerator = SimpleNamespace(
            num_processes=num_ranks,
            sync_gradients=True,
            gather=lambda x: x,
            gather_for_metrics=lambda x: x,
            reduce=lambda x, reduction: x,
        )
        self._metrics = defaultdict(lambda: defaultdict(list))

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        return self._logprobs, _entropy(self._logprobs), None
