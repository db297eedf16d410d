"""Whole trainings on a tiny model with an engine that sleeps instead of computing: what overlap is measured with.

`Stage` is a run without the CLI: real policy, sync, checkpoints, store and watchdog; engine and grader are fakes.
`measure_overlap` is for tests and benchmarks.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from scripted_engine import ScriptedEngine
from test_job import a_config
from test_rollout import CALL, SEARCH, RecordingEnvironment, RecordingGrader

from rft.chat import Chat
from rft.collect import Collector
from rft.config import RunConfig
from rft.data import items_for_step
from rft.engines import Completion, SamplingParams
from rft.pipeline import Pipeline
from rft.preflight import load_splits
from rft.progress import Display
from rft.rollout import Workshop
from rft.sampling import Sampling
from rft.store import RunStore
from rft.trainers import checkpoint
from rft.trainers.grpo import train
from rft.trainers.leader import SamplingLeader
from rft.trainers.policy import Policy
from rft.trainers.ranks import build_accelerator
from rft.trainers.sync import Sync
from rft.trainers.update import StepStats
from rft.types import Grade, Group, Item, rollout_id
from rft.watch import Watchdog


def chatty(prompt: str, rollout_id: str, turn: int) -> str:
    """A call, then an answer that depends on the rollout."""
    return CALL if turn == 0 else "e" * (1 + int(rollout_id[-2:], 16) % 7)


def answering(prompt: str, rollout_id: str, turn: int) -> str:
    return "e" * (1 + int(rollout_id[-2:], 16) % 7)


class HashGrader(RecordingGrader):
    """Grades differ within every group, and are the same in every run."""

    async def grade(self, item: Item, sample: dict[str, Any], trace_id: str = "") -> Grade:
        return Grade(score=hashlib.sha256(trace_id.encode()).digest()[0] / 256)


class HonestEngine(ScriptedEngine):
    """Scores with the policy that it is said to serve, as a probe expects. Keeps the versions it answered from."""

    policy: Policy
    answered: list[int]

    async def score(self, ids: list[int], start: int) -> list[float]:
        return self.policy.score(ids, start)

    async def generate(self, prompt_ids: list[int], params: SamplingParams, rollout_id: str) -> Completion:
        completion = await super().generate(prompt_ids, params, rollout_id)
        self.__dict__.setdefault("answered", []).append(completion.policy_version)
        return completion


class SlowPolicy(Policy):
    """Takes `step_s` longer for a step, without computing."""

    step_s = 0.0

    def step(self, micro_batches: Any, num_tokens: int, on_micro_batch: Callable[[], None] | None = None) -> StepStats:
        time.sleep(self.step_s)
        return super().step(micro_batches, num_tokens, on_micro_batch)


class WatchedLeader(SamplingLeader):
    """Keeps what was trained on."""

    def groups(self, step: int) -> list[Group]:
        groups = super().groups(step)
        self.__dict__.setdefault("trained", {})[step] = groups
        return groups


@dataclass
class Stage:
    """What a training runs with; change it before `train`. engine: None for a HonestEngine that says `script`."""

    config: RunConfig
    run_id: str = "run"
    engine: Any = None
    script: Callable[[str, str, int], str] = answering
    policy_class: type[Policy] = SlowPolicy
    environment: RecordingEnvironment | None = None
    is_threaded: bool | None = None
    trained: dict[int, list[Group]] = field(default_factory=dict)  # by step
    policy: Any = None
    stall_limit_s: float = 600.0

    def __post_init__(self) -> None:
        self.chat = Chat.from_folder(self.config.model.path)
        self.engine = self.engine or HonestEngine(self.chat, self.script)
        accelerator = build_accelerator(self.config.seed)
        training, temperature = self.config.training, self.config.rollout.temperature
        self.policy = self.policy_class(self.config.model, training, temperature, accelerator, self.config.seed)
        self.engine.policy = self.policy

    @property
    def store(self) -> RunStore:
        return RunStore.open(self.config.runs_dir / self.run_id)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Of the training."""
        return [row for row in self.store.metrics() if row["kind"] == "training"]

    @property
    def items(self) -> list[Item]:
        """Of the training."""
        return load_splits(self.config)["train"]

    def first_ids(self, step: int, place: int = 0) -> list[str]:
        """The ids of a group's rollouts, had none of them to be replaced; `place`: of the group in its step."""
        training = self.config.training
        item = items_for_step(self.items, step - 1, training.items_per_step, self.config.seed)[place]
        return [rollout_id(self.run_id, "train", step, item.id, i) for i in range(self.config.rollouts_per_item)]

    @contextmanager
    def watched(self) -> Iterator[tuple[RunStore, Watchdog]]:
        folder = self.config.runs_dir / self.run_id
        store = RunStore.open(folder) if folder.exists() else RunStore.create(self.config.runs_dir, self.run_id, {})
        loop = asyncio.Runner()
        watchdog = Watchdog(loop, store, lambda: self.display.label, tick_s=0.1)
        with store, Display(enabled=False) as self.display, loop, watchdog:
            watchdog.attach(self.engine, None, self.stall_limit_s)
            try:
                yield store, watchdog
            finally:
                self.num_left = loop.run(_cancel_all())

    def train(self) -> float:
        """Train, after the last checkpoint where there is one; the seconds it took."""
        with self.watched() as (store, watchdog):
            watchdog.run(self.engine.start())
            workshop = Workshop(
                self.engine, self.chat, self.environment, HashGrader(), {}, self.config.rollout, 1024, watchdog.waits
            )
            collector = Collector(workshop, self.run_id, self.config.seed, store.append_rollout)
            items = load_splits(self.config)
            if self.environment is not None:
                items = {split: [_with_tools(item) for item in each] for split, each in items.items()}
            sampling = Sampling(self.config, collector, watchdog, store, self.display, items)
            sync = Sync("merged", store.weights, self.config.model.path, "float32")
            pipeline = Pipeline(sampling, is_threaded=self.is_threaded)
            self.collector, self.waits = collector, watchdog.waits
            leader = WatchedLeader(
                self.config, store, self.display, pipeline, self.engine, sync, self.chat.first_prompt
            )
            latest = checkpoint.latest(store.checkpoints)
            first = checkpoint.load(latest, self.policy)["step"] + 1 if latest else 1
            store.rewind(first - 1)
            self.trained = leader.__dict__["trained"] = {}
            started = time.perf_counter()
            train(self.config, self.policy, leader, first)
            return time.perf_counter() - started


