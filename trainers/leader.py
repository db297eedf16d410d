"""What only rank 0 has: where groups come from, where new weights go, and the run folder.

`SamplingLeader` is the whole run: an engine samples, and gets the weights of every step. `ReplayLeader` trains on the
rollouts of another run, without an engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rft.baseline.numbers import Baseline, measure
from rft.config import RunConfig
from rft.doctor.alarm import Alarm, warning
from rft.engines import Engine, SleepingEngine
from rft.engines.pool import EnginePool
from rft.errors import NumericsError, UserError
from rft.metrics import Clock, group_metrics, rollout_metrics, staleness_metrics, step_line
from rft.pipeline import Pipeline
from rft.progress import Display, Phase
from rft.replay import stored_groups
from rft.shaping import cost_metrics, shaped_scores
from rft.store import RunStore
from rft.trainers.policy import Policy
from rft.trainers.sync import Sync
from rft.types import Group, Item, Split

T = TypeVar("T")

_JUDGED = "baseline"  # what marks the event about the groups of step 1
_PROBE_SEQUENCES = 2


@dataclass(slots=True)
class Leader:
    """Writes what happens into the run folder."""

    config: RunConfig
    store: RunStore
    display: Display
    alarm: Alarm = field(init=False)

    def __post_init__(self) -> None:
        self.alarm = Alarm(self.config, self.store)

    def begin(self, policy: Policy, first_step: int) -> None:
        """Before the first step: what must be in place, and where the run starts."""

    def groups(self, step: int) -> list[Group]:
        """What 1-based `step` trains on."""
        raise NotImplementedError

    def beside(self, work: Callable[[], T]) -> T:
        """Do what takes the trainer long. Raises what it raises, and what goes wrong in the sampling beside it."""
        return work()

    @contextmanager
    def training(self, step: int, num_micro_batches: int) -> Iterator[Callable[[], None]]:
        """A bar over the training of a step; what it gives is to be called after each micro-batch, in any thread."""
        with self.display.phase(f"step {step}: training", num_micro_batches, keep=False) as phase:

            def on_micro_batch() -> None:
                phase.advance()
                self.store.beat()

            yield on_micro_batch

    def check_gap(self, gap: float, step: int) -> None:
        """Look at the mean |log-probability difference| between who sampled and the trainer."""

    def publish(self, policy: Policy, step: int, groups: list[Group]) -> dict[str, float]:
        """The new weights to whoever samples next; metrics of it."""
        return {}

    def evaluate(self, split: Split, step: int) -> None:
        """How good the policy is on a split."""

    def record(self, step: int, groups: list[Group], update: dict[str, float], clock: Clock) -> None:
        """The step's row in the metrics, the state, the line that a person follows, and what the doctor warns of."""
        row: dict[str, Any] = {"step": step, "kind": "training", **group_metrics(groups), **update, **clock.metrics()}
        row |= {f"train/{name}": value for name, value in rollout_metrics(groups).items()}
        costs = self.config.training.costs
        row |= cost_metrics(groups, costs)
        row |= staleness_metrics([group for group in groups if len(set(shaped_scores(group, costs))) > 1])
        self.store.append_metrics(row)
        self.store.write_state({"status": "running", "step": step, "steps": self.config.training.steps})
        self.display.line(step_line(row, self.config.training.steps))
        for finding in self.alarm.look(row, groups):
            data = {"check": finding.check, "severity": finding.severity, "weight": finding.weight, "step": step}
            self.store.append_event("warn", warning(finding), data)
            self.display.line(f"warning: {warning(finding)}")


