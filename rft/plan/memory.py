"""Memory of one trainer, in bytes: what trainers/ allocates, part by part.

Follows the code and not a rule of thumb: which tensors a layer keeps for its backward pass (transformers' Llama-like
layers with trainers/attention.py), the chunked head (trainers/head.py), masters (full.py), shards (sharding.py).
scripts/bench_plan holds it to measured peaks.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from rft.plan.setup import Setup
from rft.plan.shape import Layer

Launch = Literal["single", "ddp", "deepspeed", "fsdp2"]  # files of configs/accelerate

_CHUNK_BYTES = 64 * 2**20  # trainers/head.py
_CHUNKS_HELD = 4  # of it at once: log-probabilities and probabilities of a chunk, logits and more of the next one
_BUCKET = 500_000_000  # numbers: DeepSpeed's reduce_bucket_size
_ADAM_BYTES = {"adamw": 8, "adamw_8bit": 2, "paged_adamw_8bit": 2}  # two moments of a float32 parameter
_CONTEXT_GIB = 0.6  # CUDA context, kernels and cuBLAS workspaces of a process
_NCCL_GIB = 0.8  # its buffers, where there are several processes
_FRAGMENTATION = 0.08  # of what comes and goes: blocks that the caching allocator cannot join


@dataclass(frozen=True, slots=True)
class TrainerMemory:
    """Bytes on the fullest GPU at the fullest moment."""

    weights: float
    merged: float  # adapters: the weights that are computed with, beside the frozen ones
    reference: float
    gradients: float
    optimizer: float  # masters included
    gathered: float  # shards put together for the layers that compute
    activations: float  # kept for the backward pass, of one micro-batch
    temporaries: float  # the head's chunks, or a layer's backward pass, whichever is more
    reserve: float  # what the process and the allocator need beside tensors

    @property
    def total(self) -> float:
        return float(sum(getattr(self, field.name) for field in fields(self)))

    @property
    def state(self) -> float:
        """What does not depend on the tokens of a micro-batch."""
        return self.total - self.activations - self.temporaries


def trainer_memory(
    setup: Setup, launch: Launch, num_ranks: int, *, is_gpu: bool = True, num_predictors: int | None = None
) -> TrainerMemory:
    """The memory of one rank of `num_ranks`, with rows as long as the budget lets them be.

    num_predictors: the positions of a row that are sampled from; None: all of them, the most there can be.
    """
    shape, size = setup.shape, setup.value_bytes
    shards = num_ranks if launch == "fsdp2" else 1
    tokens = setup.row_tokens
    activations = kept(setup, tokens, is_gpu=is_gpu)
    head = _head(setup, num_predictors or tokens)
    temporaries = max(head, _layer_backward(setup, tokens) + _tied_gradient(setup, shards))
    masters, gradients, optimizer = _trained(setup, launch, num_ranks)
    stored = 4 if _is_stored_as_master(setup, shards) else size
    merged = shape.in_linears * size if setup.is_merged and shards == 1 else 0
    reserve = 0.0
    if is_gpu:
        process_gib = _CONTEXT_GIB + (_NCCL_GIB if num_ranks > 1 else 0.0)
        reserve = process_gib * 2**30 + _FRAGMENTATION * (activations + temporaries)
    return TrainerMemory(
        weights=shape.parameters * stored / shards + (4 * setup.trained if setup.lora is not None else 0),
        merged=merged,
        reference=shape.parameters * size / shards if setup.has_reference else 0,
        gradients=gradients,
        optimizer=masters + optimizer,
        gathered=_gathered(setup) if shards > 1 else 0,
        activations=activations,
        temporaries=temporaries,
        reserve=reserve,
    )


def _is_stored_as_master(setup: Setup, shards: int) -> bool:
    """A shard is its own float32 master (scorer.py)."""
    return shards > 1 and setup.lora is None and setup.has_float_masters


def _trained(setup: Setup, launch: Launch, num_ranks: int) -> tuple[float, float, float]:
    """Masters, gradients and moments: 4 + 4 + 8 bytes a number, less where it steps or keeps less."""
    count = setup.trained
    has_small = setup.lora is None and not setup.has_float_masters and setup.value_bytes == 2
    grad_bytes = 2 if has_small else 4  # full.py adds up in float32 where there are masters
    moments = _ADAM_BYTES[setup.optimizer] * (0.5 if has_small and setup.optimizer == "adamw" else 1)
    needs_masters = setup.lora is None and setup.has_float_masters and setup.value_bytes == 2 and launch != "fsdp2"
    masters = 4 * count if needs_masters else 0
    if launch == "fsdp2" and setup.lora is None:  # adapters stay whole on every rank
        return 0.0, grad_bytes * count / num_ranks, moments * count / num_ranks
    if launch == "deepspeed":  # a float32 copy is spread with the moments; gradients pass through a bucket
        bucket = 4 * min(_BUCKET, count)
        return 4 * count / num_ranks, 4 * count / num_ranks + bucket, 8 * count / num_ranks
    return masters, grad_bytes * count, moments * count


def _tied_gradient(setup: Setup, shards: int) -> float:
    """The head's gradient waits, in the head's dtype, for that of the embedding that it is tied to."""
    if setup.lora is not None or not setup.shape.is_tied or shards > 1:
        return 0.0
    return setup.shape.embedding * setup.value_bytes


def _gathered(setup: Setup) -> float:
    """FSDP2: embedding, head and the layer that computes with the one fetched ahead, and a layer's whole gradient."""
    shape, size = setup.shape, setup.value_bytes
    root = shape.embedding * (1 if shape.is_tied else 2)
    weights = (root + 2 * shape.largest_layer) * size
    gradients = (root + shape.largest_layer) * (size + 4) if setup.lora is None else 0  # reduced in float32
    return weights + gradients


