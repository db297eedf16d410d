"""DeepSpeed ZeRO stages 1 and 2: every rank has all weights, and keeps and steps a part of the optimizer's state.

Asked for by the launch (`accelerate launch --config_file configs/accelerate/deepspeed.yaml`). Accelerate's own wrapper
is not used (on a CPU it ignores DeepSpeed): the engine is DeepSpeed's, made here, the same on both. It reduces, clips
and steps, and skips a step whose gradient is not finite. Checkpoints hold whole tensors: they can be continued with
any launch. Not measured on a GPU.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rft.config import ModelConfig, TrainingConfig
from rft.errors import ConfigError

_MOMENTS = ("exp_avg", "exp_avg_sq")
_IGNORED = {  # of the launch: (what leaves it alone, the cure)
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": ("none", "leave out deepspeed_config_file; set zero_stage"),
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": ("none", "leave it out"),
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": ("none", "leave it out"),
    "ACCELERATE_GRADIENT_CLIPPING": ("none", "leave it out; training.max_grad_norm decides"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", "leave it out; training.max_tokens_per_micro_batch decides"),
}


def is_asked_for(model: ModelConfig, training: TrainingConfig) -> bool:
    """True when the launch asks for DeepSpeed. Raises ConfigError for what it or the config asks and is not done."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return False
    for name, (value, cure) in _IGNORED.items():
        if os.environ.get(name, value).lower() != value:
            field = name.removeprefix("ACCELERATE_").removeprefix("DEEPSPEED_").lower()
            raise ConfigError("is not supported", where=f"deepspeed_config.{field}", cure=cure)
    if _stage() not in (1, 2):
        cure = "set it to 1 or 2, or shard weights with configs/accelerate/fsdp2.yaml"
        raise ConfigError(f"stage {_stage()} is not supported", where="deepspeed_config.zero_stage", cure=cure)
    if model.lora is None and model.dtype != "float32":
        cure = "set model.dtype=float32, or launch with configs/accelerate/fsdp2.yaml"
        raise ConfigError("DeepSpeed would have its own masters of the weights", where="model.dtype", cure=cure)
    if training.optimizer != "adamw":
        cure = "set training.optimizer=adamw: its state is spread over the ranks anyway"
        raise ConfigError("DeepSpeed steps AdamW only", where="training.optimizer", cure=cure)
    return True


class ZeroStepper:
    """DeepSpeed's engine around a scorer: see `stepper.Stepper`."""

    is_lockstep = True  # it reduces inside the backward pass

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], max_norm: float
    ) -> None:
        """Collective. Raises ConfigError where DeepSpeed is not installed."""
        try:
            import deepspeed
        except ImportError as error:
            cure = "pip install deepspeed, or launch with another file of configs/accelerate"
            raise ConfigError(f"DeepSpeed is missing: {error}", where="distributed_type", cure=cure) from None
        self._parameters = list(parameters)
        self._num_ranks = torch.distributed.get_world_size()
        self._engine: Any = deepspeed.initialize(
            model=module, optimizer=optimizer, config=_settings(max_norm), dist_init_required=False
        )[0]

    def forward(self, *args: Any) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = self._engine(*args)
        return found

    def zero_grad(self) -> None:
        """Forget the gradients of a pass that did not end in `step`: the parameters' and those already reduced."""
        zero = self._engine.optimizer
        zero.zero_grad()
        for reduced in (zero.averaged_gradients, zero.all_grad_tensors):
            reduced.update(dict.fromkeys(reduced))

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(is_last)
        self._engine.backward(loss * self._num_ranks, scale_wrt_gas=False)  # gradients come averaged over the ranks

    def step(self, *, is_finite: bool) -> float:
        """Steps unless the gradient is not finite, which it is when the loss is not."""
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        return norm if self._engine.was_step_applied() else math.inf

    def norm(self) -> float | None:
        return None  # gradients are reduced as they come

    # --- whole tensors, in the form of a plain AdamW's `state_dict` ---

    def optimizer_state(self) -> dict[str, Any]:
        """On the CPU, on every rank. Collective."""
        from deepspeed.utils import safe_get_full_optimizer_state

        zero, (group,) = self._engine.optimizer, self._engine.optimizer.optimizer.param_groups
        step = next((own["step"] for own in zero.optimizer.state.values()), None)
        state: dict[int, Any] = {}
        if step is not None:
            for index, parameter in enumerate(self._parameters):
                moments = {name: safe_get_full_optimizer_state(parameter, name).cpu() for name in _MOMENTS}
                state[index] = {"step": step.detach().cpu().clone(), **moments}
        options = {name: value for name, value in group.items() if name != "params"}
        return {"state": state, "param_groups": [options | {"params": list(range(len(self._parameters)))}]}

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """The reverse. Not collective."""
        from deepspeed.utils import safe_set_full_optimizer_state

        zero = self._engine.optimizer
        for name, value in state["param_groups"][0].items():
            if name != "params":
                zero.optimizer.param_groups[0][name] = value
        if not state["state"]:
            return
        (part,) = zero.single_partition_of_fp32_groups
        moments = {name: torch.zeros_like(part) for name in _MOMENTS}
        zero.optimizer.state[part] = {"step": state["state"][0]["step"].to(part.device), **moments}
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()
        for index, parameter in enumerate(self._parameters):
            for name in _MOMENTS:
                safe_set_full_optimizer_state(parameter, state["state"][index][name].to(part.device), name)

    def take_weights(self) -> None:
        """The module's weights were replaced: step from them. Not collective."""
        self._engine.optimizer.refresh_fp32_params()


def _stage() -> int:
    return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))


def _settings(max_norm: float) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,  # is of DeepSpeed's own loader and counters
        "gradient_accumulation_steps": 1,  # `backward` says which one is the last
        "gradient_clipping": max_norm,
        "zero_optimization": {"stage": _stage()},
        "zero_allow_untested_optimizer": True,
    }
