"""The output head in chunks: values and gradients are those of plain autograd, whatever of the head is trained."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from rft.trainers import head as head_module
from rft.trainers.head import Head, token_logprobs

VOCABULARY, WIDTH, POSITIONS, TEMPERATURE = 101, 16, 23, 0.8
FORMS = {"plain": (1.0, None), "capped": (1.0, 3.0), "scaled": (0.3, None), "both": (0.5, 2.0)}


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "_CHUNK_BYTES", 4 * VOCABULARY * 7)  # 7 positions: the last chunk is smaller


@dataclass(frozen=True)
class Case:
    """A head, hidden states, targets (two of them at one position are the same), gradients to send back."""

    head: Head
    hidden: Tensor
    index: Tensor
    targets: Tensor
    grad_logprobs: Tensor
    grad_entropies: Tensor


def a_case(form: str = "plain", has_bias: bool = True, is_trained: bool = True, seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)
    module = nn.Linear(WIDTH, VOCABULARY, bias=has_bias)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    module.requires_grad_(is_trained)
    index = torch.cat([torch.arange(POSITIONS), torch.tensor([0, 0, 5, 22])])
    targets = torch.randint(VOCABULARY, index.shape, generator=generator)
    targets[-4:] = targets[[0, 1, 6, 22]]
    hidden = torch.randn(POSITIONS, WIDTH, generator=generator)
    hidden[4] = 4 * module.weight.detach()[targets[4]]  # a confident guess
    grads = torch.randn(2, index.numel(), generator=generator)
    return Case(Head(module, *FORMS[form]), hidden, index, targets, grads[0], grads[1, :POSITIONS])


def ours(case: Case, with_entropy_grad: bool) -> list[Tensor]:
    """Log-probabilities, entropies, then the gradients of hidden and of the head's parameters."""
    hidden = case.hidden.clone().requires_grad_()
    logprobs, entropies = token_logprobs(
        case.head, hidden, case.index, case.targets, TEMPERATURE, with_entropy_grad=with_entropy_grad
    )
    assert entropies.requires_grad == with_entropy_grad
    return _backward(case, hidden, logprobs, entropies, with_entropy_grad)


def plain(case: Case, with_entropy_grad: bool) -> list[Tensor]:
    """The same through torch's own operations, the whole [P, V] at once."""
    hidden = case.hidden.clone().requires_grad_()
    logits = case.head.module(hidden).float() * case.head.scale
    if case.head.cap is not None:
        logits = case.head.cap * torch.tanh(logits / case.head.cap)
    logs = torch.log_softmax(logits / TEMPERATURE, -1)
    return _backward(case, hidden, logs[case.index, case.targets], -(logs.exp() * logs).sum(-1), with_entropy_grad)


def _backward(case: Case, hidden: Tensor, logprobs: Tensor, entropies: Tensor, with_entropy_grad: bool) -> list[Tensor]:
    case.head.module.zero_grad()
    loss = (logprobs * case.grad_logprobs).sum()
    if with_entropy_grad:
        loss = loss + (entropies * case.grad_entropies).sum()
    loss.backward()
    grads = [tensor.grad for tensor in (hidden, *case.head.module.parameters()) if tensor.requires_grad]
    return [logprobs.detach(), entropies.detach(), *(grad.clone() for grad in grads if grad is not None)]


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("with_entropy_grad", [False, True])
@pytest.mark.parametrize(("is_trained", "has_bias"), list(product([True, False], repeat=2)))
@pytest.mark.parametrize("form", list(FORMS))
def test_values_and_gradients_are_those_of_plain_autograd(form, is_trained, has_bias, with_entropy_grad):
    case = a_case(form, has_bias, is_trained)
    found, expected = ours(case, with_entropy_grad), plain(case, with_entropy_grad)
    assert len(found) == len(expected) == 3 + is_trained * (1 + has_bias)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32 and distance(one, other) < 1e-5


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trained_head_has_the_values_of_a_frozen_one_bit_for_bit(form, dtype):
    case = a_case(form)
    case.head.module.to(dtype)
    call = (case.hidden.to(dtype), case.index, case.targets, TEMPERATURE)
    trained = token_logprobs(case.head, *call)
    case.head.module.requires_grad_(False)
    for one, other in zip(trained, token_logprobs(case.head, *call), strict=True):
        assert torch.equal(one, other)


def test_worked_number():
    """h = 1, W = (ln 3, 0), T = 1: p = (3/4, 1/4), H = 0.75 ln(4/3) + 0.25 ln 4 = 0.562335.

    d log p_0 / d W = (1/4, -1/4); d log p_0 / d h = ln 3 / 4.
    d H / d z_v = -p_v (log p_v + H): -0.75 (-0.287682 + 0.562335) = -0.205990, and +0.205990.
    """
    module = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[3.0], [1.0]]).log())
    hidden = torch.ones(1, 1, requires_grad=True)
    zero = torch.tensor([0])
    logprobs, entropies = token_logprobs(Head(module, 1.0, None), hidden, zero, zero, 1.0, with_entropy_grad=True)
    assert logprobs.item() == pytest.approx(-0.287682, abs=1e-6) and entropies.item() == pytest.approx(
        0.562335, abs=1e-6
    )
    by_weight, by_hidden = torch.autograd.grad(logprobs.sum(), (module.weight, hidden), retain_graph=True)
    assert by_weight.flatten().tolist() == pytest.approx([0.25, -0.25]) and by_hidden.item() == pytest.approx(0.274653)
    by_weight, _ = torch.autograd.grad(entropies.sum(), (module.weight, hidden))
    assert by_weight.flatten().tolist() == pytest.approx([-0.205990, 0.205990], abs=1e-6)


