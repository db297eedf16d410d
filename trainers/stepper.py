"""How gradients become a step: by a plain optimizer here, by DeepSpeed in deepspeed.py, behind one small interface."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from rft.config import TrainingConfig
from rft.trainers.optimizer import clip_gradients, load_optimizer_state, optimizer_state, total_norm
from rft.trainers.ranks import Ranks
from rft.trainers.weights import Weights


class Stepper(Protocol):
    """The optimizer of one rank. Everything but `norm` is collective where there are several ranks."""

    is_lockstep: bool  # ranks meet inside a forward or backward pass: one of them cannot start it again alone

    def forward(self, *args: Any) -> tuple[Tensor, Tensor]:
        """The scorer's forward pass, to be followed by `backward`."""
        ...

    def zero_grad(self) -> None: ...

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Add up the gradient of this rank's `loss`; the window's loss is the sum of all of them.

        is_last: `step` comes next.
        """
        ...

    def step(self, *, is_finite: bool) -> float:
        """Clip and step, unless the loss or the gradient is not finite; the norm it had before clipping."""
        ...

    def norm(self) -> float | None:
        """Of this rank's own gradient, None where nobody knows it."""
        ...

    def optimizer_state(self) -> dict[str, Any]:
        """A plain optimizer's `state_dict` with whole tensors on the CPU."""
        ...

    def load_optimizer_state(self, state: dict[str, Any]) -> None: ...

    def take_weights(self) -> None:
        """The weights were replaced: step from them."""
        ...


class PlainStepper:
    """Steps `weights` with `optimizer`, replicated or sharded."""

    def __init__(
        self,
        scorer: torch.nn.Module,
        weights: Weights,
        optimizer: torch.optim.Optimizer,
        training: TrainingConfig,
        ranks: Ranks,
        *,
        is_sharded: bool,
    ) -> None:
        self.is_lockstep = is_sharded
        self.forward = scorer
        self._weights, self._optimizer, self._ranks = weights, optimizer, ranks
        self._max_norm = training.max_grad_norm
        # the loss is a sum over ranks; gradients of shards come averaged over them, those of whole adapters do not
        has_shards = any(hasattr(parameter, "device_mesh") for parameter in weights.parameters)
        self._loss_scale = ranks.num if has_shards else 1

    def zero_grad(self) -> None:
        self._optimizer.zero_grad()

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        (loss * self._loss_scale).backward()

    def step(self, *, is_finite: bool) -> float:
        parameters = self._weights.parameters
        self._ranks.sum_gradients(parameters)
        norm = clip_gradients(parameters, self._max_norm)
        if is_finite and math.isfinite(norm):
            self._optimizer.step()
        return norm

    def norm(self) -> float | None:
        return total_norm(self._weights.parameters)

    def optimizer_state(self) -> dict[str, Any]:
        return optimizer_state(self._optimizer)

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        load_optimizer_state(self._optimizer, state)

    def take_weights(self) -> None:
        """It steps the weights themselves."""
