"""The jobs that measure and train nothing: `run_evaluation` of any model, `run_baseline` of the untrained one.

Both leave a run folder like a training's: rollouts under the policy version that sampled them, one metrics row of the
kind evaluation, and in state.json who was measured. One that did not succeed goes on with `resume`: the rollouts that
had ended are used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rft import checkpoints
from rft.assembly import Parts, start_parts, start_with_policy
from rft.baseline.numbers import baseline_of
from rft.baseline.presentation import table, write_baseline
from rft.chat import Chat
from rft.config import RunConfig
from rft.data import items_for_step
from rft.engines import Engine, build_engine, sync_kind
from rft.engines.remote import RemoteConfig, RemoteModel
from rft.errors import UserError
from rft.export import find_checkpoint
from rft.lifecycle import Job, Plan, carry_out, check_parts, quieten, sampling_of
from rft.preflight import check_fits, check_start, load_splits, open_store
from rft.progress import Display
from rft.reuse import is_whole
from rft.store import RunStore
from rft.types import Item, Split
from rft.wire import safe_url

if TYPE_CHECKING:
    from rft.trainers.policy import Policy

_BEST = "best:"
_MAX_NAME = 50  # characters of the config's name that a run's name keeps
_NUM_PROBED = 2  # prompts


@dataclass(frozen=True, slots=True)
class Subject:
    """Which model is measured: the config's own, one with the weights of a checkpoint, or one behind a URL.

    label: what a person calls it. version: the policy version of the weights, 0 for those that no run of ours trained.
    """

    label: str
    version: int = 0
    weights: Path | None = None
    remote: RemoteConfig | None = None


@dataclass(frozen=True, slots=True)
class Extent:
    """How much is sampled. num_items None: what a training evaluates of a test or validation split, all of train."""

    split: Split
    num_samples: int
    num_items: int | None = None


def subject_of(config: RunConfig, of: str | None = None, remote: RemoteConfig | None = None) -> Subject:
    """The model that a person names. Without a name: the one a training of this config starts from.

    of: a run folder (its newest checkpoint), a checkpoint's folder, or `best:` and a run folder (the best validation
    grade). Raises UserError where it is not there, or is another kind of model; StorageError where it is corrupt.
    """
    if remote is not None:
        if of is not None:
            raise UserError("name one model", where="--of, --url", cure="leave out one of the two")
        return Subject(remote.model, remote=remote)
    place = of if of is not None else config.model.init_from
    if place is None:
        return Subject(config.model.path.name)
    if str(place).startswith(_BEST):
        weights = find_checkpoint(RunStore.open(Path(str(place).removeprefix(_BEST))), "best")
    else:
        weights = checkpoints.find(Path(place))
    check_start(config.model_copy(update={"model": config.model.model_copy(update={"init_from": weights})}))
    step = checkpoints.step_of(weights)
    run = weights.resolve().parent.parent.name
    return Subject(f"{run} step {step}" if step else run, step if of is not None else 0, weights)


def run_evaluation(
    config: RunConfig, subject: Subject, extent: Extent, *, run_id: str | None = None, resume: bool = False
) -> Path:
    """Sample and grade a split with a model; the run folder, `<name>-eval-001` and on by default.

    Raises RftError with one clear message.
    """

    def finish(job: Job) -> None:
        job.store.mark_done()
        job.display.line(f"evaluation: {job.store.path}")

    return _measure(_named(config, "eval", extent), subject, extent, _Ending(run_id, resume, finish), Display())


def run_baseline(
    config: RunConfig, extent: Extent, *, run_id: str | None = None, resume: bool = False, to_stderr: bool = False
) -> Path:
    """Sample a split with the model that a training starts from, and judge it; the run folder, with baseline.json and
    baseline.png, `<name>-baseline-001` and on by default. Raises RftError with one clear message.
    """

    def finish(job: Job) -> None:
        found = baseline_of(job.store, extent.split)
        write_baseline(job.store, found)
        job.store.mark_done()
        job.display.show(table(found, is_boxed=job.display.is_terminal))
        job.display.line(f"baseline: {job.store.path / 'baseline.json'} and baseline.png")

    ending = _Ending(run_id, resume, finish)
    return _measure(
        _named(config, "baseline", extent), subject_of(config), extent, ending, Display(to_stderr=to_stderr)
    )


@dataclass(frozen=True, slots=True)
class _Ending:
    """Which folder, and what is done in it at the end."""

    run_id: str | None
    resume: bool
    finish: Callable[[Job], None]


def _named(config: RunConfig, kind: str, extent: Extent) -> RunConfig:
    """The config as it is used, and written into the run folder."""
    changes: dict[str, Any] = {"rollouts_per_item": extent.num_samples}
    if extent.num_items is not None and extent.split != "train":
        changes[f"{extent.split}_items"] = extent.num_items
    evaluation = config.evaluation.model_copy(update=changes)
    return config.model_copy(update={"name": f"{config.name[:_MAX_NAME]}-{kind}", "evaluation": evaluation})


def _measure(config: RunConfig, subject: Subject, extent: Extent, ending: _Ending, display: Display) -> Path:
    quieten()
    items = {extent.split: _items(config, extent)}
    chat = None
    if subject.remote is None:
        chat = Chat.from_folder(config.model.path)
        check_fits(config, chat, items)
    facts = _facts(subject, extent)

    def opened() -> RunStore:
        store = open_store(config, ending.run_id, ending.resume)
        if ending.resume:
            _check_facts(store, facts)
        return store

    def work(job: Job) -> None:
        parts = _started(job, subject)
        job.store.write_state({**facts, "status": "running"})
        _rewind(job, subject, extent)
        sampling_of(job, parts).evaluate(extent.split, subject.version)

    return carry_out(Plan(opened, work, ending.finish, facts), config, items, chat, display)


def _items(config: RunConfig, extent: Extent) -> list[Item]:
    """Of the training split the ones that a training takes first; of the others those that it evaluates."""
    items = load_splits(config).get(extent.split)
    if not items:
        cure = f"add data.{extent.split}, or choose another split with --split"
        raise UserError("the config names no data of this split", where=f"--split {extent.split}", cure=cure)
    if extent.split == "train" and extent.num_items is not None:
        return items_for_step(items, 0, min(extent.num_items, len(items)), config.seed)
    return items


def _facts(subject: Subject, extent: Extent) -> dict[str, Any]:
    """Who was measured on what, as state.json says it; never a key."""
    facts: dict[str, Any] = {"kind": "evaluation", "label": subject.label, "split": extent.split}
    facts |= {"step": subject.version, "num_samples": extent.num_samples, "num_items": extent.num_items}
    if subject.remote is not None:
        return facts | {"source": safe_url(subject.remote.url)}
    return facts | {"source": str(subject.weights) if subject.weights is not None else None}


def _check_facts(store: RunStore, facts: dict[str, Any]) -> None:
    """Refuse to go on with another measurement. Raises UserError naming what differs."""
    state = store.read_state()
    for name, value in facts.items():
        if name in state and state[name] != value:
            store.close()
            problem = f"{name} was {state[name]!r} when it was started, now it is {value!r}"
            cure = "resume with the options it was started with, or start a new one"
            raise UserError(problem, where=str(store.path), cure=cure)


def _rewind(job: Job, subject: Subject, extent: Extent) -> None:
    """Go on with the rollouts of the same measurement that had ended."""
    place = (extent.split, subject.version)
    run_id = job.store.path.name
    kept = job.store.rewind(
        subject.version,
        lambda rollout: (rollout.split, rollout.step) == place and is_whole(rollout, run_id),
    )
    job.stored.fill(kept)
    if kept:
        job.display.line(f"going on: {len(kept)} finished rollouts are used")


# --- the model ---


def _started(job: Job, subject: Subject) -> Parts:
    """Tools, graders and the model, ready."""
    if subject.weights is not None:
        return _with_weights(job, subject, subject.weights)
    remote = RemoteModel(subject.remote) if subject.remote is not None else None
    parts = check_parts(job, remote)
    with job.display.phase("reaching the model" if remote is not None else "starting the engine") as phase:
        job.watchdog.run(start_parts(job.config, parts, job.store, job.stack, phase.status))
    return parts


def _with_weights(job: Job, subject: Subject, weights: Path) -> Parts:
    """The engine with a checkpoint's weights, which come there as in training, and the proof that they arrived."""
    from rft.trainers import checkpoint
    from rft.trainers.sync import Sync

    config = job.config
    engine = build_engine(config, job.store.engine_log)
    parts = check_parts(job, engine)
    with job.display.phase("starting the engine and loading the weights") as phase:
        policy = job.watchdog.run(start_with_policy(config, parts, job.store, job.stack, phase.status))
        kind = sync_kind(config.training.sync, policy.device.type, is_lora=config.model.lora is not None)
        sync = Sync(kind, job.store.weights, config.model.path, config.model.dtype)
        job.stack.callback(sync.clear)
        _probe(job, sync, policy, engine)
        checkpoint.load_weights(weights, policy)
        job.watchdog.run(engine.load(sync.publish(policy, subject.version)))
        _probe(job, sync, policy, engine)
    return parts


def _probe(job: Job, sync: Any, policy: Policy, engine: Engine) -> None:
    """Raises SyncError where the engine computes with other weights than the policy."""
    (items,) = job.items.values()
    job.watchdog.run(sync.probe(policy, engine, [job.first_prompt(item) for item in items[:_NUM_PROBED]]))
