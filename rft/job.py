"""The jobs that train: check everything cheap first, start what it needs, work, report.

`run_job` trains, `run_sampling` only fills a run folder with rollouts, and a training may replay those of another run
instead of sampling. A job that did not succeed can be continued with `resume`: it goes on after its last complete step.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rft.assembly import load_policy, start_parts, start_with_policy
from rft.chat import Chat
from rft.checkpoints import name_of, supersede_after
from rft.config import RunConfig
from rft.engines import build_engine, sync_kind
from rft.errors import ConfigError, Paused, UserError
from rft.lesson import load_lesson
from rft.lifecycle import Job, Plan, carry_out, check_parts, is_paused, quieten, recorded, sampling_of
from rft.metrics import group_metrics, rollout_metrics, sampling_line
from rft.pipeline import Pipeline
from rft.preflight import check_fits, load_splits, open_store
from rft.progress import Display
from rft.report import final_table, write_report
from rft.reuse import Usable
from rft.store import RunStore
from rft.tracking import check_trackers, tracked

if TYPE_CHECKING:
    from rft.trainers.leader import Leader
    from rft.trainers.policy import Policy


_WARMUP_CURE = (
    "add warmup: {demonstrations: FILE.jsonl}, or warmup: {from_run: RUN FOLDER, min_grade: 0.5}; "
    "warmup.demonstrations=FILE.jsonl on the command line does the same"
)
_TRL_CURE = "run scripts/setup --warmup in a checkout, or pip install 'rft-local[warmup]'"


def run_job(
    config: RunConfig,
    *,
    run_id: str | None = None,
    resume: bool = False,
    replay: Path | None = None,
    checkpoint: str | None = None,
    is_strict: bool = False,
) -> Path:
    """Train from `config` (or continue a run) and return the run folder. Raises RftError with one clear message.

    replay: the folder of a run whose stored rollouts are trained on; no engine, no tools, no evaluation.
    checkpoint: which one of the run to continue from; by default the newest.
    is_strict: end with a UserError before the first update where the first groups have no signal.
    """
    quieten()
    check_trackers(config.trackers)
    if int(os.environ.get("RANK", "0")) > 0:
        _follow(config)
        return config.runs_dir
    source = RunStore.open(replay) if replay is not None else None

    def work(job: Job) -> None:
        if source is not None:
            _replay(job, source)
        else:
            _sample_and_train(job, is_strict)

    def report(job: Job) -> None:
        job.display.show(final_table(write_report(job.store)))
        job.store.mark_done()
        job.display.line(f"report: {job.store.path / 'report.json'} and report.png")

    return _carry_out(config, Plan(lambda: open_store(config, run_id, resume, checkpoint), work, report))


def run_sampling(config: RunConfig, *, run_id: str | None = None, resume: bool = False) -> Path:
    """Sample the rollouts of `training.steps` steps with the untrained model, and nothing else; the run folder.

    Raises RftError with one clear message.
    """
    quieten()
    return _carry_out(config, Plan(lambda: open_store(config, run_id, resume), _sample_only, _mark_done))


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
    quieten()
    chat = Chat.from_folder(config.model.path)
    lesson = load_lesson(config, config.warmup, chat)
    from rft.trainers import checkpoint
    from rft.trainers.warmup import Keeper, check_machine, num_steps, warm_up

    check_machine()
    with Display() as display:
        store = open_store(config.model_copy(update={"name": f"{config.name}-warmup"}), run_id, resume)
        display.line(f"run folder: {store.path}")
        with store, recorded(store):
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
        if is_paused(store, display):
            return store.path
        with store:
            store.mark_done()
    return store.path


def _carry_out(config: RunConfig, plan: Plan) -> Path:
    """With all splits of the data, each prompt of which fits."""
    items, chat = load_splits(config), Chat.from_folder(config.model.path)
    check_fits(config, chat, items)
    return carry_out(plan, config, items, chat, Display())


def _mark_done(job: Job) -> None:
    job.store.mark_done()


# --- the kinds of jobs ---


def _sample_and_train(job: Job, is_strict: bool) -> None:
    from rft.trainers.leader import SamplingLeader
    from rft.trainers.sync import Sync

    config, store = job.config, job.store
    engine = build_engine(config, store.engine_log)
    parts = check_parts(job, engine)
    with job.display.phase("starting the engine and loading the model") as phase:
        policy = job.watchdog.run(start_with_policy(config, parts, store, job.stack, phase.status))
    sync = Sync(_sync_kind(config, policy), store.weights, config.model.path, config.model.dtype)
    pipeline = Pipeline(sampling_of(job, parts))
    leader = SamplingLeader(config, store, job.display, pipeline, engine, sync, job.first_prompt, is_strict)
    try:
        _train(job, policy, leader)
    except Paused:
        sync.clear()  # the checkpoint has what is needed to go on
        raise
    sync.clear()


def _replay(job: Job, source: RunStore) -> None:
    from rft.trainers.leader import ReplayLeader

    with job.display.phase("loading the model"):
        policy = load_policy(job.config)
    _train(job, policy, ReplayLeader(job.config, job.store, job.display, source, job.items["train"]))


def _train(job: Job, policy: Policy, leader: Leader) -> None:
    from rft.trainers.grpo import train

    with policy.ranks.leading():
        step = _restore(job, policy)
        _rewind(job, step, job.config.training.staleness)
        with tracked(job.config.trackers, job.store, job.config.model_dump(mode="json"), step + 1):
            train(job.config, policy, leader, step + 1)


def _sample_only(job: Job) -> None:
    parts = check_parts(job)
    with job.display.phase("starting the engine") as phase:
        job.watchdog.run(start_parts(job.config, parts, job.store, job.stack, phase.status))
    sampling, last = sampling_of(job, parts), job.config.training.steps
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


def _restore(job: Job, policy: Policy) -> int:
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


def _rewind(job: Job, step: int, staleness: int | None) -> None:
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