# --- activations -----------------------------------------------------------------------------------------------------


def kept(setup: Setup, tokens: int, *, is_gpu: bool = True) -> float:
    """Bytes that a row of `tokens` keeps for the backward pass."""
    shape, size = setup.shape, setup.value_bytes
    layers = [(tokens * _kept_per_token(setup, layer, is_gpu=is_gpu), count) for layer, count in shape.layers]
    if setup.has_checkpointing:  # the input of every layer, and one layer in full
        body = shape.num_layers * tokens * shape.hidden * size + max(part for part, _ in layers)
    else:
        body = sum(count * part for part, count in layers)
    head_dim = shape.layers[0][0].query // shape.num_heads
    rotary = 2 * head_dim * size  # cosines and sines, for all layers
    last = shape.hidden * (4 + (size if size == 2 else 0) + size + 4)  # final norm, its rows, the head's [P, h]
    return body + tokens * (rotary + last)


def _kept_per_token(setup: Setup, layer: Layer, *, is_gpu: bool) -> float:
    hidden, size = setup.shape.hidden, setup.value_bytes
    is_full = setup.lora is None
    # a norm keeps its input in float32, what a trained weight multiplies, and its output, a linear layer's input
    norms = (layer.num_norms * hidden + layer.normed) * (4 + size * is_full) + 2 * hidden * size
    attention = (layer.query + layer.key + layer.value + layer.output) * size
    if is_gpu:
        attention += layer.output * size + 4 * setup.shape.num_heads  # a contiguous copy; log-sum-exp of FlexAttention
    # gate, activated gate, up, product; without a gate before and after the activation
    mlp = (4 if setup.shape.is_gated else 2) * layer.inner * size
    routes = 2 * layer.num_routes * hidden * size  # each expert's input and output
    low = 0
    if setup.lora is not None and not setup.is_merged:  # A x of every adapter
        low = setup.lora.rank * size * sum(linear.num_active for linear in layer.linears)
    return norms + attention + mlp + routes + low


def _head(setup: Setup, num_predictors: int) -> float:
    """While the head computes: chunks of [rows, V] in float32, a copy in the head's dtype, a few [N, h] in float32."""
    shape, size = setup.shape, setup.value_bytes
    rows = min(num_predictors, max(1, _CHUNK_BYTES // (4 * shape.vocabulary)))
    chunk = rows * 4 * shape.vocabulary
    held = _CHUNKS_HELD if num_predictors > rows else _CHUNKS_HELD - 1
    copies = chunk * (size / 4) if size == 2 else 0
    weight = 4 * shape.embedding if setup.lora is None else 0  # the sum of a trained head's gradient
    return held * chunk + copies + weight + 3 * 4 * num_predictors * shape.hidden


def _layer_backward(setup: Setup, tokens: int) -> float:
    """While the last layer goes back: gradients of its MLP's three wide activations, and of its input."""
    layer = max((layer for layer, _ in setup.shape.layers), key=lambda one: one.inner)
    return tokens * setup.value_bytes * (3 * layer.inner + 2 * setup.shape.hidden)
