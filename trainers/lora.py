"""LoRA: adapters in float32 on a frozen model. Saved as a peft folder, which peft and vLLM load."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from peft.utils import load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from rft.config import LoraConfig
from rft.errors import ConfigError, UserError
from rft.trainers.adapter import LoraLinear

FILES = ("adapter_config.json", "adapter_model.safetensors")


class LoraWeights:
    """Adapters on `model`: see `weights.Weights`. They are whole on every rank; what they sit on may be sharded.

    is_merged: True where the engine samples from merged weights, so that the trainer computes with the same numbers.
    """

    def __init__(self, model: PreTrainedModel, config: LoraConfig, is_merged: bool, seed: int) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = add_lora(model, config, is_merged)
        self.causal_lm = model
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def after_step(self) -> None:
        torch.autograd.graph.increment_version(self.parameters)  # fused AdamW does not; merged weights go by it

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """While it lasts the model computes with the weights it had before any training."""
        with self.model.disable_adapter():
            yield

    @torch.no_grad()
    def full_state_dict(self) -> dict[str, Tensor]:
        """W + s B A computed in fp32, rounded once to the model's dtype; what is not adapted as it is."""
        model = self.causal_lm
        tied = getattr(model, "all_tied_weights_keys", {})
        layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
        merged: dict[str, Tensor] = {}
        for key, value in model.state_dict().items():
            module, _, leaf = key.rpartition(".base_layer.")
            name = f"{module}.{leaf}" if module else key
            if ".lora_" not in key and name not in tied:
                is_adapted = module in layers and leaf == "weight"
                merged[name] = _merged(layers[module], value) if is_adapted else _whole(value)
        return merged

    def save(self, path: Path, *, writes: bool = True) -> None:
        """Write adapter_model.safetensors and adapter_config.json, float32. Not collective."""
        if writes:
            self.model.save_pretrained(str(path), save_embedding_layers=False)

    def load(self, path: Path) -> None:
        missing = [name for name in FILES if not (path / name).is_file()]
        if missing:
            cure = "it holds no adapter: set model.lora=null to train the whole model, or choose a run with adapters"
            raise UserError(f"{', '.join(missing)} is missing", where=str(path), cure=cure)
        device = next(self.model.parameters()).device
        try:
            result: Any = set_peft_model_state_dict(self.model, load_peft_weights(str(path), device=str(device)))
            unexpected = result.unexpected_keys
        except RuntimeError as error:  # torch's own words for shapes that differ
            unexpected = [str(error).strip().splitlines()[-1].strip()]
        if unexpected:
            cure = "give model.lora the rank and targets of that run, or export it and set model.path to the export"
            raise UserError(f"the adapter does not fit the model: {unexpected[0]}", where=str(path), cure=cure)


def add_lora(model: PreTrainedModel, config: LoraConfig, is_merged: bool) -> PeftModel:
    """`model` with fresh adapters (A random, B zero) in float32 on the layers that the config names."""
    targets = config.targets
    head = next((name for name, module in model.named_modules() if module is model.get_output_embeddings()), None)
    if targets != "all-linear" and head is not None and any(head.endswith(target) for target in targets):
        raise ConfigError(
            f"adapters on the output head ({head}) are not supported", where="model.lora.targets", cure="remove it"
        )
    alpha: Any = int(config.alpha) if config.alpha.is_integer() else config.alpha  # peft writes it out
    lora = PeftConfig(r=config.rank, lora_alpha=alpha, target_modules=targets, bias="none", task_type="CAUSAL_LM")
    lora._register_custom_module({nn.Linear: LoraLinear})
    try:
        adapted = get_peft_model(model, lora)
    except ValueError as error:
        linear = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise ConfigError(
            f"{targets} does not name linear layers of this model: {error}",
            where="model.lora.targets",
            cure=f"use all-linear, or names among {', '.join(linear)}",
        ) from error
    for module in adapted.modules():
        if isinstance(module, LoraLinear):
            module.is_merged = is_merged
    return cast("PeftModel", adapted)


def _merged(layer: Any, base: Tensor) -> Tensor:
    if isinstance(base, DTensor):
        weight = base.full_tensor()
        a, b, scale = layer.factors
        return torch.addmm(weight.float(), b, a, alpha=scale).to(weight.dtype).cpu()
    if isinstance(layer, LoraLinear):
        return layer.merged_weight()
    # peft's own layer, e.g. GPT-2's transposed linear maps
    delta = cast("Tensor", layer.get_delta_weight(layer.active_adapters[0]))
    return (base.float() + delta.float()).to(base.dtype)


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value