def _with_tools(item: Item) -> Item:
    return item.model_copy(update={"tools": [SEARCH]})


async def _cancel_all() -> int:
    """As the end of a job does; how many tasks were left."""
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    if left:
        await asyncio.wait(left, timeout=30)
    return len(left)


def config_of(tmp_path: Path, staleness: int, steps: int = 5, **sections: Any) -> RunConfig:
    """Two items of four rollouts a step; log-probabilities that a script invents are no reason to stop."""
    training = {"steps": steps, "items_per_step": 2, "base_rollouts": 4, "staleness": staleness}
    training |= {"max_logprob_gap": 1e9, "learning_rate": 1e-3, "checkpoint_every": 1}
    rollout = {"max_tokens_per_turn": 200, "max_concurrent": 8} | sections.pop("rollout", {})
    evaluation = {"every": 2, "validation_items": 2} | sections.pop("evaluation", {})
    engine = {"type": "transformers", "max_model_len": 1024, "max_concurrent": 64} | sections.pop("engine", {})
    training |= sections.pop("training", {})
    return a_config(tmp_path, training=training, rollout=rollout, evaluation=evaluation, engine=engine, **sections)


@dataclass(frozen=True, slots=True)
class Overlap:
    """What was hidden of a training, in seconds over all steps: all in all, waited for groups, trained, hidden."""

    wall_s: float
    waited_s: float
    training_s: float
    hidden_s: float

    @property
    def sampling_s(self) -> float:
        """In which anything was sampled while the trainer waited or trained, however many steps at a time."""
        return self.waited_s + self.hidden_s

    @property
    def hidden_share(self) -> float:
        """Of the shorter of sampling and training."""
        return self.hidden_s / min(self.sampling_s, self.training_s)


def overlap(rows: list[dict[str, Any]], wall_s: float) -> Overlap:
    """From the metrics' training rows."""
    names = ("sampling", "training", "hidden")
    waited, trained, hidden = (sum(row[f"time/{name}_s"] for row in rows) for name in names)
    return Overlap(wall_s, waited, trained, hidden)


def measure_overlap(config: RunConfig, run_id: str, seconds: float) -> Overlap:
    """Train with an engine and a trainer that both take `seconds` a step, the engine on no core of ours.

    The engine samples the rollouts of one step at a time: set rollout.max_concurrent to their number.
    """
    stage = Stage(config, run_id)
    stage.engine.first_token_s, stage.policy.step_s = seconds, seconds
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the model is tiny: on busy cores two threads take seconds to wait for each other
    try:
        wall_s = stage.train()
    finally:
        torch.set_num_threads(num_threads)
    return overlap(stage.rows, wall_s)
