"""Log-probabilities and entropies from hidden states without ever holding a [T, V] tensor, and their gradients.

The output head is applied to a chunk of positions at a time. A frozen head needs a gradient for the hidden states
alone: each chunk keeps the expectation of the head's rows under the softmax ([P, h]), and the backward pass needs no
second pass over the vocabulary. A trained head keeps nothing: its backward pass computes the chunks again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rft.errors import UserError

_CHUNK_BYTES = 64 * 2**20  # of one fp32 [rows, V] temporary


@dataclass(frozen=True, slots=True)
class Head:
    """logits = cap * tanh(scale * (h W^T + bias) / cap), without the tanh where cap is None.

    W and bias are looked up in the module at each use: sharded training swaps them between two uses.
    """

    module: nn.Module
    scale: float
    cap: float | None

    @property
    def weight(self) -> Tensor:
        """[V, h], tied to the embedding or not."""
        return cast("Tensor", self.module.weight)

    @property
    def bias(self) -> Tensor | None:
        """[V], or None."""
        return cast("Tensor | None", getattr(self.module, "bias", None))

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """hidden: [P, h] -> [P, V] float32. The product is taken in the weights' dtype, as engines do."""
        logits = nn.functional.linear(hidden, weight, bias).float()
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


def find_head(model: PreTrainedModel) -> Head:
    """The output head of a causal LM, checked against the model's own logits.

    Raises UserError for a model whose logits are not a scaled, soft-capped linear map of its last hidden state.
    """
    module, config = model.get_output_embeddings(), model.config.get_text_config()
    multiplier = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
    scale = multiplier / (getattr(config, "logits_scaling", None) or 1.0)  # Cohere, Falcon-H1; Granite
    if isinstance(module, nn.Module) and isinstance(getattr(module, "weight", None), Tensor):
        head = Head(module, float(scale), getattr(config, "final_logit_softcapping", None))
        if _agrees(model, head):
            return head
    raise UserError(
        f"the output head of {type(model).__name__} is not one rft knows (linear, scaled, soft-capped)",
        cure="use another model, or teach rft/trainers/head.py this head",
    )


@torch.no_grad()
def _agrees(model: PreTrainedModel, head: Head) -> bool:
    ids = torch.arange(1, 5, device=model.device)[None]
    expected = model(input_ids=ids, use_cache=False).logits[0].float()
    hidden = decoder(model)(input_ids=ids, use_cache=False).last_hidden_state[0]
    found = head.logits(hidden, head.weight, head.bias)
    return torch.allclose(found, expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))


def decoder(model: PreTrainedModel) -> nn.Module:
    """The part of a causal LM below its output head."""
    part: nn.Module = getattr(model, model.base_model_prefix)
    return part


