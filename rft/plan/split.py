"""Who gets which GPU: every split that fits is tried, and the one with the shortest step is taken.

With training.staleness training and sampling overlap, and the best split balances them; without it they take turns, and
the best one has the smallest sum. One GPU is shared: vLLM takes its share, the trainer what is left; with engine.sleep
all GPUs are shared, and what each holds for good must fit beside the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rft.plan import engine
from rft.plan.engine import OWN_GPU_SHARE, EngineMemory, engine_memory
from rft.plan.hardware import Cluster
from rft.plan.memory import Launch, TrainerMemory, trainer_memory
from rft.plan.setup import Setup
from rft.plan.speed import SamplingSpeed, TrainingSpeed, sampling_speed, training_speed

ASLEEP_GIB = 1.5  # of a GPU that a sleeping vLLM keeps: its CUDA context, graphs and buffers. Not measured


@dataclass(frozen=True, slots=True)
class Ask:
    """What a plan is asked for. trainer_gpus, launch: None leaves the choice to the planner."""

    setup: Setup
    cluster: Cluster
    trainer_gpus: int | None = None
    launch: Launch | None = None


@dataclass(frozen=True, slots=True)
class Layout:
    """GPUs that train, and engines beside them; shared: engines are on GPUs that train."""

    num_trainers: int
    num_engines: int
    launch: Launch
    is_shared: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a layout comes to. Limits are bytes of one GPU."""

    layout: Layout
    trainer: TrainerMemory
    trainer_limit: float
    engine: EngineMemory
    training: TrainingSpeed
    sampling: SamplingSpeed
    step_s: float
    trainer_fits: bool
    engine_fits: bool

    @property
    def fits(self) -> bool:
        return self.trainer_fits and self.engine_fits

    @property
    def missing(self) -> float:
        """Bytes that are missing, as a share of the GPU; 0 where it fits."""
        trainer = max(0.0, self.trainer.total / self.trainer_limit - 1)
        return trainer + (0.0 if self.engine_fits else 1.0)


def best_outcome(ask: Ask) -> Outcome | None:
    """The fastest layout that fits, FSDP2 only where DDP on as many GPUs does not; else the nearest to fitting.

    None where there is no layout.
    """
    outcomes = [outcome_of(ask, layout) for layout in layouts(ask)]
    fitting = [outcome for outcome in outcomes if outcome.fits]
    if fitting:
        whole = {outcome.layout.num_trainers for outcome in fitting if outcome.layout.launch != "fsdp2"}
        wanted = [o for o in fitting if o.layout.launch != "fsdp2" or o.layout.num_trainers not in whole]
        return min(wanted, key=lambda outcome: outcome.step_s)
    return min(outcomes, key=lambda outcome: outcome.missing, default=None)


def fits(ask: Ask) -> bool:
    """Some layout fits. One GPU needs no buffers for others; from two on, more of them never need more each."""
    num_gpus, ranks = ask.cluster.num_gpus, ask.setup.tensor_parallel
    extremes = {1, num_gpus - ranks, num_gpus} if ask.trainer_gpus is None else {ask.trainer_gpus}
    return any(_fits(ask, layout) for count in sorted(extremes) if count >= 1 for layout in _layouts(ask, count))


def layouts(ask: Ask) -> Iterator[Layout]:
    """All that the cluster and what was asked for allow."""
    for num_trainers in range(1, ask.cluster.num_gpus + 1):
        yield from _layouts(ask, num_trainers)


def _layouts(ask: Ask, num_trainers: int) -> Iterator[Layout]:
    num_gpus, ranks = ask.cluster.num_gpus, ask.setup.tensor_parallel
    num_engines = (num_gpus - num_trainers) // ranks
    is_shared = num_trainers == num_gpus and ranks == 1
    is_wanted = ask.trainer_gpus in (None, num_trainers)
    if ask.setup.sleeps:
        if is_wanted and num_trainers == num_gpus >= ranks:
            for launch in _launches(ask, num_trainers):
                yield Layout(num_trainers, num_gpus // ranks, launch, is_shared=True)
    elif is_wanted and (num_engines > 0 or (is_shared and (num_gpus == 1 or ask.trainer_gpus is not None))):
        for launch in _launches(ask, num_trainers):
            yield Layout(num_trainers, max(1, num_engines), launch, is_shared)


def _launches(ask: Ask, num_trainers: int) -> Iterator[Launch]:
    """DDP before FSDP2, which gathers weights all the time; DeepSpeed where it was asked for."""
    found: tuple[Launch, ...] = ("single",) if num_trainers == 1 else ("ddp", "fsdp2")
    if ask.launch is not None:
        found = (ask.launch,) if (ask.launch == "single") == (num_trainers == 1) else ()
    for launch in found:
        if not why_not(ask.setup, launch):
            yield launch


def why_not(setup: Setup, launch: Launch) -> str:
    """Why the trainer refuses a launch for this config, else nothing: see trainers/."""
    if launch == "fsdp2" and setup.has_expert_adapters:
        return "adapters on experts need merged weights, which shards are not"
    if launch == "fsdp2" and setup.lora is None and setup.optimizer != "adamw":
        return f"{setup.optimizer} cannot step sharded weights"
    if launch == "deepspeed" and setup.lora is None and setup.value_bytes != 4:
        return "DeepSpeed needs adapters or model.dtype float32"
    if launch == "deepspeed" and setup.optimizer != "adamw":
        return "DeepSpeed steps AdamW only"
    return ""


def _memories(ask: Ask, layout: Layout) -> tuple[TrainerMemory, float, EngineMemory]:
    setup, gpu = ask.setup, ask.cluster.gpu
    share = setup.gpu_memory_share if layout.is_shared else OWN_GPU_SHARE
    trainer = trainer_memory(setup, layout.launch, layout.num_trainers)
    limit = gpu.memory_gib * 2**30 * (1 - share if layout.is_shared else 1)
    if setup.sleeps:  # the engine wakes beside what the trainer keeps, the rest is there for a step
        asleep = gpu.memory_gib * 2**30 - ASLEEP_GIB * 2**30
        limit = min(asleep, limit + trainer.total - trainer.state)
    return trainer, limit, engine_memory(setup, gpu, share)


def _fits(ask: Ask, layout: Layout) -> bool:
    trainer, limit, memory = _memories(ask, layout)
    return trainer.total <= limit and engine.fits(ask.setup, memory)


def outcome_of(ask: Ask, layout: Layout) -> Outcome:
    """Memory and speed of one layout."""
    setup, cluster = ask.setup, ask.cluster
    trainer, limit, memory = _memories(ask, layout)
    training = training_speed(setup, layout.launch, layout.num_trainers, cluster)
    sampling = sampling_speed(setup, memory, layout.num_engines, cluster.gpu)
    overlaps = setup.staleness > 0 and not layout.is_shared
    return Outcome(
        layout=layout,
        trainer=trainer,
        trainer_limit=limit,
        engine=memory,
        training=training,
        sampling=sampling,
        step_s=max(training.seconds, sampling.seconds) if overlaps else training.seconds + sampling.seconds,
        trainer_fits=trainer.total <= limit,
        engine_fits=engine.fits(setup, memory),
    )
