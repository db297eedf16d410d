"""A user's model folder -> a causal LM, ready to train. Every mistake is a ConfigError here."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from rft.errors import ConfigError
from rft.threads import LOADING_A_MODEL
from rft.trainers.attention import choose_attention


def load_model(path: Path, dtype: torch.dtype, device: torch.device, field: str = "model.path") -> PreTrainedModel:
    """The causal LM in `path`, in `dtype`, with the attention that packed rows need on `device`; still on the CPU.

    field: names the path in errors.
    """
    if not (path / "config.json").is_file():
        problem = "there is no such folder" if not path.exists() else "is not a model folder: no config.json"
        cure = "run scripts/prepare_model, or give a folder that transformers can load (config.json, *.safetensors)"
        raise ConfigError(problem, where=f"{field}: {path}", cure=cure)
    try:
        with LOADING_A_MODEL:
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(str(path), dtype=dtype, local_files_only=True)
    except (OSError, ValueError) as error:
        cure = "check the folder's files against the model's source"
        raise ConfigError(f"cannot be loaded: {error}", where=f"{field}: {path}", cure=cure) from error
    choose_attention(model, device)
    model.eval()  # dropout would make the ratio to the sampling policy random
    return model


def checkpoint_gradients(model: PreTrainedModel) -> None:
    """Let `model` compute its layers' activations again in the backward pass. Raises ConfigError where it cannot.

    transformers does so only in layers that are in training mode; their dropout stays off all the same.
    """
    try:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as error:
        raise ConfigError(str(error), where="training.gradient_checkpointing", cure="set it to false") from error
    layers: list[nn.Module] = [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]
    for layer in layers:
        layer.training = True  # of the layer alone, not of what is inside
        for name, value in vars(layer).items():
            if "dropout" in name and isinstance(value, float):
                setattr(layer, name, 0.0)
