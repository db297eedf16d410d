"""Warm-up: a supervised cold start on demonstrations, by TRL's SFTTrainer, for models that never earn a reward.

Owns how demonstrations are batched and trained on, and which checkpoint is kept: the policy's own, so that
whatever reads a run reads a warm-up. The ids come tokenised and nothing is cut; dropout is off, the order is seeded,
nothing is reported to anyone. One process: several ranks are refused. Needs TRL, so it is imported only when used.
"""

from __future__ import annotations

import math
import os
from typing import Any, cast

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from rft.config import RunConfig, WarmupConfig
from rft.demonstrations import Demonstration
from rft.errors import NumericsError, Paused, UserError
from rft.lesson import Lesson
from rft.progress import Display, Phase
from rft.store import RunStore
from rft.trainers import checkpoint
from rft.trainers.optimizer import clip_gradients
from rft.trainers.policy import Policy
from rft.types import Sequence

_LEARNING_RATES = {True: 2e-4, False: 2e-5}  # with adapters, all weights: ten times apart, as TRL's guide has it
_RAMP_SHARE = 0.05  # of the steps, in which the learning rate rises; then it falls to zero in a line
_NUM_LINES = 20  # that a person reads of a warm-up
_NOT_LEARNT = -100  # the label without a loss
_ROW_NAMES = {
    "loss": "update/loss",
    "learning_rate": "update/learning_rate",
    "mean_token_accuracy": "update/token_accuracy",
    "entropy": "update/entropy",
    "epoch": "epoch",
    "num_tokens": "num_tokens",  # seen since the start
    "eval_loss": "held_out/loss",
    "eval_mean_token_accuracy": "held_out/token_accuracy",
}


