"""`rft` with one thing that goes wrong in it, as a launcher: `faulty_run.py FAULT -m rft train ...`. A real process."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from rft import cli
from rft.errors import NumericsError, StorageError
from rft.trainers import grpo

FAULT = sys.argv[1]
STEP = 2
update = grpo._update


def faulty(policy: Any, window: Any, leader: Any, step: int) -> Any:
    if step == STEP:
        if FAULT == "fails":
            raise NumericsError("the loss was not finite")
        if FAULT == "bug":
            raise KeyError("a bug")
        if FAULT == "disk":
            raise StorageError("No space left on device", cure="free space")
        once = Path(leader.store.path) / "killed-once"
        if FAULT == "killed once" and not once.exists():
            once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    return update(policy, window, leader, step)


grpo._update = faulty
sys.argv = ["rft", *sys.argv[4:]]
cli.main()
