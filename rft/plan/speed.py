"""Seconds of a step, from a roofline: arithmetic over FLOP/s, bytes over bandwidth, and which of them is the limit.

Sampling: every decoding step reads the weights and the cache of all its sequences. Training: matrix products, the
elementwise kernels between them, the optimizer's pass over its state, and what FSDP gathers while it computes.
Nothing here waits for tools or graders.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rft.plan.engine import EngineMemory, cache_bytes
from rft.plan.hardware import Cluster, Gpu
from rft.plan.memory import Launch
from rft.plan.setup import Setup
from rft.plan.shape import Layer

Limit = Literal["compute", "bandwidth", "link", "KV memory", "rollouts"]

_BANDWIDTH_EFFICIENCY = 0.75  # of the peak that kernels over large tensors reach
_PREFILL_EFFICIENCY = 1.2  # of a training step's: no backward pass between its matrix products
_DECODE_OVERHEAD_S = 1.5e-3  # scheduling and sampling of one decoding step
_OPTIMIZER_BYTES = 40  # a number: clipping, AdamW over weight, gradient and two moments, masters copied
_HEAD_TRIPS = {
    True: 8,
    False: 4,
}  # of V x h FLOPs a position; a trained one computes its chunks twice (head.py)


@dataclass(frozen=True, slots=True)
class Work:
    """What a rank does in one step."""

    flops: float
    elementwise_bytes: float
    optimizer_bytes: float

    def seconds(self, flops: float, bytes_per_s: float) -> float:
        """At `flops` FLOP/s and `bytes_per_s`, one after the other."""
        return self.flops / flops + (self.elementwise_bytes + self.optimizer_bytes) / bytes_per_s


@dataclass(frozen=True, slots=True)
class TrainingSpeed:
    seconds: float  # of a step's update
    tokens_per_s: float  # computed ones, all GPUs
    limit: Limit


@dataclass(frozen=True, slots=True)
class SamplingSpeed:
    seconds: float  # of a step's rollouts, without tools
    tokens_per_s: float  # sampled ones, all engines
    concurrency: int  # of one engine
    limit: Limit


def update_work(setup: Setup, row_tokens: float, num_predictors: float, context: float) -> Work:
    """One update over `row_tokens` computed tokens, of which `num_predictors` are sampled from; context: mean length
    of what a token attends to.
    """
    shape = setup.shape
    forward = 2 * shape.active + sum(count * _attention(layer, context) for layer, count in shape.layers)
    adapters = 0 if setup.lora is None else 4 * _active_adapters(setup)
    gradients = (2 if setup.lora is None else 1) * 2 * shape.active
    scores = sum(count * 2.5 * _attention(layer, context) for layer, count in shape.layers)
    again = 1 if setup.has_checkpointing else 0
    per_token = (1 + again) * forward + gradients + scores + adapters
    head = _HEAD_TRIPS[setup.lora is None] * shape.embedding
    reference = (forward * row_tokens + 2 * shape.embedding * num_predictors) if setup.has_reference else 0
    moved = sum(count * _elementwise(setup, layer) for layer, count in shape.layers)
    merging = 3 * 4 * shape.in_linears if setup.is_merged else 0
    return Work(
        flops=per_token * row_tokens + head * num_predictors + reference,
        elementwise_bytes=(3 + again) * moved * row_tokens,  # going back reads and writes twice as much
        optimizer_bytes=_OPTIMIZER_BYTES * setup.trained + merging,
    )


def _attention(layer: Layer, context: float) -> float:
    """FLOPs of a token's scores and of the weighted sum of values."""
    return 2 * context * (layer.query + layer.output)


def _active_adapters(setup: Setup) -> float:
    assert setup.lora is not None
    share = setup.trained / max(1, setup.shape.adapters(setup.lora.rank, None))
    rank = setup.lora.rank
    met = sum(
        count * rank * linear.num_active * (linear.inputs + linear.outputs)
        for layer, count in setup.shape.layers
        for linear in layer.linears
    )
    return share * met


