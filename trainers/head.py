"""Log-probabilities from hidden states without ever holding a [T, V] tensor.

The frozen output head is applied to a chunk of positions at a time. Because only the hidden states need a gradient,
each chunk keeps the expectation of the head's rows under the softmax ([P, h]) instead of its logits ([P, V]): the
backward pass needs no second pass over the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rft.errors import UserError

_CHUNK_BYTES = 64 * 2**20  # of one fp32 [rows, V] temporary


@dataclass(frozen=True, slots=True)
class Head:
    """logits = cap * tanh(scale * (h W^T + bias) / cap), without the tanh where cap is None."""

    weight: Tensor  # [V, h]
    bias: Tensor | None  # [V]
    scale: float
    cap: float | None

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [P, h] -> [P, V] float32. The product is taken in the weights' dtype, as engines do."""
        logits = torch.nn.functional.linear(hidden, self.weight, self.bias).float()
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
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if weight is not None:
        head = Head(weight, bias, float(scale), getattr(config, "final_logit_softcapping", None))
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
    return torch.allclose(head.logits(hidden), expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))


def decoder(model: PreTrainedModel) -> torch.nn.Module:
    """The part of a causal LM below its output head."""
    part: torch.nn.Module = getattr(model, model.base_model_prefix)
    return part


def token_logprobs(
    head: Head, hidden: Tensor, index: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Natural-log probabilities at `temperature`, and the entropies of the distributions they come from.

    hidden: [P, h]; index: [N] int64 into P; targets: [N] int64 -> ([N] float32, [P] float32 without gradient).
    """
    result: tuple[Tensor, Tensor] = _TokenLogprobs.apply(hidden, head, index, targets, temperature)  # type: ignore[no-untyped-call]
    return result


class _TokenLogprobs(torch.autograd.Function):
    """d log p(t) / d h = (f'(z_t) W_t - E) s / T, E = sum_v p_v f'(z_v) W_v, f the soft cap (f' = 1 without one).

    The most probable row enters E in fp32 and the rest in the head's dtype, so that W_t - E does not cancel to
    rounding noise where p(t) is close to 1.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Head, index: Tensor, targets: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        logprobs = hidden.new_zeros(targets.shape, dtype=torch.float32)
        slopes = torch.ones_like(logprobs)  # f'(z_t)
        entropies = hidden.new_zeros(hidden.shape[0], dtype=torch.float32)
        expected = hidden.new_zeros(hidden.shape if ctx.needs_input_grad[0] else (0, 0), dtype=torch.float32)
        rows = max(1, _CHUNK_BYTES // (4 * head.weight.shape[0]))
        for start in range(0, hidden.shape[0], rows):
            chunk = slice(start, min(start + rows, hidden.shape[0]))
            logits = head.logits(hidden[chunk])
            is_here = ((index >= chunk.start) & (index < chunk.stop)).nonzero()[:, 0]
            places = (index[is_here] - chunk.start, targets[is_here])
            if head.cap is not None:
                slopes[is_here] = 1 - (logits[places] / head.cap) ** 2
            slope = None if head.cap is None else 1 - (logits / head.cap) ** 2
            logs = torch.log_softmax(logits.div_(temperature), -1)
            logprobs[is_here] = logs[places]
            probabilities = logs.exp()
            entropies[chunk] = -(probabilities * logs).sum(-1)
            if ctx.needs_input_grad[0]:
                expected[chunk] = _expected_row(head, probabilities if slope is None else probabilities * slope)
        ctx.save_for_backward(expected, slopes, index, targets)
        ctx.head, ctx.temperature = head, temperature
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        expected, slopes, index, targets = ctx.saved_tensors
        grad = outputs[0]  # [N]
        rows = ctx.head.weight[targets].float() * slopes[:, None] - expected[index]  # [N, h]
        grad_hidden = torch.zeros_like(expected).index_add_(0, index, rows * grad[:, None])
        scaled = grad_hidden * (ctx.head.scale / ctx.temperature)
        return scaled.to(ctx.head.weight.dtype), None, None, None, None


def _expected_row(head: Head, weights: Tensor) -> Tensor:
    """sum_v weights[p, v] W[v] in fp32 where it matters; weights: [P, V] float32 (overwritten) -> [P, h] float32."""
    largest, top = weights.max(-1)
    weights.scatter_(1, top[:, None], 0.0)
    rest = weights.to(head.weight.dtype) @ head.weight
    return rest.float() + largest[:, None] * head.weight[top].float()
