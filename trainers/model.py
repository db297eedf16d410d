"""A user's model folder -> a causal LM with LoRA adapters, ready to train. Every mistake is a ConfigError here."""

from __future__ import annotations

from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from rft.config import ModelConfig
from rft.errors import ConfigError
from rft.trainers.adapter import LoraLinear
from rft.trainers.attention import choose_attention


def load_model(config: ModelConfig, device: torch.device) -> PreTrainedModel:
    """The causal LM in `config.path`, in its dtype, on `device`, with the attention that packed rows need there."""
    if not (config.path / "config.json").is_file():
        problem = "there is no such folder" if not config.path.exists() else "is not a model folder: no config.json"
        cure = "run scripts/prepare_model, or give a folder that transformers can load (config.json, *.safetensors)"
        raise ConfigError(problem, where=f"model.path: {config.path}", cure=cure)
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            str(config.path), dtype=getattr(torch, config.dtype), local_files_only=True
        )
    except (OSError, ValueError) as error:
        cure = "check the folder's files against the model's source"
        raise ConfigError(f"cannot be loaded: {error}", where=f"model.path: {config.path}", cure=cure) from error
    choose_attention(model, device)
    nn.Module.to(model, device)
    return model


def add_lora(model: PreTrainedModel, config: ModelConfig, is_merged: bool) -> PeftModel:
    """`model` with fresh adapters (A random, B zero) in float32 on the layers that the config names.

    is_merged: True where the engine samples from merged weights, so that the trainer computes with the same numbers.
    """
    targets = config.lora.targets
    head = next((name for name, module in model.named_modules() if module is model.get_output_embeddings()), None)
    if targets != "all-linear" and head is not None and any(head.endswith(target) for target in targets):
        raise ConfigError(
            f"adapters on the output head ({head}) are not supported", where="model.lora.targets", cure="remove it"
        )
    alpha: Any = int(config.lora.alpha) if config.lora.alpha.is_integer() else config.lora.alpha  # peft writes it out
    lora = LoraConfig(r=config.lora.rank, lora_alpha=alpha, target_modules=targets, bias="none", task_type="CAUSAL_LM")
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
