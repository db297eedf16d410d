"""A tokenizer and a model folder made in code: real formats, no download, small enough for fast tests."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

_LESSONS = 130
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One id per byte, plus the two ChatML markers; its template knows no tools."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"]
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def tiny_model_folder(path: Path, **changes: Any) -> Path:
    """A randomly initialised Llama (about 50k parameters, fp32) with `tiny_tokenizer`, saved as a model folder."""
    tokenizer = tiny_tokenizer()
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
    }
    set_seed(0)
    LlamaForCausalLM(LlamaConfig(**shape | changes)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def taught_model_folder(path: Path, row: dict[str, Any], said: list[str], results: list[list[str]]) -> Path:
    """A tiny model that answers `row` with the calls and the answer in `said`, whatever the tools say in between.

    said: the text of its first turn, with calls, and of its second; results: what the calls might be answered, by
    example. Learnt in seconds, by heart; deterministic.
    """
    import torch

    from rft.chat import Chat
    from rft.data import Problems, parse_item
    from rft.types import Message

    tiny_model_folder(path, max_position_embeddings=4096)
    chat = Chat.from_folder(path)
    item = parse_item(row, "taught", None, Problems(1))
    assert item is not None
    end = [chat.end_of_turn]
    first, second = (chat.tokenizer.encode(text) + end for text in said)
    calling = chat.parse(first, item, "taught")
    examples: list[tuple[list[int], list[int]]] = []  # ids, and of each whether it is to be learnt
    for outputs in results:
        answers = [
            Message(role="tool", content=output, tool_call_id=call.call_id)
            for call, output in zip(calling.tool_calls, outputs, strict=True)
        ]
        between = chat.continuation(item, [calling, *answers], first).ids
        prompt = chat.first_prompt(item)
        ids = [*prompt, *first, *between, *second]
        mask = [0] * len(prompt) + [1] * len(first) + [0] * len(between) + [1] * len(second)
        examples.append((ids, mask))
    model = LlamaForCausalLM.from_pretrained(path)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for step in range(_LESSONS):
        ids, mask = examples[step % len(examples)]
        tokens, learnt = torch.tensor([ids]), torch.tensor(mask[1:], dtype=torch.bool)
        logits = model(tokens).logits[0, :-1][learnt]
        loss = torch.nn.functional.cross_entropy(logits, tokens[0, 1:][learnt])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05, f"it did not learn its lines: loss {loss.item():.3f}"
    model.save_pretrained(path)
    return path
