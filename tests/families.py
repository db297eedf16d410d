"""Tiny random models of many families, each with a tokenizer in the family's manner: no download, fp32, two layers.

The chat templates are those that TRL ships, which are the published ones; Mistral's is written here after the
template of Mistral-7B-Instruct-v0.3. Tokens are bytes; markers are special tokens as the published tokenizers have
them: only those that theirs names (eos, bos) have a name.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PreTrainedTokenizerFast,
)

CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<tool_call>", "</tool_call>")
LLAMA = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>")
MISTRAL = ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]")
GEMMA = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
PHI = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")

MISTRAL_TEMPLATE = """\
{%- if messages[0]["role"] == "system" %}{%- set system = messages[0]["content"] %}{%- set rest = messages[1:] %}
{%- else %}{%- set rest = messages %}{%- endif %}
{%- set users = rest | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace(index=0) %}
{%- for m in rest %}{%- if not (m.role == "tool" or (m.tool_calls is defined and m.tool_calls is not none)) %}
{%- if (m["role"] == "user") != (ns.index % 2 == 0) %}{{- raise_exception("roles must alternate") }}{%- endif %}
{%- set ns.index = ns.index + 1 %}{%- endif %}{%- endfor %}
{{- bos_token }}
{%- for m in rest %}
{%- if m["role"] == "user" %}
{%- if tools and m == users[-1] %}{{- "[AVAILABLE_TOOLS] " + (tools | tojson) + "[/AVAILABLE_TOOLS]" }}{%- endif %}
{%- if loop.last and system is defined %}{{- "[INST] " + system + "\\n\\n" + m["content"] + "[/INST]" }}
{%- else %}{{- "[INST] " + m["content"] + "[/INST]" }}{%- endif %}
{%- elif m.tool_calls is defined and m.tool_calls is not none %}{{- "[TOOL_CALLS] [" }}
{%- for call in m.tool_calls %}
{%- if not call.id is defined or call.id | length != 9 %}{{- raise_exception("ids need length 9!") }}{%- endif %}
{{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' }}{{- ", " if not loop.last else "]" + eos_token }}
{%- endfor %}
{%- elif m["role"] == "assistant" %}{{- " " + m["content"] | trim + eos_token }}
{%- elif m["role"] == "tool" %}
{%- if not m.tool_call_id is defined or m.tool_call_id | length != 9 %}{{- raise_exception("length 9!") }}{%- endif %}
{{- '[TOOL_RESULTS] {"content": ' + m.content | string + ', "call_id": "' + m.tool_call_id + '"}[/TOOL_RESULTS]' }}
{%- endif %}
{%- endfor %}"""


@dataclass(frozen=True)
class Family:
    """One row of the matrix. `template`: a file of TRL's, or the text itself; empty where the family has none."""

    model_type: str
    template: str = ""
    markers: tuple[str, ...] = CHATML
    eos: str = "<|im_end|>"
    bos: str | None = None
    config: dict[str, Any] = field(default_factory=dict)  # beside SHAPE
    dropped: tuple[str, ...] = ()  # of SHAPE
    is_packed: bool = True
    warning: str = ""  # what a policy says when it is built

    @property
    def chat_template(self) -> str:
        return _trl_template(self.template) if self.template.isidentifier() else self.template


SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,  # the least that vLLM's CPU kernels take
    "max_position_embeddings": 1024,
    "initializer_range": 0.1,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_GEMMA = {"layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 32}
_MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 24, "v_head_dim": 16}
_DEEPSEEK = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 24,
}
_BARE = r"no adapters on .*mlp\.shared_experts\.up_proj"

FAMILIES = {
    "llama": Family("llama", "llama3_1", LLAMA, "<|eot_id|>", "<|begin_of_text|>", {"tie_word_embeddings": True}),
    "qwen2": Family("qwen2", "qwen2_5", dropped=("head_dim",)),
    "qwen3": Family("qwen3", "qwen3"),
    "mistral": Family("mistral", MISTRAL_TEMPLATE, MISTRAL, "</s>", "<s>", {"sliding_window": None}),
    "mistral_window": Family(
        "mistral", MISTRAL_TEMPLATE, MISTRAL, "</s>", "<s>", {"sliding_window": 16}, is_packed=False
    ),
    "gemma3": Family("gemma3_text", "gemma3", GEMMA, "<eos>", "<bos>", {**_GEMMA, "sliding_window": 512}),
    "gemma3_window": Family(
        "gemma3_text", "gemma3", GEMMA, "<eos>", "<bos>", {**_GEMMA, "sliding_window": 16}, is_packed=False
    ),
    "gpt2": Family(
        "gpt2",
        markers=("<|endoftext|>",),
        eos="<|endoftext|>",
        config={"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 1024, "initializer_range": 0.1},
        dropped=tuple(SHAPE),
    ),
    "phi3": Family("phi3", "phi3", PHI, "<|endoftext|>", dropped=("head_dim",)),
    "qwen3_moe": Family("qwen3_moe", "qwen3", config=_EXPERTS),
    "mixtral": Family(
        "mixtral", MISTRAL_TEMPLATE, MISTRAL, "</s>", "<s>", {"num_local_experts": 4, "num_experts_per_tok": 2}
    ),
    "olmoe": Family("olmoe", "qwen2_5", config={**_EXPERTS, "clip_qkv": None}, dropped=("head_dim",)),
    "deepseek_v3": Family(
        "deepseek_v3",
        "qwen2_5",
        config={**_DEEPSEEK, **_MLA, "first_k_dense_replace": 1, "n_shared_experts": 1, "num_key_value_heads": 2},
        dropped=("head_dim",),
        warning=_BARE,
    ),
}
EXPERTS = [name for name in FAMILIES if name in ("qwen3_moe", "mixtral", "olmoe", "deepseek_v3")]


def family_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """One id per byte, then the family's markers, with its template."""
    family = FAMILIES[name]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(marker, special=True, normalized=False) for marker in family.markers])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=family.eos, bos_token=family.bos)
    if family.template:
        tokenizer.chat_template = family.chat_template
    return tokenizer


def family_config(name: str, vocab_size: int, eos: int) -> Any:
    family = FAMILIES[name]
    shape = {key: value for key, value in SHAPE.items() if key not in family.dropped}
    ids = {"vocab_size": vocab_size, "bos_token_id": None, "eos_token_id": eos, "pad_token_id": eos}
    return AutoConfig.for_model(family.model_type, **shape | ids | family.config)


def family_folder(name: str, path: Path, **changes: Any) -> Path:
    """The model folder of a family as a user has it: config, weights under their published names, tokenizer."""
    tokenizer = family_tokenizer(name)
    config = family_config(name, len(tokenizer), int(tokenizer.eos_token_id))
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def multimodal_folder(path: Path) -> Path:
    """A Gemma 3 that also reads images, as the published ones from 4B on do."""
    tokenizer = family_tokenizer("gemma3")
    size, eos = len(tokenizer), int(tokenizer.eos_token_id)
    text = family_config("gemma3", size + 3, eos).to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"image_token_id": size, "boi_token_id": size + 1, "eoi_token_id": size + 2}
    config = Gemma3Config(
        text_config=text,
        vision_config=vision | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=1,
        eos_token_id=eos,
        **tokens,
    )
    torch.manual_seed(0)
    Gemma3ForConditionalGeneration(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def _trl_template(name: str) -> str:
    found = importlib.util.find_spec("trl")
    assert found is not None and found.origin is not None, "TRL is one of the development requirements"
    return (Path(found.origin).parent / "chat_templates" / f"{name}.jinja").read_text()