def _elementwise(setup: Setup, layer: Layer) -> float:
    """Bytes of one token going forward: norms, residuals, rotary positions, activation and product."""
    hidden, size = setup.shape.hidden, setup.value_bytes
    norms = 7 * layer.num_norms * hidden * 4
    return norms + size * (6 * hidden + 8 * (layer.query + layer.key) + 5 * layer.inner)


def training_speed(setup: Setup, launch: Launch, num_ranks: int, cluster: Cluster) -> TrainingSpeed:
    """The update of one step, dealt to `num_ranks`."""
    work, gpu = setup.work, cluster.gpu
    share = 1 / num_ranks
    rank = update_work(setup, work.row_tokens * share, work.num_sampled * share, work.context / 2)
    stepped = rank.optimizer_bytes * (share if launch in ("fsdp2", "deepspeed") else 1)
    bandwidth = 1e9 * gpu.bandwidth_gbs * _BANDWIDTH_EFFICIENCY
    compute_s = rank.flops / gpu.flops(setup.value_bytes)
    moving_s = rank.elementwise_bytes / bandwidth
    link_s = _link_seconds(setup, launch, num_ranks, cluster)
    seconds = max(compute_s + moving_s, link_s) + stepped / bandwidth
    limit: Limit = "compute" if compute_s >= moving_s + stepped / bandwidth else "bandwidth"
    return TrainingSpeed(seconds, work.row_tokens / seconds, "link" if link_s > compute_s + moving_s else limit)


def _link_seconds(setup: Setup, launch: Launch, num_ranks: int, cluster: Cluster) -> float:
    """What ranks tell each other: FSDP gathers all weights forward and backward of every micro-batch."""
    if num_ranks == 1:
        return 0.0
    rate = 1e9 * cluster.link_gbs(num_ranks) * _BANDWIDTH_EFFICIENCY
    gradients = 2 * 4 * setup.trained  # reduced and spread: twice around the ring
    if launch != "fsdp2":
        return gradients / rate
    rounds = -(-setup.work.row_tokens // (setup.max_tokens * num_ranks))
    reduced = 4 * setup.trained * rounds if setup.lora is None else gradients
    return (rounds * 2 * setup.shape.parameters * setup.value_bytes + reduced) / rate


def sampling_speed(setup: Setup, memory: EngineMemory, num_engines: int, gpu: Gpu) -> SamplingSpeed:
    """The rollouts of one step on engines that share them evenly; `memory` is of each."""
    work, ranks = setup.work, setup.tensor_parallel
    each = -(-work.rollouts // num_engines)
    batch = max(1, min(each, memory.concurrency))
    bandwidth = 1e9 * gpu.bandwidth_gbs * _BANDWIDTH_EFFICIENCY
    read = _weights_read(setup, batch) / ranks + batch * (work.context / 2 + work.prompt / 2) * cache_bytes(setup)
    products = 2 * (setup.shape.active + setup.shape.embedding) * batch / ranks
    flops = gpu.flops(setup.value_bytes) * _PREFILL_EFFICIENCY
    read_s, compute_s = read / bandwidth, products / flops
    decode_s = max(read_s, compute_s) + _DECODE_OVERHEAD_S
    read_tokens = work.items * work.prompt / num_engines + each * work.results  # prompts are cached for their item
    prefill_s = 2 * setup.shape.active * read_tokens / ranks / flops
    seconds = each / batch * work.sampled * decode_s + prefill_s
    limit: Limit = "compute" if compute_s > read_s else "bandwidth"
    if memory.concurrency < min(each, setup.max_concurrent):
        limit = "KV memory"
    elif each < setup.max_concurrent and limit == "bandwidth":
        limit = "rollouts"
    return SamplingSpeed(seconds, work.num_sampled / seconds, batch, limit)


def _weights_read(setup: Setup, batch: int) -> float:
    """Bytes of the weights that a batch meets: of a mixture, the experts that at least one of its tokens is sent to."""
    total = setup.shape.embedding * setup.value_bytes
    for layer, count in setup.shape.layers:
        for linear in layer.linears:
            missed = (1 - linear.num_active / linear.count) ** batch
            total += int(count * linear.size * (1 - missed)) * setup.value_bytes
    return total
