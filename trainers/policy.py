"""The policy being trained: a causal LM with LoRA, its optimizer and schedule, under accelerate.

Owns log-probabilities, the optimizer step and the weights in the forms others need. Log-probabilities are natural
logs over the full vocabulary, computed without dropout. A step's result does not depend on how its micro-batches are
dealt to ranks. Does not decide what to train on, and does not talk to engines.
"""

from __future__ import annotations

import logging
import math
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, get_scheduler

from rft.config import ModelConfig, TrainingConfig
from rft.errors import ConfigError, UserError
from rft.trainers.adapter import LoraLinear
from rft.trainers.attention import attention_inputs, choose_attention
from rft.trainers.batch import Layout, MicroBatch, build_micro_batches
from rft.trainers.head import decoder, find_head, token_logprobs
from rft.trainers.objective import LossStats, dapo_loss
from rft.types import Group

logger = logging.getLogger(__name__)

# Packed and plain log-probabilities of the same tokens, max |difference|: rounding, not a wrong mask (which costs >> 1).
_PACKED_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5}


@dataclass(frozen=True, slots=True)
class StepStats:
    """One optimizer step over all ranks; token means are over the loss-bearing tokens."""

    loss: float
    grad_norm: float  # before clipping
    learning_rate: float  # used by this step
    num_tokens: int  # loss-bearing
    num_row_tokens: int  # computed, padding included
    clip_share: float
    mean_ratio: float
    approx_kl: float  # KL(sampling policy || policy)
    mean_logprob_gap: float  # |sampled - current|
    max_logprob_gap: float
    entropy: float  # mean over the distinct positions that were sampled from, at the sampling temperature
    is_skipped: bool  # a loss or gradient was not finite: nothing was changed


class _Scorer(nn.Module):
    """MicroBatch -> ([N] log-probabilities, [P] entropies): the forward pass as one module, so that DDP can wrap it."""

    def __init__(self, model: PeftModel) -> None:
        super().__init__()
        self.model = model
        self.causal_lm: PreTrainedModel = model.get_base_model()
        self.head = find_head(self.causal_lm)

    def forward(self, micro_batch: MicroBatch, temperature: float) -> tuple[Tensor, Tensor]:
        inputs = attention_inputs(self.causal_lm, micro_batch)
        output = decoder(self.causal_lm)(
            input_ids=micro_batch.input_ids, position_ids=micro_batch.position_ids, use_cache=False, **inputs
        )
        hidden = output.last_hidden_state.flatten(0, 1).index_select(0, micro_batch.predictors)
        return token_logprobs(self.head, hidden, micro_batch.predictor_index, micro_batch.targets, temperature)