def check_machine() -> None:
    """Raises UserError where SFTTrainer would need more than this process and one device."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("a warm-up runs in one process", where="rft warmup", cure="start it without accelerate launch")
    if torch.cuda.device_count() > 1:
        cure = "show it one: CUDA_VISIBLE_DEVICES=0 rft warmup ..."
        raise UserError("a warm-up runs on one GPU, and several are visible", where="rft warmup", cure=cure)


def warm_up(
    config: RunConfig, policy: Policy, lesson: Lesson, tokenizer: PreTrainedTokenizerBase, keeper: Keeper
) -> None:
    """Train `policy` on the lesson; the checkpoint that is left is of the best epoch, or of the end.

    Raises NumericsError, before anything is saved, when a loss or gradient is not finite, and Paused after saving when
    that was asked for.
    """
    warmup = config.warmup
    assert warmup is not None, "the caller has looked"
    learning_rate = warmup.learning_rate or _LEARNING_RATES[config.model.lora is not None]
    rows = _micro_batch_size(lesson, warmup.batch_size, config.training.max_tokens_per_micro_batch)
    arguments = SFTConfig(
        output_dir=str(keeper.store.weights),  # nothing is written there: rft keeps its own checkpoints
        num_train_epochs=warmup.epochs,
        per_device_train_batch_size=rows,
        per_device_eval_batch_size=rows,
        gradient_accumulation_steps=warmup.batch_size // rows,
        learning_rate=learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=_RAMP_SHARE,
        max_grad_norm=0.0,  # the optimizer clips
        seed=config.seed,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        gradient_checkpointing=False,
        bf16=False,  # no autocast: model.dtype decides, as everywhere
        use_cpu=policy.device.type == "cpu",
        eval_strategy="epoch" if lesson.held_out else "no",
        save_strategy="no",
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
    )
    optimizer = _optimizer(policy, learning_rate, keeper)
    trainer = _Trainer(
        model=cast("PreTrainedModel", policy.weights.model),
        args=arguments,
        train_dataset=_dataset(lesson.learnt),
        eval_dataset=_dataset(lesson.held_out) if lesson.held_out else None,
        processing_class=tokenizer,
        callbacks=[keeper],
        optimizers=(optimizer, None),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    if not lesson.held_out:
        keeper.save(trainer.state.global_step)


def _optimizer(policy: Policy, learning_rate: float, keeper: Keeper) -> torch.optim.Optimizer:
    """AdamW over the policy's own parameters, which are float32 masters where the model is not: Trainer knows only
    the model's.
    """
    parameters, training = policy.weights.parameters, policy.training
    optimizer = torch.optim.AdamW(parameters, learning_rate, weight_decay=training.weight_decay, fused=True)

    def clip(*_: Any) -> None:
        keeper.grad_norm = clip_gradients(parameters, training.max_grad_norm)

    def bring_to_model(*_: Any) -> None:
        policy.weights.after_step()
        for parameter in parameters:
            parameter.grad = None

    optimizer.register_step_pre_hook(clip)
    optimizer.register_step_post_hook(bring_to_model)
    return optimizer


class _Trainer(SFTTrainer):
    """SFTTrainer without dropout and without telemetry."""

    def _send_telemetry(self) -> None:
        """Nothing leaves the machine."""

    def compute_loss(self, *arguments: Any, **options: Any) -> Any:
        """With all modules as in sampling; the flag of the whole model stays, TRL tells training by it."""
        for module in cast("nn.Module", self.model).children():
            module.eval()
        return super().compute_loss(*arguments, **options)  # type: ignore[no-untyped-call]


class Keeper(TrainerCallback):
    """Writes what happens into the run folder, and keeps the checkpoint."""

    def __init__(self, policy: Policy, store: RunStore, display: Display, phase: Phase, num_steps: int) -> None:
        self.policy, self.store, self.display, self.phase = policy, store, display, phase
        self.num_steps = num_steps
        self.grad_norm = math.nan
        self.best_loss = math.inf

    def save(self, step: int) -> None:
        """The policy as it is now becomes the run's only checkpoint."""
        checkpoint.save(self.store.checkpoints, step, self.policy, {})
        checkpoint.prune(self.store.checkpoints, 1)

    def on_log(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """One row for a step, one for a measurement; SFTTrainer's summary at the end has nothing new."""
        values = {_ROW_NAMES[name]: float(value) for name, value in rest["logs"].items() if name in _ROW_NAMES}
        step, losses = state.global_step, [values.get("update/loss"), values.get("held_out/loss")]
        if not any(loss is not None for loss in losses):
            return
        if "update/loss" in values:
            values["update/grad_norm"] = self.grad_norm
        self.store.append_metrics({"step": step, "kind": "warmup", **values})
        if not all(math.isfinite(value) for value in values.values()):
            raise NumericsError(
                f"the loss or its gradient was not finite at step {step} of the warm-up",
                cure="lower warmup.learning_rate, or set model.dtype=float32",
            )
        if "update/loss" in values:
            self.store.write_state({"status": "running", "step": step, "steps": self.num_steps})
            self.phase.advance()
        if "held_out/loss" in values or step % max(1, self.num_steps // _NUM_LINES) == 0 or step == 1:
            self.display.line(_line(step, self.num_steps, values))
        if "update/loss" in values and step < self.num_steps and self.store.is_pause_asked:
            self.save(step)
            raise Paused(step)

    def on_evaluate(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Keep the epoch when it is the best so far."""
        loss = float(rest["metrics"]["eval_loss"])
        if loss < self.best_loss:
            self.best_loss = loss
            self.save(state.global_step)


def num_steps(lesson: Lesson, warmup: WarmupConfig) -> int:
    """Optimizer steps of the whole warm-up."""
    return math.ceil(len(lesson.sequences) / warmup.batch_size) * warmup.epochs


def _micro_batch_size(lesson: Lesson, batch_size: int, max_tokens: int) -> int:
    """The most sequences of an optimizer step that fit into one padded micro-batch, dividing the step evenly."""
    longest = max(demonstration.num_tokens for demonstration in lesson.learnt + lesson.held_out)
    divisors = [rows for rows in range(1, batch_size + 1) if batch_size % rows == 0]
    return max([rows for rows in divisors if rows * longest <= max_tokens], default=1)


def _dataset(demonstrations: list[Demonstration]) -> Dataset:
    sequences = [sequence for demonstration in demonstrations for sequence in demonstration.sequences]
    return Dataset.from_list([{"input_ids": sequence.ids, "labels": _labels(sequence)} for sequence in sequences])


def _labels(sequence: Sequence) -> list[int]:
    pairs = zip(sequence.ids, sequence.mask, strict=True)
    return [token if is_learnt else _NOT_LEARNT for token, is_learnt in pairs]


def _line(step: int, steps: int, values: dict[str, float]) -> str:
    if "held_out/loss" in values:
        return f"warm-up {step}/{steps}: held out: loss {values['held_out/loss']:.3f}"
    return f"warm-up {step}/{steps}: loss {values['update/loss']:.3f}"
