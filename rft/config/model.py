"""The sections model and engine: what is trained, and what samples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from rft.config.section import Config


class LoraConfig(Config):
    """Low-rank adapters on the policy; `targets` is peft's `target_modules`."""

    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    targets: Literal["all-linear"] | list[str] = "all-linear"


class ModelConfig(Config):
    """The policy: any folder that `AutoModelForCausalLM.from_pretrained` accepts."""

    path: Path
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    lora: LoraConfig | None = Field(LoraConfig(), description="null: the whole model is trained")
    freeze: list[str] = Field(
        default_factory=list, description="lora: null; modules or parameters left as they are, e.g. model.layers.0.*"
    )
    master_dtype: Literal["float32", "bfloat16"] | None = Field(
        None, description="lora: null; what the optimizer steps; null: float32; bfloat16 saves memory, loses updates"
    )
    init_from: Path | None = Field(None, description="a run folder whose newest weights this run starts from")
    reference: Path | None = Field(
        None, description="the model of training.kl_coef; null: this one, as it was before any training"
    )

    @model_validator(mode="after")
    def _of_full_training(self) -> ModelConfig:
        if self.lora is not None and self.freeze:
            raise ValueError("freeze is for lora: null; with adapters choose lora.targets instead")
        if self.lora is not None and self.master_dtype is not None:
            raise ValueError("master_dtype is for lora: null; adapters are always trained in float32")
        if self.dtype == "float32" and self.master_dtype == "bfloat16":
            raise ValueError("master_dtype bfloat16 below a model in float32 would lose what it computes; leave it out")
        return self


class VllmEngineConfig(Config):
    """vLLM servers: given by `url`, or launched by the run as its own processes when `url` is null."""

    type: Literal["vllm"] = "vllm"
    url: str | Annotated[list[str], Field(min_length=1)] | None = None  # several share the rollouts
    num_servers: int = Field(1, ge=1, description="that are launched; like those of `url` they share the rollouts")
    devices: list[str] | None = Field(
        None, description='CUDA_VISIBLE_DEVICES of each launched server, e.g. ["6", "7"]; null: as the run has it'
    )
    sleep: bool = Field(
        False, description="GPUs are shared in turn: vLLM's sleep mode frees its memory while the policy trains"
    )
    max_model_len: int = Field(2048, ge=16)
    max_concurrent: int = Field(64, ge=1, description="sequences a server samples at once")
    kv_cache_gib: float = Field(1.0, gt=0, description="KV cache on CPU, GiB; a GPU uses gpu_memory_share")
    gpu_memory_share: float = Field(0.45, gt=0, le=1)
    start_timeout_s: float = Field(300.0, gt=0)
    request_timeout_s: float = Field(300.0, gt=0)
    outage_limit_s: float = Field(600.0, gt=0, description="how long all servers of `url` may be away before it ends")
    args: list[str] = Field(default_factory=list, description="further flags of the server, passed on unchanged")

    @model_validator(mode="after")
    def _servers_fit(self) -> VllmEngineConfig:
        if self.url is not None and (self.num_servers > 1 or self.devices is not None):
            raise ValueError("num_servers and devices are for servers that the run launches; leave them out, or url")
        if self.devices is not None and len(self.devices) != self.num_servers:
            raise ValueError(f"devices names {len(self.devices)} servers, num_servers {self.num_servers}")
        return self


class TransformersEngineConfig(Config):
    """In-process sampling with transformers: deterministic, slow, needs no vLLM."""

    type: Literal["transformers"] = "transformers"
    max_model_len: int = Field(2048, ge=16)
    max_concurrent: int = Field(64, ge=1, description="sequences sampled as one batch")
    dtype: Literal["bfloat16", "float32"] | None = None  # null: the policy's


EngineConfig = Annotated[VllmEngineConfig | TransformersEngineConfig, Field(discriminator="type")]
