"""A program that runs one command and never leaves anything of it behind: `python supervise.py LIFELINE GRACE SCRATCH
COMMAND...`; `supervised` makes that command line.

The command gets its own session. When it exits, when its owner is gone (see `supervised`) or on SIGTERM, the whole
process group and its orphans are ended, SIGTERM first. Standard library only; run by path, so that it starts in
milliseconds. It cannot act when it is itself killed by SIGKILL; then the command still gets SIGTERM on Linux, its own
children only what it tells them.
"""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

GRACE_S = 8.0  # vLLM needs about two seconds to remove its shared memory and end its workers
_POLL_S = 0.02
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def supervised(
    command: list[str], scratch: Path, lifeline: Literal["stdin", "parent"] = "stdin", grace_s: float = GRACE_S
) -> list[str]:
    """The command line that runs `command` under supervision; it has `grace_s` seconds for each of two signals.

    stdin: the owner is gone when the supervisor's standard input ends; the command itself reads nothing. The folder
    `scratch` is removed at the end. parent: the owner is this process, on Linux; the command has our standard input.
    Several commands may share `scratch`: it is removed only when the owner died.
    """
    sign = str(os.getpid()) if lifeline == "parent" else lifeline
    return [sys.executable, "-I", str(Path(__file__).resolve()), sign, str(grace_s), str(scratch), *command]


def main(lifeline: str, grace_s: float, scratch: str, command: list[str]) -> int:
    """Run `command` until it or its owner ends; returns its exit status (negative: the signal that ended it)."""
    wake_reader, wake_writer = os.pipe()
    for end in (wake_reader, wake_writer):
        os.set_blocking(end, False)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # Slurm's to the task above us, sent to all below it too
    signal.set_wakeup_fd(wake_writer)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # orphans of the group come to us, so that we can see them end
    watches_stdin = lifeline == "stdin"
    if not watches_stdin:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL if watches_stdin else None,
        start_new_session=True,
        preexec_fn=lambda: _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM),  # safe: one thread
    )
    try:
        is_orphan = _is_orphan(lifeline)  # the owner may have died before we asked to be told
        while not is_orphan and child.poll() is None and not _should_stop(wake_reader, watches_stdin):
            pass
    finally:
        _end_group(child, grace_s)
        if watches_stdin or _is_orphan(lifeline):
            shutil.rmtree(scratch, ignore_errors=True)
        _remove_openmp_marks()
    return child.returncode


def _is_orphan(lifeline: str) -> bool:
    return lifeline != "stdin" and os.getppid() != int(lifeline)


def _should_stop(wake_reader: int, watches_stdin: bool) -> bool:
    """Wait for a signal or for our owner; True when the command must end."""
    stdin = [sys.stdin.fileno()] if watches_stdin else []
    ready, _, _ = select.select([*stdin, wake_reader], [], [])
    if stdin and stdin[0] in ready and not os.read(stdin[0], 1024):
        return True
    if wake_reader not in ready:
        return False
    return bool({signal.SIGTERM, signal.SIGINT} & set(os.read(wake_reader, 1024)))


def _end_group(child: subprocess.Popen[bytes], grace_s: float) -> None:
    """The command's process group, and orphans that left it for a session of their own, as torchrun's workers do."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + grace_s
        told: set[int] = set()
        has_group = _signal_group(child.pid, number)
        while (_signal_orphans(child.pid, number, told) or has_group) and time.monotonic() < deadline:
            child.poll()
            _reap_orphans(child.pid)
            time.sleep(_POLL_S)
            has_group = _signal_group(child.pid, 0)  # asked once; from now on only look whether anything is left


def _signal_group(group: int, number: int) -> bool:
    """False when no process of the group is left."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


def _signal_orphans(child: int, number: int, told: set[int]) -> bool:
    """Signal, once, each process that became ours and is not the command; False when there is none."""
    try:
        pids = {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()} - {child}
    except OSError:  # a kernel that does not say
        return False
    for pid in pids - told:
        os.kill(pid, number)  # our own child: nobody else can have taken its number
    told |= pids
    return bool(pids)


def _reap_orphans(child: int) -> None:
    """Collect ended processes that became ours; the command itself is left to `Popen.poll`."""
    while True:
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if ended is None or ended.si_pid == child:
            return
        os.waitpid(ended.si_pid, 0)


def _remove_openmp_marks() -> None:
    """Delete the files that Intel's OpenMP leaves in shared memory when a process is killed: ours, of the dead."""
    for mark in Path("/dev/shm").glob(f"__KMP_REGISTERED_LIB_*_{os.getuid()}"):
        pid = mark.name.split("_")[-2]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            mark.unlink(missing_ok=True)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    status = main(sys.argv[1], float(sys.argv[2]), sys.argv[3], sys.argv[4:])
    sys.exit(status if status >= 0 else 128 - status)
