"""Figures that others publish, side by side with what the planner says of the same: `python tests/published.py`.

A row's `plan` is the planner's own function at their shape. Memory is fitted to none of them; where they allocate what
rft does not (whole [T, V] logits) the row says so, and its bound is wider. Training speed is no independent proof: the
efficiencies of A100 and H100 in hardware.py come from the same page of torchtitan's. A source is where the figure was
read, which for two of them is somebody's copy of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from rft.plan.engine import cache_bytes, engine_memory
from rft.plan.hardware import GPUS, Cluster
from rft.plan.memory import trainer_memory
from rft.plan.setup import Lora, Setup, Workload
from rft.plan.shape import ModelShape, shape_of
from rft.plan.speed import sampling_speed, training_speed

GIB = 2**30
LLAMA_8B: dict[str, Any] = {  # Llama 3, 3.1
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 32,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
LLAMA_70B = LLAMA_8B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
}
LLAMA2_7B = LLAMA_8B | {"intermediate_size": 11008, "num_key_value_heads": 32, "vocab_size": 32000}


def a_setup(tree: dict[str, Any] | ModelShape, **changes: Any) -> Setup:
    """LoRA of rank 16 in bfloat16 on the model, with small rollouts, changed by name."""
    shape = tree if isinstance(tree, ModelShape) else shape_of(tree, name="model")
    setup = Setup(
        shape=shape,
        value_bytes=2,
        lora=Lora(16, None),
        sync="auto",
        has_float_masters=True,
        optimizer="adamw",
        has_checkpointing=False,
        has_reference=False,
        has_frozen=False,
        max_tokens=4096,
        max_tokens_per_turn=256,
        max_model_len=2048,
        max_concurrent=64,
        gpu_memory_share=0.45,
        engine_args=(),
        staleness=0,
        work=Workload(items=8, rollouts_per_item=8, prompt=300, sampled=256, results=0),
    )
    return replace(setup, **changes)


@dataclass(frozen=True, slots=True)
class Figure:
    what: str
    source: str
    published: float
    unit: str
    bound: float  # of plan / published - 1, either way
    plan: Callable[[], float]


def _pretraining(tree: dict[str, Any], tokens: int, gpus: Cluster, *, has_checkpointing: bool) -> float:
    """Tokens per second of each GPU: sequences of `tokens`, all of them predicted."""
    work = Workload(items=gpus.num_gpus, rollouts_per_item=1, prompt=1, sampled=tokens, results=0)
    setup = a_setup(tree, lora=None, has_checkpointing=has_checkpointing, max_tokens=tokens, work=work)
    return training_speed(setup, "fsdp2", gpus.num_gpus, gpus).tokens_per_s / gpus.num_gpus


def _long_lora() -> float:
    setup = a_setup(LLAMA2_7B, lora=Lora(8, ("q_proj",)), has_checkpointing=True, max_tokens=8192)
    logits = 8192 * 32000 * (2 + 3 * 4)  # bfloat16, float32, its log-softmax and its gradient: rft's head is chunked
    return (trainer_memory(setup, "ddp", 8).total + logits) / GIB


def _requests_per_s() -> float:
    gpu, work = GPUS["A10G"], Workload(items=1000, rollouts_per_item=1, prompt=256, sampled=128, results=0)
    setup = a_setup(LLAMA2_7B, lora=None, max_model_len=4096, max_concurrent=256, work=work)
    return 1000 / sampling_speed(setup, engine_memory(setup, gpu, 0.9), 1, gpu).seconds


FIGURES = (
    Figure(
        "vLLM: weights of Llama 3.1 8B",
        "https://github.com/vllm-project/vllm/issues/10517",
        14.9888,
        "GiB",
        0.01,
        lambda: engine_memory(a_setup(LLAMA_8B), GPUS["H100"], 0.9).weights / GIB,
    ),
    Figure(
        "vLLM: tokens in 3.81 GiB of KV cache, Llama 3.1 8B",
        "https://github.com/vllm-project/vllm/issues/10517",
        1952 * 16,
        "tokens",
        0.01,
        lambda: 3.81 * GIB / cache_bytes(a_setup(LLAMA_8B)),
    ),
    Figure(
        "Unsloth: KV cache of 20K tokens, Llama 3.1 8B",
        "https://newreleases.io/project/github/unslothai/unsloth/release/2025-02-v2",
        2.5,
        "GiB",
        0.05,
        lambda: 20_000 * cache_bytes(a_setup(LLAMA_8B)) / GIB,
    ),
    Figure(
        "LongLoRA, table 12: plain LoRA of Llama 2 7B, 8,192 tokens, with the logits of theirs",
        "https://huggingface.co/datasets/odyn-network/benchmark-finetune-lora-v1 (of arXiv:2309.12307)",
        25.7,
        "GiB",
        0.2,
        _long_lora,
    ),
    Figure(
        "torchtitan: Llama 3 8B, 64 A100, selective recomputation",
        "https://github.com/pytorch/torchtitan/blob/main/docs/performance.md",
        2904,
        "tokens/s/GPU",
        0.25,
        lambda: _pretraining(LLAMA_8B, 8192, Cluster(GPUS["A100-80"], 64, 8), has_checkpointing=False),
    ),
    Figure(
        "torchtitan: Llama 3 70B, 64 A100, full recomputation",
        "https://github.com/pytorch/torchtitan/blob/main/docs/performance.md",
        331,
        "tokens/s/GPU",
        0.25,
        lambda: _pretraining(LLAMA_70B, 8192, Cluster(GPUS["A100-80"], 64, 8), has_checkpointing=True),
    ),
    Figure(
        "torchtitan: Llama 3.1 8B, 8 H100 of 500 W, selective recomputation",
        "https://github.com/pytorch/torchtitan/blob/main/docs/performance.md",
        5762,
        "tokens/s/GPU",
        0.25,
        lambda: _pretraining(LLAMA_8B, 8192, Cluster(GPUS["H100"], 8, 8), has_checkpointing=False),
    ),
    Figure(
        "vLLM 0.2.0: Llama 2 7B on an A10G, 1,000 prompts of 256 tokens, 128 sampled",
        "https://github.com/neuralmagic/nm-vllm/commit/c13b5c2db94204380ae246d968d6ace23eb6fcb4",
        3.80,
        "requests/s",
        0.25,
        _requests_per_s,
    ),
)


def main() -> None:
    for figure in FIGURES:
        found = figure.plan()
        ratio = f"{found / figure.published:.2f}"
        print(f"{figure.what}: {figure.published:,g} {figure.unit}, plan {found:,.4g} ({ratio})  {figure.source}")


if __name__ == "__main__":
    main()
