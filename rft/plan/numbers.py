"""A plan: the numbers of the best layout, what limits it, and where nothing fits the smallest change that does.

`Plan` is the JSON of `rft plan --json`: memory in GiB of one GPU, times in seconds, tokens per second over all GPUs.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from pydantic import Field

from rft.config import RunConfig
from rft.errors import UserError
from rft.plan.changes import Change, smallest_change
from rft.plan.engine import OWN_GPU_SHARE, EngineMemory
from rft.plan.hardware import parse_cluster
from rft.plan.memory import Launch, TrainerMemory
from rft.plan.setup import setup_of
from rft.plan.shape import ModelShape
from rft.plan.speed import Limit
from rft.plan.split import Ask, Outcome, best_outcome, why_not
from rft.types import Record

_GIB = 2**30


class ModelNumbers(Record):
    name: str
    parameters: int
    active_parameters: int  # that one token is multiplied with, the head included
    trained_parameters: int
    cache_bytes_per_token: int


class SplitNumbers(Record):
    trainer_gpus: int
    engines: int
    gpus_per_engine: int
    launch: Launch
    is_shared: bool  # the engine is on a GPU that trains
    engine_memory_share: float  # what vLLM is to take of its GPUs: --gpu-memory-utilization


class TrainerNumbers(Record):
    fits: bool
    limit_gib: float
    total_gib: float
    parts_gib: dict[str, float]
    row_tokens: int  # of the largest micro-batch
    seconds: float  # of a step
    tokens_per_s: float  # computed
    limited_by: Limit


class EngineNumbers(Record):
    fits: bool
    weights_gib: float
    adapters_gib: float
    workspace_gib: float
    cache_gib: float
    cache_tokens: int
    sequences_of_max_model_len: float
    concurrency: int  # rollouts of the planned length that one engine samples at once
    seconds: float  # of a step, without tools
    tokens_per_s: float  # sampled
    limited_by: Limit


class ChangeNumbers(Record):
    overrides: list[str]
    flags: list[str]


class Plan(Record):
    """What `rft plan` found. trainer and engine are of the nearest layout where none fits; null without any."""

    cluster: str
    gpu_memory_gib: float
    fits: bool
    model: ModelNumbers
    rollouts_per_step: int
    split: SplitNumbers | None = None
    trainer: TrainerNumbers | None = None
    engine: EngineNumbers | None = None
    step_s: float | None = None
    problems: list[str] = Field(default_factory=list)  # why nothing fits
    change: ChangeNumbers | None = None  # the smallest that makes it fit
    assumptions: list[str] = Field(default_factory=list)


def make_plan(
    config: RunConfig,
    gpus: str,
    *,
    model: Path | None = None,
    trainer_gpus: int | None = None,
    launch: Launch | None = None,
    tokens: dict[str, int] | None = None,
) -> Plan:
    """Plan a config on `gpus` (see `parse_cluster`); tokens: as for `setup_of`. Raises UserError."""
    cluster = parse_cluster(gpus)
    setup, assumed = setup_of(config, model, tokens or {})
    if trainer_gpus is not None and not 1 <= trainer_gpus <= cluster.num_gpus:
        cure = f"give at most {cluster.num_gpus}, or more GPUs"
        raise UserError(f"{trainer_gpus} of {cluster.num_gpus} GPUs", where="--trainer-gpus", cure=cure)
    if launch is not None and (problem := why_not(setup, launch)):
        raise UserError(problem, where=f"--launch {launch}", cure="take another launch, or leave --launch out")
    ask = Ask(setup, cluster, trainer_gpus, launch)
    outcome = best_outcome(ask)
    fits = outcome is not None and outcome.fits
    found = None if fits else smallest_change(ask)
    plan = Plan(
        cluster=str(cluster),
        gpu_memory_gib=cluster.gpu.memory_gib,
        fits=fits,
        model=_model(setup.shape, setup.trained, setup.value_bytes),
        rollouts_per_step=setup.work.rollouts,
        problems=[] if fits else _problems(ask, outcome),
        change=None if found is None else _change(found[0], config),
        assumptions=assumed,
    )
    return plan if outcome is None else plan.model_copy(update=_numbers(ask, outcome))


def _change(change: Change, config: RunConfig) -> ChangeNumbers:
    """In a config without a section engine, its first key has to say of which type it is."""
    needs_type = "engine" not in config.model_fields_set and any(o.startswith("engine.") for o in change.overrides)
    overrides = [*(["engine.type=vllm"] if needs_type else []), *change.overrides]
    return ChangeNumbers(overrides=overrides, flags=list(change.flags))


def _model(shape: ModelShape, trained: int, value_bytes: int) -> ModelNumbers:
    return ModelNumbers(
        name=shape.name,
        parameters=shape.parameters,
        active_parameters=shape.active + shape.embedding,
        trained_parameters=trained,
        cache_bytes_per_token=shape.cached * value_bytes,
    )


def _numbers(ask: Ask, outcome: Outcome) -> dict[str, object]:
    layout, setup = outcome.layout, ask.setup
    split = SplitNumbers(
        trainer_gpus=layout.num_trainers,
        engines=layout.num_engines,
        gpus_per_engine=setup.tensor_parallel,
        launch=layout.launch,
        is_shared=layout.is_shared,
        engine_memory_share=setup.gpu_memory_share if layout.is_shared else OWN_GPU_SHARE,
    )
    trainer = TrainerNumbers(
        fits=outcome.trainer_fits,
        limit_gib=_gib(outcome.trainer_limit),
        total_gib=_gib(outcome.trainer.total),
        parts_gib=_parts(outcome.trainer),
        row_tokens=setup.row_tokens,
        seconds=_rounded(outcome.training.seconds),
        tokens_per_s=_rounded(outcome.training.tokens_per_s),
        limited_by=outcome.training.limit,
    )
    engine = _engine(outcome.engine, outcome)
    return {"split": split, "trainer": trainer, "engine": engine, "step_s": _rounded(outcome.step_s)}


def _engine(memory: EngineMemory, outcome: Outcome) -> EngineNumbers:
    return EngineNumbers(
        fits=outcome.engine_fits,
        weights_gib=_gib(memory.weights),
        adapters_gib=_gib(memory.adapters),
        workspace_gib=_gib(memory.workspace),
        cache_gib=_gib(memory.cache),
        cache_tokens=memory.cache_tokens,
        sequences_of_max_model_len=round(memory.max_full_length, 1),
        concurrency=memory.concurrency,
        seconds=_rounded(outcome.sampling.seconds),
        tokens_per_s=_rounded(outcome.sampling.tokens_per_s),
        limited_by=outcome.sampling.limit,
    )


def _parts(memory: TrainerMemory) -> dict[str, float]:
    return {field.name: _gib(getattr(memory, field.name)) for field in fields(memory)}


def _problems(ask: Ask, outcome: Outcome | None) -> list[str]:
    setup, gpu = ask.setup, ask.cluster.gpu
    if outcome is None:
        engine = f"an engine of {setup.tensor_parallel} GPUs and a trainer"
        return [f"{ask.cluster} has no place for {engine if setup.tensor_parallel > 1 else 'this launch'}"]
    found = []
    if not outcome.trainer_fits:
        where = f"beside the engine {gpu.name}" if outcome.layout.is_shared else gpu.name
        needs, has = _gib(outcome.trainer.total), _gib(outcome.trainer_limit)
        found.append(f"the trainer needs {needs:.1f} GiB, {where} has {has:.1f}")
    if not outcome.engine_fits:
        memory = outcome.engine
        if memory.cache <= 0:
            needs = _gib(memory.total - max(0.0, memory.cache))
            found.append(f"an engine needs {needs:.1f} GiB a GPU before any KV cache")
        else:
            room = f"{memory.cache_tokens:,} tokens"
            found.append(f"the KV cache holds {room}, less than engine.max_model_len, {setup.max_model_len:,}")
    return found


def _gib(num_bytes: float) -> float:
    return round(num_bytes / _GIB, 2)


def _rounded(value: float) -> float:
    """To four digits: more would claim what no roofline knows."""
    return float(f"{value:.4g}")
