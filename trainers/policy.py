"""The policy being trained: a causal LM with LoRA, its optimizer and schedule, under accelerate.

Owns log-probabilities, the optimizer step and the weights in the forms others need. Log-probabilities are natural
logs over the full vocabulary, computed without dropout. A step's result does not depend on how its micro-batches are
dealt to ranks. Does not decide what to train on, and does not talk to engines.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed
from peft import PeftModel
from peft.utils import load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel, get_scheduler

from rft.config import ModelConfig, TrainingConfig
from rft.engines import sync_kind
from rft.errors import UserError
from rft.trainers.adapter import LoraLinear
from rft.trainers.attention import attention_inputs, attention_window
from rft.trainers.batch import Layout, MicroBatch, build_micro_batches, one_path
from rft.trainers.head import decoder, find_head, token_logprobs
from rft.trainers.model import add_lora, load_model
from rft.trainers.objective import LossStats, Objective, Tokens, policy_loss
from rft.types import Group

logger = logging.getLogger(__name__)

# Mean and max |packed - plain| log-probability of the same tokens. In bfloat16 two kernels differ by a mean of 0.04
# and a maximum of 0.5 on text sampled at temperature 0.8, each as far from float32; a wrong mask costs far more.
_PACKED_TOLERANCE = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (0.1, 1.0)}
_RANKS_TIMEOUT = timedelta(hours=2)  # ranks without an engine wait for a whole step's sampling


def build_accelerator(seed: int) -> Accelerator:
    """What `accelerate launch` or a plain start made of this process; seeds Python's, NumPy's and torch's generators.

    Mixed precision stays off: `model.dtype` decides, and adapters are float32 masters either way.
    """
    set_seed(seed)
    return Accelerator(mixed_precision="no", kwargs_handlers=[InitProcessGroupKwargs(timeout=_RANKS_TIMEOUT)])


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
    reference_kl: float  # KL(policy || reference), 0 without training.kl_coef
    entropy: float  # mean over the distinct positions that were sampled from, at the sampling temperature
    is_skipped: bool  # a loss or gradient was not finite: nothing was changed


class _Scorer(nn.Module):
    """MicroBatch -> ([N] log-probabilities, [P] entropies): the forward pass as one module, so that DDP can wrap it."""

    def __init__(self, model: PeftModel) -> None:
        super().__init__()
        self.model = model
        self.causal_lm = cast("PreTrainedModel", model.get_base_model())
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
        self.objective = Objective(
            loss=training.loss,
            clip_low=training.clip_low,
            clip_high=training.clip_high,
            max_ratio=training.max_ratio,
            cispo_max_ratio=training.cispo_max_ratio,
            kl_coef=training.kl_coef,
        )
        self.device: torch.device = accelerator.device
        base = load_model(model, self.device)
        self.layout: Layout | None = "plain" if training.batch == "plain" else None  # None: not yet checked
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = add_lora(base, model, is_merged=sync_kind(training.sync, self.device.type) == "merged")
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
        return cast("PreTrainedModel", self.model.get_base_model())

    @property
    def trainable_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.parameters)

    def micro_batches(self, groups: list[Group], advantages: list[Tensor]) -> list[MicroBatch]:
        """The groups as micro-batches in the layout this policy uses, checked on the first group ever given."""
        if self.layout is None and groups:
            self.check_packed(groups[0])
        limit = self.training.max_tokens_per_micro_batch
        micro_batches = build_micro_batches(groups, advantages, limit, self.layout or "packed")
        window = attention_window(self.causal_lm)
        longest = max((int(micro_batch.position_ids.max()) + 1 for micro_batch in micro_batches), default=0)
        if self.layout == "packed" and window is not None and longest > window:
            self._use_plain(f"sequences of {longest} tokens exceed the model's attention window of {window}")
            return build_micro_batches(groups, advantages, limit, "plain")
        return micro_batches

    def check_packed(self, group: Group) -> float:
        """Compare packed with plain log-probabilities on `group`, settle `layout`, return the largest difference.

        Beyond a mean of 1e-4 or a maximum of 1e-3 (float32), 0.1 or 1 (bfloat16), `batch: auto` falls back to the
        plain layout with a warning; `batch: packed` raises UserError. Runs on one rank alone, without gradients.
        """
        zeros, limit = [torch.zeros(len(group.rollouts))], self.training.max_tokens_per_micro_batch
        rows = build_micro_batches([group], zeros, limit, "packed")
        if not rows:  # nothing was sampled: nothing to compare, the next group settles it
            return 0.0
        packed = self._in_order(rows)
        plain = self._in_order(build_micro_batches([group], zeros, limit, "plain"))
        gaps = (packed - plain).abs()
        mean, largest = gaps.mean().item(), gaps.max().item()
        mean_limit, limit_of_all = _PACKED_TOLERANCE[self.causal_lm.dtype]
        found = f"mean {mean:.2g} (tolerance {mean_limit:g}), maximum {largest:.2g} (tolerance {limit_of_all:g})"
        self.layout = "packed"
        if mean <= mean_limit and largest <= limit_of_all:
            logger.info("packed and plain log-probabilities agree: %s", found)
        else:  # NaN comes here too
            self._use_plain(f"packed and plain log-probabilities differ: {found}")
        return largest

    def _use_plain(self, problem: str) -> None:
        if self.training.batch == "packed":
            raise UserError(problem, where="training.batch", cure="set training.batch to auto or plain")
        logger.warning("%s: training on plain batches, which is slower", problem)
        self.layout = "plain"

    def _in_order(self, micro_batches: list[MicroBatch]) -> Tensor:
        """[N] log-probabilities of several micro-batches, by sequence and time: the same order in every layout."""
        sequences = torch.cat([micro_batch.sequence_index for micro_batch in micro_batches])
        logprobs = torch.cat([self.logprobs(micro_batch).cpu() for micro_batch in micro_batches])
        return logprobs[torch.argsort(sequences, stable=True)]

    @torch.no_grad()
    def logprobs(self, micro_batch: MicroBatch) -> Tensor:
        """[N] float32 log-probabilities of the micro-batch's targets at the sampling temperature, no gradient."""
        scorer = self.accelerator.unwrap_model(self._scorer)
        result: Tensor = scorer(micro_batch.to(self.device), self.temperature)[0]
        return result

    def _reference(self, micro_batch: MicroBatch) -> Tensor:
        """[N] float32 log-probabilities of the reference: the model without its adapter."""
        with self.model.disable_adapter():
            return self.logprobs(micro_batch)

    def logprob_gap(self, group: Group) -> tuple[float, float]:
        """Mean and largest |sampled - current| log-probability over a group's sampled tokens; 0 without any."""
        micro_batches = self.micro_batches([group], [torch.zeros(len(group.rollouts))])
        if not micro_batches:
            return 0.0, 0.0
        gaps = torch.cat([(self.logprobs(batch).cpu() - batch.sampled_logprobs).abs() for batch in micro_batches])
        return gaps.mean().item(), gaps.max().item()

    def score(self, ids: list[int], start: int) -> list[float]:
        """Log-probabilities at temperature 1 of `ids[start:]`, each given what precedes it; start >= 1."""
        with torch.no_grad():
            scorer = self.accelerator.unwrap_model(self._scorer)
            scores: list[float] = scorer(one_path(ids, start).to(self.device), 1.0)[0].tolist()
        return scores

    def step(
        self, micro_batches: list[MicroBatch], num_tokens: int, on_micro_batch: Callable[[], None] | None = None
    ) -> StepStats:
        """One optimizer step on this rank's micro-batches (see `batch.weigh`); every rank passes equally many, >= 1.

        num_tokens: the loss-bearing tokens of the whole window, over all ranks. A loss or gradient that is not
        finite on any rank skips the step on all of them: weights, optimizer and schedule stay as they were.
        on_micro_batch: called after each micro-batch, for progress.
        """
        learning_rate = float(self.scheduler.get_last_lr()[0])
        self.optimizer.zero_grad()
        rows: list[list[float]] = []
        for micro_batch in micro_batches:
            is_last = len(rows) == len(micro_batches) - 1
            rows.append(self._backward(micro_batch.to(self.device), is_last))
            if on_micro_batch is not None:
                on_micro_batch()
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

    def _backward(self, micro_batch: MicroBatch, is_last: bool) -> list[float]:
        """Accumulate one micro-batch's gradient; returns its share of the step's statistics as sums."""
        reference = self._reference(micro_batch) if self.objective.kl_coef else None
        with nullcontext() if is_last else self.accelerator.no_sync(self._scorer):
            logprobs, entropies = self._scorer(micro_batch, self.temperature)
            tokens = Tokens(
                logprobs,
                micro_batch.sampled_logprobs,
                micro_batch.advantages,
                micro_batch.weights,
                micro_batch.sequence_index,
                reference,
            )
            loss, stats = policy_loss(self.objective, tokens)
            # ranks average their gradients, the loss is a sum over ranks
            self.accelerator.backward(loss * self.accelerator.num_processes)
        return [
            loss.item(),
            *_sums(stats),
            stats.max_gap,
            stats.reference_kl * stats.num_tokens,
            entropies.sum().item(),
            entropies.numel(),
            micro_batch.num_row_tokens,
        ]

    def _totals(self, rows: Tensor) -> dict[str, float]:
        """[micro-batches, 10] float64 of this rank -> the step's statistics over all ranks."""
        gathered = self.accelerator.gather(rows) if self.accelerator.num_processes > 1 else rows
        loss, tokens, clips, ratios, kls, gaps, _, references, *others = gathered.sum(0).tolist()
        entropies, positions, row_tokens = others
        tokens, positions = max(1.0, tokens), max(1.0, positions)
        return {
            "loss": loss,
            "clip_share": clips / tokens,
            "mean_ratio": ratios / tokens,
            "approx_kl": kls / tokens,
            "mean_logprob_gap": gaps / tokens,
            "max_logprob_gap": gathered[:, 6].max().item(),
            "reference_kl": references / tokens,
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
        result: Any = set_peft_model_state_dict(self.model, load_peft_weights(str(path), device=str(self.device)))
        if result.unexpected_keys:
            raise UserError(f"the adapter does not fit the model: {result.unexpected_keys[0]}", where=str(path))


def _sums(stats: LossStats) -> list[float]:
    means = (stats.clip_share, stats.mean_ratio, stats.approx_kl, stats.mean_gap)
    return [stats.num_tokens, *(mean * stats.num_tokens for mean in means)]


def _merged(layer: Any) -> Tensor:
    if isinstance(layer, LoraLinear):
        return layer.merged_weight()
    weight = cast("Tensor", layer.get_base_layer().weight)  # peft's own layer, e.g. GPT-2's transposed linear maps
    delta = cast("Tensor", layer.get_delta_weight(layer.active_adapters[0]))
    return (weight.float() + delta.float()).to(weight.dtype)


def _schedule(optimizer: torch.optim.Optimizer, training: TrainingConfig) -> torch.optim.lr_scheduler.LRScheduler:
    name = "constant_with_warmup" if training.schedule == "constant" else training.schedule
    scheduler: torch.optim.lr_scheduler.LRScheduler = get_scheduler(
        name, optimizer, num_warmup_steps=training.warmup_steps, num_training_steps=max(1, training.steps)
    )
    return scheduler
