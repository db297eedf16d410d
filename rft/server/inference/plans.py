"""How a target is served: by which host, with its checkpoint merged or as an adapter beside the base.

Adapters beside their base are meant for GPUs and not measured on one.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from rft.files import read_json
from rft.server.models import Target
from rft.server.settings import InferenceConfig

_MAX_LORA_RANK = 64  # of adapters beside their base; larger ones are merged


@dataclass(frozen=True, slots=True)
class Plan:
    """How a target is served: `checkpoint` merged into the host's weights, or `adapter` beside them."""

    key: str  # targets of one key share a host
    checkpoint: Path | None = None
    adapter: Path | None = None
    max_lora_rank: int | None = None  # of the adapters that the host takes

    @property
    def name(self) -> str:
        """The adapter's, in URLs."""
        return hashlib.sha256(str(self.adapter).encode()).hexdigest()[:16]

    @property
    def path(self) -> str:
        """Where the target answers on its host."""
        return "v1" if self.adapter is None else f"adapters/{self.name}/v1"


def plan_of(target: Target, config: InferenceConfig) -> Plan:
    """Names that stand for the same weights share a host; where adapters lie beside their base, all on one do."""
    base = target.local
    key = "|".join([str(base.path.resolve()), base.dtype, str(base.max_model_len)])
    rank = _lora_rank(target.checkpoint) if target.checkpoint is not None else 0
    can_be = config.engine == "vllm" and rank is not None and rank <= _MAX_LORA_RANK
    if can_be and (config.adapters == "beside" or (config.adapters == "auto" and not _is_cpu())):
        return Plan(key, adapter=target.checkpoint, max_lora_rank=_MAX_LORA_RANK)
    return Plan(f"{key}|{target.checkpoint or ''}", checkpoint=target.checkpoint)


@cache
def _is_cpu() -> bool:
    from rft.engines.vllm_server import is_cpu_build

    return is_cpu_build()


def _lora_rank(checkpoint: Path) -> int | None:
    """None for a checkpoint of the whole model."""
    file = checkpoint / "adapter_config.json"
    return int(read_json(file)["r"]) if file.is_file() else None
