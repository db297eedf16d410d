"""What one vLLM engine holds: weights, its workspaces, and the KV cache that is left, which decides its concurrency.

vLLM takes `gpu_memory_share` of each GPU, and all of it that weights and workspaces leave becomes KV cache.
"""

from __future__ import annotations

from dataclasses import dataclass

from rft.plan.hardware import Gpu
from rft.plan.setup import Setup

OWN_GPU_SHARE = 0.9  # vLLM's default, of a GPU that it has for itself
_BATCHED_TOKENS = 8192  # computed at once: vLLM's default for a server on 70 GiB and more, 2,048 below
_SMALL_BATCHED_TOKENS = 2048
_FIXED_GIB = 1.0  # CUDA context, CUDA graphs
_LORA_SLOTS = 3  # rft/engines/vllm_server.py
_SAMPLER_COPIES = 3  # of [sequences, V] float32: logits, and log-probabilities for `processed_logprobs`


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """Bytes on each GPU of one engine; `cache` is negative where the rest does not fit."""

    weights: float
    adapters: float
    workspace: float
    cache: float
    cache_tokens: int  # of the whole engine
    max_full_length: float  # sequences of max_model_len that the cache holds
    concurrency: int  # sequences of the workload's length at once

    @property
    def total(self) -> float:
        return self.weights + self.adapters + self.workspace + max(0.0, self.cache)


def engine_memory(setup: Setup, gpu: Gpu, share: float) -> EngineMemory:
    """The memory of an engine of `setup.tensor_parallel` GPUs, of each of which it may take `share`."""
    shape, size, ranks = setup.shape, setup.value_bytes, setup.tensor_parallel
    weights = shape.parameters * size / ranks
    is_sent = setup.lora is not None and not setup.is_merged
    adapters = _LORA_SLOTS * setup.trained * size / ranks if is_sent else 0.0
    workspace = _workspace(setup, gpu)
    cache = gpu.memory_gib * 2**30 * share - weights - adapters - workspace
    tokens = max(0, int(cache // cache_bytes(setup)))
    concurrency = min(setup.max_concurrent, tokens // max(1, setup.work.context))
    return EngineMemory(weights, adapters, workspace, cache, tokens, tokens / setup.max_model_len, concurrency)


def cache_bytes(setup: Setup) -> float:
    """Of one token on one GPU. Heads are dealt to the GPUs, at least one each; a latent (MLA) is on all of them."""
    kept = setup.shape.cached * setup.value_bytes
    is_latent = any(layer.cached < layer.key + layer.value for layer, _ in setup.shape.layers)
    return kept if is_latent else kept / min(setup.tensor_parallel, setup.shape.num_kv_heads)


def fits(setup: Setup, memory: EngineMemory) -> bool:
    """vLLM starts only where one sequence of max_model_len has room."""
    return memory.cache > 0 and memory.cache_tokens >= setup.max_model_len


def _workspace(setup: Setup, gpu: Gpu) -> float:
    shape, size = setup.shape, setup.value_bytes
    tokens = _BATCHED_TOKENS if gpu.memory_gib >= 70 else _SMALL_BATCHED_TOKENS
    widest = max(3 * layer.inner // setup.tensor_parallel + 4 * shape.hidden for layer, _ in shape.layers)
    logits = _SAMPLER_COPIES * 4 * setup.max_concurrent * shape.vocabulary
    return _FIXED_GIB * 2**30 + tokens * widest * size + logits
