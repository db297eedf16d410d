"""Full fine-tuning: every weight that is not frozen is trained, with masters in float32 where the config asks for it.

Masters: the model computes in `model.dtype`, as the engine does; the optimizer steps float32 copies, gradients are
added up in float32, and the model gets the copies rounded once. Without them small updates vanish in bfloat16.
Sharded models (sharding.py) keep their masters in the shards instead.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from rft.config import ModelConfig
from rft.errors import ConfigError, UserError
from rft.trainers.sharding import whole

FILE = "model.safetensors"  # in a checkpoint: the trained weights and the frozen ones, masters where there are any


class FullWeights:
    """The whole model: see `weights.Weights`."""

    def __init__(self, model: PreTrainedModel, config: ModelConfig) -> None:
        self.model = self.causal_lm = model
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        _freeze(model, config.freeze)
        self._masters: list[nn.Parameter] = []
        if config.master_dtype != "bfloat16" and model.dtype != torch.float32:
            self._masters = [nn.Parameter(parameter.detach().float()) for parameter in self._trained]
            for parameter, master in zip(self._trained, self._masters, strict=True):
                parameter.register_post_accumulate_grad_hook(_hand_over(master))

    @property
    def parameters(self) -> list[nn.Parameter]:
        return self._masters or self._trained

    @property
    def _trained(self) -> list[nn.Parameter]:
        """Looked up at each use: sharding puts other tensors in their place."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def after_step(self) -> None:
        if self._masters:
            with torch.no_grad():
                torch._foreach_copy_(list[Tensor](self._trained), list[Tensor](self._masters))

    @torch.no_grad()
    def full_state_dict(self) -> dict[str, Tensor]:
        """The model's own tensors, named as in the published checkpoint.

        Of a sharded model whole copies on the CPU, in the dtype it computes in.
        """
        is_sharded = any(isinstance(value, DTensor) for value in self.model.parameters())
        return {name: value.cpu() if is_sharded else value for name, value in self.full_tensors()}

    @torch.no_grad()
    def full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, value in self._named().items():
            yield from revert_weight_conversion(self.causal_lm, {name: self._computed(value)}).items()

    def save(self, path: Path, *, writes: bool = True) -> None:
        """Write model.safetensors: masters in float32, the rest as it is. Collective where weights are sharded."""
        masters = self._masters_by_id()
        state: dict[str, Tensor] = {}
        for name, value in self._named(keep_vars=True).items():
            stepped = whole(masters.get(id(value), value).detach())
            if writes:
                state[name] = stepped.cpu().contiguous()
        if writes:
            save_file(state, path / FILE, metadata={"format": "pt"})

    @torch.no_grad()
    def load(self, path: Path) -> None:
        if not (path / FILE).is_file():
            cure = "set model.lora as that run did, or export it and set model.path to the export"
            raise UserError(f"there is no {FILE}: an adapter does not fit a whole model", where=str(path), cure=cure)
        stored = load_file(path / FILE)
        masters = self._masters_by_id()
        own = self._named(keep_vars=True)
        odd = sorted(own.keys() ^ stored.keys()) or [n for n in own if own[n].shape != stored[n].shape]
        if odd:
            raise UserError(f"the weights do not fit the model: {odd[0]}", where=str(path), cure="check model.path")
        for name, value in own.items():
            _copy(masters.get(id(value), value), stored[name])
        self.after_step()

    def _computed(self, value: Tensor) -> Tensor:
        """A shard's float32 master as the model computes with it; what is not sharded is that already."""
        if not isinstance(value, DTensor):
            return value
        gathered = value.full_tensor()
        return gathered.to(self._dtype) if gathered.is_floating_point() else gathered

    def _masters_by_id(self) -> dict[int, nn.Parameter]:
        """Of each parameter that has one; parameters are tensors, whose `==` is elementwise."""
        return {id(p): master for p, master in zip(self._trained, self._masters, strict=True)} if self._masters else {}

    def _named(self, **options: Any) -> dict[str, Tensor]:
        """The model's state dict; tied weights once."""
        tied = getattr(self.causal_lm, "all_tied_weights_keys", {})
        return {name: value for name, value in self.causal_lm.state_dict(**options).items() if name not in tied}


def _freeze(model: PreTrainedModel, patterns: list[str]) -> None:
    """Take what matches a pattern (`model.embed_tokens`, `model.layers.0.*`) out of training."""
    for pattern in patterns:
        found = [
            parameter
            for name, parameter in model.named_parameters()
            if fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}.*")
        ]
        if not found:
            examples = ", ".join(name for name, _ in list(model.named_modules())[1:6])
            cure = f"use names of modules or parameters of this model, e.g. {examples}"
            raise ConfigError(f"`{pattern}` names nothing in this model", where="model.freeze", cure=cure)
        for parameter in found:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("nothing is left to train", where="model.freeze", cure="freeze less")


def _hand_over(master: nn.Parameter) -> Any:
    """A hook that moves a gradient to its master as soon as it is there, so that sums are in float32."""

    def move(parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient, parameter.grad = parameter.grad.float(), None
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)

    return move


def _copy(target: Tensor, source: Tensor) -> None:
    if isinstance(target, DTensor):
        source = distribute_tensor(source.to(target.device), target.device_mesh, target.placements)
    target.copy_(source)
