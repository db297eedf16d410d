"""A plan as a person reads it: memory, split, speed and limits, then what was assumed, or what to change."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType

from rft.plan.numbers import EngineNumbers, Plan, TrainerNumbers
from rft.tables import cell, new_table

_NAMES = {"reserve": "process and allocator"}


def shown(plan: Plan, *, is_boxed: bool) -> RenderableType:
    """The tables and lines of a plan."""
    model = plan.model
    title = f"{model.name}: {_count(model.parameters)} parameters, {_count(model.trained_parameters)} trained"
    parts: list[RenderableType] = [cell(f"{title}; {plan.cluster}, {plan.gpu_memory_gib:g} GiB each", style="bold")]
    if plan.trainer is not None and plan.engine is not None:
        rows = new_table("", "GiB", left=[""], is_boxed=is_boxed)
        for name, value in (*_trainer_rows(plan.trainer), *_engine_rows(plan.engine)):
            rows.add_row(cell(name), cell(value))
        parts += [rows, *(cell(line) for line in _lines(plan, plan.trainer, plan.engine))]
    parts += [cell(f"assumed: {assumption}") for assumption in plan.assumptions]
    parts += [cell(f"does not fit: {problem}", style="red") for problem in plan.problems]
    return Group(*parts)


def cure_of(plan: Plan) -> str:
    """What makes it fit, as words of a command."""
    if plan.change is None:
        return "no change that rft knows makes it fit: take a smaller model, or GPUs with more memory"
    words = plan.change.overrides + plan.change.flags
    return "the smallest change that fits: " + " ".join(map(_quoted, words))


def _quoted(word: str) -> str:
    return f"'{word}'" if not word.startswith("--") and set(word) & set(" {[") else word


def _trainer_rows(trainer: TrainerNumbers) -> Iterator[tuple[str, str]]:
    for name, value in trainer.parts_gib.items():
        if value > 0:
            yield f"trainer: {_NAMES.get(name, name)}", f"{value:.2f}"
    yield f"trainer: together, of {trainer.limit_gib:.1f}", f"{trainer.total_gib:.2f}"


def _engine_rows(engine: EngineNumbers) -> Iterator[tuple[str, str]]:
    yield "engine: weights", f"{engine.weights_gib:.2f}"
    if engine.adapters_gib:
        yield "engine: adapters", f"{engine.adapters_gib:.2f}"
    yield "engine: workspaces", f"{engine.workspace_gib:.2f}"
    yield f"engine: KV cache, {engine.cache_tokens:,} tokens", f"{engine.cache_gib:.2f}"


def _lines(plan: Plan, trainer: TrainerNumbers, engine: EngineNumbers) -> Iterator[str]:
    split = plan.split
    if split is None or not plan.fits:
        return
    each = "" if split.gpus_per_engine == 1 else f" of {split.gpus_per_engine} GPUs"
    engines = f"{split.engines} engine{'s' if split.engines > 1 else ''}{each}"
    shared = "on the same GPU" if split.trainer_gpus == 1 else "on the same GPUs"
    place = shared if split.is_shared else f"with --gpu-memory-utilization {split.engine_memory_share:g}"
    yield f"split: {split.trainer_gpus} to train ({_launch(split.launch)}), {engines} {place}"
    yield (
        f"training: {trainer.seconds:.3g} s a step, {trainer.tokens_per_s:,.0f} tokens/s computed, rows of"
        f" {trainer.row_tokens:,}; limited by {trainer.limited_by}"
    )
    yield (
        f"sampling: {engine.seconds:.3g} s a step without tools, {engine.tokens_per_s:,.0f} tokens/s,"
        f" {engine.concurrency} rollouts at once on each engine; limited by {engine.limited_by}"
    )
    yield f"a step of {plan.rollouts_per_step} rollouts: {plan.step_s:.3g} s and what tools and graders take"


def _launch(name: str) -> str:
    return f"configs/accelerate/{name}.yaml"


def _count(number: int) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:,}"
