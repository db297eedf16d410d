"""Following a submitted job to its end: says what changes, lets a requeued job start at once, cancels it when asked.

Asks Slurm every second, sooner once the run has said its last word, and bears a controller that does not answer for
some minutes.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path

from rft.cluster import queue
from rft.cluster.attempt import Attempt, End, attempts_of
from rft.cluster.queue import QueuedJob
from rft.errors import ClusterError
from rft.files import replace

_POLL_S = 1.0
_LOOK_S = 0.1  # between two looks at whether node 0 has written how it ended
_SOON_S = 0.25  # after that
_SAY_AGAIN_S = 60.0  # while nobody else gives a sign of life
_SETTLE_S = 10.0  # a job that starts before the end of its last attempt has come in is taken to have ended itself
_SILENCE_S = 600.0  # of Slurm, before we give up
_CANCEL_S = 90.0
_LAUNCH_FAILED = "JobLaunchFailure"
_NUM_LINES = 15
_MAX_NODES = 1024  # that are looked at for why they ended


def follow(run: Path, job_id: str, say: Callable[[str], None]) -> int:
    """The exit code of the run. Raises ClusterError when the job ended without one; KeyboardInterrupt cancels it."""
    try:
        job = _until_over(run, job_id, say)
    except KeyboardInterrupt:
        say(f"cancelling job {job_id}")
        _cancel(job_id)
        raise
    return _exit_code(run, job_id, job, say)


class Hurry:
    """Lets a requeued job start, once per restart, as soon as the end of its last attempt has reached Slurm."""

    def __init__(self, job_id: str) -> None:
        self._job_id = job_id
        self._num_hurried, self._since = 0, 0.0

    def look(self, job: QueuedJob, now: float) -> None:
        if not (job.is_waiting and job.reason == "BeginTime" and job.num_restarts > self._num_hurried):
            self._since = now
        elif now - self._since > _SETTLE_S:
            self._num_hurried = job.num_restarts
            with contextlib.suppress(ClusterError):  # not permitted: it waits for two minutes
                queue.start_now(self._job_id)


def _until_over(run: Path, job_id: str, say: Callable[[str], None]) -> QueuedJob | None:
    told, told_at, heard_at, hurry = "", 0.0, time.monotonic(), Hurry(job_id)
    while True:
        now = time.monotonic()
        try:
            job = queue.ask(job_id)
            heard_at = now
        except ClusterError:
            if now - heard_at > _SILENCE_S:
                raise
            time.sleep(_POLL_S)
            continue
        words = job.told() if job is not None else "over"
        is_long = job is not None and job.is_waiting and now - told_at > _SAY_AGAIN_S
        if words != told:
            say(f"job {job_id}: {words}")
        if words != told or is_long:
            told, told_at = words, now
            _write(run, job_id, words)
        if job is None or job.is_over:
            return job
        hurry.look(job, now)
        _wait(run, job_id, job)


def _wait(run: Path, job_id: str, job: QueuedJob) -> None:
    """Until Slurm may have news. It tells nobody: it has to be asked."""
    attempts = [] if job.is_waiting else attempts_of(run, job_id)
    deadline = time.monotonic() + _POLL_S
    while time.monotonic() < deadline:
        if attempts and attempts[-1].ended(0) is not None:
            time.sleep(_SOON_S)
            return
        time.sleep(_LOOK_S)


def _write(run: Path, job_id: str, words: str) -> None:
    said = {"job_id": job_id, "state": words, "time": time.time()}
    replace(run / queue.QUEUE, json.dumps(said).encode(), is_durable=False)


def _exit_code(run: Path, job_id: str, job: QueuedJob | None, say: Callable[[str], None]) -> int:
    attempts = attempts_of(run, job_id)
    last = attempts[-1] if attempts else None
    end = last.ended(0) if last is not None else None
    if job is not None and job.state == "CANCELLED":
        raise ClusterError(f"job {job_id} was cancelled", cure=_again(run))
    if job is not None and job.state == "TIMEOUT":
        raise ClusterError(f"job {job_id} reached its time limit and could not be queued again", cure=_again(run))
    if end is None or last is None:
        raise ClusterError(_without_a_word(run, job_id, job), cure=_cure(run, job))
    if end.code == 0:
        return 0
    if end.why:
        raise ClusterError(_told(last, end), cure="" if "cure:" in end.why else _again(run))
    say(f"the run ended with code {end.code}; {last.log('node-0')} says:")
    say("\n".join(_tail(last.log("node-0"))))
    for node in range(1, _MAX_NODES):
        if (other := last.ended(node)) is not None and other.why:
            say(f"node {node} ended with code {other.code}: {other.why}")
    return end.code


def _told(last: Attempt, end: End) -> str:
    return f"attempt {last.restart + 1} of job {last.job_id} ended: {end.why}"


def _without_a_word(run: Path, job_id: str, job: QueuedJob | None) -> str:
    if job is not None and job.reason == _LAUNCH_FAILED:
        nodes = job.nodes or "the node"
        return (
            f"Slurm could not write into {run} on {nodes}: the run folder is not shared between login node and {nodes}"
        )
    words = _tail(run / "slurm" / "submitit" / f"{job_id}_0_log.out")
    quoted = "".join(f"\n    {line}" for line in words)
    return (
        f"job {job_id} ended ({job.told() if job is not None else 'unknown to Slurm'}) before its first word" + quoted
    )


def _cure(run: Path, job: QueuedJob | None) -> str:
    if job is not None and job.reason == _LAUNCH_FAILED:
        return "set runs_dir to a folder of the shared file system"
    return f"read {run / 'slurm' / 'submitit'}"


def _again(run: Path) -> str:
    warmup = " --warmup" if (queue.job_of(run) or {}).get("kind") == "warmup" else ""
    command = f"rft submit {run / 'job_config.yaml'} --run-id {run.name} --resume{warmup}"
    return f"`{command}`, with the options of before, goes on after the last complete step"


def _tail(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return [line.rstrip() for line in lines if line.strip()][-_NUM_LINES:]


def _cancel(job_id: str) -> None:
    """Nothing of the job runs when this returns, unless Slurm does not answer in time."""
    deadline = time.monotonic() + _CANCEL_S
    with contextlib.suppress(ClusterError):
        queue.cancel(job_id)
        while (job := queue.ask(job_id)) is not None and not job.is_over and time.monotonic() < deadline:
            time.sleep(_POLL_S / 4)
