"""Submitting a run: all that can be checked on the login node, its folder, one job of Slurm.

Guarantees: a run that Slurm does not take leaves no folder behind, and none that was there before is changed. What the
job reads is written into the run folder now: editing the config later changes nothing.
"""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import shlex
import shutil
import sys
import time
from concurrent.futures import TimeoutError as DeadlineError
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rft.chat import Chat
from rft.cluster import queue
from rft.cluster.allocation import Allocation
from rft.cluster.attempt import FOLDER, NONCE
from rft.cluster.commands import CONFIG, Kind
from rft.cluster.node import NodeTask
from rft.config import RunConfig, VllmEngineConfig
from rft.errors import ClusterError, ConfigError, UserError
from rft.files import replace, storing
from rft.lesson import load_lesson
from rft.preflight import check_fits, load_splits, open_store
from rft.store import RunStore
from rft.threads import DaemonThreads
from rft.tracking import check_trackers

_SBATCH_DEADLINE_S = 60.0
_SUBMITIT_CURE = "pip install 'rft-local[cluster]'"
_SBATCH_CURE = "call rft submit on a login node of the cluster, with Slurm's commands on PATH"


@dataclass(frozen=True, slots=True)
class Submitted:
    """A run and its job. is_new: False where the job was there already."""

    run: Path
    job_id: str
    is_new: bool = True


def submit(
    config: RunConfig, allocation: Allocation, kind: Kind = "train", *, run_id: str | None = None, resume: bool = False
) -> Submitted:
    """Queue the run, or what is left of it. Raises RftError with one clear message before Slurm has anything.

    A run with a job that is still queued or running is not submitted again: that job is returned.
    """
    check_cluster()
    check_roles(config, allocation, kind)
    if resume and run_id is not None and (job_id := _active_job(config.runs_dir / run_id)) is not None:
        return Submitted((config.runs_dir / run_id).resolve(), job_id, is_new=False)
    check_trackers(config.trackers)
    _check_data(config, kind)
    stored = config.model_copy(update={"name": f"{config.name}-warmup"}) if kind == "warmup" else config
    was_there = run_id is not None and (config.runs_dir / run_id).exists()
    with open_store(stored, run_id, resume) as store:
        if resume and (job_id := _active_job(store.path)) is not None:
            return Submitted(store.path.resolve(), job_id, is_new=False)
        state = store.read_state()
        try:
            task = _prepare(store, config, allocation, kind)
            store.close()  # the job may start at once, and is the writer from now on
            job_id = _sbatch(task, allocation, store.run_id)
            _write_job(store, job_id, allocation, kind)
        except BaseException:
            store.write_state(state)
            if not resume:
                _forget(store, was_there=was_there)
            raise
    return Submitted(Path(task.run), job_id)


def spare_torch() -> None:
    """For a process that only submits: transformers without torch has tokenizers and no models, and loads in a second
    instead of six. Nothing else in this process can use torch afterwards.
    """
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # it would say that torch is missing
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # Python's own way of saying that there is none
    import transformers  # noqa: F401

    del os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"]  # the job has the environment of who submits


def check_cluster() -> None:
    """Raises UserError without submitit or without Slurm's commands."""
    if importlib.util.find_spec("submitit") is None:
        raise UserError("submitit is not installed", where="rft submit", cure=_SUBMITIT_CURE)
    for command in ("sbatch", "srun", "scontrol"):
        if shutil.which(command) is None:
            raise UserError(f"there is no {command} here", where="rft submit", cure=_SBATCH_CURE)


def check_roles(config: RunConfig, allocation: Allocation, kind: Kind) -> None:
    """Raises ConfigError where the nodes asked for and the config do not fit."""
    where = "rft submit"
    if kind == "warmup" and (allocation.nodes > 1 or allocation.gpus_per_node > 1):
        raise ConfigError("a warm-up runs on one device", where=where, cure="leave out --nodes and --gpus-per-node 2+")
    if not allocation.engine_nodes:
        return
    if not isinstance(config.engine, VllmEngineConfig):
        cure = "set engine.type=vllm, or leave out --engine-nodes"
        raise ConfigError(f"{config.engine.type} samples inside the run, not as a server", where=where, cure=cure)
    if config.engine.url is not None:
        cure = "leave out one of them"
        raise ConfigError("engine.url and --engine-nodes both say where the engines are", where=where, cure=cure)
    if config.engine.num_servers > 1 or config.engine.devices is not None or config.engine.sleep:
        cure = "leave out --engine-nodes, or set engine.num_servers=1 engine.devices=null engine.sleep=false"
        raise ConfigError("engines beside the trainer, and --engine-nodes too", where=where, cure=cure)
    num_engines = allocation.engine_nodes * allocation.engines_per_node
    if config.training.sync == "transfer" and num_engines > 1:
        cure = "ask for one engine (--gpus-per-engine), or set training.sync to reload or auto"
        raise ConfigError(
            f"training.sync is transfer, which serves one engine, not {num_engines}", where=where, cure=cure
        )


