"""The policy being trained: a causal LM, its optimizer and schedule, on one rank or many.

Owns log-probabilities and the optimizer step. Log-probabilities are natural logs over the full vocabulary, computed
without dropout. A step's result does not depend on how its micro-batches are dealt to ranks. What is trained of the
model is weights.py's; does not decide what to train on, and does not talk to engines.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from rft.config import ModelConfig, TrainingConfig
from rft.engines import sync_kind
from rft.errors import MemoryLimitError, UserError
from rft.trainers import deepspeed, sharding
from rft.trainers.attention import attention_inputs, attention_window
from rft.trainers.batch import Layout, MicroBatch, build_micro_batches, one_path
from rft.trainers.halving import free_memory, halve, is_out_of_memory
from rft.trainers.head import decoder, find_head, token_logprobs
from rft.trainers.lora import LoraWeights
from rft.trainers.model import checkpoint_gradients, load_model
from rft.trainers.objective import LossStats, Objective, Tokens, policy_loss
from rft.trainers.optimizer import (
    build_optimizer,
    build_schedule,
    clip_gradients,
    load_optimizer_state,
    optimizer_state,
    total_norm,
)
from rft.trainers.ranks import Ranks
from rft.trainers.weights import build_weights
from rft.types import Group

logger = logging.getLogger(__name__)

# Mean and max |packed - plain| log-probability of the same tokens. In bfloat16 two kernels differ by a mean of 0.04
# and a maximum of 0.5 on text sampled at temperature 0.8, each as far from float32; a wrong mask costs far more.
_PACKED_TOLERANCE = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (0.1, 1.0)}


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
    bad_rollouts: tuple[int, ...] = ()  # then: whose it was, as `MicroBatch.rollout_index` counts them


class _Scorer(nn.Module):
    """MicroBatch -> ([N] log-probabilities, [P] entropies): the forward pass as one module, so that it can be sharded.

    model: what is called, or its causal LM wrapped in adapters.
    """

    def __init__(self, model: nn.Module, causal_lm: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.causal_lm = causal_lm
        self.head = find_head(causal_lm)

    def forward(
        self, micro_batch: MicroBatch, temperature: float, with_entropy_grad: bool = False
    ) -> tuple[Tensor, Tensor]:
        inputs = attention_inputs(self.causal_lm, micro_batch)
        output = decoder(self.causal_lm)(
            input_ids=micro_batch.input_ids, position_ids=micro_batch.position_ids, use_cache=False, **inputs
        )
        hidden = output.last_hidden_state.flatten(0, 1).index_select(0, micro_batch.predictors)
        index, targets = micro_batch.predictor_index, micro_batch.targets
        return token_logprobs(self.head, hidden, index, targets, temperature, with_entropy_grad)


class Policy:
    """The trained model. `temperature` is the sampling temperature at which all training log-probabilities are.

    Every rank has one; methods marked collective are called on rank 0 and run on all (`Ranks.follow`).
    """

    def __init__(
        self, model: ModelConfig, training: TrainingConfig, temperature: float, accelerator: Accelerator, seed: int
    ) -> None:
        self.training, self.temperature = training, temperature
        self.objective = Objective(
            loss=training.loss,
            clip_low=training.clip_low,
            clip_high=training.clip_high,
            max_ratio=training.max_ratio,
            cispo_max_ratio=training.cispo_max_ratio,
            importance_cap=training.effective_importance_cap,
            kl_coef=training.kl_coef,
            entropy_coef=training.entropy_coef,
        )
        self.ranks = Ranks(accelerator)
        self.device = self.ranks.device
        self.is_sharded = self.ranks.num > 1 and sharding.is_asked_for()
        if deepspeed.is_asked_for():
            deepspeed.check_fits(model, training)
        self.layout: Layout | None = "plain" if training.batch == "plain" else None  # None: not yet checked
        self.max_tokens = training.max_tokens_per_micro_batch  # lowered when memory does not suffice
        is_lora = model.lora is not None
        # the loss is a sum over ranks; gradients of shards come averaged over them
        self._loss_scale = self.ranks.num if self.is_sharded and not is_lora else 1
        is_merged = sync_kind(training.sync, self.device.type, is_lora=is_lora) == "merged" and not self.is_sharded
        dtype: torch.dtype = getattr(torch, model.dtype)
        # a shard is its own master: it is stepped as it is stored, and cast when it is gathered
        is_master = self.is_sharded and not is_lora and model.master_dtype != "bfloat16"
        base = load_model(model.path, torch.float32 if is_master else dtype, self.device)
        if training.gradient_checkpointing:
            checkpoint_gradients(base)
        self._place_early(base)
        self.weights = build_weights(base, model, is_merged, seed)
        self.causal_lm = self.weights.causal_lm
        self._scorer = self._placed(_Scorer(self.weights.model, base), base, dtype, is_lora)
        self._reference_scorer = self._load_reference(model, dtype) if training.kl_coef else None
        self.optimizer = build_optimizer(self.weights.parameters, training, self.device)
        self.scheduler = build_schedule(self.optimizer, training)
        self._zero = deepspeed.build_zero(self._scorer, self.optimizer, training.max_grad_norm, self.ranks)

    def _place_early(self, model: nn.Module) -> None:
        if not self.is_sharded:  # a sharded one goes to its device layer by layer
            nn.Module.to(model, self.device)

    def _placed(self, scorer: _Scorer, model: PreTrainedModel, dtype: torch.dtype, is_lora: bool) -> _Scorer:
        if not self.is_sharded:
            return scorer
        adapters = self.weights.parameters if is_lora else []
        for adapter in adapters:
            adapter.data = adapter.data.to(self.device)
        sharding.shard(scorer, model, dtype, adapters, self.ranks)
        return scorer

    def _load_reference(self, config: ModelConfig, dtype: torch.dtype) -> _Scorer | None:
        """The second model of the KL term; None where the reference is this model without its adapter."""
        if config.reference is None and config.lora is not None:
            return None
        path, field = (config.reference, "model.reference") if config.reference else (config.path, "model.path")
        model = load_model(path, dtype, self.device, field)
        model.requires_grad_(False)
        self._place_early(model)
        return self._placed(_Scorer(model, model), model, dtype, is_lora=False)

    @property
    def trainable_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.weights.parameters)

    def micro_batches(self, groups: list[Group], advantages: list[Tensor]) -> list[MicroBatch]:
        """The groups as micro-batches for all ranks, in this policy's layout, which is checked on its first group."""
        if self.layout is None and groups:
            self.check_packed(groups[0])
        micro_batches = build_micro_batches(
            groups, advantages, self.max_tokens, self.layout or "packed", self.ranks.num
        )
        window = attention_window(self.causal_lm)
        longest = max((int(micro_batch.position_ids.max()) + 1 for micro_batch in micro_batches), default=0)
        if self.layout == "packed" and window is not None and longest > window:
            self._use_plain(f"sequences of {longest} tokens exceed the model's attention window of {window}")
            return build_micro_batches(groups, advantages, self.max_tokens, "plain")
        return micro_batches

    def check_packed(self, group: Group) -> float:
        """Compare packed with plain log-probabilities on `group`, settle `layout`, return the largest difference.

        Beyond a mean of 1e-4 or a maximum of 1e-3 (float32), 0.1 or 1 (bfloat16), `batch: auto` falls back to the
        plain layout with a warning; `batch: packed` raises UserError. Without gradients; collective where sharded.
        """
        zeros = [torch.zeros(len(group.rollouts))]
        rows = build_micro_batches([group], zeros, self.max_tokens, "packed")
        if not rows:  # nothing was sampled: nothing to compare, the next group settles it
            return 0.0
        packed = self._in_order(rows)
        plain = self._in_order(build_micro_batches([group], zeros, self.max_tokens, "plain"))
        gaps = (packed - plain).abs()
        mean, largest = gaps.mean().item(), gaps.max().item()
        mean_limit, limit_of_all = _PACKED_TOLERANCE[next(self._scorer.parameters()).dtype]
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

    def logprobs(self, micro_batch: MicroBatch, temperature: float | None = None) -> Tensor:
        """[N] float32 log-probabilities of the micro-batch's targets, without gradient; collective where sharded.

        temperature: the sampling temperature where it is not given.
        """
        with self._joined("logprobs", micro_batch, temperature), torch.no_grad():
            result: Tensor = self._scorer(micro_batch.to(self.device), temperature or self.temperature)[0]
        return result

    def _joined(self, method: str, *args: Any) -> AbstractContextManager[None]:
        """A forward pass of rank 0 alone, which the others must take part in where each has a part of the weights."""
        return self.ranks.join(method, *args) if self.is_sharded else nullcontext()

    def _reference(self, micro_batch: MicroBatch) -> Tensor:
        """[N] float32 log-probabilities of the reference model."""
        with torch.no_grad():
            if self._reference_scorer is not None:
                result: Tensor = self._reference_scorer(micro_batch, self.temperature)[0]
                return result
            with cast("LoraWeights", self.weights).without_adapter():
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
        scores: list[float] = self.logprobs(one_path(ids, start), 1.0).tolist()
        return scores

    def update(
        self, shares: list[list[MicroBatch]], num_tokens: int, on_micro_batch: Callable[[], None] | None = None
    ) -> StepStats:
        """One optimizer step of all ranks, each on its share of the window. Collective."""
        with self.ranks.join("update", shares, num_tokens):
            return self.step(shares[self.ranks.index], num_tokens, on_micro_batch)

    def step(
        self, micro_batches: list[MicroBatch], num_tokens: int, on_micro_batch: Callable[[], None] | None = None
    ) -> StepStats:
        """One optimizer step on this rank's micro-batches (see `batch.weigh`); every rank passes equally many, >= 1.

        num_tokens: the loss-bearing tokens of the whole window, over all ranks. A loss or gradient that is not
        finite on any rank skips the step on all of them: weights, optimizer and schedule stay as they were.
        on_micro_batch: called after each micro-batch, for progress. Raises MemoryLimitError when memory does not
        suffice for half of a micro-batch either.
        """
        learning_rate = float(self.scheduler.get_last_lr()[0])
        rows = self._accumulate(micro_batches, on_micro_batch)
        totals = self._totals(rows)
        grad_norm = self._step_weights(math.isfinite(totals["loss"]))
        is_finite = math.isfinite(grad_norm) and math.isfinite(totals["loss"])
        if is_finite:
            self.weights.after_step()
            self.scheduler.step()
        bad_rollouts = () if is_finite else tuple(sorted(self.ranks.union(self._bad_rollouts(micro_batches))))
        self._zero_grad()
        return StepStats(
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            num_tokens=num_tokens,
            num_row_tokens=int(totals.pop("num_row_tokens")),
            is_skipped=not is_finite,
            bad_rollouts=bad_rollouts,
            **totals,
        )

    def _zero_grad(self) -> None:
        if self._zero is not None:
            self._zero.zero_grad()
        else:
            self.optimizer.zero_grad()

    def _step_weights(self, is_finite: bool) -> float:
        """Step what is trained, unless the loss or the gradient is not finite; the gradient's norm."""
        if self._zero is not None:
            return self._zero.step()
        parameters = self.weights.parameters
        self.ranks.sum_gradients(parameters)
        grad_norm = clip_gradients(parameters, self.training.max_grad_norm)
        if is_finite and math.isfinite(grad_norm):
            self.optimizer.step()
        return grad_norm

    def _accumulate(
        self, micro_batches: list[MicroBatch], on_micro_batch: Callable[[], None] | None
    ) -> list[list[float]]:
        """The gradient of this rank's share; when memory runs out on any rank, all start again on halves, once."""
        rows = self._try(micro_batches, on_micro_batch)
        if rows is None:
            self.max_tokens = max(16, max(batch.num_row_tokens for batch in micro_batches) // 2)
            logger.warning(
                "out of memory: micro-batches are halved; set training.max_tokens_per_micro_batch=%d", self.max_tokens
            )
            rows = self._try([half for batch in micro_batches for half in halve(batch)], on_micro_batch)
        if rows is None:
            raise MemoryLimitError(
                f"out of memory with micro-batches of {self.max_tokens} tokens",
                cure=f"set training.max_tokens_per_micro_batch={max(16, self.max_tokens // 2)} or less, "
                "training.gradient_checkpointing=true, or shorten rollouts (rollout.max_tokens_per_turn)",
            )
        return rows

    def _try(
        self, micro_batches: list[MicroBatch], on_micro_batch: Callable[[], None] | None
    ) -> list[list[float]] | None:
        """The micro-batches' statistics; None when memory ran out on any rank. Gradients are in the parameters."""
        self._zero_grad()
        rows: list[list[float]] = []
        is_full = False
        try:
            for index, micro_batch in enumerate(micro_batches):
                rows.append(self._backward(micro_batch.to(self.device), is_last=index == len(micro_batches) - 1))
                if on_micro_batch is not None:
                    on_micro_batch()
        except RuntimeError as error:
            # where weights are sharded the other ranks wait inside this forward pass, with DeepSpeed inside the
            # backward pass: they cannot start again with us
            if not is_out_of_memory(error) or self.is_sharded or self._zero is not None:
                raise
            is_full = True
        if self.ranks.any(is_full):
            free_memory()
            return None
        return rows

    def _backward(self, micro_batch: MicroBatch, *, is_last: bool = True) -> list[float]:
        """Accumulate one micro-batch's gradient; returns its share of the step's statistics as sums."""
        reference = self._reference(micro_batch) if self.objective.kl_coef else None
        has_bonus = self.objective.entropy_coef > 0
        logprobs, entropies = (self._zero or self._scorer)(micro_batch, self.temperature, has_bonus)
        tokens = Tokens(
            logprobs,
            micro_batch.sampled_logprobs,
            micro_batch.advantages,
            micro_batch.weights,
            micro_batch.sequence_index,
            reference,
            entropies[micro_batch.predictor_index] if has_bonus else None,
        )
        loss, stats = policy_loss(self.objective, tokens)
        if self._zero is not None:
            self._zero.backward(loss, is_last=is_last)
        else:
            (loss * self._loss_scale).backward()
        return [
            loss.item(),
            *_sums(stats),
            stats.reference_kl * stats.num_tokens,
            entropies.sum().item(),
            entropies.numel(),
            micro_batch.num_row_tokens,
            stats.max_gap,
        ]

    def _totals(self, rows: list[list[float]]) -> dict[str, float]:
        """This rank's rows of statistics -> the step's, over all ranks."""
        columns = list(zip(*rows, strict=True))
        (max_gap,) = self.ranks.max([max(columns.pop())])
        sums = self.ranks.sum([math.fsum(column) for column in columns])
        loss, tokens, clips, ratios, kls, gaps, references, entropies, positions, row_tokens = sums
        tokens, positions = max(1.0, tokens), max(1.0, positions)
        return {
            "loss": loss,
            "clip_share": clips / tokens,
            "mean_ratio": ratios / tokens,
            "approx_kl": kls / tokens,
            "mean_logprob_gap": gaps / tokens,
            "max_logprob_gap": max_gap,
            "reference_kl": references / tokens,
            "entropy": entropies / positions,
            "num_row_tokens": row_tokens,
        }

    def _bad_rollouts(self, micro_batches: list[MicroBatch]) -> set[int]:
        """The rollouts (as `rollout_index` counts them) of this rank's micro-batches whose gradient is not finite.

        Where a rollout's own log-probabilities say so it is that one, else all of its micro-batch.
        """
        found: set[int] = set()
        for micro_batch in micro_batches:
            self._zero_grad()
            moved = micro_batch.to(self.device)
            (loss, *_) = self._backward(moved)
            terms = self.logprobs(moved) - moved.sampled_logprobs
            is_bad = ~torch.isfinite(terms * moved.advantages)
            # DeepSpeed has no norm of one rank's gradient: it is this micro-batch's fault if the terms say so
            norm = total_norm(self.weights.parameters) if self._zero is None else math.nan if is_bad.any() else 0.0
            if not (math.isfinite(loss) and math.isfinite(norm)):
                found |= set(moved.rollout_index[is_bad if bool(is_bad.any()) else slice(None)].tolist())
        return found

    # --- the weights, in the forms others need ---

    def full_state_dict(self) -> dict[str, Tensor]:
        """Every weight as engines load them, see `Weights.full_state_dict`. Collective where sharded."""
        with self._joined("full_state_dict"):
            return self.weights.full_state_dict()

    def full_tensors(self) -> Generator[tuple[str, Tensor], None, None]:
        """The same one after another, see `Weights.full_tensors`. Collective where sharded: take all, or close it."""
        with self._joined("pass_full_tensors"):
            yield from self.weights.full_tensors()

    def pass_full_tensors(self) -> None:
        """What the other ranks do while rank 0 takes `full_tensors`."""
        for _ in self.weights.full_tensors():
            pass

    def save_weights(self, path: Path) -> None:
        """Write what is trained into the folder `path`. Collective where sharded."""
        with self._joined("save_weights", path):
            self.weights.save(path, writes=self.ranks.leads)

    def load_weights(self, path: Path) -> None:
        """Replace what is trained by what `save_weights` wrote. Collective. Raises UserError when it does not fit."""
        with self.ranks.join("load_weights", path):
            self.weights.load(path)
            if self._zero is not None:
                self._zero.take_weights()

    def training_state(self) -> dict[str, Any]:
        """Optimizer and schedule, as `load_training_state` takes them. Collective where sharded."""
        with self.ranks.join("training_state") if self._zero is not None else self._joined("training_state"):
            optimizer = self._zero.optimizer_state() if self._zero is not None else optimizer_state(self.optimizer)
            return {"optimizer": optimizer, "scheduler": self.scheduler.state_dict()}

    def load_training_state(self, path: Path) -> None:
        """From a file that holds, among others, what `training_state` gave. Collective: every rank reads it."""
        with self.ranks.join("load_training_state", path):
            state = torch.load(path, map_location="cpu", weights_only=True)
            if self._zero is not None:
                self._zero.load_optimizer_state(state["optimizer"])
            else:
                load_optimizer_state(self.optimizer, state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])


def _sums(stats: LossStats) -> list[float]:
    means = (stats.clip_share, stats.mean_ratio, stats.approx_kl, stats.mean_gap)
    return [stats.num_tokens, *(mean * stats.num_tokens for mean in means)]
