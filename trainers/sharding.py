"""Weights spread over the ranks (FSDP2): each keeps a part of every layer and gathers the rest when it computes.

Asked for by the launch (`accelerate launch --config_file configs/accelerate/fsdp2.yaml`). accelerate ignores its own
FSDP settings on a CPU, so the sharding is torch's `fully_shard` here, the same on both. Not measured on a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from rft.errors import ConfigError
from rft.trainers.ranks import Ranks

_REFUSED = {  # settings of a launch that mean something and would be ignored
    "FSDP_ACTIVATION_CHECKPOINTING": ("true", "set training.gradient_checkpointing=true instead"),
    "FSDP_USE_ORIG_PARAMS": ("false", "leave it out: it is of the first version of FSDP"),
}


def is_asked_for() -> bool:
    """True when the launch asks for FSDP. Raises ConfigError for settings that would be ignored."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError("only FSDP2 is supported", where="fsdp_config.fsdp_version", cure="set it to 2")
    for name, (value, cure) in _REFUSED.items():
        if os.environ.get(name, "").lower() == value:
            raise ConfigError(f"{value} is not supported", where=f"fsdp_config.{name.lower()}", cure=cure)
    return True


def shard(
    root: nn.Module, model: PreTrainedModel, dtype: torch.dtype, whole: Collection[nn.Parameter], ranks: Ranks
) -> None:
    """Shard `root`, a module around `model`, layer by layer, over all ranks; `whole` parameters stay on every rank.

    dtype: what the model computes in. Parameters of another dtype (float32 masters) are cast when they are gathered.
    """
    mesh = init_device_mesh(ranks.device.type, (ranks.num,))
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    is_offloaded = os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true"
    offload: OffloadPolicy = CPUOffloadPolicy() if is_offloaded else OffloadPolicy()
    is_resharded = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "true"
    names = set(model._no_split_modules or ())
    for module in [part for part in model.modules() if type(part).__name__ in names] + [root]:
        fully_shard(
            module,
            mesh=mesh,
            mp_policy=precision,
            offload_policy=offload,
            reshard_after_forward=is_resharded and module is not root,
            ignored_params=set(whole),
        )


def whole(value: Tensor) -> Tensor:
    """A sharded tensor gathered onto the CPU, by all ranks together; any other as it is."""
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value
