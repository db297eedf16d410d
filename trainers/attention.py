"""Attention over a token trie, for packed rows. Owns the two kernels' views of `MicroBatch.subtree_end`.

CPU: the trie is cut into chains (runs of tokens without a branch); each attends to its gathered ancestors with plain
matrix products, so that the work grows with what is attended to and not with T^2 (a third less time than torch's
fused CPU kernel on the same chains, whose backward pass is slow). CUDA: FlexAttention with the same relation as a
block mask; not measured on a GPU. Other models get the dense mask. All of them are exact.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rft.trainers.batch import MicroBatch

CHAINS = "rft_chains"  # the name of the CPU implementation in transformers' registry
_MAX_QUERIES = 256


@dataclass(frozen=True, slots=True)
class Chains:
    """A packed row cut into chains, in row order: chain i has `lengths[i]` queries and `num_keys[i]` keys."""

    lengths: list[int]
    num_keys: list[int]
    keys: Tensor  # [sum(num_keys)] int64 row positions: each chain's ancestors, then itself
    future: Tensor  # [L, L] float32, L the longest chain: -inf where the key (dim 1) comes after the query, else 0


def cut_chains(micro_batch: MicroBatch) -> Chains:
    """The chains of a packed row (B = 1): a token continues its predecessor's chain when it is its only child.

    Long chains are cut on: what comes after a piece need not be computed for it.
    """
    ends, depths = micro_batch.subtree_end[0], micro_batch.position_ids[0]
    starts_chain = torch.ones_like(ends, dtype=torch.bool)
    starts_chain[1:] = (depths[1:] != depths[:-1] + 1) | (ends[1:] != ends[:-1])
    borders = [*starts_chain.nonzero()[:, 0].tolist(), ends.numel()]
    pieces = [
        (start, min(start + _MAX_QUERIES, border))
        for first, border in itertools.pairwise(borders)
        for start in range(first, border, _MAX_QUERIES)
    ]
    keys = [torch.cat([(ends[:start] > start).nonzero()[:, 0], torch.arange(start, end)]) for start, end in pieces]
    lengths = [end - start for start, end in pieces]
    future = torch.full((max(lengths), max(lengths)), float("-inf")).triu(1)
    return Chains(lengths, [key.numel() for key in keys], torch.cat(keys), future)


def attention_inputs(model: PreTrainedModel, micro_batch: MicroBatch) -> dict[str, Any]:
    """The keyword arguments that make `model` attend as the micro-batch says."""
    if micro_batch.layout == "plain":
        return {}  # right-padded and causal: no token with a loss sees padding, and torch's causal kernel is fastest
    implementation = model.config._attn_implementation
    if implementation == CHAINS:
        # the dense mask only tells transformers to build none; the kernel does not read it
        placeholder = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=micro_batch.input_ids.device)
        return {"attention_mask": placeholder, "chains": cut_chains(micro_batch)}
    if implementation == "flex_attention":
        return {"attention_mask": block_mask(micro_batch)}
    if implementation == "sdpa":
        return {"attention_mask": micro_batch.attention_mask}
    dtype = next(model.parameters()).dtype
    lowest = torch.finfo(dtype).min  # eager attention adds its mask to the scores
    return {"attention_mask": torch.where(micro_batch.attention_mask, 0.0, lowest).to(dtype)}


def attention_window(model: PreTrainedModel) -> int | None:
    """The most tokens any layer may look back on, or None: a packed row does not know of windows."""
    config = model.config.get_text_config()
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min((window for window in windows if window is not None), default=None)


def block_mask(micro_batch: MicroBatch) -> Any:
    """The ancestor relation as FlexAttention's BlockMask. Not measured on a GPU."""
    from torch.nn.attention.flex_attention import create_block_mask

    ends, length = micro_batch.subtree_end, micro_batch.input_ids.shape[1]

    def may_attend(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < ends[batch, key])

    return create_block_mask(may_attend, B=ends.shape[0], H=None, Q_LEN=length, KV_LEN=length, device=ends.device)


