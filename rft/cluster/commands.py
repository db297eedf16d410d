"""The command lines of a submitted run: what a node that trains starts, and with which environment."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rft.cluster.allocation import Allocation

CONFIG, ENDING = "job_config.yaml", "ending.json"  # in the run folder, as the server's jobs have them
Kind = Literal["train", "warmup"]
_OUTAGE_S = 60  # a server that ends does not come back in this attempt; what is waited for is the network


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Where the ranks meet: node 0."""

    address: str
    port: int


def run_command(run: Path, kind: Kind, engine_urls: list[str]) -> list[str]:
    """What follows `python`: go on with the run, whether or not it has begun."""
    urls = [f"engine.url={json.dumps(engine_urls)}", f"engine.outage_limit_s={_OUTAGE_S}"] if engine_urls else []
    where = f"runs_dir={json.dumps(str(run.parent))}"
    return ["-m", "rft", kind, str(run / CONFIG), where, *urls, "--run-id", run.name, "--resume"]


def launch_command(allocation: Allocation, node: int, meeting: Rendezvous, run: list[str]) -> list[str]:
    """The command line on a node that trains; `run` is what each rank does.

    accelerate launch starts one process on a CPU whatever it is told, so there torch's own launcher does it.
    """
    if allocation.num_ranks == 1:
        return [sys.executable, *run]
    if not allocation.gpus_per_node:
        group: dict[str, int | str] = {"--nnodes": allocation.num_trainers, "--node_rank": node, "--nproc_per_node": 1}
        group |= {"--master_addr": meeting.address, "--master_port": meeting.port}
        return [sys.executable, "-m", "torch.distributed.run", *_flags(group), *run]
    machines: dict[str, int | str] = {
        "--num_machines": allocation.num_trainers,
        "--machine_rank": node,
        "--num_processes": allocation.num_ranks,
        "--main_process_ip": meeting.address,
        "--main_process_port": meeting.port,
    }
    plain = ["--multi_gpu", "--mixed_precision", "no", "--dynamo_backend", "no"]
    how = plain if allocation.launch_config is None else ["--config_file", str(allocation.launch_config)]
    return [sys.executable, "-m", "accelerate.commands.launch", *how, *_flags(machines), *run]


def launch_env(allocation: Allocation, run: Path, node: int) -> dict[str, str]:
    """What the environment of a node that trains adds to the task's."""
    env = {"HF_HUB_OFFLINE": "1"}
    if node == 0:
        env["RFT_ENDING"] = str(run / ENDING)
    if allocation.num_ranks > 1 and not allocation.gpus_per_node:
        env["ACCELERATE_USE_CPU"] = "true"
    return env


def engine_gpus(allocation: Allocation, index: int, visible: list[str] | None) -> str | None:
    """CUDA_VISIBLE_DEVICES of server `index` of a node; None on CPUs."""
    if not allocation.gpus_per_node:
        return None
    names = visible if visible is not None else [str(number) for number in range(allocation.gpus_per_node)]
    size = allocation.gpus_per_engine
    return ",".join(names[index * size : (index + 1) * size])


def _flags(values: dict[str, int | str]) -> list[str]:
    return [str(word) for pair in values.items() for word in pair]
