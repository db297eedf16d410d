"""The shape of a transformer, from its config.json: how many numbers it has, keeps per token, and computes with.

Dense, grouped-query, latent (MLA) and mixture-of-experts decoders. What it does not know it refuses by name: layers
that are no attention, and configs without the fields below. Biases are left out: less than 0.1% of any model.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rft.errors import ConfigError

_MAX_LAYERS = 10_000  # beyond it a file is wrong, not deep
_UNGATED = ("gpt2", "gpt_neo", "gptj", "opt", "bloom", "falcon", "phi", "starcoder2", "mpt", "nemotron")  # two matrices
_QK_NORMED = ("qwen3", "gemma3", "olmo2", "olmoe")
_FOUR_NORMS = ("gemma2", "gemma3")
_MLP_NAMES = ("gate_proj", "up_proj", "down_proj", "fc", "mlp", "expert", "w1", "w2", "w3")  # in `lora.targets`
_FULL_ATTENTION = ("full_attention", "sliding_attention", "chunked_attention", "attention")  # of `layer_types`


@dataclass(frozen=True, slots=True)
class Linear:
    """`count` matrices [outputs, inputs] of a layer, of which a token meets `num_active`."""

    inputs: int
    outputs: int
    count: int = 1
    num_active: int = 1

    @property
    def size(self) -> int:
        return self.inputs * self.outputs * self.count

    @property
    def active(self) -> int:
        return self.inputs * self.outputs * self.num_active

    def adapter(self, rank: int) -> int:
        """The numbers of its LoRA pair."""
        return rank * (self.inputs + self.outputs) * self.count


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer. Widths are numbers per token."""

    attention: tuple[Linear, ...]
    mlp: tuple[Linear, ...]
    router: int  # its numbers; it never gets an adapter
    query: int  # heads x head_dim, of the queries and keys after projection
    key: int
    value: int
    output: int  # heads x the dimension of values: what attention gives
    cached: int  # what the KV cache keeps
    inner: int  # the width of the MLP, summed over the experts that a token meets
    num_routes: int  # routed experts that a token meets
    num_norms: int
    normed: int  # numbers normed inside attention (query-key norm)

    @property
    def linears(self) -> tuple[Linear, ...]:
        return self.attention + self.mlp

    @property
    def size(self) -> int:
        return self.router + sum(linear.size for linear in self.linears)

    @property
    def active(self) -> int:
        """The numbers that one token is multiplied with."""
        return self.router + sum(linear.active for linear in self.linears)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder-only language model."""

    name: str
    hidden: int
    vocabulary: int
    num_positions: int  # the longest sequence it was made for; 0: not said
    num_heads: int
    num_kv_heads: int
    is_tied: bool
    is_gated: bool
    layers: tuple[tuple[Layer, int], ...]  # the different ones, and how many there are of each

    @property
    def num_layers(self) -> int:
        return sum(count for _, count in self.layers)

    @property
    def embedding(self) -> int:
        """The numbers of one [vocabulary, hidden] matrix."""
        return self.vocabulary * self.hidden

    @property
    def in_linears(self) -> int:
        """What adapters can sit on: every matrix of the layers but routers."""
        return sum(count * linear.size for layer, count in self.layers for linear in layer.linears)

    @property
    def parameters(self) -> int:
        norms = self.hidden * (1 + sum(count * layer.num_norms for layer, count in self.layers))
        routers = sum(count * layer.router for layer, count in self.layers)
        return self.in_linears + routers + norms + self.embedding * (1 if self.is_tied else 2)

    @property
    def active(self) -> int:
        """The numbers of the layers' matrices that one token is multiplied with."""
        return sum(count * layer.active for layer, count in self.layers)

    @property
    def cached(self) -> int:
        """What the KV cache keeps of one token, as numbers. Every layer keeps the whole context."""
        return sum(count * layer.cached for layer, count in self.layers)

    @property
    def largest_layer(self) -> int:
        """The numbers of the layer that has most."""
        return max(layer.size for layer, _ in self.layers)

    @property
    def is_mixture(self) -> bool:
        return any(layer.router for layer, _ in self.layers)

    def has_mlp(self, targets: tuple[str, ...] | None) -> bool:
        """Adapters with these targets (None: all linear layers) sit on MLPs or experts too."""
        return targets is None or any(name in target for target in targets for name in _MLP_NAMES)

    def adapters(self, rank: int, targets: tuple[str, ...] | None) -> int:
        """The numbers of LoRA adapters; named targets count as all of attention, all of the MLP, or both."""
        has_attention = targets is None or any(not any(name in target for name in _MLP_NAMES) for target in targets)
        return sum(
            count * linear.adapter(rank)
            for layer, count in self.layers
            for linear in (layer.attention if has_attention else ()) + (layer.mlp if self.has_mlp(targets) else ())
        )


