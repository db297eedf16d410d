"""What is planned: the parts of a config that decide memory and speed, and the work of one step.

What a config does not say (how long prompts, answers and tool results are) is assumed here, and each assumption told.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from statistics import fmean

from rft.config import RunConfig, VllmEngineConfig
from rft.errors import ConfigError, UserError
from rft.plan.shape import ModelShape, read_shape

BYTES = {"bfloat16": 2, "float32": 4}
_CHARS_PER_TOKEN = 4.0  # of English with JSON; byte-pair tokenizers of 50k to 150k entries are within a quarter of it
_ROWS_READ = 64
_SAMPLED_SHARE = 0.5  # of what a rollout may sample: the limits are there for the long ones
_RESULT_TOKENS = 128  # of one tool's answer
_TENSOR_PARALLEL = ("--tensor-parallel-size", "-tp")


@dataclass(frozen=True, slots=True)
class Lora:
    rank: int
    targets: tuple[str, ...] | None  # None: all linear layers


@dataclass(frozen=True, slots=True)
class Workload:
    """One step. Tokens are means: of a prompt, of what a rollout samples, and of what tools answer it."""

    items: int
    rollouts_per_item: int
    prompt: int
    sampled: int
    results: int

    @property
    def rollouts(self) -> int:
        return self.items * self.rollouts_per_item

    @property
    def context(self) -> int:
        """The tokens of a finished rollout."""
        return self.prompt + self.sampled + self.results

    @property
    def num_sampled(self) -> int:
        return self.rollouts * self.sampled

    @property
    def row_tokens(self) -> int:
        """What training computes: packed rows hold an item's prompt once."""
        return self.items * self.prompt + self.rollouts * (self.sampled + self.results)


@dataclass(frozen=True, slots=True)
class Setup:
    """One training run, as far as memory and speed go."""

    shape: ModelShape
    value_bytes: int  # of a weight and an activation: model.dtype
    lora: Lora | None
    sync: str  # training.sync
    has_float_masters: bool  # all weights: the optimizer steps float32
    optimizer: str
    has_checkpointing: bool
    has_reference: bool  # a second model, for the KL
    has_frozen: bool  # model.freeze names something
    max_tokens: int  # of a micro-batch
    max_tokens_per_turn: int
    max_model_len: int
    max_concurrent: int  # sequences an engine samples at once
    gpu_memory_share: float  # of an engine that is on a trainer's GPU
    engine_args: tuple[str, ...]
    staleness: int
    work: Workload
    sleeps: bool = False  # engines give their memory back while the policy trains: engine.sleep

    @property
    def tensor_parallel(self) -> int:
        """The GPUs of one engine."""
        return tensor_parallel(self.engine_args)

    @property
    def has_expert_adapters(self) -> bool:
        return self.lora is not None and self.shape.is_mixture and self.shape.has_mlp(self.lora.targets)

    @property
    def is_merged(self) -> bool:
        """Adapters are computed, and sent to engines, as merged weights; on GPUs only where that is asked for, or
        where adapters sit on fused experts, which no server loads (trainers/lora.py).
        """
        return self.lora is not None and (self.sync == "merged" or self.has_expert_adapters)

    @property
    def row_tokens(self) -> int:
        """The tokens of the largest row: a sequence beyond the budget gets a row of its own (trainers/packing.py)."""
        return max(self.max_tokens, self.max_model_len)

    @property
    def trained(self) -> int:
        """How many numbers are trained."""
        if self.lora is None:
            return self.shape.parameters
        return self.shape.adapters(self.lora.rank, self.lora.targets)