def choose_attention(model: PreTrainedModel, device: torch.device) -> None:
    """Switch `model` to the trie kernel of the device where it supports one; else it keeps transformers' choice."""
    if model.config._attn_implementation != "sdpa" or not model._supports_attention_backend:
        return
    has_soft_cap = getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None
    if device.type == "cpu" and has_soft_cap:
        model.set_attn_implementation("eager")  # torch's kernel would leave the cap out, engines do not
    elif device.type == "cpu":
        ALL_ATTENTION_FUNCTIONS.register(CHAINS, _chains_attention)
        ALL_MASK_ATTENTION_FUNCTIONS.register(CHAINS, sdpa_mask)
        model.set_attn_implementation(CHAINS)
    elif device.type == "cuda" and model._supports_flex_attn:
        model.set_attn_implementation("flex_attention")


def _chains_attention(
    module: torch.nn.Module,
    query: Tensor,  # [1, H, T, D]
    key: Tensor,  # [1, H_kv, T, D]
    value: Tensor,  # [1, H_kv, T, D]
    attention_mask: Tensor | None,
    chains: Chains | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface -> [1, T, H, D]; without `chains` it is transformers' SDPA."""
    if chains is None:
        kwargs["scaling"] = scaling
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return output, None
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    outputs = [
        _ChainAttention.apply(q, k, v, chains.future, scale)  # type: ignore[no-untyped-call]
        for q, k, v in zip(
            query[0].split(chains.lengths, 1),
            key[0].index_select(1, chains.keys).split(chains.num_keys, 1),
            value[0].index_select(1, chains.keys).split(chains.num_keys, 1),
            strict=True,
        )
    ]
    return torch.cat(outputs, 1).transpose(0, 1).contiguous()[None], None


class _ChainAttention(torch.autograd.Function):
    """softmax(scale * q k^T + future) v for one chain whose last keys are its own; the softmax is in float32.

    q: [H, n, D]; k, v: [G, m, D] with m >= n, each shared by H / G query heads. The probabilities ([H, n, m]) are
    made again in the backward pass instead of being kept for every layer.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, future: Tensor, scale: float) -> Tensor:
        rows = q.reshape(k.shape[0], -1, q.shape[2])  # the query heads of one key head, below each other
        output = torch.bmm(_probabilities(rows, k, future, q.shape[1], scale).to(v.dtype), v)
        ctx.save_for_backward(rows, k, v, output, future)
        ctx.shape, ctx.scale = q.shape, scale
        return output.view(q.shape)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        rows, k, v, output, future = ctx.saved_tensors
        grad = outputs[0].reshape(rows.shape)
        probabilities = _probabilities(rows, k, future, ctx.shape[1], ctx.scale)
        grad_v = torch.bmm(probabilities.to(v.dtype).transpose(1, 2), grad)
        mean = (grad.float() * output.float()).sum(-1, keepdim=True)
        grad_scores = torch.bmm(grad, v.transpose(1, 2)).float().sub_(mean).mul_(probabilities).mul_(ctx.scale)
        low = grad_scores.to(k.dtype)
        return torch.bmm(low, k).view(ctx.shape), torch.bmm(low.transpose(1, 2), rows), grad_v, None, None


def _probabilities(rows: Tensor, k: Tensor, future: Tensor, length: int, scale: float) -> Tensor:
    """rows: [G, H/G * n, D], k: [G, m, D] -> [G, H/G * n, m] float32."""
    scores = torch.baddbmm(rows.new_zeros(1, 1, 1), rows, k.transpose(1, 2), beta=0, alpha=scale).float()
    own = scores.view(k.shape[0], -1, length, k.shape[1])[..., k.shape[1] - length :]
    own.add_(future[:length, :length])
    return torch.softmax(scores, -1)