class Policy:
    """The trained model. `temperature` is the sampling temperature at which all training log-probabilities are."""

    def __init__(
        self, model: ModelConfig, training: TrainingConfig, temperature: float, accelerator: Accelerator, seed: int
    ) -> None:
        self.training, self.temperature, self.accelerator = training, temperature, accelerator
        self.device: torch.device = accelerator.device
        base = _load(model, self.device)
        self.layout: Layout | None = "plain" if training.batch == "plain" else None  # None: not yet checked
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = _add_lora(base, model, _computes_merged(training, self.device))
        self.model.eval()  # dropout would make the ratio to the sampling policy random
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=training.weight_decay)
        # the schedule is not prepared: accelerate would advance it once per rank
        self.scheduler = _schedule(optimizer, training)
        self._scorer, self.optimizer = accelerator.prepare(_Scorer(self.model), optimizer)
        self.parameters = parameters

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The model with its adapters, as transformers knows it."""
        model: PreTrainedModel = self.model.get_base_model()
        return model

    @property
    def trainable_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.parameters)

    def micro_batches(self, groups: list[Group], advantages: list[Tensor]) -> list[MicroBatch]:
        """The groups as micro-batches in the layout this policy uses, checked on the first group ever given."""
        if self.layout is None and groups:
            self.check_packed(groups[0])
        limit = self.training.max_tokens_per_micro_batch
        return build_micro_batches(groups, advantages, limit, self.layout or "packed")

    def check_packed(self, group: Group) -> float:
        """Compare packed with plain log-probabilities on `group`, settle `layout`, return the largest difference.

        Beyond 1e-3 (float32) or 0.5 (bfloat16), `batch: auto` falls back to the plain layout with a warning;
        `batch: packed` raises UserError. Runs on one rank alone, without gradients.
        """
        zeros, limit = [torch.zeros(len(group.rollouts))], self.training.max_tokens_per_micro_batch
        packed = self._in_order(build_micro_batches([group], zeros, limit, "packed"))
        plain = self._in_order(build_micro_batches([group], zeros, limit, "plain"))
        gap = (packed - plain).abs().max().item() if plain.numel() else 0.0
        tolerance = _PACKED_TOLERANCE[self.causal_lm.dtype]
        self.layout = "packed" if gap <= tolerance else "plain"  # NaN falls back too
        logger.info("packed batches agree with plain ones to %.2g (tolerance %.2g)", gap, tolerance)
        if self.layout == "plain":
            problem = f"packed log-probabilities differ from plain ones by {gap:.3g} (tolerance {tolerance:g})"
            if self.training.batch == "packed":
                raise UserError(problem, where="training.batch", cure="set training.batch to auto or plain")
            logger.warning("%s: training on plain batches, which is slower", problem)
        return gap

    def _in_order(self, micro_batches: list[MicroBatch]) -> Tensor:
        """[N] log-probabilities of several micro-batches, by rollout and time: the same order in every layout."""
        rollouts = torch.cat([micro_batch.rollout_index for micro_batch in micro_batches])
        logprobs = torch.cat([self.logprobs(micro_batch).cpu() for micro_batch in micro_batches])
        return logprobs[torch.argsort(rollouts, stable=True)]

    @torch.no_grad()
    def logprobs(self, micro_batch: MicroBatch) -> Tensor:
        """[N] float32 log-probabilities of the micro-batch's targets at the sampling temperature, no gradient."""
        scorer = self.accelerator.unwrap_model(self._scorer)
        result: Tensor = scorer(micro_batch.to(self.device), self.temperature)[0]
        return result

    def score(self, ids: list[int], start: int) -> list[float]:
        """Log-probabilities at temperature 1 of `ids[start:]`, each given what precedes it; start >= 1."""
        path = torch.tensor(ids)
        ends = torch.full((1, len(ids)), len(ids))
        places, targets = torch.arange(start - 1, len(ids) - 1), path[start:]
        index, zeros = torch.arange(targets.numel()), torch.zeros(targets.numel())
        micro_batch = MicroBatch(
            path[None], torch.arange(len(ids))[None], ends, places, index, targets, zeros, zeros, index, "plain"
        )
        with torch.no_grad():
            scorer = self.accelerator.unwrap_model(self._scorer)
            scores: list[float] = scorer(micro_batch.to(self.device), 1.0)[0].tolist()
        return scores

    def step(self, micro_batches: list[MicroBatch], num_tokens: int) -> StepStats:
        """One optimizer step on this rank's micro-batches; every rank must pass equally many, at least one.

        num_tokens: the loss-bearing tokens of the whole window, over all ranks. A loss or gradient that is not
        finite on any rank skips the step on all of them: weights, optimizer and schedule stay as they were.
        """
        learning_rate = float(self.scheduler.get_last_lr()[0])
        self.optimizer.zero_grad()
        rows = [
            self._backward(micro_batch.to(self.device), num_tokens, is_last=index == len(micro_batches) - 1)
            for index, micro_batch in enumerate(micro_batches)
        ]
        grad_norm = float(self.accelerator.clip_grad_norm_(self.parameters, self.training.max_grad_norm))
        totals = self._totals(torch.tensor(rows, dtype=torch.float64, device=self.device))
        is_finite = math.isfinite(grad_norm) and math.isfinite(totals["loss"])
        if is_finite:
            self.optimizer.step()
            self.scheduler.step()
        self.optimizer.zero_grad()
        return StepStats(
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            num_tokens=num_tokens,
            num_row_tokens=int(totals.pop("num_row_tokens")),
            is_skipped=not is_finite,
            **totals,
        )

    def _backward(self, micro_batch: MicroBatch, num_tokens: int, is_last: bool) -> list[float]:
        """Accumulate one micro-batch's gradient; returns its share of the step's statistics as sums."""
        with nullcontext() if is_last else self.accelerator.no_sync(self._scorer):
            logprobs, entropies = self._scorer(micro_batch, self.temperature)
            clip = (self.training.clip_low, self.training.clip_high)
            loss, stats = dapo_loss(
                logprobs, micro_batch.sampled_logprobs, micro_batch.advantages, *clip, max(1, num_tokens)
            )
            # ranks average their gradients, the loss is a sum over ranks
            self.accelerator.backward(loss * self.accelerator.num_processes)
        return [
            loss.item(),
            *_sums(stats),
            stats.max_gap,
            entropies.sum().item(),
            entropies.numel(),
            micro_batch.num_row_tokens,
        ]

    def _totals(self, rows: Tensor) -> dict[str, float]:
        """[micro-batches, 9] float64 of this rank -> the step's statistics over all ranks."""
        gathered = self.accelerator.gather(rows) if self.accelerator.num_processes > 1 else rows
        loss, tokens, clips, ratios, kls, gaps, _, entropies, positions, row_tokens = gathered.sum(0).tolist()
        tokens, positions = max(1.0, tokens), max(1.0, positions)
        return {
            "loss": loss,
            "clip_share": clips / tokens,
            "mean_ratio": ratios / tokens,
            "approx_kl": kls / tokens,
            "mean_logprob_gap": gaps / tokens,
            "max_logprob_gap": gathered[:, 6].max().item(),
            "entropy": entropies / positions,
            "num_row_tokens": row_tokens,
        }

    @torch.no_grad()
    def merged_state_dict(self) -> dict[str, Tensor]:
        """The weights with the adapters in them: W + s B A computed in fp32, cast to the model's dtype.

        Keyed as the base model's own state dict, tied weights once. The live model is not modified, and adapted
        tensors are not written to later; frozen ones are the model's own: copy before changing them.
        """
        model = self.causal_lm
        tied = getattr(model, "all_tied_weights_keys", {})
        layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
        merged: dict[str, Tensor] = {}
        for key, value in model.state_dict().items():
            module, _, leaf = key.rpartition(".base_layer.")
            name = f"{module}.{leaf}" if module else key
            if ".lora_" not in key and name not in tied:
                merged[name] = _merged(layers[module]) if module in layers and leaf == "weight" else value
        return merged

    def save_adapter(self, path: Path) -> None:
        """Write the adapter as a peft folder (adapter_model.safetensors, adapter_config.json), float32."""
        self.model.save_pretrained(str(path), save_embedding_layers=False)

    def load_adapter(self, path: Path) -> None:
        """Replace the adapter's weights by those of a folder that `save_adapter` wrote."""
        result = set_peft_model_state_dict(self.model, load_peft_weights(str(path), device=str(self.device)))
        if result.unexpected_keys:
            raise UserError(f"the adapter does not fit the model: {result.unexpected_keys[0]}", where=str(path))


