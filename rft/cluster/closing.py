"""The last lines of the batch script: `python -m rft.cluster.closing RUN CODE`, once all tasks have ended.

Gives the job the exit code of node 0. A node 0 that was killed before it could say how it ended is a node that was
lost: the job is queued again, a few times. Not reached when Slurm itself ends the job.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from rft.cluster import queue
from rft.cluster.attempt import Attempt, attempts_of
from rft.errors import ClusterError

_MAX_LOSSES = 3
_LOST = "it was killed before it could say why"


def close(run: Path, job_id: str, restart: int, code: int) -> int:
    """The exit code of the job; `code` is what srun ended with."""
    here = Attempt(run, job_id, restart)
    if (end := here.ended(0)) is not None:
        return end.code
    if here.announced(0) is None:
        return code or 1  # it never started: the next attempt would not either
    ends = [attempt.ended(0) for attempt in attempts_of(run, job_id)]
    here.end(0, code or 1, _LOST)
    if sum(end is not None and end.why == _LOST for end in ends) >= _MAX_LOSSES:
        return code or 1
    try:
        queue.requeue(job_id)
    except ClusterError as error:
        print(error, file=sys.stderr)
    return code or 1


if __name__ == "__main__":
    number = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    sys.exit(close(Path(sys.argv[1]), os.environ["SLURM_JOB_ID"], number, int(sys.argv[2])))
