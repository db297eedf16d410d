"""The groups of each step of a run: sampled with the current policy, and every rollout written as it ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rft.budget import StepBudget
from rft.collect import Collector
from rft.config import RunConfig
from rft.data import further_items, items_for_step
from rft.evaluate import evaluate
from rft.metrics import evaluation_line
from rft.progress import Display
from rft.store import RunStore
from rft.types import Group, Item, Rollout, Split
from rft.watch import Watchdog


@dataclass(frozen=True, slots=True)
class Sampling:
    """Samples for a run and evaluates it. `items` holds the splits that exist."""

    config: RunConfig
    collector: Collector
    watchdog: Watchdog
    store: RunStore
    display: Display
    items: dict[Split, list[Item]]

    def groups(self, step: int) -> list[Group]:
        """The training groups of 1-based `step`. Raises as `Collector.stream` does."""
        config, train = self.config, self.items["train"]
        items = items_for_step(train, step - 1, config.training.items_per_step, config.seed)
        total = len(items) * config.rollouts_per_item
        with self.display.phase(f"step {step}: sampling", total, keep=False) as phase:
            self.collector.on_rollout = self._observer(phase.advance)
            if config.training.allocation == "uniform":
                return self.watchdog.run(self.collector.collect(items, "train", step, config.rollouts_per_item))
            budget = StepBudget(total, config.training.first_rollouts)
            further = further_items(train, items, step - 1, config.seed)
            return self.watchdog.run(self.collector.collect_adaptive(items, further, step, budget))

    def evaluate(self, split: Split, step: int) -> None:
        """Evaluate a split once per version; a row that a resumed run already has is not made again."""
        items = self.items.get(split)
        if not items or self.store.has_evaluation(split, step):
            return
        size = self.config.evaluation.rollouts_per_item
        with self.display.phase(f"step {step}: evaluating {split}", len(items) * size, keep=False) as phase:
            self.collector.on_rollout = self._observer(phase.advance)
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

    def _observer(self, advance: Callable[[], None]) -> Callable[[Rollout], None]:
        def observe(rollout: Rollout) -> None:
            if rollout.id not in self.collector.stored:
                self.store.append_rollout(rollout)
            if not rollout.stop_reason.is_discarded:
                advance()

        return observe
