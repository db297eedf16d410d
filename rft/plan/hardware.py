"""GPUs by name: what they hold, compute and move; and the clusters that `--gpus` names.

Figures are peaks of the makers' data sheets, dense (without sparsity), bfloat16 with float32 sums. Memory is about what
a process can allocate, GiB, a little below the name's GB. None of them is measured here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from rft.errors import UserError

_NETWORK_GBS = 50.0  # per GPU between nodes: one 400 Gb/s port for each, as in DGX H100
_GPUS_PER_NODE = 8
_FLOAT32_EFFICIENCY = 0.7  # no tensor cores: easier to keep busy


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU. link_gbs: to the other GPUs of its node, one direction."""

    name: str
    memory_gib: float
    tflops: float  # bfloat16
    tflops_float32: float  # as torch multiplies float32 by default: not in TF32
    bandwidth_gbs: float
    link_gbs: float
    efficiency: float  # the share of tflops that matrix products of a whole training step reach

    def flops(self, value_bytes: int) -> float:
        """FLOP/s that a training step's matrix products reach."""
        if value_bytes == 4:
            return 1e12 * self.tflops_float32 * _FLOAT32_EFFICIENCY
        return 1e12 * self.tflops * self.efficiency


# Sources: the data sheets nvidia.com/en-us/data-center/a100 (312 TFLOPS; 1,555 and 2,039 GB/s; NVLink 600 GB/s both
# ways), /h100 (989; 3,350; 900), /h200 (989; 4,800; 900), /l40s (362; 864; PCIe 4), /l4 (121; 300; PCIe 4), /hgx for
# B200 (2,250; 7,700; 1,800), the Ada GPU architecture whitepaper for the RTX 4090 (165 with float32 sums; 1,008; PCIe
# 4), aws.amazon.com/ec2/instance-types/g5 for the A10G (70; 600). Memory: the cards' totals less what drivers keep.
# Efficiency: torchtitan trains Llama 3 8B at 57% of an A100's peak and at 33 to 39% of an H100's, with all kernels
# (github.com/pytorch/torchtitan/blob/main/docs/performance.md, of 2024 and 2025); the others by their likeness.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100-40", 39.4, 312, 19.5, 1_555, 300, 0.6),
        Gpu("A100-80", 79.1, 312, 19.5, 2_039, 300, 0.6),
        Gpu("H100", 79.1, 989, 67, 3_350, 450, 0.4),
        Gpu("H200", 139.8, 989, 67, 4_800, 450, 0.4),
        Gpu("B200", 178.0, 2_250, 75, 7_700, 900, 0.4),
        Gpu("L40S", 44.4, 362, 91.6, 864, 32, 0.5),
        Gpu("RTX4090", 23.5, 165, 82.6, 1_008, 32, 0.6),
        Gpu("A10G", 22.1, 70, 35, 600, 32, 0.6),
        Gpu("L4", 22.0, 121, 30.3, 300, 32, 0.5),
    )
}
_BY_SIZE = {24: "RTX4090", 40: "A100-40", 48: "L40S", 80: "H100", 141: "H200"}  # `8x80`: the usual one of that size


@dataclass(frozen=True, slots=True)
class Cluster:
    gpu: Gpu
    num_gpus: int
    gpus_per_node: int

    def link_gbs(self, num_gpus: int) -> float:
        """Of each of `num_gpus` that exchange weights or gradients: the slowest link on their ring."""
        return self.gpu.link_gbs if num_gpus <= self.gpus_per_node else min(self.gpu.link_gbs, _NETWORK_GBS)

    def __str__(self) -> str:
        nodes, rest = divmod(self.num_gpus, self.gpus_per_node)
        count = f"{nodes}x{self.gpus_per_node}" if nodes > 1 and not rest else f"{self.num_gpus}"
        return f"{count}x{self.gpu.name}"


def parse_cluster(text: str) -> Cluster:
    """`8x80` (GPUs x GB), `8xH100`, `H100`, `2x8xH100` (nodes x GPUs x kind). Raises UserError with what there is."""
    found = re.fullmatch(r"(?:(?:(\d{1,4})x)?(\d{1,4})x)?([A-Za-z0-9-]+)", text.strip(), re.ASCII)
    name = found.group(3) if found else ""
    if name.isdigit():
        name = _BY_SIZE.get(int(name), name)
    gpu = next((gpu for key, gpu in GPUS.items() if key.lower() == name.lower()), None)
    nodes, each = (int(found.group(index) or 1) for index in (1, 2)) if found else (0, 0)
    if gpu is None or nodes < 1 or each < 1:
        sizes = ", ".join(map(str, _BY_SIZE))
        cure = f"write 8xH100, 2x8xH100 or 8x80; kinds: {', '.join(GPUS)}; sizes in GB: {sizes}"
        raise UserError(f"{text[:40]!r} names no GPUs the planner knows", where="--gpus", cure=cure)
    if nodes == 1:
        return Cluster(gpu, each, _GPUS_PER_NODE)
    return Cluster(gpu, nodes * each, each)
