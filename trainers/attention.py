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
_MAX_QUERIES = 128  # a longer piece computes more of what its causal mask removes; measured 10% slower at 256


Spans = tuple[tuple[int, int], ...]  # runs of row positions, (start, end exclusive)


@dataclass(frozen=True, slots=True)
class Chains:
    """A packed row cut into chains, in row order."""

    keys: list[Spans]  # of each chain: its path from the root, the last `lengths[i]` positions its own
    lengths: list[int]
    future: Tensor  # [L, L] float32, L the longest chain: -inf where the key (dim 1) comes after the query, else 0


def cut_chains(micro_batch: MicroBatch) -> Chains:
    """The chains of a packed row (B = 1): a token continues its predecessor's chain when it is its only child.

    Long chains are cut on: what comes after a piece need not be computed for it. Takes time in proportion to the
    tokens and the chains.
    """
    ends, depths = micro_batch.subtree_end[0], micro_batch.position_ids[0]
    starts_chain = torch.ones_like(ends, dtype=torch.bool)
    starts_chain[1:] = (depths[1:] != depths[:-1] + 1) | (ends[1:] != ends[:-1])
    borders = [*starts_chain.nonzero()[:, 0].tolist(), ends.numel()]
    path: Spans = ()
    keys: list[Spans] = []
    lengths: list[int] = []
    for first, border in itertools.pairwise(borders):
        path = _first(path, int(depths[first]))
        for start in range(first, border, _MAX_QUERIES):
            end = min(start + _MAX_QUERIES, border)
            path = (*path[:-1], (path[-1][0], end)) if path and path[-1][1] == start else (*path, (start, end))
            keys.append(path)
            lengths.append(end - start)
    future = torch.full((max(lengths), max(lengths)), float("-inf"), device=ends.device).triu(1)
    return Chains(keys, lengths, future)


def _first(spans: Spans, count: int) -> Spans:
    """The first `count` positions of `spans`."""
    found: list[tuple[int, int]] = []
    for start, end in spans:
        if count <= 0:
            break
        found.append((start, min(end, start + count)))
        count -= end - start
    return tuple(found)


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
    value: Tensor,  # [1, H_kv, T, D_v]
    attention_mask: Tensor | None,
    chains: Chains | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface -> [1, T, H, D_v]; without `chains` it is transformers' SDPA."""
    if chains is None:
        kwargs["scaling"] = scaling
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return output, None
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    output = _TrieAttention.apply(query[0], key[0], value[0], chains, scale)  # type: ignore[no-untyped-call]
    return output[None], None


class _TrieAttention(torch.autograd.Function):
    """For every chain: softmax(scale * q k^T + future) v over its path, the softmax in float32.

    query: [H, T, D]; key: [G, T, D]; value: [G, T, D_v], each shared by H / G query heads -> [T, H, D_v]. What is kept
    for the backward pass has the row's length: the probabilities ([H, n, m]) and the chains' own copies of their paths
    are made again, so that memory does not depend on how the row branches.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, chains: Chains, scale: float) -> Tensor:
        output = query.new_empty(query.shape[1], query.shape[0], value.shape[2])
        for spans, length in zip(chains.keys, chains.lengths, strict=True):
            end = spans[-1][1]
            k, v = _gather(key, spans), _gather(value, spans)
            q = query[:, end - length : end].reshape(k.shape[0], -1, k.shape[2])
            found = torch.bmm(_probabilities(q, k, chains.future, length, scale).to(v.dtype), v)
            output[end - length : end] = found.view(-1, length, v.shape[2]).transpose(0, 1)
        ctx.save_for_backward(query, key, value, output)
        ctx.chains, ctx.scale = chains, scale
        return output

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output = ctx.saved_tensors
        chains, scale = ctx.chains, ctx.scale
        grad_query = torch.empty_like(query)
        grad_key, grad_value = (torch.zeros_like(x, dtype=torch.float32) for x in (key, value))  # sums over children
        for spans, length in zip(chains.keys, chains.lengths, strict=True):
            own = slice(spans[-1][1] - length, spans[-1][1])
            k, v = _gather(key, spans), _gather(value, spans)
            # the query heads of one key head, below each other
            q = query[:, own].reshape(k.shape[0], -1, k.shape[2])
            grad, out = (x[own].transpose(0, 1).reshape(k.shape[0], -1, v.shape[2]) for x in (outputs[0], output))
            probabilities = _probabilities(q, k, chains.future, length, scale)
            _scatter(grad_value, torch.bmm(probabilities.to(v.dtype).transpose(1, 2), grad), spans)
            mean = (grad.float() * out.float()).sum(-1, keepdim=True)
            scores = torch.bmm(grad, v.transpose(1, 2)).float().sub_(mean).mul_(probabilities).mul_(scale).to(k.dtype)
            grad_query[:, own] = torch.bmm(scores, k).view(-1, length, k.shape[2])
            _scatter(grad_key, torch.bmm(scores.transpose(1, 2), q), spans)
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None


def _gather(rows: Tensor, spans: Spans) -> Tensor:
    """[G, T, D] -> [G, m, D], the positions of `spans`."""
    parts = [rows[:, start:end] for start, end in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _scatter(total: Tensor, rows: Tensor, spans: Spans) -> None:
    """Add [G, m, D] to the positions of `spans` in [G, T, D]."""
    for (start, end), part in zip(spans, rows.split([end - start for start, end in spans], 1), strict=True):
        total[:, start:end] += part


def _probabilities(rows: Tensor, k: Tensor, future: Tensor, length: int, scale: float) -> Tensor:
    """rows: [G, H/G * n, D], k: [G, m, D] -> [G, H/G * n, m] float32."""
    scores = torch.baddbmm(rows.new_zeros(1, 1, 1), rows, k.transpose(1, 2), beta=0, alpha=scale).float()
    own = scores.view(k.shape[0], -1, length, k.shape[1])[..., k.shape[1] - length :]
    own.add_(future[:length, :length])
    return torch.softmax(scores, -1)