def token_logprobs(
    head: Head, hidden: Tensor, index: Tensor, targets: Tensor, temperature: float, with_entropy_grad: bool = False
) -> tuple[Tensor, Tensor]:
    """Natural-log probabilities at `temperature`, and the entropies (nats) of the distributions they come from.

    hidden: [P, h]; index: [N] int64 into P; targets: [N] int64 -> ([N] float32, [P] float32). Gradients reach hidden
    and, where they are trained, the head's weight and bias. The entropies have one only `with_entropy_grad`: for a
    frozen head it costs a second product with W per chunk and [P, h] float32.
    """
    call = _Call(head, index, targets, temperature, with_entropy_grad)
    weight, bias = head.weight, head.bias
    is_trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    function = _TrainedHead if is_trained else _FrozenHead
    result: tuple[Tensor, Tensor] = function.apply(hidden, weight, bias, call)  # type: ignore[no-untyped-call]
    return result


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Neighbouring positions; `entries` are the targets predicted there, `places` their rows and columns in logs."""

    rows: slice
    logs: Tensor  # [rows, V] float32 log-probabilities, the consumer's to overwrite
    slope: Tensor | None  # [rows, V] float32, the soft cap's derivative f'(z); None without one
    entries: Tensor  # [n] int64
    places: tuple[Tensor, Tensor]  # [n] int64, twice


@dataclass(frozen=True, slots=True)
class _Call:
    """What the backward pass needs to know of a call of `token_logprobs`, besides the weights."""

    head: Head
    index: Tensor
    targets: Tensor
    temperature: float
    with_entropy_grad: bool

    def chunks(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Iterator[_Chunk]:
        """The log-softmax of every position, a chunk at a time."""
        size = max(1, _CHUNK_BYTES // (4 * weight.shape[0]))
        for start in range(0, hidden.shape[0], size):
            rows = slice(start, min(start + size, hidden.shape[0]))
            logits = self.head.logits(hidden[rows], weight, bias)
            slope = None if self.head.cap is None else 1 - (logits / self.head.cap) ** 2
            logs = torch.log_softmax(logits.div_(self.temperature), -1)
            del logits
            entries = ((self.index >= rows.start) & (self.index < rows.stop)).nonzero()[:, 0]
            yield _Chunk(rows, logs, slope, entries, (self.index[entries] - start, self.targets[entries]))


class _FrozenHead(torch.autograd.Function):
    """d log p(t) / d h = (f'(z_t) W_t - E) s / T, E = sum_v p_v f'(z_v) W_v, f the soft cap (f' = 1 without one).

    The most probable row enters E in fp32 and the rest in the head's dtype, so that W_t - E does not cancel to
    rounding noise where p(t) is close to 1. d H / d h = -(s / T) sum_v p_v (log p_v + H) f'(z_v) W_v.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: _Call) -> tuple[Tensor, Tensor]:
        logprobs = hidden.new_zeros(call.targets.shape, dtype=torch.float32)
        slopes = torch.ones_like(logprobs)  # f'(z_t)
        entropies = hidden.new_zeros(hidden.shape[0], dtype=torch.float32)
        needs_grad = ctx.needs_input_grad[0]
        nothing = (0, hidden.shape[1])
        expected = hidden.new_zeros(hidden.shape if needs_grad else nothing, dtype=torch.float32)
        spread = torch.zeros_like(expected) if call.with_entropy_grad else expected.new_zeros(nothing)
        for chunk in call.chunks(hidden, weight, bias):
            logprobs[chunk.entries] = chunk.logs[chunk.places]
            if chunk.slope is not None:
                slopes[chunk.entries] = chunk.slope[chunk.places]
            probabilities = chunk.logs.exp()
            entropies[chunk.rows] = _entropies(chunk.logs, probabilities)
            if not needs_grad:
                continue
            sloped = probabilities if chunk.slope is None else probabilities * chunk.slope
            if call.with_entropy_grad:
                spread[chunk.rows] = _spread_row(weight, sloped, chunk.logs, entropies[chunk.rows])
            expected[chunk.rows] = _expected_row(weight, sloped)
        ctx.save_for_backward(weight, expected, spread, slopes)
        ctx.call = call
        if not call.with_entropy_grad:
            ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, expected, spread, slopes = ctx.saved_tensors
        call: _Call = ctx.call
        rows = weight[call.targets].float() * slopes[:, None] - expected[call.index]  # [N, h]
        grad_hidden = torch.zeros_like(expected).index_add_(0, call.index, rows * grads[0][:, None])
        if call.with_entropy_grad:
            grad_hidden -= spread * grads[1][:, None]
        scaled = grad_hidden * (call.head.scale / call.temperature)
        return scaled.to(weight.dtype), None, None, None


class _TrainedHead(torch.autograd.Function):
    """With u = z / T: d log p(t) / d u_v = [v = t] - p_v, d H / d u_v = -p_v (log p_v + H), d z / d (h W^T) = s f'(z).

    The same values as `_FrozenHead`, bit for bit. One chunk's gradient of the logits is held at a time; those of
    weight and bias are summed in fp32.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: _Call) -> tuple[Tensor, Tensor]:
        logprobs = hidden.new_zeros(call.targets.shape, dtype=torch.float32)
        entropies = hidden.new_zeros(hidden.shape[0], dtype=torch.float32)
        for chunk in call.chunks(hidden, weight, bias):
            logprobs[chunk.entries] = chunk.logs[chunk.places]
            entropies[chunk.rows] = _entropies(chunk.logs, chunk.logs.exp())
        ctx.save_for_backward(hidden, weight, bias)
        ctx.call = call
        if not call.with_entropy_grad:
            ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        call: _Call = ctx.call
        needs_hidden, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias else None
        for chunk in call.chunks(hidden, weight, bias):
            grad = _logits_grad(call, chunk, *grads)
            if grad_hidden is not None:
                grad_hidden[chunk.rows] = grad.to(weight.dtype) @ weight
            if grad_weight is not None:
                _add_outer(grad_weight, grad, hidden[chunk.rows])
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        return grad_hidden, _cast(grad_weight, weight), _cast(grad_bias, bias), None


def _entropies(logs: Tensor, probabilities: Tensor) -> Tensor:
    """[rows, V] twice -> [rows]."""
    return -(probabilities * logs).sum(-1)


def _expected_row(weight: Tensor, shares: Tensor) -> Tensor:
    """sum_v shares[p, v] W[v] in fp32 where it matters; shares: [P, V] float32 (overwritten) -> [P, h] float32."""
    largest, top = shares.max(-1)
    shares.scatter_(1, top[:, None], 0.0)
    rest = shares.to(weight.dtype) @ weight
    return rest.float() + largest[:, None] * weight[top].float()


def _spread_row(weight: Tensor, sloped: Tensor, logs: Tensor, entropies: Tensor) -> Tensor:
    """sum_v p_v f'(z_v) (log p_v + H) W_v; sloped = p f': [P, V] float32, logs (overwritten) -> [P, h] float32."""
    shares = logs.add_(entropies[:, None]).mul_(sloped)
    return (shares.to(weight.dtype) @ weight).float()


def _logits_grad(call: _Call, chunk: _Chunk, grad_logprobs: Tensor, grad_entropies: Tensor) -> Tensor:
    """[rows, V] float32: the loss's gradient by h W^T + bias."""
    probabilities = chunk.logs.exp()
    grads = grad_logprobs[chunk.entries]
    rows, columns = chunk.places
    sums = probabilities.new_zeros(probabilities.shape[0]).index_add_(0, rows, grads)
    grad = probabilities * -sums[:, None]
    grad.view(-1).index_add_(0, rows * grad.shape[1] + columns, grads)  # flat: deterministic on CPU
    if call.with_entropy_grad:
        shares = chunk.logs.add_(_entropies(chunk.logs, probabilities)[:, None]).mul_(probabilities)
        grad -= shares.mul_(grad_entropies[chunk.rows][:, None])
    if chunk.slope is not None:
        grad *= chunk.slope
    return grad.mul_(call.head.scale / call.temperature)


def _add_outer(total: Tensor, grad: Tensor, hidden: Tensor) -> None:
    """total += grad^T hidden; total: [V, h] float32, grad: [P, V] float32, hidden: [P, h]."""
    if total.device.type == "cpu" or hidden.dtype == torch.float32:
        total.addmm_(grad.t(), hidden.float())  # on a CPU as fast as in bfloat16, and exact
    else:
        total += grad.to(hidden.dtype).t() @ hidden


def _cast(grad: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    return None if grad is None or parameter is None else grad.to(parameter.dtype)
