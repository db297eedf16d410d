"""What only rank 0 has: where groups come from, where new weights go, and the run folder.

`SamplingLeader` is the whole run: an engine samples, and gets the weights of every step. `ReplayLeader` trains on the
rollouts of another run, without an engine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rft.config import RunConfig
from rft.engines import Engine
from rft.errors import NumericsError
from rft.metrics import Clock, group_metrics, rollout_metrics, shadow_divergence, step_line
from rft.progress import Display
from rft.replay import stored_groups
from rft.sampling import Sampling
from rft.shaping import cost_metrics
from rft.store import RunStore
from rft.trainers.policy import Policy
from rft.trainers.sync import Sync
from rft.types import Group, Item, Split

_PROBE_SEQUENCES = 2
_DIVERGENCE_EVERY = 4  # steps between two looks at grade and shadow grades


@dataclass(slots=True)
class Leader:
    """Writes what happens into the run folder."""

    config: RunConfig
    store: RunStore
    display: Display

    def begin(self, policy: Policy, first_step: int) -> None:
        """Before the first step: what must be in place, and where the run starts."""

    def groups(self, step: int) -> list[Group]:
        """What 1-based `step` trains on."""
        raise NotImplementedError

    def check_gap(self, gap: float, step: int) -> None:
        """Look at the mean |log-probability difference| between who sampled and the trainer."""

    def publish(self, policy: Policy, step: int, groups: list[Group]) -> dict[str, float]:
        """The new weights to whoever samples next; metrics of it."""
        return {}

    def evaluate(self, split: Split, step: int) -> None:
        """How good the policy is on a split."""

    def record(self, step: int, groups: list[Group], update: dict[str, float], clock: Clock) -> None:
        """The step's row in the metrics, the state, and the line that a person follows."""
        row: dict[str, Any] = {"step": step, "kind": "training", **group_metrics(groups), **update, **clock.metrics()}
        row |= {f"train/{name}": value for name, value in rollout_metrics(groups).items()}
        row |= cost_metrics(groups, self.config.training.costs)
        self.store.append_metrics(row)
        self.store.write_state({"status": "running", "step": step, "steps": self.config.training.steps})
        self.display.line(step_line(row, self.config.training.steps))
        if step % _DIVERGENCE_EVERY == 0:
            training = [row for row in self.store.metrics() if row.get("kind") == "training"]
            self._warn(shadow_divergence(training, _DIVERGENCE_EVERY))

    def _warn(self, text: str | None) -> None:
        if text:
            self.store.append_event("warn", text)
            self.display.line(f"warning: {text}")


@dataclass(slots=True)
class SamplingLeader(Leader):
    """Samples with an engine that always has the policy's weights. `first_prompt`: the ids an item is asked with."""

    sampling: Sampling
    engine: Engine
    sync: Sync
    first_prompt: Callable[[Item], list[int]]

    def begin(self, policy: Policy, first_step: int) -> None:
        """Bring the engine to the policy's version and measure where the run starts."""
        prompts = [self.first_prompt(item) for item in self.sampling.items["train"][:_PROBE_SEQUENCES]]
        run = self.sampling.watchdog.run
        if first_step > 1 or self.config.model.init_from is not None:
            run(self.engine.load(self.sync.publish(policy, first_step - 1)))
        run(self.sync.probe(policy, self.engine, prompts))
        due = first_step == 1 or (first_step - 1) % self.config.evaluation.every == 0
        if due or first_step > self.config.training.steps:
            self.evaluate("validation", first_step - 1)
        if first_step == 1:
            self.evaluate("test", 0)

    def groups(self, step: int) -> list[Group]:
        return self.sampling.groups(step)

    def check_gap(self, gap: float, step: int) -> None:
        """Raises NumericsError when the engine does not sample from the policy."""
        if gap > self.config.training.max_logprob_gap:
            raise NumericsError(
                f"engine and trainer disagree at step {step}: mean |log-probability difference| {gap:.3f}",
                cure="check that the engine serves this model in this dtype, or raise training.max_logprob_gap",
            )

    def publish(self, policy: Policy, step: int, groups: list[Group]) -> dict[str, float]:
        """The new weights to the engine, and the proof that they arrived."""
        run = self.sampling.watchdog.run
        run(self.engine.load(self.sync.publish(policy, step)))
        sequences = [rollout.sequences[-1].ids for group in groups for rollout in group.rollouts[:1] if rollout.turns]
        probed = sequences[:_PROBE_SEQUENCES] or [self.first_prompt(group.item) for group in groups[:1]]
        probe = run(self.sync.probe(policy, self.engine, probed))
        reused = {"rollouts/reused": self.sampling.settle("train", step)}
        return reused | {"probe/mean": probe.mean_gap, "probe/max": probe.max_gap}

    def evaluate(self, split: Split, step: int) -> None:
        self.sampling.evaluate(split, step)


@dataclass(slots=True)
class ReplayLeader(Leader):
    """Trains on what the run `source` stored. Its policy may drift from the one that sampled: no gap is refused."""

    source: RunStore
    items: list[Item]

    def groups(self, step: int) -> list[Group]:
        return stored_groups(self.source, self.items, self.config, step)
