"""What Slurm says of a job, and what it is told about one: each a command with a deadline.

Raises ClusterError when Slurm cannot be asked or refuses. Does not submit: see submission.py.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rft.errors import ClusterError

JOB, QUEUE = "slurm/job.json", "slurm/queue.json"  # in the run folder: which job it is, what was last heard of it
_DEADLINE_S = 10.0
_LOOK_DEADLINE_S = 3.0
_LOOK_AGAIN_S = 5.0  # for readers that ask on every page
_FIELD = re.compile(r"(?:^|\s)(JobState|Reason|NodeList|ExitCode|Restarts)=(\S*)")
_WAITING = frozenset({"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT"})
_ACTIVE = frozenset({"RUNNING", "COMPLETING", "SUSPENDED", "SIGNALING", "STAGE_OUT", "STOPPED", "RESIZING"})


@dataclass(frozen=True, slots=True)
class QueuedJob:
    """A job as Slurm sees it. exit_code: Slurm's `status:signal`."""

    state: str
    reason: str
    nodes: str
    exit_code: str
    num_restarts: int

    @property
    def is_waiting(self) -> bool:
        return self.state in _WAITING

    @property
    def is_over(self) -> bool:
        return self.state not in _WAITING | _ACTIVE

    def told(self) -> str:
        """For a person: `queued (Resources)`, `running on node[1-2]`, `completed`."""
        if self.is_waiting:
            return f"queued ({self.reason})" if self.reason else "queued"
        where = f" on {self.nodes}" if self.state == "RUNNING" and self.nodes else ""
        why = f" ({self.reason})" if self.is_over and self.state != "COMPLETED" and self.reason else ""
        return f"{self.state.lower()}{where}{why}"


def ask(job_id: str, deadline_s: float = _DEADLINE_S) -> QueuedJob | None:
    """None when Slurm does not know the job any more. Raises ClusterError."""
    done = _run(["scontrol", "--oneliner", "show", "job", job_id], deadline_s)
    if done.returncode != 0:
        if "Invalid job id" in done.stderr:
            return None
        raise ClusterError(f"Slurm does not answer: {done.stderr.strip()}", cure="check `scontrol ping`")
    found: dict[str, str] = {}
    for name, value in _FIELD.findall(done.stdout):
        found.setdefault(name, "" if value in ("None", "(null)") else value)
    restarts = found.get("Restarts", "0")
    return QueuedJob(
        found.get("JobState", "UNKNOWN"),
        found.get("Reason", ""),
        found.get("NodeList", ""),
        found.get("ExitCode", ""),
        int(restarts) if restarts.isdigit() else 0,
    )


def requeue(job_id: str) -> None:
    """End the job and queue it again. Raises ClusterError quoting Slurm."""
    _tell(["scontrol", "requeue", job_id])


def start_now(job_id: str) -> None:
    """Slurm lets a requeued job wait for two minutes; do not wait. Raises ClusterError quoting Slurm."""
    _tell(["scontrol", "update", f"JobId={job_id}", "StartTime=now"])


def cancel(job_id: str) -> None:
    """Raises ClusterError quoting Slurm."""
    _tell(["scancel", job_id])


def kill_wait_s() -> float:
    """Seconds between SIGTERM and SIGKILL when Slurm ends a job; its default where it does not say."""
    try:
        found = re.search(r"KillWait\s*=\s*(\d+)", _run(["scontrol", "show", "config"], _DEADLINE_S).stdout)
    except ClusterError:
        return 30.0
    return float(found.group(1)) if found else 30.0


# --- for readers of a run folder ---

_looked: dict[str, tuple[float, QueuedJob | None]] = {}  # job -> until when it holds, what Slurm said


def job_of(run: Path) -> dict[str, Any] | None:
    """What `rft submit` wrote of the run's job; None for a run that was not submitted."""
    try:
        found = json.loads((run / JOB).read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("job_id"), str) else None


def look(run: Path) -> QueuedJob | None:
    """What Slurm says of the run's job, at most some seconds old; None without one, or where Slurm cannot be asked."""
    job = job_of(run)
    if job is None:
        return None
    job_id, now = job["job_id"], time.monotonic()
    until, found = _looked.get(job_id, (0.0, None))
    if now >= until:
        try:
            found, until = ask(job_id, _LOOK_DEADLINE_S), now + _LOOK_AGAIN_S
            if found is None or found.is_over:
                until = math.inf
        except ClusterError:
            found, until = None, now + _LOOK_AGAIN_S
        _looked[job_id] = (until, found)
    return found


def status_of(run: Path, status: str) -> str:
    """The status that a run folder says, corrected by what Slurm knows of the run's job."""
    if status == "succeeded" or (job := look(run)) is None:
        return status
    if job.is_waiting:
        return "queued"
    if job.is_over:
        return "killed" if status == "queued" else status
    return "starting" if status in ("queued", "killed") else status  # between two attempts, or two nodes


def _tell(command: list[str]) -> None:
    done = _run(command, _DEADLINE_S)
    if done.returncode != 0:
        raise ClusterError(f"{' '.join(command[:2])}: Slurm says: {(done.stderr or done.stdout).strip()}")


def _run(command: list[str], deadline_s: float) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=deadline_s, check=False)
    except FileNotFoundError:
        cure = "call rft on a node of the cluster, with Slurm's commands on PATH"
        raise ClusterError(f"there is no {command[0]} here", cure=cure) from None
    except (subprocess.TimeoutExpired, OSError) as error:
        raise ClusterError(f"{command[0]} did not answer: {error}", cure="check `scontrol ping`") from None