def test_a_tied_weight_has_the_gradient_of_both_uses():
    case = a_case(has_bias=False)
    ids = torch.arange(POSITIONS) * 3

    def loss(is_ours: bool) -> Tensor:
        hidden = torch.tanh(nn.functional.embedding(ids, case.head.weight)) + case.hidden
        if is_ours:
            logprobs = token_logprobs(case.head, hidden, case.index, case.targets, TEMPERATURE)[0]
        else:
            logits = nn.functional.linear(hidden, case.head.weight) / TEMPERATURE
            logprobs = torch.log_softmax(logits, -1)[case.index, case.targets]
        return (logprobs * case.grad_logprobs).sum()

    found, expected = (torch.autograd.grad(loss(is_ours), case.head.weight)[0] for is_ours in (True, False))
    assert distance(found, expected) < 1e-5


@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_each_part_of_the_head_can_be_trained_alone(trained):
    """Hidden states without a gradient: everything below the head is frozen."""
    case = a_case("both", is_trained=False)
    parameter = getattr(case.head.module, trained).requires_grad_()
    logprobs, _ = token_logprobs(case.head, case.hidden, case.index, case.targets, TEMPERATURE)
    (found,) = torch.autograd.grad((logprobs * case.grad_logprobs).sum(), parameter)
    everything = plain(a_case("both"), with_entropy_grad=False)
    assert distance(found, everything[3 if trained == "weight" else 4]) < 1e-5


@pytest.mark.parametrize("with_entropy_grad", [False, True])
@pytest.mark.parametrize("is_trained", [True, False])
@pytest.mark.parametrize("form", ["plain", "both"])
def test_bfloat16_is_no_worse_than_plain_bfloat16(form, is_trained, with_entropy_grad):
    """Both against float32 with the same (rounded) weights; the error's norm over all of a tensor."""
    errors = {"ours": [0.0] * 3, "plain": [0.0] * 3}
    for seed in range(8):
        case = a_case(form, has_bias=False, is_trained=is_trained, seed=seed)
        low = Case(**{**case.__dict__, "hidden": case.hidden.bfloat16()})
        case.head.module.bfloat16()
        found = {"ours": ours(low, with_entropy_grad), "plain": plain(low, with_entropy_grad)}
        case.head.module.float()
        exact = plain(Case(**{**case.__dict__, "hidden": low.hidden.float()}), with_entropy_grad)
        for name, tensors in found.items():
            assert all(tensor.dtype == torch.bfloat16 for tensor in tensors[2:])
            for place, (one, other) in enumerate(zip(tensors[2:], exact[2:], strict=True)):
                errors[name][place] += distance(one, other) / 8
    for mine, theirs in zip(errors["ours"], errors["plain"], strict=True):
        assert mine <= 1.1 * theirs < 0.02


@pytest.mark.parametrize("is_trained", [True, False])
def test_nothing_to_predict_has_a_graph_and_zero_gradients(is_trained):
    """A rank that only pads must still give every parameter a gradient."""
    case = a_case(is_trained=is_trained)
    hidden, none = torch.zeros(0, WIDTH, requires_grad=True), torch.zeros(0, dtype=torch.int64)
    logprobs, entropies = token_logprobs(case.head, hidden, none, none, TEMPERATURE, with_entropy_grad=True)
    (logprobs.sum() + entropies.sum()).backward()
    assert hidden.grad is not None
    if is_trained:
        assert all(not parameter.grad.any() for parameter in case.head.module.parameters())


def test_weights_are_looked_up_at_each_use():
    """Sharded training replaces a module's parameters between two steps."""
    case = a_case()
    call = (case.hidden, case.index, case.targets, TEMPERATURE)
    before = token_logprobs(case.head, *call)[0]
    case.head.module.weight = nn.Parameter(torch.zeros(VOCABULARY, WIDTH))
    case.head.module.bias = nn.Parameter(torch.zeros(VOCABULARY))
    after = token_logprobs(case.head, *call)[0]
    assert not torch.equal(before, after)
    assert torch.allclose(after, torch.full_like(after, -torch.tensor(float(VOCABULARY)).log().item()))


@pytest.mark.parametrize("is_trained", [True, False])
def test_no_tensor_of_all_positions_and_the_vocabulary(is_trained):
    """The largest tensor that either pass makes is one chunk's, or the weight's own gradient."""
    case = a_case(is_trained=is_trained)
    hidden = case.hidden.repeat(9, 1).requires_grad_()
    index, targets = torch.arange(hidden.shape[0]), torch.zeros(hidden.shape[0], dtype=torch.int64)
    with _LargestTensor() as largest:
        logprobs, entropies = token_logprobs(case.head, hidden, index, targets, TEMPERATURE, with_entropy_grad=True)
        (logprobs.sum() + entropies.sum()).backward()
    assert largest.numel <= max(7 * VOCABULARY, VOCABULARY * WIDTH, hidden.numel()) < hidden.shape[0] * VOCABULARY


class _LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Sees every operation, the backward pass's too."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result
