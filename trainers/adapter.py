"""LoRA linear layers that compute with the weights the engine samples from.

`is_merged` layers (engines that load merged weights) run one matrix product with round(W + s B A): the forward pass
costs nothing extra and its numbers are the engine's; the rounding is passed through unchanged by the gradient.
Other layers add s B A x to W x in the base's dtype, as engines that load adapters do. A and B are fp32 masters
throughout; W is frozen and gets no gradient.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.nn.functional import linear


class LoraLinear(Linear):
    """peft's LoRA layer with one active adapter, no dropout and no variants; same parameters, names and files."""

    is_merged = True
    _cache: tuple[tuple[int, ...], Tensor] | None = None

    @property
    def factors(self) -> tuple[Tensor, Tensor, float]:
        """A [r, in] float32, B [out, r] float32, and the scale s = alpha / r."""
        name = self.active_adapters[0]
        a, b = cast("nn.Linear", self.lora_A[name]), cast("nn.Linear", self.lora_B[name])
        return a.weight, b.weight, self.scaling[name]

    @property
    def base(self) -> nn.Linear:
        """The frozen layer."""
        return cast("nn.Linear", self.get_base_layer())

    def merged_weight(self) -> Tensor:
        """round(W + s B A) [out, in] in the base's dtype, computed in fp32; made anew when A or B have changed.

        A returned tensor is never written to afterwards.
        """
        a, b, scale = self.factors
        weight = self.base.weight
        version = (a._version, b._version, weight._version, weight.data_ptr())
        if self._cache is None or self._cache[0] != version:
            with torch.no_grad():
                self._cache = version, torch.addmm(weight.float(), b, a, alpha=scale).to(weight.dtype)
        return self._cache[1]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x: [..., in] -> [..., out], both in the base's dtype."""
        base = self.base
        if self.disable_adapters:
            return linear(x, base.weight, base.bias)
        a, b, scale = self.factors
        if not self.is_merged:
            return linear(x, base.weight, base.bias) + linear(linear(x, a.to(x.dtype)), (scale * b).to(x.dtype))
        result = _MergedLinear.apply(x, self.merged_weight(), base.bias, a, b, scale)  # type: ignore[no-untyped-call]
        return cast("Tensor", result)


class _MergedLinear(torch.autograd.Function):
    """y = x W'^T + bias with W' = round(W + s B A); gradients of x, A and B as if W' were not rounded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, weight, a, b)
        ctx.scale = scale
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b = ctx.saved_tensors
        grad = outputs[0].reshape(-1, outputs[0].shape[-1])  # [M, out]
        rows = x.reshape(-1, x.shape[-1])  # [M, in]
        low = rows @ a.to(x.dtype).T  # [M, r]
        low_grad = grad @ (ctx.scale * b).to(x.dtype)  # [M, r]
        grad_a, grad_b = low_grad.T @ rows, (grad.T @ low) * ctx.scale
        grad_x = (grad @ weight).view_as(x) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, grad_a.to(a.dtype), grad_b.to(b.dtype), None
