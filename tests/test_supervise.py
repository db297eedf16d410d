"""The supervisor: nothing of a command is left when its owner is gone, not even what left its process group."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from rft.supervise import supervised

DEADLINE_S = 20.0


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("ignored", ["", "TERM"], ids=["", "that ignores SIGTERM"])
def test_a_process_in_a_session_of_its_own_is_ended_too(tmp_path: Path, ignored: str) -> None:
    """As torchrun starts its workers: they come to the supervisor once torchrun is killed."""
    told = tmp_path / "pid"
    worker = f"trap '' {ignored}; echo $$ > {told}.part; mv {told}.part {told}; exec sleep 1000"
    worker = worker if ignored else worker.removeprefix("trap '' ; ")
    command = ["sh", "-c", 'setsid sh -c "$0" & exec sleep 1000', worker]
    process = subprocess.Popen(supervised(command, tmp_path / "scratch", grace_s=0.5), stdin=subprocess.PIPE)
    deadline = time.monotonic() + DEADLINE_S
    while not told.exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    pid = int(told.read_text())
    assert is_alive(pid)
    process.communicate(timeout=DEADLINE_S)
    assert not is_alive(pid)
