"""What is asked of Slurm, and which node of it does what. Knows nothing of how it is asked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from pydantic import Field, ValidationError, model_validator

from rft.config import Config, config_problem
from rft.errors import ConfigError

_OURS = {
    *("nodes", "ntasks", "ntasks-per-node", "gpus-per-node", "time", "partition", "account", "signal", "requeue"),
    *("no-requeue", "output", "error", "array", "open-mode", "chdir", "export", "wrap"),
}


class Allocation(Config):
    """Nodes 0 to `num_trainers` - 1 train; the others run vLLM servers."""

    nodes: int = Field(1, ge=1)
    engine_nodes: int = Field(0, ge=0, description="the last ones; 0: the run launches its engine as `rft train` does")
    gpus_per_node: int = Field(0, ge=0, description="0: on CPUs")
    gpus_per_engine: int = Field(1, ge=1, description="tensor parallelism of each server on the engine nodes")
    time: str | None = Field(None, description="the time limit in Slurm's form, e.g. 2:00:00; null: the partition's")
    partition: str | None = None
    account: str | None = None
    slurm: dict[str, str] = Field(default_factory=dict, description="further options of sbatch, by their long names")
    port: int = Field(0, ge=0, le=65000, description="the first of those used on every node; 0: any free ones")
    notice_s: int = Field(120, ge=10, description="before the time limit, for saving")
    launch_config: Path | None = Field(None, description="a file of configs/accelerate/; null: replicated ranks")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.engine_nodes >= self.nodes:
            raise ValueError(
                f"engine_nodes is {self.engine_nodes} of {self.nodes} nodes; leave at least one that trains"
            )
        if self.engine_nodes and self.gpus_per_node % self.gpus_per_engine:
            raise ValueError(f"gpus_per_engine is {self.gpus_per_engine}: {self.gpus_per_node} GPUs cannot be so split")
        if self.time is not None and (limit_s := time_limit_s(self.time)) <= 2 * self.notice_s:
            raise ValueError(
                f"time is {limit_s:.0f} s and notice_s {self.notice_s}: nothing is left to train in; raise the one or "
                "lower the other"
            )
        if self.launch_config is not None and not self.launch_config.is_file():
            raise ValueError(f"launch_config {self.launch_config} is not there; take one of configs/accelerate/")
        return self

    @property
    def num_trainers(self) -> int:
        """Nodes that train."""
        return self.nodes - self.engine_nodes

    @property
    def num_ranks(self) -> int:
        """Processes that train: one per GPU, on CPUs one per node."""
        return self.num_trainers * max(1, self.gpus_per_node)

    @property
    def engines_per_node(self) -> int:
        return max(1, self.gpus_per_node // self.gpus_per_engine)

    def is_engine(self, node: int) -> bool:
        return node >= self.num_trainers


def time_limit_s(text: str) -> float:
    """Seconds of a limit in Slurm's form: minutes, M:S, H:M:S, D-H, D-H:M or D-H:M:S. Raises ValueError."""
    if text.upper() in ("UNLIMITED", "INFINITE"):
        return math.inf
    days, dash, rest = text.rpartition("-")
    parts = rest.split(":")
    if not all(part.isascii() and part.isdigit() for part in (*parts, *([days] if dash else []))) or len(parts) > 3:
        raise ValueError(f"time is {text!r}; Slurm's forms are 90, 90:00, 1:30:00, 2-0, 2-12:00:00")
    units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
    return int(days or 0) * 86400 + sum(int(part) * unit for part, unit in zip(parts, units, strict=False))


def parse_allocation(values: Mapping[str, object]) -> Allocation:
    """Raises ConfigError naming the option. Values that are None are left out."""
    try:
        return Allocation.model_validate({key: value for key, value in values.items() if value is not None})
    except ValidationError as error:
        cure = "see `rft submit --help`"
        raise ConfigError(config_problem(error).removeprefix("config: "), where="rft submit", cure=cure) from None


def parse_options(options: list[str]) -> dict[str, str]:
    """`key=value` or `key` as options of sbatch. Raises ConfigError for those that rft sets itself."""
    found = {}
    for option in options:
        key, _, value = option.removeprefix("--").partition("=")
        name = key.replace("_", "-")
        if not name or name in _OURS:
            cure = "it has an option of its own, or rft needs it as it is; see `rft submit --help`"
            raise ConfigError(f"{name or 'an empty option'} cannot be given here", where=f"--slurm {option}", cure=cure)
        found[name] = value
    return found
