"""A private Slurm cluster of two nodes on this machine: munge, a controller, two daemons, all in one folder.

Node 2 sees an empty folder where `unshared` is: what is submitted from there is not shared with it. Needs root. What
was started is ended by its pid when the context ends.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

DEADLINE_S = 30.0
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "unshare")
_CONF = """ClusterName=rfttest
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CryptoType=crypto/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
JobRequeue=1
KillWait={kill_wait_s}
SlurmdTimeout=60
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
SchedulerParameters=sched_min_interval=100000,batch_sched_delay=1,bf_interval=1
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port1} CPUs=2 RealMemory=8000 Gres=gpu:1
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port2} CPUs=2 RealMemory=8000 Gres=gpu:1
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
_GRES = "NodeName=node[1-2] Name=gpu File=/dev/null\n"  # Slurm gives it; no driver knows it


def why_not() -> str:
    """Why there can be no cluster here; "" when there can."""
    path = os.environ.get("PATH", "") + ":/usr/sbin"
    missing = [name for name in _PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        return f"no Slurm here: {', '.join(missing)} missing (apt-get install slurm-wlm munge)"
    return "" if os.getuid() == 0 else "starting a private Slurm needs root"


@dataclass(frozen=True, slots=True)
class Cluster:
    """env: what its commands need. unshared: a folder that node 2 does not share."""

    folder: Path
    env: dict[str, str]
    unshared: Path

    def run(self, *command: str) -> str:
        """The output of a Slurm command, which must succeed."""
        done = subprocess.run(
            command, env=os.environ | self.env, capture_output=True, text=True, timeout=DEADLINE_S, check=False
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def cancel_all(self) -> None:
        """No job is left when this returns."""
        self.run("scancel", "--user", "root")
        deadline = time.monotonic() + 2 * DEADLINE_S
        while self.run("squeue", "-h").strip():
            assert time.monotonic() < deadline, self.run("squeue")
            time.sleep(0.1)


@contextmanager
def cluster(folder: Path, kill_wait_s: int = 20) -> Iterator[Cluster]:
    """Both nodes are idle when the block begins."""
    for name in ("state", "spool-node1", "spool-node2", "unshared"):
        (folder / name).mkdir(parents=True)
    port1, port2, controller_port = _free_ports(3)
    names = {"folder": folder, "host": socket.gethostname(), "kill_wait_s": kill_wait_s}
    conf = _CONF.format(**names, port1=port1, port2=port2, controller_port=controller_port)
    (folder / "slurm.conf").write_text(conf)
    (folder / "gres.conf").write_text(_GRES)
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    env = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": os.environ.get("PATH", "") + ":/usr/sbin"}
    here = Cluster(folder, env, folder / "unshared")
    started: list[subprocess.Popen[bytes]] = []
    try:
        started += [_start(command, here) for command in _daemons(folder)]
        _wait_until_idle(here, started)
        try:
            yield here
        finally:
            here.cancel_all()
    finally:
        for process in reversed(started):
            _end(process)


def _daemons(folder: Path) -> list[list[str]]:
    munge = ["--key-file", "munge.key", "--socket", "munge.sock", "--pid-file", "munged.pid", "--seed-file", "seed"]
    private = f"mount -t tmpfs -o size=1m none {folder}/unshared && exec slurmd -D -N node2"
    return [
        ["munged", "--foreground", "--force", *(str(folder / w) if "." in w or w == "seed" else w for w in munge)],
        ["slurmctld", "-D", "-c"],
        ["slurmd", "-D", "-N", "node1"],
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", private],
    ]


def _start(command: list[str], here: Cluster) -> subprocess.Popen[bytes]:
    with (here.folder / "daemons.log").open("ab") as log:
        process = subprocess.Popen(
            command,
            env=os.environ | here.env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=here.folder,
            start_new_session=True,
        )
    if command[0] == "munged":
        _until(lambda: (here.folder / "munge.sock").exists(), "munged did not start")
    return process


def _wait_until_idle(here: Cluster, started: list[subprocess.Popen[bytes]]) -> None:
    def is_idle() -> bool:
        assert all(process.poll() is None for process in started), (here.folder / "daemons.log").read_text()
        command = ["sinfo", "-h", "-o", "%T %D"]
        env = os.environ | here.env
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
        return done.stdout.strip() == "idle 2"

    _until(is_idle, "the nodes did not become idle")


def _until(is_so: object, problem: str) -> None:
    assert callable(is_so)
    deadline = time.monotonic() + DEADLINE_S
    while not is_so():
        assert time.monotonic() < deadline, problem
        time.sleep(0.05)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=10)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # its own session: nothing else is in the group
    process.wait(timeout=10)


def _free_ports(num: int) -> list[int]:
    sockets = [socket.socket() for _ in range(num)]
    for opened in sockets:
        opened.bind(("127.0.0.1", 0))
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports
