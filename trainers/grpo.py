"""GRPO, told top to bottom: sample groups, drop those that teach nothing, one optimizer step, sync, measure.

Every rank runs `train`. Rank 0 has a `Leader` (engine, collector, run folder); it alone samples and writes, and
shares the window's micro-batches, so no collective depends on what a rollout contains.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from rft.budget import StepBudget
from rft.collect import Collector
from rft.config import RunConfig
from rft.data import further_items, items_for_step
from rft.engines import Engine
from rft.errors import NumericsError
from rft.evaluate import evaluate
from rft.metrics import Clock, evaluation_line, group_metrics, rollout_metrics, shadow_divergence, step_line
from rft.progress import Display
from rft.store import RunStore
from rft.trainers import checkpoint
from rft.trainers.batch import MicroBatch, count_tokens, split_over_ranks
from rft.trainers.objective import advantages
from rft.trainers.policy import Policy, StepStats
from rft.trainers.sync import ProbeResult, Sync
from rft.types import Group, Item, Rollout, Split
from rft.watch import Watchdog

T = TypeVar("T")

_MAX_SKIPPED = 3  # non-finite steps in a row before the run stops
_PROBE_SEQUENCES = 2
_DIVERGENCE_EVERY = 4  # steps between two looks at grade and shadow grades


@dataclass(slots=True)
class Leader:
    """What only rank 0 has. `items` holds the splits that exist."""

    loop: Watchdog
    engine: Engine
    collector: Collector
    sync: Sync
    store: RunStore
    display: Display
    items: dict[Split, list[Item]]
    first_prompt: Callable[[Item], list[int]]

    def warn(self, text: str | None) -> None:
        if text:
            self.store.append_event("warn", text)
            self.display.line(f"warning: {text}")

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run(work)


@dataclass(frozen=True, slots=True)
class Window:
    """What one optimizer step trains on: this rank's micro-batches and the token count over all ranks."""

    micro_batches: list[MicroBatch]
    num_tokens: int


def train(config: RunConfig, policy: Policy, accelerator: Accelerator, leader: Leader | None, first_step: int) -> None:
    """Run steps `first_step` to `training.steps`, then the test split.

    Step s samples with policy version s-1 and makes version s. Raises NumericsError, SyncError, EngineError or
    NoProgressError; the run folder then holds everything up to the last completed step.
    """
    if leader is not None:
        _begin(config, policy, leader, first_step)
    num_skipped = 0
    for step in _steps(config, leader, first_step):
        clock = Clock()
        groups = _sample(config, leader, step) if leader is not None else []
        clock.lap("sampling")
        window = _share(_window(config, policy, groups, accelerator.num_processes), accelerator)
        stats = _update(policy, window, leader, step)
        clock.lap("training")
        num_skipped = _count_skips(stats, num_skipped)
        if leader is not None:
            update = _update_metrics(policy, groups, stats)
            _check_gap(config, update["logprob_gap/mean"], step)
            probe = _publish(policy, leader, step, groups)
            clock.lap("sync")
            _record(leader, config, step, groups, update, probe, clock)
            _save(config, policy, leader, step)
            if step % config.evaluation.every == 0 or step == config.training.steps:
                _evaluate(config, leader, "validation", step)
    if leader is not None:
        _evaluate(config, leader, "test", config.training.steps)


def _steps(config: RunConfig, leader: Leader | None, first_step: int) -> Iterator[int]:
    """The numbers of the steps to do, with a bar over the whole training on rank 0."""
    last = config.training.steps
    if leader is None:
        yield from range(first_step, last + 1)
        return
    with leader.display.phase("training", last, keep=False) as phase:
        phase.advance(first_step - 1)
        for step in range(first_step, last + 1):
            yield step
            phase.advance()


def _begin(config: RunConfig, policy: Policy, leader: Leader, first_step: int) -> None:
    """Bring the engine to the policy's version and measure where the run starts."""
    prompts = [leader.first_prompt(item) for item in leader.items["train"][:_PROBE_SEQUENCES]]
    if first_step > 1:
        leader.wait(leader.engine.load(leader.sync.publish(policy, first_step - 1)))
    leader.wait(leader.sync.probe(policy, leader.engine, prompts))
    due = first_step == 1 or (first_step - 1) % config.evaluation.every == 0
    if due or first_step > config.training.steps:
        _evaluate(config, leader, "validation", first_step - 1)
    if first_step == 1:
        _evaluate(config, leader, "test", 0)


def _sample(config: RunConfig, leader: Leader, step: int) -> list[Group]:
    items = items_for_step(leader.items["train"], step - 1, config.training.items_per_step, config.seed)
    total = len(items) * config.rollouts_per_item
    with leader.display.phase(f"step {step}: sampling", total, keep=False) as phase:
        leader.collector.on_rollout = _observer(leader.store, phase.advance)
        if config.training.allocation == "uniform":
            return leader.wait(leader.collector.collect(items, "train", step, config.rollouts_per_item))
        budget = StepBudget(total, config.training.first_rollouts)
        further = further_items(leader.items["train"], items, step - 1, config.seed)
        return leader.wait(leader.collector.collect_adaptive(items, further, step, budget))


