"""The policy being trained: a causal LM, its optimizer and schedule, on one rank or many.

Owns log-probabilities and the optimizer step. Log-probabilities are natural logs over the full vocabulary, computed
without dropout. A step's result does not depend on how its micro-batches are dealt to ranks. What is trained of the
model is weights.py's; does not decide what to train on, and does not talk to engines.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor

from rft.config import ModelConfig, TrainingConfig
from rft.engines import sync_kind
from rft.errors import UserError
from rft.trainers import deepspeed, sharding
from rft.trainers.attention import attention_window
from rft.trainers.batch import Layout, MicroBatch, build_micro_batches, one_path
from rft.trainers.halving import free_memory
from rft.trainers.lora import LoraWeights
from rft.trainers.objective import Objective
from rft.trainers.optimizer import build_optimizer, build_schedule
from rft.trainers.ranks import Ranks
from rft.trainers.scorer import Loader
from rft.trainers.stepper import PlainStepper, Stepper
from rft.trainers.update import StepStats, update
from rft.types import Group

logger = logging.getLogger(__name__)

# Mean and max |packed - plain| log-probability of the same tokens. In bfloat16 two kernels differ by a mean of 0.04
# and a maximum of 0.5 on text sampled at temperature 0.8, each as far from float32; a wrong mask costs far more.
_PACKED_TOLERANCE = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (0.1, 1.0)}


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
        is_zero = self.ranks.num > 1 and deepspeed.is_asked_for(model, training)
        self.layout: Layout | None = "plain" if training.batch == "plain" else None  # None: not yet checked
        self.max_tokens = training.max_tokens_per_micro_batch  # lowered when memory does not suffice
        kind = sync_kind(training.sync, self.device.type, is_lora=model.lora is not None)
        loader = Loader(model, self.ranks, is_sharded=self.is_sharded)
        self.weights, self.scorer = loader.trained(
            is_merged=kind == "merged" and not self.is_sharded,
            has_checkpointing=training.gradient_checkpointing,
            seed=seed,
        )
        self.causal_lm = self.weights.causal_lm
        self._reference = loader.reference() if training.kl_coef else None
        self.optimizer = build_optimizer(self.weights.parameters, training, self.device)
        self.scheduler = build_schedule(self.optimizer, training)
        self.stepper: Stepper = (
            deepspeed.ZeroStepper(self.scorer, self.optimizer, self.weights.parameters, training.max_grad_norm)
            if is_zero
            else PlainStepper(
                self.scorer, self.weights, self.optimizer, training, self.ranks, is_sharded=self.is_sharded
            )
        )

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
        mean_limit, limit_of_all = _PACKED_TOLERANCE[next(self.scorer.parameters()).dtype]
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
            result: Tensor = self.scorer(micro_batch.to(self.device), temperature or self.temperature)[0]
        return result

    def _joined(self, method: str, *args: Any) -> AbstractContextManager[None]:
        """A forward pass of rank 0 alone, which the others must take part in where each has a part of the weights."""
        return self.ranks.join(method, *args) if self.is_sharded else nullcontext()

    def reference_logprobs(self, micro_batch: MicroBatch) -> Tensor:
        """[N] float32 log-probabilities of the reference model; every rank calls it for its own micro-batch."""
        with torch.no_grad():
            if self._reference is not None:
                result: Tensor = self._reference(micro_batch, self.temperature)[0]
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
        return update(self, micro_batches, num_tokens, on_micro_batch)

    def release_memory(self) -> None:
        """Give what a step left unused of the GPUs' memory back to others, on all ranks. Collective."""
        with self.ranks.join("release_memory"):
            free_memory()

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
            self.stepper.take_weights()

    def training_state(self) -> dict[str, Any]:
        """Optimizer and schedule, as `load_training_state` takes them. Collective."""
        with self.ranks.join("training_state"):
            return {"optimizer": self.stepper.optimizer_state(), "scheduler": self.scheduler.state_dict()}

    def load_training_state(self, path: Path) -> None:
        """From a file that holds, among others, what `training_state` gave. Collective: every rank reads it."""
        with self.ranks.join("load_training_state", path):
            state = torch.load(path, map_location="cpu", weights_only=True)
            self.stepper.load_optimizer_state(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
