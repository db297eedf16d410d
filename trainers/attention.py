"""Attention over a token trie, for packed rows. Owns the two kernels' views of `MicroBatch.subtree_end`.

CPU: the trie is cut into chains (runs of tokens without a branch); each attends to its gathered ancestors through
torch's own kernel, so that the work grows with what is attended to and not with T^2. CUDA: FlexAttention with the
same relation as a block mask; not measured on a GPU. Other models get the dense mask. All three are exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rft.trainers.batch import MicroBatch

CHAINS = "rft_chains"  # the name of the CPU implementation in transformers' registry


@dataclass(frozen=True, slots=True)
class Chains:
    """A packed row cut into chains, in row order: chain i has `lengths[i]` queries and `num_keys[i]` keys."""

    lengths: list[int]
    num_keys: list[int]
    keys: Tensor  # [sum(num_keys)] int64 row positions: each chain's ancestors, then itself
    masks: list[Tensor | None]  # [queries, keys] bool, True = may attend; None where plain causality says it all


def cut_chains(micro_batch: MicroBatch) -> Chains:
    """The chains of a packed row (B = 1): a token continues its predecessor's chain when it is its only child."""
    ends, depths = micro_batch.subtree_end[0].cpu(), micro_batch.position_ids[0].cpu()
    starts_chain = torch.ones_like(ends, dtype=torch.bool)
    starts_chain[1:] = (depths[1:] != depths[:-1] + 1) | (ends[1:] != ends[:-1])
    starts = starts_chain.nonzero()[:, 0].tolist()
    keys, masks, lengths = [], list[Tensor | None](), []
    for start, end in zip(starts, [*starts[1:], ends.numel()], strict=True):
        ancestors = (ends[:start] > start).nonzero()[:, 0]
        keys.append(torch.cat([ancestors, torch.arange(start, end)]))
        lengths.append(end - start)
        num_ancestors = ancestors.numel()
        mask = torch.ones(end - start, num_ancestors + end - start, dtype=torch.bool).tril(num_ancestors)
        masks.append(mask.to(micro_batch.subtree_end.device) if num_ancestors else None)
    num_keys = [key.numel() for key in keys]
    return Chains(lengths, num_keys, torch.cat(keys).to(micro_batch.subtree_end.device), masks)


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
    has_fewer_keys = key.shape[1] != query.shape[1]
    outputs = [
        scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scaling, enable_gqa=has_fewer_keys)
        for q, k, v, mask in zip(
            query.split(chains.lengths, 2),
            key.index_select(2, chains.keys).split(chains.num_keys, 2),
            value.index_select(2, chains.keys).split(chains.num_keys, 2),
            chains.masks,
            strict=True,
        )
    ]
    return torch.cat(outputs, 2).transpose(1, 2).contiguous(), None
