"""The two sides of scripts/bench_trainer: one optimizer step of rft's and of TRL's, on the same recorded rollouts.

A side builds its batch from the rollouts, runs forward, loss, backward, clip and optimizer step, and gives the loss.
Both have the same weights after `copy_weights`; `gradients` gives what a step accumulated, before the clip.
Importing this is light: torch, rft and TRL are imported when a side is built.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from rft.trainers.batch import MicroBatch
    from rft.types import Group

RANK, ALPHA, TEMPERATURE = 16, 32, 0.8
LEARNING_RATE = 1e-6  # so small that all steps of a run compute with nearly the same weights
NUM_STEPS, NUM_GENERATIONS = 100_000, 8


@dataclass(frozen=True, slots=True)
class Shape:
    """A group of `rollouts` with one prompt; between two sampled turns comes a tool result."""

    prompt: int
    turns: tuple[int, ...]  # sampled tokens of each
    result: int = 0  # tokens
    rollouts: int = 8

    @property
    def num_tokens(self) -> int:
        """The loss-bearing tokens of the group."""
        return self.rollouts * sum(self.turns)


@dataclass(frozen=True, slots=True)
class Recorded:
    """What a step trains on."""

    groups: list[Group]
    advantages: list[Tensor]  # one [rollouts] float32 per group


def record(shape: Shape, model: Path, num_groups: int = 1, logprobs: Tensor | None = None) -> Recorded:
    """Groups of random ids: the rollouts of a group share their prompt and nothing else, which is the least they can.

    logprobs: [N] float32 of all sampled tokens in order, or None where a step's loss does not matter.
    """
    import torch
    from transformers import AutoConfig

    vocabulary = AutoConfig.from_pretrained(model, local_files_only=True).get_text_config().vocab_size
    draw = torch.Generator().manual_seed(0)
    values = iter(logprobs.tolist() if logprobs is not None else [-5.0] * (num_groups * shape.num_tokens))

    def ids(count: int) -> list[int]:
        return torch.randint(vocabulary, (count,), generator=draw).tolist()

    groups = [_group(shape, f"item-{number}", ids, values) for number in range(num_groups)]
    spread = torch.linspace(-1, 1, shape.rollouts) if shape.rollouts > 1 else torch.ones(1)
    return Recorded(groups, [spread] * num_groups)


def _group(shape: Shape, name: str, ids: Callable[[int], list[int]], values: Iterable[float]) -> Group:
    from rft.types import Group, Item, Message, Rollout, StopReason, Turn

    source, prompt = iter(values), ids(shape.prompt)

    def turn(inputs: list[int], length: int) -> Turn:
        return Turn(
            input_ids=inputs,
            output_ids=ids(length),
            logprobs=[next(source) for _ in range(length)],
            finish_reason="stop",
            policy_version=0,
            message=Message(role="assistant"),
        )

    def rollout(attempt: int) -> Rollout:
        turns = [turn(ids(shape.result) if number else prompt, length) for number, length in enumerate(shape.turns)]
        facts: dict[str, Any] = {"item_id": name, "split": "train", "step": 0, "seed": 0, "attempt": attempt}
        facts |= {"stop_reason": StopReason.ANSWERED, "started_at": 0.0, "duration_s": 1.0}
        return Rollout(id=f"{name}-{attempt}", turns=turns, **facts)

    return Group(Item(id=name, row={}, messages=[]), 0, [rollout(attempt) for attempt in range(shape.rollouts)])


class RftSide:
    """`Policy`, fed as trainers/grpo.py feeds it."""

    name = "rft"

    def __init__(self, model: Path, dtype: str, *, has_lora: bool, **training: Any) -> None:
        """training: fields of TrainingConfig that are not the default."""
        from rft.config import ModelConfig, TrainingConfig
        from rft.trainers.policy import Policy
        from rft.trainers.ranks import build_accelerator

        lora = {"rank": RANK, "alpha": ALPHA} if has_lora else None
        model_config = ModelConfig.model_validate({"path": model, "dtype": dtype, "lora": lora})
        section = TrainingConfig(steps=NUM_STEPS, learning_rate=LEARNING_RATE, **training)
        self.policy = Policy(model_config, section, TEMPERATURE, build_accelerator(0), 0)

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        return _trained(self.policy.causal_lm)

    def micro_batches(self, recorded: Recorded) -> list[MicroBatch]:
        from rft.trainers.batch import weigh

        return weigh(self.policy.micro_batches(recorded.groups, recorded.advantages), "dapo", 1)

    def step(self, recorded: Recorded) -> float:
        return self.update(self.micro_batches(recorded))

    def update(self, micro_batches: list[MicroBatch]) -> float:
        from rft.trainers.batch import count_tokens

        return self.policy.step(micro_batches, count_tokens(micro_batches)).loss

    def logprobs(self, recorded: Recorded) -> Tensor:
        """[N] float32 of the sampled tokens, in the order of the rollouts."""
        import torch

        batches = self.micro_batches(recorded)
        order = torch.cat([batch.sequence_index for batch in batches]).argsort(stable=True)
        return torch.cat([self.policy.logprobs(batch).cpu() for batch in batches])[order]


class TrlSide:
    """TRL's GRPOTrainer, whose generation answers with the recorded rollouts; its `training_step` does the rest."""

    name = "TRL"

    def __init__(self, model: Path, dtype: str, *, has_lora: bool) -> None:
        self.micro_batch_size = NUM_GENERATIONS
        self.trainer = _trl_trainer(model, dtype, has_lora)
        self.trainer.create_optimizer_and_scheduler(NUM_STEPS)

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        model = self.trainer.model
        return _trained(model.get_base_model() if hasattr(model, "get_base_model") else model)

    def step(self, recorded: Recorded) -> float:
        """What transformers' Trainer does for one optimizer step, without its callbacks and logging."""
        trainer, model = self.trainer, self.trainer.model
        trainer.recorded = _trl_inputs(recorded, trainer.accelerator.device)
        num_rollouts = len(recorded.groups[0].rollouts)
        count = max(1, num_rollouts // self.micro_batch_size)
        trainer.args.steps_per_generation = trainer.args.gradient_accumulation_steps = count
        trainer.current_gradient_accumulation_steps, trainer._step = count, 0
        loss = sum(float(trainer.training_step(model, [], None)) for _ in range(count))
        trainer.accelerator.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        model.zero_grad()
        return loss


def _trl_trainer(model: Path, dtype: str, has_lora: bool) -> Any:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging
    from trl import GRPOConfig, GRPOTrainer

    logging.set_verbosity_error()
    logging.disable_progress_bar()

    class RecordedTrainer(GRPOTrainer):  # type: ignore[misc]
        recorded: dict[str, Tensor]

        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Tensor]:
            return self.recorded

    arguments = GRPOConfig(
        tempfile.mkdtemp(prefix="bench_trainer-"),  # nothing is written there
        per_device_train_batch_size=NUM_GENERATIONS,
        num_generations=NUM_GENERATIONS,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        temperature=TEMPERATURE,
        loss_type="dapo",
        epsilon_high=0.28,
        beta=0.0,
        bf16=False,  # `dtype` decides; True would be autocast on top
        gradient_checkpointing=False,
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
    )
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", bias="none", task_type="CAUSAL_LM")
    return RecordedTrainer(
        AutoModelForCausalLM.from_pretrained(
            model, dtype=getattr(torch, dtype), attn_implementation="sdpa", local_files_only=True
        ),
        reward_funcs=lambda completions, **columns: [0.0] * len(completions),
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": ["-"] * NUM_GENERATIONS}),
        processing_class=AutoTokenizer.from_pretrained(model, local_files_only=True),
        peft_config=lora if has_lora else None,
    )