def _sums(stats: LossStats) -> list[float]:
    means = (stats.clip_share, stats.mean_ratio, stats.approx_kl, stats.mean_gap)
    return [stats.num_tokens, *(mean * stats.num_tokens for mean in means)]


def _merged(layer: Any) -> Tensor:
    if isinstance(layer, LoraLinear):
        return layer.merged_weight()
    weight: Tensor = layer.get_base_layer().weight  # peft's own layer, e.g. of GPT-2's transposed linear maps
    return (weight.float() + layer.get_delta_weight(layer.active_adapters[0]).float()).to(weight.dtype)


def _computes_merged(training: TrainingConfig, device: torch.device) -> bool:
    """True where the engine will sample from merged weights: the trainer then computes with the same numbers."""
    return training.sync == "merged" or (training.sync == "auto" and device.type == "cpu")


def _load(config: ModelConfig, device: torch.device) -> PreTrainedModel:
    if not (config.path / "config.json").is_file():
        problem = "there is no such folder" if not config.path.exists() else "is not a model folder: no config.json"
        cure = "run scripts/prepare_model, or give a folder that transformers can load (config.json, *.safetensors)"
        raise ConfigError(problem, where=f"model.path: {config.path}", cure=cure)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(config.path), dtype=getattr(torch, config.dtype), local_files_only=True
        )
    except (OSError, ValueError) as error:
        cure = "check the folder's files against the model's source"
        raise ConfigError(f"cannot be loaded: {error}", where=f"model.path: {config.path}", cure=cure) from error
    choose_attention(model, device)
    return model.to(device)  # type: ignore[no-any-return]


def _add_lora(model: PreTrainedModel, config: ModelConfig, is_merged: bool) -> PeftModel:
    targets = config.lora.targets
    head = next((name for name, module in model.named_modules() if module is model.get_output_embeddings()), None)
    if targets != "all-linear" and head is not None and any(head.endswith(target) for target in targets):
        raise ConfigError(
            f"adapters on the output head ({head}) are not supported", where="model.lora.targets", cure="remove it"
        )
    lora = LoraConfig(
        r=config.lora.rank, lora_alpha=config.lora.alpha, target_modules=targets, bias="none", task_type="CAUSAL_LM"
    )
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
    return adapted  # type: ignore[return-value]


def _schedule(optimizer: torch.optim.Optimizer, training: TrainingConfig) -> torch.optim.lr_scheduler.LRScheduler:
    name = "constant_with_warmup" if training.schedule == "constant" else training.schedule
    scheduler: torch.optim.lr_scheduler.LRScheduler = get_scheduler(
        name, optimizer, num_warmup_steps=training.warmup_steps, num_training_steps=max(1, training.steps)
    )
    return scheduler