def setup_of(config: RunConfig, model: Path | None, tokens: dict[str, int]) -> tuple[Setup, list[str]]:
    """The setup of a config, and what was assumed.

    model: a folder with a config.json instead of the config's. tokens: `prompt`, `sampled`, `results` where known.
    Raises ConfigError for a model, or an engine, that the planner does not know.
    """
    engine, training, lora = config.engine, config.training, config.model.lora
    if not isinstance(engine, VllmEngineConfig):
        raise ConfigError("the planner knows vLLM alone", where="engine.type", cure="add engine.type=vllm")
    shape = read_shape(model, "--model") if model is not None else read_shape(config.model.path)
    work, assumed = _workload(config, tokens)
    targets = None if lora is None or lora.targets == "all-linear" else tuple(lora.targets)
    setup = Setup(
        shape=shape,
        value_bytes=BYTES[config.model.dtype],
        lora=None if lora is None else Lora(lora.rank, targets),
        sync=training.sync,
        has_float_masters=config.model.master_dtype != "bfloat16",
        optimizer=training.optimizer,
        has_checkpointing=training.gradient_checkpointing,
        has_reference=training.kl_coef > 0 and (lora is None or config.model.reference is not None),
        has_frozen=bool(config.model.freeze),
        max_tokens=training.max_tokens_per_micro_batch,
        max_tokens_per_turn=config.rollout.max_tokens_per_turn,
        max_model_len=engine.max_model_len,
        max_concurrent=engine.max_concurrent,
        gpu_memory_share=engine.gpu_memory_share,
        sleeps=engine.sleep,
        engine_args=tuple(engine.args),
        staleness=training.staleness,
        work=work,
    )
    if setup.has_expert_adapters and training.sync != "merged":
        assumed.append("adapters on experts need training.sync: merged, and are planned so")
    if config.model.freeze:
        assumed.append("model.freeze is not looked at: frozen weights need less than planned")
    return setup, assumed


def tensor_parallel(args: Sequence[str]) -> int:
    """The GPUs of one engine, as its flags say; 1 where they do not. Raises UserError."""
    for name, value in pairwise([*args, ""]):
        key, equals, given = name.partition("=")
        if key in _TENSOR_PARALLEL:
            text = given if equals else value
            if not text.isdigit() or int(text) < 1:
                raise UserError(f"{key} is {text[:20]!r}", where="engine.args", cure="give the number of GPUs")
            return int(text)
    return 1


def _workload(config: RunConfig, tokens: dict[str, int]) -> tuple[Workload, list[str]]:
    rollout, limit, assumed = config.rollout, config.engine.max_model_len, []
    prompt = tokens.get("prompt")
    if prompt is None:
        prompt, told = _prompt_tokens(config.data.train, limit)
        assumed.append(told)
    sampled = tokens.get("sampled")
    if sampled is None:
        sampled = max(1, round(_SAMPLED_SHARE * rollout.max_sampled_tokens))
        assumed.append(f"a rollout samples {sampled:,} tokens, half of what it may (--sampled-tokens)")
    results = tokens.get("results")
    if results is None:
        num_calls = 0 if config.environment is None else max(0, round(_SAMPLED_SHARE * (rollout.max_turns - 1)))
        results = num_calls * _RESULT_TOKENS
        if num_calls:
            assumed.append(f"its tools answer {results:,} tokens, {_RESULT_TOKENS} a call (--result-tokens)")
    if (context := prompt + sampled + results) > limit:
        assumed.append(f"rollouts of {context:,} tokens are cut at engine.max_model_len, {limit:,}")
        prompt = min(prompt, limit - 1)
        sampled = min(sampled, limit - prompt)
        results = limit - prompt - sampled
    return Workload(config.training.items_per_step, config.rollouts_per_item, prompt, sampled, results), assumed


def _prompt_tokens(data: Path, limit: int) -> tuple[int, str]:
    """From the first rows of the training data where they are there, at four characters a token."""
    try:
        with data.open(encoding="utf-8") as lines:
            sizes = [_prompt_chars(line) for line in islice(lines, _ROWS_READ) if line.strip()]
    except (OSError, UnicodeDecodeError):
        sizes = []
    if not sizes:
        prompt = max(1, limit // 4)
        return prompt, f"a prompt has {prompt:,} tokens, a quarter of engine.max_model_len (--prompt-tokens)"
    prompt = max(1, round(fmean(sizes) / _CHARS_PER_TOKEN))
    return prompt, f"a prompt has {prompt:,} tokens, from the characters of {data} (--prompt-tokens)"


def _prompt_chars(line: str) -> int:
    try:
        row = json.loads(line)
    except ValueError:
        return len(line)
    shown = {name: row[name] for name in ("messages", "tools") if name in row} if isinstance(row, dict) else row
    return len(re.sub(r"\s+", " ", json.dumps(shown, ensure_ascii=False)))
