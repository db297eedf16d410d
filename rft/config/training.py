"""The sections training, evaluation and warmup."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from rft.config.section import Config

_AUTO_IMPORTANCE_CAP = 2.0


class CostsConfig(Config):
    """What the most expensive rollout of a group loses of its grade; the cheapest loses nothing."""

    tool_calls: float = Field(0.0, ge=0)
    sampled_tokens: float = Field(0.0, ge=0)
    reasoning_tokens: float = Field(0.0, ge=0)
    seconds: float = Field(0.0, ge=0, description="wall-clock, of the whole rollout")
    above: float = Field(0.0, allow_inf_nan=False, description="costs count among rollouts with a grade above this")


class TrainingConfig(Config):
    """GRPO. Rollouts per item = max(2, round(base_rollouts x compute_multiplier))."""

    steps: int = Field(..., ge=0)
    items_per_step: int = Field(8, ge=1)
    base_rollouts: int = Field(8, ge=2)
    compute_multiplier: float = Field(1.0, gt=0.00001, le=10)
    allocation: Literal["uniform", "adaptive"] = "uniform"  # adaptive: the same rollouts, where grades vary
    first_rollouts: int = Field(4, ge=2, description="adaptive: what an item gets before its grades are looked at")
    learning_rate: float = Field(1e-4, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    loss: Literal["grpo", "dapo", "dr_grpo", "gspo", "cispo"] = "dapo"
    clip_low: float = Field(0.2, gt=0, lt=1)
    clip_high: float = Field(0.28, gt=0)
    max_ratio: float | None = Field(None, gt=1, description="a second clip, where the advantage is negative")
    cispo_max_ratio: float = Field(5.0, gt=0, description="cispo: what a token's ratio is cut to")
    importance_cap: float | Literal["auto"] | None = Field(
        "auto",
        description="the ratio to the sampling policy, cut to this, weighs the tokens instead of being clipped;"
        " null: it is clipped; auto: null without staleness, else 2",
    )
    staleness: int = Field(
        0, ge=0, le=64, description="how many optimizer steps the weights that sampled may be behind"
    )
    entropy_coef: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="loss -= entropy_coef x mean entropy of the sampled tokens"
    )
    kl_coef: float = Field(0.0, ge=0, description="of the KL to the model without its adapter; costs a forward pass")
    advantage_scale: Literal["none", "group"] = "none"
    baseline: Literal["mean", "leave_one_out"] = "mean"
    costs: CostsConfig = CostsConfig()
    batch: Literal["auto", "packed", "plain"] = "auto"
    max_tokens_per_micro_batch: int = Field(4096, ge=16)
    gradient_checkpointing: bool = Field(False, description="compute activations twice instead of keeping them")
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = Field(
        "adamw", description="the 8-bit ones need the package bitsandbytes"
    )
    sync: Literal["auto", "adapter", "merged", "reload", "transfer"] = Field(
        "auto",
        description="how new weights reach the engine; for model.lora: null reload (from disk), or transfer (from GPU"
        " memory to one vLLM server: CUDA IPC to a launched one, NCCL to engine.url)",
    )
    max_logprob_gap: float = Field(
        0.2, gt=0, description="mean |engine - trainer| log-probability; beyond it the run stops"
    )
    checkpoint_every: int = Field(1, ge=1)
    keep_checkpoints: int = Field(2, ge=1, description="the newest ones")
    keep_best: int = Field(1, ge=0, description="beside them, those with the best validation grades")

    @property
    def effective_importance_cap(self) -> float | None:
        """What `importance_cap` comes to: null where the ratio is clipped, and for cispo, which cuts it itself."""
        if self.importance_cap == "auto":
            return _AUTO_IMPORTANCE_CAP if self.staleness > 0 and self.loss != "cispo" else None
        return self.importance_cap

    @field_validator("importance_cap", mode="before")
    @classmethod
    def _is_a_cap(cls, value: Any) -> Any:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is None or value == "auto" or (is_number and 1 <= value < math.inf):
            return value
        raise ValueError("input should be a number of at least 1, null or auto")

    @model_validator(mode="after")
    def _options_have_an_effect(self) -> TrainingConfig:
        """Refuses what is set and would be ignored. A value that equals its default, as in a dump, is not set."""
        for name, reason in self._ignored():
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} {reason}")
        return self

    def _ignored(self) -> Iterator[tuple[str, str]]:
        clips = ("clip_low", "clip_high", "max_ratio")
        if self.loss == "cispo":
            yield from ((name, "has no effect with loss: cispo; remove it, or choose another loss") for name in clips)
            if self.importance_cap not in (None, "auto"):
                yield (
                    "importance_cap",
                    "is not for loss: cispo, which cuts the ratio itself; set cispo_max_ratio instead",
                )
            return
        yield "cispo_max_ratio", f"has no effect with loss: {self.loss}; remove it, or set loss: cispo"
        cap = self.effective_importance_cap
        if cap is not None:
            reason = f"has no effect where the ratio is a weight (importance_cap comes to {cap:g})"
            yield from ((name, f"{reason}; remove it, or set importance_cap: null") for name in clips)


class EvaluationConfig(Config):
    """Validation runs at step 0 and every `every` steps, the test split before step 1 and after the last."""

    every: int = Field(10, ge=1)
    validation_items: int | None = Field(None, ge=1)  # null: all
    test_items: int | None = Field(None, ge=1)
    rollouts_per_item: int = Field(1, ge=1)


class WarmupConfig(Config):
    """`rft warmup`: supervised training on demonstrations, from a file or from the graded rollouts of a run."""

    demonstrations: Path | None = None  # JSONL: rows whose messages go on with what the model is to say
    from_run: Path | None = None  # a run folder: its training rollouts with a grade of at least min_grade
    min_grade: float | None = Field(None, allow_inf_nan=False)
    epochs: int = Field(3, ge=1)
    learning_rate: float | None = Field(None, gt=0, description="null: 2e-4 with adapters, 2e-5 for all weights")
    batch_size: int = Field(8, ge=1, description="sequences per optimizer step")
    max_length: int | None = Field(
        None, ge=16, description="tokens; longer demonstrations are left out and counted; null: engine.max_model_len"
    )
    held_out_share: float = Field(
        0.0, ge=0, le=0.5, description="of the demonstrations; measured every epoch, and the best epoch is kept"
    )

    @model_validator(mode="after")
    def _one_source(self) -> WarmupConfig:
        if (self.demonstrations is None) == (self.from_run is None):
            raise ValueError("name one source: demonstrations, or from_run with min_grade")
        if (self.from_run is None) != (self.min_grade is None):
            raise ValueError("min_grade goes with from_run: the least grade a rollout is learnt from")
        return self
