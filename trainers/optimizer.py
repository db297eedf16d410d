"""AdamW, its schedule, clipping, and its state as whole tensors, whether its parameters are sharded or not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from rft.config import TrainingConfig
from rft.errors import ConfigError
from rft.trainers.sharding import whole


def build_optimizer(
    parameters: Sequence[nn.Parameter], training: TrainingConfig, device: torch.device
) -> torch.optim.Optimizer:
    """The optimizer that `training.optimizer` names. Raises ConfigError where it cannot be had.

    The 8-bit ones keep moments of tensors below 4,096 numbers in float32. On a CPU bitsandbytes has no pages.
    """
    options: dict[str, Any] = {"lr": training.learning_rate, "weight_decay": training.weight_decay}
    if training.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **options)
    if training.optimizer == "paged_adamw_8bit" and device.type != "cuda":
        cure = "set training.optimizer=adamw_8bit or adamw"
        raise ConfigError(f"{training.optimizer} needs a GPU", where="training.optimizer", cure=cure)
    if any(isinstance(parameter, DTensor) for parameter in parameters):
        cure = "set training.optimizer=adamw: its state is spread over the ranks anyway"
        raise ConfigError("bitsandbytes cannot step sharded weights", where="training.optimizer", cure=cure)
    try:
        import bitsandbytes
    except ImportError as error:
        cure = "pip install bitsandbytes, or set training.optimizer=adamw"
        raise ConfigError(f"bitsandbytes is missing: {error}", where="training.optimizer", cure=cure) from None
    kind = bitsandbytes.optim.AdamW8bit if training.optimizer == "adamw_8bit" else bitsandbytes.optim.PagedAdamW8bit
    optimizer: torch.optim.Optimizer = kind(parameters, **options)
    return optimizer


def build_schedule(optimizer: torch.optim.Optimizer, training: TrainingConfig) -> LRScheduler:
    """The learning rate over the run's steps."""
    name = "constant_with_warmup" if training.schedule == "constant" else training.schedule
    scheduler: LRScheduler = get_scheduler(
        name, optimizer, num_warmup_steps=training.warmup_steps, num_training_steps=max(1, training.steps)
    )
    return scheduler


def total_norm(parameters: Sequence[nn.Parameter]) -> float:
    """The 2-norm of all gradients together; collective where they are sharded."""
    norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    return float(whole(norm))


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> float:
    """Scale the gradients down to `max_norm` together; returns the norm they had. Collective where sharded."""
    norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    clip_grads_with_norm_(parameters, max_norm, norm)
    return float(whole(norm))


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """`optimizer.state_dict()` with whole tensors on the CPU; collective where parameters are sharded."""
    state = optimizer.state_dict()
    whole = {index: {name: _on_cpu(value) for name, value in own.items()} for index, own in state["state"].items()}
    return {**state, "state": whole}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """The reverse; shards take their part. Collective where parameters are sharded."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    parts = {
        index: {name: _part(value, parameters[index]) for name, value in own.items()}
        for index, own in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": parts})


def _part(value: Any, parameter: nn.Parameter) -> Any:
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


def _on_cpu(value: Any) -> Any:
    if isinstance(value, dict):  # bitsandbytes wraps what it quantized
        return {name: _on_cpu(inner) for name, inner in value.items()}
    return whole(value).cpu() if isinstance(value, Tensor) else value