def _trl_inputs(recorded: Recorded, device: Any) -> dict[str, Tensor]:
    """What `_generate_and_score_completions` makes of the rollouts: prompts, completions with the tools' results."""
    import torch
    from trl.trainer.utils import pad

    (group,), (advantages,) = recorded.groups, recorded.advantages
    starts = [len(rollout.turns[0].input_ids) for rollout in group.rollouts]
    sequences = [rollout.sequences[0] for rollout in group.rollouts]
    pairs = list(zip(sequences, starts, strict=True))

    def padded(rows: list[list[Any]], side: str = "right") -> Tensor:
        return pad([torch.tensor(row) for row in rows], padding_value=0, padding_side=side).to(device)

    tool_mask = padded([[int(is_sampled) for is_sampled in s.mask[start:]] for s, start in pairs])
    found = {
        "prompt_ids": padded([s.ids[:start] for s, start in pairs], "left"),
        "prompt_mask": padded([[1] * start for start in starts], "left"),
        "completion_ids": padded([s.ids[start:] for s, start in pairs]),
        "completion_mask": padded([[1] * (len(s.ids) - start) for s, start in pairs]),
        "old_per_token_logps": padded([s.logprobs[start:] for s, start in pairs]),
        "advantages": advantages.to(device),
        "num_items_in_batch": tool_mask.sum(),
    }
    has_tools = any(len(rollout.turns) > 1 for rollout in group.rollouts)
    return found | ({"tool_mask": tool_mask} if has_tools else {})


def _trained(model: Any) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def copy_weights(source: RftSide, target: TrlSide) -> None:
    """Give `target` the trained weights of `source`; both must train the same tensors."""
    import torch

    if source.weights.keys() != target.weights.keys():
        raise ValueError(f"not the same tensors: {sorted(source.weights.keys() ^ target.weights.keys())[:3]}")
    with torch.no_grad():
        for name, parameter in target.weights.items():
            parameter.copy_(source.weights[name])


def gradients(side: RftSide | TrlSide, step: Callable[[], float]) -> tuple[float, Tensor]:
    """The loss and the whole gradient of a step, as a vector before the clip; the weights are put back afterwards."""
    import torch

    before = {name: parameter.detach().clone() for name, parameter in side.weights.items()}
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Parameter], None]:
        return lambda parameter: found.update({name: parameter.grad.clone()})  # type: ignore[union-attr]

    hooks = [p.register_post_accumulate_grad_hook(keep(name)) for name, p in side.weights.items()]
    try:
        loss = step()
    finally:
        for hook in hooks:
            hook.remove()
    with torch.no_grad():
        for name, parameter in side.weights.items():
            parameter.copy_(before[name])
    return loss, torch.cat([found[name].flatten().float() for name in sorted(found)])