def _check_data(config: RunConfig, kind: Kind) -> None:
    """As the run itself will look at it. Raises UserError."""
    chat = Chat.from_folder(config.model.path)
    if kind == "train":
        check_fits(config, chat, load_splits(config))
    elif config.warmup is None:
        cure = "add warmup: {demonstrations: FILE.jsonl}"
        raise ConfigError("the config has no warm-up", where="warmup", cure=cure)
    else:
        load_lesson(config, config.warmup, chat)


def _active_job(run: Path) -> str | None:
    """The job of an earlier submission that is not over. Raises ClusterError."""
    job = queue.job_of(run)
    found = queue.ask(job["job_id"]) if job is not None else None
    return None if job is None or found is None or found.is_over else str(job["job_id"])


def _prepare(store: RunStore, config: RunConfig, allocation: Allocation, kind: Kind) -> NodeTask:
    """What the nodes need in the run folder, and what travels to them."""
    run, nonce = store.path.resolve(), secrets.token_hex(16)
    with storing(run):
        (run / FOLDER).mkdir(exist_ok=True)
    replace(run / NONCE, nonce.encode())
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    replace(run / CONFIG, text.encode(), mode=0o600)  # it may hold keys of tools and judges
    store.write_state({**store.read_state(), "status": "queued", "error": None})
    return NodeTask(str(run), os.getcwd(), nonce, allocation.model_dump(mode="json"), kind)


def _forget(store: RunStore, *, was_there: bool) -> None:
    """Take a new run back: nothing ran in it. A server's folder holds more than the run, and stays."""
    store.close()
    if not was_there:
        shutil.rmtree(store.path)
        return
    shutil.rmtree(store.path / FOLDER, ignore_errors=True)
    for name in ("config.json", "state.json"):
        (store.path / name).unlink(missing_ok=True)


def _sbatch(task: NodeTask, allocation: Allocation, name: str) -> str:
    """The job's id. Raises ClusterError quoting Slurm."""
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    executor = submitit.SlurmExecutor(Path(task.run) / FOLDER / "submitit", python=shlex.quote(sys.executable))
    executor.update_parameters(**slurm_parameters(Path(task.run), allocation, name))
    submitting = DaemonThreads().submit(executor.submit, task)
    try:
        return str(submitting.result(_SBATCH_DEADLINE_S).job_id)
    except (FailedJobError, FailedSubmissionError) as error:
        words = "\n".join(f"    {line}" for line in str(error).strip().splitlines())
        cure = "change what was asked for; `sinfo` shows what there is"
        raise ClusterError(f"Slurm does not take the job; sbatch says:\n{words}", cure=cure) from None
    except DeadlineError:
        cure = "check `scontrol ping`; `squeue --me` shows whether it took the job all the same"
        raise ClusterError(f"sbatch did not answer within {_SBATCH_DEADLINE_S:.0f} s", cure=cure) from None


def slurm_parameters(run: Path, allocation: Allocation, name: str) -> dict[str, Any]:
    """What submitit is told: one task per node, a notice before the time limit, and a last word of the batch script."""
    options: dict[str, Any] = {key: value or True for key, value in allocation.slurm.items()}
    srun = [f"--cpus-per-task={options['cpus-per-task']}"] if "cpus-per-task" in options else []  # it forgets sbatch's
    asked = {
        "partition": allocation.partition,
        "account": allocation.account,
        "gpus_per_node": allocation.gpus_per_node or None,
    }
    time_limit = {"time": allocation.time} if allocation.time is not None else {}
    closing = shlex.join([sys.executable, "-m", "rft.cluster.closing", str(run)])
    return {
        "job_name": name,
        "nodes": allocation.nodes,
        "ntasks_per_node": 1,
        "signal_delay_s": allocation.notice_s,
        "stderr_to_stdout": True,
        "srun_args": srun,
        "teardown": ["code=$?", f'{closing} "$code"'],
        "additional_parameters": {"requeue": True, **time_limit, **options},
        **{key: value for key, value in asked.items() if value is not None},
    }


def _write_job(store: RunStore, job_id: str, allocation: Allocation, kind: Kind) -> None:
    job: dict[str, Any] = {"job_id": job_id, "kind": kind, "submitted_at": time.time()}
    job["allocation"] = allocation.model_dump(mode="json")
    replace(store.path / queue.JOB, json.dumps(job, indent=2).encode())
    store.append_event_apart("info", f"submitted to Slurm as job {job_id}")