def _observer(store: RunStore, advance: Callable[[], None]) -> Callable[[Rollout], None]:
    def observe(rollout: Rollout) -> None:
        store.append_rollout(rollout)
        if not rollout.stop_reason.is_discarded:
            advance()

    return observe


def _window(config: RunConfig, policy: Policy, groups: list[Group], num_ranks: int) -> list[Window]:
    """One window per rank. Groups with equal grades are dropped here: their advantages are zero."""
    useful = [group for group in groups if group.has_signal]
    scale = config.training.advantage_scale
    found = [advantages(torch.tensor(group.scores), scale, group.round_sizes) for group in useful]
    micro_batches = policy.micro_batches(useful, found)
    num_tokens = count_tokens(micro_batches)
    return [Window(share, num_tokens) for share in split_over_ranks(micro_batches, num_ranks)]


def _share(windows: list[Window], accelerator: Accelerator) -> Window:
    """Rank 0's windows to all ranks; each takes its own."""
    if accelerator.num_processes == 1:
        return windows[0]
    own: Window = broadcast_object_list(windows, from_process=0)[accelerator.process_index]
    return own


def _update(policy: Policy, window: Window, leader: Leader | None, step: int) -> StepStats | None:
    """One optimizer step; None when no group carried signal."""
    if window.num_tokens == 0:
        return None
    if leader is None:
        return policy.step(window.micro_batches, window.num_tokens)
    with leader.display.phase(f"step {step}: training", len(window.micro_batches), keep=False) as phase:
        return policy.step(window.micro_batches, window.num_tokens, on_micro_batch=phase.advance)


def _count_skips(stats: StepStats | None, num_skipped: int) -> int:
    if stats is None or not stats.is_skipped:
        return 0
    if num_skipped + 1 >= _MAX_SKIPPED:
        raise NumericsError(
            f"the loss or its gradient was not finite in {_MAX_SKIPPED} steps in a row",
            cure="lower training.learning_rate, or set model.dtype=float32",
        )
    return num_skipped + 1


def _update_metrics(policy: Policy, groups: list[Group], stats: StepStats | None) -> dict[str, float]:
    """What the update says of itself; without one, at least how far engine and trainer are apart."""
    if stats is None:
        mean, largest = policy.logprob_gap(groups[0])
        return {"logprob_gap/mean": mean, "logprob_gap/max": largest}
    row = {f"update/{name}": value for name, value in dataclasses.asdict(stats).items() if "logprob_gap" not in name}
    return row | {"logprob_gap/mean": stats.mean_logprob_gap, "logprob_gap/max": stats.max_logprob_gap}


def _check_gap(config: RunConfig, gap: float, step: int) -> None:
    if gap > config.training.max_logprob_gap:
        raise NumericsError(
            f"engine and trainer disagree at step {step}: mean |log-probability difference| {gap:.3f}",
            cure="check that the engine serves this model in this dtype, or raise training.max_logprob_gap",
        )


def _publish(policy: Policy, leader: Leader, step: int, groups: list[Group]) -> ProbeResult:
    """The new weights to the engine, and the proof that they arrived."""
    leader.wait(leader.engine.load(leader.sync.publish(policy, step)))
    sequences = [rollout.sequences[-1].ids for group in groups for rollout in group.rollouts[:1] if rollout.turns]
    probed = sequences[:_PROBE_SEQUENCES] or [leader.first_prompt(group.item) for group in groups[:1]]
    return leader.wait(leader.sync.probe(policy, leader.engine, probed))


def _record(
    leader: Leader,
    config: RunConfig,
    step: int,
    groups: list[Group],
    update: dict[str, float],
    probe: ProbeResult,
    clock: Clock,
) -> None:
    row: dict[str, Any] = {"step": step, "kind": "training", **group_metrics(groups), **update, **clock.metrics()}
    row |= {f"train/{name}": value for name, value in rollout_metrics(groups).items()}
    row |= {"probe/mean": probe.mean_gap, "probe/max": probe.max_gap}
    leader.store.append_metrics(row)
    leader.store.write_state({"status": "running", "step": step, "steps": config.training.steps})
    leader.display.line(step_line(row, config.training.steps))
    if step % _DIVERGENCE_EVERY == 0:
        training = [row for row in leader.store.metrics() if row.get("kind") == "training"]
        leader.warn(shadow_divergence(training, _DIVERGENCE_EVERY))


def _save(config: RunConfig, policy: Policy, leader: Leader, step: int) -> None:
    if step % config.training.checkpoint_every == 0 or step == config.training.steps:
        checkpoint.save(leader.store.checkpoints, step, policy, {})
        checkpoint.prune(leader.store.checkpoints, config.training.keep_checkpoints)


def _evaluate(config: RunConfig, leader: Leader, split: Split, step: int) -> None:
    """Evaluate a split once per version; a row that a resumed run already has is not made again."""
    items = leader.items.get(split)
    if not items or leader.store.has_evaluation(split, step):
        return
    rollouts_per_item = config.evaluation.rollouts_per_item
    with leader.display.phase(f"step {step}: evaluating {split}", len(items) * rollouts_per_item, keep=False) as phase:
        leader.collector.on_rollout = _observer(leader.store, phase.advance)
        row = leader.wait(evaluate(leader.collector, items, split, step, rollouts_per_item))
    leader.store.append_metrics(row)
    leader.display.line(evaluation_line(row))