def read_shape(path: Path, field: str = "model.path") -> ModelShape:
    """The shape that `path`/config.json describes. Raises ConfigError that names the field and the cure."""
    file = path / "config.json" if path.is_dir() else path
    cure = "give a folder that holds the model's config.json; weights are not needed"
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConfigError(f"no config.json can be read: {reason}", where=f"{field}: {path}", cure=cure) from None
    except ValueError as error:
        raise ConfigError(f"config.json is not JSON: {error}", where=f"{field}: {path}", cure=cure) from None
    if not isinstance(tree, dict):
        raise ConfigError("config.json is not a mapping", where=f"{field}: {path}", cure=cure)
    return shape_of(tree, name=path.name or str(path), where=f"{field}: {file}")


def shape_of(tree: Mapping[str, Any], *, name: str, where: str = "config.json") -> ModelShape:
    """The shape of a transformers config given as its mapping; of a model that also sees, of its text part."""
    inner = tree.get("text_config")
    merged = {**tree, **inner} if isinstance(inner, Mapping) else dict(tree)
    fields = _Fields(merged, where)
    fields.refuse_what_is_unknown()
    hidden, num_heads = fields.count("hidden_size", "n_embd"), fields.count("num_attention_heads", "n_head")
    num_layers = fields.count("num_hidden_layers", "n_layer")
    if num_layers > _MAX_LAYERS:
        raise ConfigError(f"num_hidden_layers is {num_layers:,}", where=where, cure="check the file")
    head_dim = fields.count("head_dim", default=hidden // num_heads)
    num_kv_heads = fields.count("num_key_value_heads", default=num_heads)
    num_positions = fields.count("max_position_embeddings", "n_positions", default=0)
    is_gated = not fields.kind.startswith(_UNGATED) or fields.kind.startswith(("phi3", "phimoe"))
    attention = _attention(fields, hidden, num_heads, num_kv_heads, head_dim)
    is_gpt2 = fields.kind == "gpt2"
    layers = Counter(_layer(fields, index, hidden, attention, is_gated=is_gated) for index in range(num_layers))
    return ModelShape(
        name=name,
        hidden=hidden,
        vocabulary=fields.count("vocab_size"),
        num_positions=num_positions,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        is_tied=bool(merged.get("tie_word_embeddings", is_gpt2 or fields.kind.startswith("gemma"))),
        is_gated=is_gated,
        layers=tuple(layers.items()),
    )


class _Fields:
    """A config.json's fields, each a positive whole number or an error that names it."""

    def __init__(self, tree: Mapping[str, Any], where: str) -> None:
        self._tree, self._where = tree, where
        self.kind = str(tree.get("model_type", ""))

    def count(self, *names: str, default: int | None = None) -> int:
        found = next((self._tree[name] for name in names if self._tree.get(name) is not None), default)
        if isinstance(found, int) and not isinstance(found, bool) and found >= (1 if default is None else 0):
            return found
        problem = "is missing" if found is None else f"is {str(found)[:40]!r}, not a positive whole number"
        cure = "give the config.json of a decoder-only transformer"
        raise ConfigError(f"{names[0]} {problem}", where=self._where, cure=cure)

    def indices(self, name: str) -> list[int]:
        found = self._tree.get(name)
        return [index for index in found if isinstance(index, int)] if isinstance(found, list) else []

    def refuse_what_is_unknown(self) -> None:
        kinds = self._tree.get("layer_types") or []
        odd = next((str(kind) for kind in kinds if kind not in _FULL_ATTENTION), "") if isinstance(kinds, list) else ""
        odd = odd or next((name for name in ("ssm_cfg", "mamba_d_state", "state_size") if name in self._tree), "")
        if odd or self._tree.get("is_encoder_decoder"):
            what = f"layers of kind {odd[:60]}" if odd else "an encoder and a decoder"
            cure = "plan a decoder whose layers are all attention; this one has to be tried"
            raise ConfigError(f"the planner does not know {what}", where=self._where, cure=cure)


@dataclass(frozen=True, slots=True)
class _Attention:
    linears: tuple[Linear, ...]
    query: int
    key: int
    value: int
    output: int
    cached: int


def _attention(fields: _Fields, hidden: int, num_heads: int, num_kv_heads: int, head_dim: int) -> _Attention:
    rank = fields.count("kv_lora_rank", default=0)
    if rank:
        return _latent_attention(fields, hidden, num_heads, rank)
    query, key = num_heads * head_dim, num_kv_heads * head_dim
    linears = (Linear(hidden, query), Linear(hidden, key), Linear(hidden, key), Linear(query, hidden))
    return _Attention(linears, query, key, key, query, 2 * key)


def _latent_attention(fields: _Fields, hidden: int, num_heads: int, rank: int) -> _Attention:
    """DeepSeek-V2 (arXiv:2405.04434, section 2.1): the cache keeps one latent and one rotated key for all heads."""
    rotated = fields.count("qk_rope_head_dim")
    plain, value_dim = fields.count("qk_nope_head_dim"), fields.count("v_head_dim")
    query, value = num_heads * (plain + rotated), num_heads * value_dim
    query_rank = fields.count("q_lora_rank", default=0)
    asks = (Linear(hidden, query_rank), Linear(query_rank, query)) if query_rank else (Linear(hidden, query),)
    keys = (Linear(hidden, rank + rotated), Linear(rank, num_heads * (plain + value_dim)))
    return _Attention((*asks, *keys, Linear(value, hidden)), query, query, value, value, rank + rotated)


def _layer(fields: _Fields, index: int, hidden: int, attention: _Attention, *, is_gated: bool) -> Layer:
    num_experts = fields.count("num_experts", "num_local_experts", "n_routed_experts", default=0)
    is_dense = num_experts == 0 or _is_dense(fields, index)
    num_ups = 2 if is_gated else 1

    def mlp(width: int, count: int = 1, num_active: int = 1) -> tuple[Linear, ...]:
        up = Linear(hidden, num_ups * width, count, num_active)  # experts are fused so
        split = (Linear(hidden, width),) * num_ups
        return (*(split if count == 1 else (up,)), Linear(width, hidden, count, num_active))

    if is_dense:
        inner = fields.count("intermediate_size", "n_inner", "ffn_dim", default=4 * hidden)
        linears, router, num_routes = mlp(inner), 0, 0
    else:
        num_routes = min(num_experts, fields.count("num_experts_per_tok", "experts_per_token"))
        width = fields.count("moe_intermediate_size", "intermediate_size")
        shared = fields.count("shared_expert_intermediate_size", default=0)
        shared = shared or width * fields.count("n_shared_experts", default=0)
        linears = mlp(width, num_experts, num_routes) + (mlp(shared) if shared else ())
        router, inner = hidden * num_experts, num_routes * width + shared
    is_normed = fields.kind.startswith(_QK_NORMED)
    return Layer(
        attention=attention.linears,
        mlp=linears,
        router=router,
        query=attention.query,
        key=attention.key,
        value=attention.value,
        output=attention.output,
        cached=attention.cached,
        inner=inner,
        num_routes=num_routes,
        num_norms=4 if fields.kind.startswith(_FOUR_NORMS) else 2,
        normed=attention.query + attention.key if is_normed else 0,
    )


def _is_dense(fields: _Fields, index: int) -> bool:
    """A layer of a mixture that has no experts: DeepSeek's first ones, Qwen's and others' exceptions."""
    step = max(1, fields.count("decoder_sparse_step", default=1))
    first = fields.count("first_k_dense_replace", default=0)
    return index < first or index in fields.indices("mlp_only_layers") or (index + 1) % step != 0
