"""Two ranks of one training, as processes of their own: replicated and sharded, adapters and whole models.

`run_cases` is what a test calls; run as a script this file is one rank.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
CASES = ["replicated lora", "replicated full", "sharded lora", "sharded full", "sharded full bfloat16"]
NUM_STEPS = 2


@dataclass
class Result:
    """What rank 0 knows in the end."""

    weights: dict[str, torch.Tensor]  # as an engine loads them
    optimizer: dict[int, dict[str, torch.Tensor]]
    losses: list[float]
    norms: list[float]
    scores: list[float]
    gap: float
    num_local: int  # numbers of trained weights that rank 0 holds itself


def run_cases(model: Path, folder: Path, num_ranks: int = 2, timeout_s: float = 240) -> dict[str, Result]:
    """Train every case on `num_ranks` gloo ranks of one thread each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "ACCELERATE_USE_CPU": "true",
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "OMP_NUM_THREADS": "1",
        "FSDP_VERSION": "2",
    }
    command = [sys.executable, __file__, str(model), str(folder)]
    ranks = [
        subprocess.Popen(
            command,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(num_ranks)
    ]
    try:
        for process in ranks:
            _, errors = process.communicate(timeout=timeout_s)
            assert process.returncode == 0, errors[-4000:]
    finally:
        for process in ranks:
            process.kill()
    return {case: Result(**torch.load(folder / f"{case}.pt", weights_only=True)) for case in CASES}


def train_case(case: str, model: Path, folder: Path) -> Result | None:
    """One case on this rank; a result on rank 0. With one rank "replicated" and "sharded" are the same."""
    from test_batch import random_group, values

    from rft.config import LoraConfig, ModelConfig, TrainingConfig
    from rft.trainers import checkpoint
    from rft.trainers.batch import build_micro_batches, count_tokens, split_over_ranks
    from rft.trainers.policy import Policy
    from rft.trainers.ranks import build_accelerator

    os.environ["ACCELERATE_USE_FSDP"] = str(case.startswith("sharded")).lower()
    dtype: Any = "bfloat16" if "bfloat16" in case else "float32"
    config = ModelConfig(path=model, dtype=dtype, lora=LoraConfig(rank=4) if "lora" in case else None)
    # not AdamW's first steps of full size: they divide gradients of rounding noise by themselves
    training = TrainingConfig(steps=10, learning_rate=1e-3, warmup_steps=9, sync="auto")
    policy = Policy(config, training, 0.8, build_accelerator(seed=0), seed=0)
    if not policy.ranks.leads:
        policy.ranks.follow(policy)
        return None
    groups = [random_group(seed) for seed in range(3)]
    with policy.ranks.leading():
        batches = build_micro_batches(groups, values(groups), 10_000, "packed")
        stats = []
        for step in range(NUM_STEPS):
            stats.append(policy.update(split_over_ranks(batches, policy.ranks.num), count_tokens(batches)))
            if step == 0:
                saved = checkpoint.save(folder / case, 1, policy, {})
                policy.update(split_over_ranks(batches, policy.ranks.num), count_tokens(batches))  # forgotten again
                checkpoint.load(saved, policy)
        return Result(
            weights={name: tensor.clone() for name, tensor in policy.full_state_dict().items()},
            optimizer=policy.training_state()["optimizer"]["state"],
            losses=[each.loss for each in stats],
            norms=[each.grad_norm for each in stats],
            scores=policy.score(list(range(3, 30)), 5),
            gap=policy.check_packed(groups[0]),
            num_local=sum(_local(parameter).numel() for parameter in policy.weights.model.parameters()),
        )


def _local(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in CASES:
        found = train_case(name, Path(sys.argv[1]), Path(sys.argv[2]))
        if found is not None:
            torch.save(vars(found), Path(sys.argv[2]) / f"{name}.pt")
    torch.distributed.destroy_process_group()
