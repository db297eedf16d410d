"""The groups of each step of a run: sampled with the current policy, and every rollout written as it ends.

What is sampled when, and what the trainer does meanwhile, is rft/pipeline.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rft.budget import StepBudget
from rft.collect import Collector
from rft.config import RunConfig
from rft.data import further_items, items_for_step
from rft.evaluate import evaluate
from rft.metrics import evaluation_line
from rft.progress import Display, Phase
from rft.store import RunStore
from rft.types import Group, Item, Rollout, Split
from rft.watch import Watchdog


@dataclass(slots=True)
class Sampling:
    """Samples for a run and evaluates it. `items` holds the splits that exist. It is the collector's `on_rollout`."""

    config: RunConfig
    collector: Collector
    watchdog: Watchdog
    store: RunStore
    display: Display
    items: dict[Split, list[Item]]
    _num_finished: Counter[tuple[Split, int]] = field(default_factory=Counter, init=False)  # discarded ones not counted
    _bars: dict[tuple[Split, int], Phase] = field(default_factory=dict, init=False)
    _training: tuple[Phase, int] | None = field(default=None, init=False)  # the bar of the step that is trained

    def __post_init__(self) -> None:
        self.collector.on_rollout = self._observe

    def groups(self, step: int) -> list[Group]:
        """The training groups of 1-based `step`, sampled now. Raises as `Collector.stream` does."""
        with self.showing("train", step, "sampling", self.num_rollouts):
            return self.watchdog.run(self.sample(step))

    async def sample(self, step: int) -> list[Group]:
        """The same on the event loop; several steps may be sampled at once."""
        config, train = self.config, self.items["train"]
        items = items_for_step(train, step - 1, config.training.items_per_step, config.seed)
        if config.training.allocation == "uniform":
            return await self.collector.collect(items, "train", step, config.rollouts_per_item)
        budget = StepBudget(self.num_rollouts, config.training.first_rollouts)
        further = further_items(train, items, step - 1, config.seed)
        return await self.collector.collect_adaptive(items, further, step, budget)

    @property
    def num_rollouts(self) -> int:
        """Of one step."""
        return self.config.training.items_per_step * self.config.rollouts_per_item

    def evaluate(self, split: Split, step: int) -> None:
        """Evaluate a split once per version; a row that a resumed run already has is not made again.

        Sees one version, because nobody publishes meanwhile. Steps that are sampled ahead go on, after it: an earlier
        step has precedence.
        """
        items = self.items.get(split)
        if not items or self.store.has_evaluation(split, step):
            return
        size = self.config.evaluation.rollouts_per_item
        with self.showing(split, step, f"evaluating {split}", len(items) * size):
            row = self.watchdog.run(evaluate(self.collector, items, split, step, size))
        row["rollouts/reused"] = self.settle(split, step)
        self.store.append_metrics(row)
        self.display.line(evaluation_line(row))

    def settle(self, split: Split, step: int) -> int:
        """To be called when a step is complete: how many of its rollouts an interrupted run had finished.

        What that run had sampled beyond the step as it is now is moved aside.
        """
        num_reused, left = self.collector.stored.settle(split, step)
        if left:
            self.store.set_aside(step, left)
        return num_reused

    @contextmanager
    def showing(self, split: Split, step: int, label: str, total: int) -> Iterator[None]:
        """A bar of the rollouts of a step, from those that have ended before."""
        with self.display.phase(f"step {step}: {label}", total, keep=False) as phase:
            phase.advance(self._num_finished[split, step])
            self._bars[split, step] = phase
            try:
                yield
            finally:
                del self._bars[split, step], self._num_finished[split, step]

    @contextmanager
    def showing_beside(self, step: int, num_micro_batches: int) -> Iterator[Phase]:
        """A bar of a step's training that also says how far the steps ahead are."""
        with self.display.phase(f"step {step}: training, sampling ahead", num_micro_batches, keep=False) as phase:
            self._training = (phase, step)
            self._show_ahead()
            try:
                yield phase
            finally:
                self._training = None

    def _show_ahead(self) -> None:
        if self._training is not None:
            phase, step = self._training
            num_ahead = sum(num for (split, of), num in self._num_finished.items() if split == "train" and of > step)
            phase.status(f"step {step}: training, {num_ahead} rollouts sampled ahead")

    def _observe(self, rollout: Rollout) -> None:
        if rollout.id not in self.collector.stored:
            self.store.append_rollout(rollout)
        if rollout.stop_reason.is_discarded:
            return
        place = (rollout.split, rollout.step)
        self._num_finished[place] += 1
        if place in self._bars:
            self._bars[place].advance()
        else:
            self._show_ahead()
