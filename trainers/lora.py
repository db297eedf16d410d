"""LoRA: adapters in float32 on a frozen model. Saved as a peft folder, which peft and vLLM load."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.utils import load_peft_weights, set_peft_model_state_dict
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from rft.config import LoraConfig
from rft.errors import ConfigError, UserError
from rft.trainers.adapter import LoraLinear
from rft.trainers.sharding import whole

logger = logging.getLogger(__name__)

_ROUTERS = (".gate", ".router", ".router.layer")  # what chooses a token's experts, as transformers' models name it

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
        """W + s B A computed in fp32, rounded once to the model's dtype; what is not adapted as it is.

        Named as in the published checkpoint: transformers keeps some weights in another form under other names
        (experts fused into one tensor).
        """
        model = self.causal_lm
        tied = getattr(model, "all_tied_weights_keys", {})
        weights = {key.replace(".base_layer", ""): value for key, value in model.state_dict().items()}
        merged = {key: value for key, value in weights.items() if ".lora_" not in key and key not in tied}
        for path, layer in model.named_modules():
            if isinstance(layer, LoraLayer):
                leaf = layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"
                merged[f"{path.replace('.base_layer', '')}.{leaf}"] = _merged(layer)
        published: dict[str, Tensor] = revert_weight_conversion(model, {k: whole(v) for k, v in merged.items()})
        return published

    def full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.full_state_dict().items()

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
    """`model` with fresh adapters (A random, B zero) in float32 on the layers that the config names.

    `all-linear` is every linear layer of the text model but the output head, and the experts of a mixture, also where
    transformers fuses them into one tensor. Routers get none: a step that moved them would send tokens to other
    experts in the trainer than in the engine, and the loss has no term that keeps their load balanced.
    is_merged: True where the engine samples from merged weights, so that the trainer computes with the same numbers.
    """
    targets = config.targets
    head = next((name for name, module in model.named_modules() if module is model.get_output_embeddings()), None)
    if targets != "all-linear" and head is not None and any(head.endswith(target) for target in targets):
        raise ConfigError(
            f"adapters on the output head ({head}) are not supported", where="model.lora.targets", cure="remove it"
        )
    alpha: Any = int(config.alpha) if config.alpha.is_integer() else config.alpha  # peft writes it out
    lora = PeftConfig(
        r=config.rank,
        lora_alpha=alpha,
        target_modules=targets,
        exclude_modules=_left_alone(model),
        bias="none",
        task_type="CAUSAL_LM",
    )
    lora._register_custom_module({nn.Linear: LoraLinear})
    try:
        _aim_at_experts(lora, model, is_merged)
        with warnings.catch_warnings():  # peft's own patterns for fused experts, and exclusions that nothing needed
            warnings.filterwarnings("ignore", r"The following (rank|alpha)_pattern|You have passed exclude_mod")
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
    if targets == "all-linear":
        _name_bare_layers(model, _left_alone(model) or [])
    return cast("PeftModel", adapted)


def _left_alone(model: PreTrainedModel) -> list[str] | None:
    """The linear layers that never get an adapter: routers, and what reads images or sound."""
    text = {id(module) for module in model.get_decoder().modules()}
    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    head = model.get_output_embeddings()
    found = [name for name, m in linear if m is not head and (name.endswith(_ROUTERS) or id(m) not in text)]
    return found or None


def _aim_at_experts(lora: PeftConfig, model: PreTrainedModel, is_merged: bool) -> None:
    """Let peft translate names of experts' layers (`gate_proj`) to the fused tensors of transformers (`gate_up_proj`).

    peft would do so by itself, and adapt the routers too.
    """
    if not isinstance(lora.target_modules, str):
        named = [target for target in lora.target_modules or () if f".{target}".endswith(_ROUTERS)]
        if named:
            raise ConfigError(
                f"adapters on routers ({named[0]}) are not supported", where="model.lora.targets", cure="remove it"
            )
    convert_peft_config_for_transformers(lora, model, None)
    routers = {name for name in lora.target_parameters or () if f".{name}".removesuffix(".weight").endswith(_ROUTERS)}
    lora.target_parameters = sorted(set(lora.target_parameters or ()) - routers) or None
    if lora.target_parameters and not is_merged:
        raise ConfigError(
            "no server loads adapters on fused experts as they are trained",
            where="training.sync",
            cure="set training.sync to merged, or model.lora.targets to the attention layers: [q_proj, k_proj, ...]",
        )


def _name_bare_layers(model: PreTrainedModel, left_alone: list[str]) -> None:
    """Say which linear layers `all-linear` could not reach: peft takes fused experts' names for theirs alone."""
    head = model.get_output_embeddings()
    bare = {
        name.rpartition("layers.")[2].partition(".")[2] or name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module is not head and name not in left_alone and ".lora_" not in name
        if not name.endswith(".base_layer")
    }
    if bare:
        logger.warning("no adapters on %s: peft cannot adapt them beside fused experts", ", ".join(sorted(bare)))


def _merged(layer: Any) -> Tensor:
    # peft's own layers: GPT-2's transposed linear maps, fused experts
    base = cast("Tensor", layer.get_param() if isinstance(layer, ParamWrapper) else layer.get_base_layer().weight)
    if isinstance(layer, LoraLinear):
        if not isinstance(base, DTensor):
            return layer.merged_weight()
        a, b, scale = layer.factors
        return torch.addmm(whole(base).float(), b.cpu(), a.cpu(), alpha=scale).to(base.dtype)
    delta = cast("Tensor", layer.get_delta_weight(layer.active_adapters[0]))
    if isinstance(base, DTensor):
        base, delta = whole(base), delta.cpu()
    return (base.float() + delta.float()).to(base.dtype)