@dataclass(slots=True)
class SamplingLeader(Leader):
    """Samples with an engine that gets the policy's weights after every step.

    With training.staleness the next steps are sampled while this one trains. `first_prompt`: the ids an item is asked
    with. is_strict: end before the first update where no group of step 1 has signal.
    """

    pipeline: Pipeline
    engine: Engine
    sync: Sync
    first_prompt: Callable[[Item], list[int]]
    is_strict: bool = False
    _is_fresh: bool = field(default=False, init=False)  # nobody has judged the groups of step 1 yet

    def begin(self, policy: Policy, first_step: int) -> None:
        """Bring the engine to the policy's version and measure where the run starts."""
        self._is_fresh = first_step == 1 and (self.is_strict or not self._was_judged())
        sampling = self.pipeline.sampling
        prompts = [self.first_prompt(item) for item in sampling.items["train"][:_PROBE_SEQUENCES]]
        run = sampling.watchdog.run
        if first_step > 1 or self.config.model.init_from is not None or self._has_given_engine():
            run(self.engine.load(self.sync.publish(policy, first_step - 1)))
        run(self.sync.probe(policy, self.engine, prompts))
        due = first_step == 1 or (first_step - 1) % self.config.evaluation.every == 0
        if due or first_step > self.config.training.steps:
            self.evaluate("validation", first_step - 1)
        if first_step == 1:
            self.evaluate("test", 0)

    def _has_given_engine(self) -> bool:
        """It may still have the weights of another run; and whether it sees ours is said before anything is sampled."""
        engine = self.config.engine
        return engine.type == "vllm" and engine.url is not None

    def groups(self, step: int) -> list[Group]:
        groups = self.pipeline.groups(step)
        if step == 1 and self._is_fresh:
            self._judge(groups)
        if (sleeper := self._sleeper()) is not None:
            self.pipeline.sampling.watchdog.run(sleeper.sleep())
        return groups

    def _sleeper(self) -> SleepingEngine | None:
        """The engine, where it shares its GPUs with the policy."""
        engine = self.config.engine
        is_shared = engine.type == "vllm" and engine.sleep
        return self.engine if is_shared and isinstance(self.engine, SleepingEngine) else None

    def _was_judged(self) -> bool:
        return any((event.get("data") or {}).get("check") == _JUDGED for event in self.store.events())

    def _judge(self, groups: list[Group]) -> None:
        """Say whether there is anything to learn. Raises UserError where there is not and the run is strict."""
        num_useful = sum(len(set(shaped_scores(group, self.config.training.costs))) > 1 for group in groups)
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        has_tools = self.config.environment is not None
        found = measure(rollouts, self.config.training.base_rollouts, has_tools=has_tools)
        text = f"before the first update: {num_useful} of {len(groups)} groups have signal, {_chances(found)}"
        told = {"check": _JUDGED, "useful": num_useful, "verdict": found.advice.verdict, "cure": found.advice.cure}
        if num_useful:
            self.store.append_event("info", f"{text}; {found.advice.sentence}", told)
            self.display.line(f"{text}; {found.advice.sentence}")
            return
        problem = f"{text}: the first update will change nothing. Verdict: {found.advice.sentence}"
        self.store.append_event("warn", problem, told)
        if self.is_strict:
            raise UserError(f"{text}. Verdict: {found.advice.sentence}", where="--strict", cure=_strict_cure(found))
        self.display.line(f"warning: {problem}\n  cure: {found.advice.cure}")

    def beside(self, work: Callable[[], T]) -> T:
        return self.pipeline.beside(work)

    @contextmanager
    def training(self, step: int, num_micro_batches: int) -> Iterator[Callable[[], None]]:
        with self._training_bar(step, num_micro_batches) as phase:

            def on_micro_batch() -> None:
                phase.advance()
                self.store.beat()
                self.pipeline.raise_if_ending()

            yield on_micro_batch

    def _training_bar(self, step: int, num_micro_batches: int) -> AbstractContextManager[Phase]:
        if self.pipeline.staleness:
            return self.pipeline.sampling.showing_beside(step, num_micro_batches)
        return self.display.phase(f"step {step}: training", num_micro_batches, keep=False)

    def check_gap(self, gap: float, step: int) -> None:
        """Raises NumericsError when the engine does not sample from the policy."""
        if gap > self.config.training.max_logprob_gap:
            drift = "or lower training.learning_rate or training.staleness, " if self.pipeline.staleness else ""
            raise NumericsError(
                f"engine and trainer disagree at step {step}: mean |log-probability difference| {gap:.3f}",
                cure=f"check that the engine serves this model in this dtype, {drift}or raise training.max_logprob_gap",
            )

    def publish(self, policy: Policy, step: int, groups: list[Group]) -> dict[str, float]:
        """The new weights to the engine, and the proof that they arrived; what came of sampling beside training."""
        run = self.pipeline.sampling.watchdog.run
        reused = {"rollouts/reused": self.pipeline.sampling.settle("train", step)}
        metrics = reused | {"groups/stale": self.pipeline.num_stale, "time/hidden_s": self.pipeline.hidden_s}
        weights = self.beside(lambda: self.sync.publish(policy, step))
        if (sleeper := self._sleeper()) is not None:
            policy.release_memory()
            run(sleeper.wake())
        run(self.engine.load(weights))
        sequences = [rollout.sequences[-1].ids for group in groups for rollout in group.rollouts[:1] if rollout.turns]
        probed = sequences[:_PROBE_SEQUENCES] or [self.first_prompt(group.item) for group in groups[:1]]
        probe = run(self.sync.probe(policy, self.engine, probed))
        if isinstance(self.engine, EnginePool):
            metrics |= {"engines/serving": len(self.engine.members), "engines/moved_requests": self.engine.num_moved}
        return metrics | {"probe/mean": probe.mean_gap, "probe/max": probe.max_gap}

    def evaluate(self, split: Split, step: int) -> None:
        self.pipeline.sampling.evaluate(split, step)


def _chances(found: Baseline) -> str:
    chances = [f"{one.chance:.2f} with {one.num_rollouts} rollouts" for one in found.useless if one.num_rollouts >= 8]
    return f"P(useless group) {', '.join(chances)}"


def _strict_cure(found: Baseline) -> str:
    return f"{found.advice.cure}; or go on all the same with --resume and without --strict"


@dataclass(slots=True)
class ReplayLeader(Leader):
    """Trains on what the run `source` stored. Its policy may drift from the one that sampled: no gap is refused."""

    source: RunStore
    items: list[Item]

    def groups(self, step: int) -> list[Group]:
        return stored_groups(self.source, self.items, self.config, step)
