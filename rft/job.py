"""One job: check everything cheap first, start what it needs, work, report; whatever was started is stopped.

`run_job` trains, `run_sampling` only fills a run folder with rollouts, and a training may replay those of another run
instead of sampling. States in state.json: starting -> running -> succeeded | failed | cancelled | paused. A job that
did not succeed can be continued with `resume`: it goes on after its last complete step.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from transformers.utils.logging import disable_progress_bar

from rft.assembly import Parts, build_parts, load_policy, start_parts, start_with_policy
from rft.chat import Chat
from rft.checkpoints import name_of, supersede_after
from rft.collect import Collector
from rft.config import RunConfig
from rft.engines import sync_kind
from rft.errors import ConfigError, Paused, RftError, UserError
from rft.lesson import load_lesson
from rft.metrics import group_metrics, rollout_metrics, sampling_line
from rft.pipeline import Pipeline
from rft.preflight import check_fits, load_splits, open_store
from rft.progress import Display
from rft.report import final_table, write_report
from rft.reuse import StoredRollouts, Usable
from rft.rollout import Workshop
from rft.sampling import Sampling
from rft.store import RunStore
from rft.tracking import check_trackers, tracked
from rft.types import Item, Split
from rft.watch import Watchdog

if TYPE_CHECKING:
    from rft.trainers.leader import Leader
    from rft.trainers.policy import Policy


_CANCEL_TIMEOUT_S = 60.0  # more than a session may take to end and to close
_WARMUP_CURE = (
    "add warmup: {demonstrations: FILE.jsonl}, or warmup: {from_run: RUN FOLDER, min_grade: 0.5}; "
    "warmup.demonstrations=FILE.jsonl on the command line does the same"
)
_TRL_CURE = "run scripts/setup --warmup in a checkout, or pip install 'rft-local[warmup]'"


@dataclass(frozen=True, slots=True)
class _Job:
    """What every kind of job works with."""

    config: RunConfig
    store: RunStore
    display: Display
    items: dict[Split, list[Item]]
    chat: Chat
    watchdog: Watchdog
    stack: AsyncExitStack
    stored: StoredRollouts = field(default_factory=StoredRollouts)

    def note(self, text: str) -> None:
        self.store.append_event("info", text)
        self.display.line(text)


def run_job(
    config: RunConfig,
    *,
    run_id: str | None = None,
    resume: bool = False,
    replay: Path | None = None,
    checkpoint: str | None = None,
) -> Path:
    """Train from `config` (or continue a run) and return the run folder. Raises RftError with one clear message.

    replay: the folder of a run whose stored rollouts are trained on; no engine, no tools, no evaluation.
    checkpoint: which one of the run to continue from; by default the newest.
    """
    _quieten()
    check_trackers(config.trackers)
    if int(os.environ.get("RANK", "0")) > 0:
        _follow(config)
        return config.runs_dir
    source = RunStore.open(replay) if replay is not None else None

    def work(job: _Job) -> None:
        if source is not None:
            _replay(job, source)
        else:
            _sample_and_train(job)

    def report(job: _Job) -> None:
        job.display.show(final_table(write_report(job.store)))
        job.store.mark_done()
        job.display.line(f"report: {job.store.path / 'report.json'} and report.png")

    return _run(config, lambda: open_store(config, run_id, resume, checkpoint), work, report)


def run_sampling(config: RunConfig, *, run_id: str | None = None, resume: bool = False) -> Path:
    """Sample the rollouts of `training.steps` steps with the untrained model, and nothing else; the run folder.

    Raises RftError with one clear message.
    """
    _quieten()
    return _run(config, lambda: open_store(config, run_id, resume), _sample_only, lambda job: job.store.mark_done())


def run_warmup(config: RunConfig, *, run_id: str | None = None, resume: bool = False) -> Path:
    """Train on the demonstrations that `config.warmup` names; the run folder, `<name>-warmup-001` and on by default.

    resume: one that was interrupted or paused starts anew in its folder and arrives at the same weights. Raises
    RftError with one clear message.
    """
    if config.warmup is None:
        raise ConfigError("the config has no warm-up", where="warmup", cure=_WARMUP_CURE)
    if importlib.util.find_spec("trl") is None:
        raise UserError("TRL is not installed", where="rft warmup", cure=_TRL_CURE)
    check_trackers(config.trackers)
    _quieten()
    chat = Chat.from_folder(config.model.path)
    lesson = load_lesson(config, config.warmup, chat)
    from rft.trainers import checkpoint
    from rft.trainers.warmup import Keeper, check_machine, num_steps, warm_up

    check_machine()
    with Display() as display:
        store = open_store(config.model_copy(update={"name": f"{config.name}-warmup"}), run_id, resume)
        display.line(f"run folder: {store.path}")
        with store, _recorded(store):
            store.rewind(0)
            supersede_after(store.checkpoints / name_of(0))
            for text in lesson.notes:
                store.append_event("info", text)
                display.line(text)
            with display.phase("loading the model"):
                policy = load_policy(config)
                if config.model.init_from is not None:
                    checkpoint.load_weights(checkpoint.find(config.model.init_from), policy)
            steps = num_steps(lesson, config.warmup)
            trackers = tracked(config.trackers, store, config.model_dump(mode="json"), first_step=1)
            with trackers, display.phase("warm-up", steps) as phase:
                warm_up(config, policy, lesson, chat.tokenizer, Keeper(policy, store, display, phase, steps))
        if _is_paused(store, display):
            return store.path
        with store:
            store.mark_done()
    return store.path


def _quieten() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    disable_progress_bar()  # transformers' own bars would break ours


def _run(
    config: RunConfig,
    opened: Callable[[], RunStore],
    work: Callable[[_Job], None],
    finish: Callable[[_Job], None],
) -> Path:
    items = load_splits(config)
    chat = Chat.from_folder(config.model.path)
    check_fits(config, chat, items)
    with Display() as display:
        store = opened()
        display.line(f"run folder: {store.path}")
        watchdog = Watchdog(loop := asyncio.Runner(), store, lambda: display.label)
        job = _Job(config, store, display, items, chat, watchdog, AsyncExitStack())
        with store, _recorded(store), loop, watchdog:
            try:
                work(job)
            finally:
                loop.run(_wind_down(job.stack))
        if _is_paused(store, display):
            return store.path
        with store:
            finish(job)
    return store.path


async def _wind_down(stack: AsyncExitStack) -> None:
    """Cancel what an interrupt left running, let it close what it opened, then close what all of it used."""
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    if left:
        await asyncio.wait(left, timeout=_CANCEL_TIMEOUT_S)
    await stack.aclose()


@contextmanager
def _recorded(store: RunStore) -> Iterator[None]:
    """Write how the job ends into its folder, whatever way it ends. A pause is an end without an error."""
    store.write_state({"status": "starting"})
    try:
        yield
    except KeyboardInterrupt:
        _end(store, "cancelled", "interrupted")
        raise
    except Paused:
        _end(store, "paused", "")
        return
    except RftError as error:
        _end(store, "failed", str(error))
        raise
    except BaseException as error:  # a bug: recorded, then shown with its traceback
        _end(store, "failed", f"{type(error).__name__}: {error}")
        raise
    _end(store, "succeeded", "")


def _end(store: RunStore, status: str, error: str) -> None:
    store.append_event("error" if status == "failed" else "info", f"job {status}", {"error": error} if error else None)
    store.write_state({**store.read_state(), "status": status, "error": error or None})


def _is_paused(store: RunStore, display: Display) -> bool:
    """Whether the job ended by a pause; says so."""
    state = store.read_state()
    if state["status"] != "paused":
        return False
    display.line(f"{Paused(state.get('step', 0))}; --resume continues it")
    return True


# --- the kinds of jobs ---


def _sample_and_train(job: _Job) -> None:
    from rft.trainers.leader import SamplingLeader
    from rft.trainers.sync import Sync

    config, store = job.config, job.store
    parts = _check_parts(job)
    with job.display.phase("starting the engine and loading the model") as phase:
        policy = job.watchdog.run(start_with_policy(config, parts, store, job.stack, phase.status))
    sync = Sync(_sync_kind(config, policy), store.weights, config.model.path, config.model.dtype)
    pipeline = Pipeline(_sampling(job, parts))
    leader = SamplingLeader(config, store, job.display, pipeline, parts.engine, sync, job.chat.first_prompt)
    try:
        _train(job, policy, leader)
    except Paused:
        sync.clear()  # the checkpoint has what is needed to go on
        raise
    sync.clear()


def _replay(job: _Job, source: RunStore) -> None:
    from rft.trainers.leader import ReplayLeader

    with job.display.phase("loading the model"):
        policy = load_policy(job.config)
    _train(job, policy, ReplayLeader(job.config, job.store, job.display, source, job.items["train"]))


def _train(job: _Job, policy: Policy, leader: Leader) -> None:
    from rft.trainers.grpo import train

    with policy.ranks.leading():
        step = _restore(job, policy)
        _rewind(job, step, job.config.training.staleness)
        with tracked(job.config.trackers, job.store, job.config.model_dump(mode="json"), step + 1):
            train(job.config, policy, leader, step + 1)


def _sample_only(job: _Job) -> None:
    parts = _check_parts(job)
    with job.display.phase("starting the engine") as phase:
        job.watchdog.run(start_parts(job.config, parts, job.store, job.stack, phase.status))
    sampling, last = _sampling(job, parts), job.config.training.steps
    done = max((row["step"] for row in job.store.metrics() if row.get("kind") == "sampling"), default=0)
    _rewind(job, done, None)
    for step in range(done + 1, last + 1):
        if job.store.is_pause_asked:
            raise Paused(step - 1)
        groups = sampling.groups(step)
        row: dict[str, Any] = {"step": step, "kind": "sampling", **group_metrics(groups)}
        row |= {f"train/{name}": value for name, value in rollout_metrics(groups).items()}
        row["rollouts/reused"] = sampling.settle("train", step)
        job.store.append_metrics(row)
        job.store.write_state({"status": "running", "step": step, "steps": last})
        job.display.line(sampling_line(row, last))


def _check_parts(job: _Job) -> Parts:
    with job.display.phase("checking tools and graders", keep=False):
        parts = job.watchdog.run(build_parts(job.config, job.store, job.stack, job.note))
    outages = parts.environment.outages if parts.environment else None
    job.watchdog.attach(parts.engine, outages, job.config.stall_limit_s)
    return parts


def _sampling(job: _Job, parts: Parts) -> Sampling:
    config = job.config
    workshop = Workshop(
        parts.engine,
        job.chat,
        parts.environment,
        parts.grader,
        parts.shadow_graders,
        config.rollout,
        config.engine.max_model_len,
        job.watchdog.waits,
    )
    collector = Collector(workshop, job.store.path.name, config.seed, job.store.append_rollout, job.stored)
    return Sampling(config, collector, job.watchdog, job.store, job.display, job.items)


def _restore(job: _Job, policy: Policy) -> int:
    """Load the newest checkpoint; the step it was made at. Without one it is step 0, with the weights of another run
    where the config names one.
    """
    from rft.trainers import checkpoint

    latest = checkpoint.latest(job.store.checkpoints)
    if latest is not None:
        return int(checkpoint.load(latest, policy)["step"])
    if job.config.model.init_from is not None:
        source = checkpoint.find(job.config.model.init_from)
        checkpoint.load_weights(source, policy)
        # resumed before its first step the run starts from the same weights, whatever has become of the other run
        checkpoint.save(job.store.checkpoints, 0, policy, {})
        job.note(f"starting from the weights of {source}")
    return 0


def _rewind(job: _Job, step: int, staleness: int | None) -> None:
    """Move aside what was made after `step`, but for the finished rollouts that the run can go on with."""
    store = job.store
    splits = [split for split in job.items if split != "train" and not store.has_evaluation(split, step)]
    kept = store.rewind(step, Usable(store.path.name, step, staleness, splits))
    job.stored.fill(kept)
    if step or kept:
        used = f": {job.stored.told()} {'is' if len(kept) == 1 else 'are'} used" if kept else ""
        job.display.line(f"continuing after step {step}{used}")


def _sync_kind(config: RunConfig, policy: Policy) -> Literal["adapter", "merged", "transfer"]:
    return sync_kind(config.training.sync, policy.device.type, is_lora=config.model.lora is not None)


def _follow(config: RunConfig) -> None:
    """A rank that only trains: same policy, no engine, no run folder, no story of its own."""
    policy = load_policy(config)
    policy.ranks.follow(policy)
