"""Every family of models through chat, batch, loss, step, sync and export, and what is special to some of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_chat import an_item, spell
from transformers import AutoModelForCausalLM

from rft.chat import Chat, tool_message
from rft.config import LoraConfig, ModelConfig, TrainingConfig
from rft.errors import UserError
from rft.trainers.policy import Policy, build_accelerator
from rft.types import Message, ToolResult
from tests.families import FAMILIES, family_folder, family_tokenizer

torch.set_num_threads(1)  # the models here are too small for threads to pay

MODES: dict[str, LoraConfig] = {"lora": LoraConfig(rank=4, alpha=8)}  # how a model is trained: `model.lora`
matrix = pytest.mark.parametrize(("name", "mode"), [(name, mode) for name in FAMILIES for mode in MODES])
TALKING = [name for name, family in FAMILIES.items() if family.template and not name.endswith("_window")]
END = {"llama": "<|eot_id|>", "mistral": "</s>", "mixtral": "</s>", "gemma3": "<end_of_turn>", "phi3": "<|end|>"}
CALL = {
    "hermes": '<tool_call>\n{"name": "search", "arguments": {"query": "mi"}}\n</tool_call>',
    "llama3": '{"name": "search", "parameters": {"query": "mi"}}',
    "mistral": '[TOOL_CALLS] [{"name": "search", "arguments": {"query": "mi"}}]',
}
IDS = list(range(30, 80))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {name: family_folder(name, root / name) for name in FAMILIES}


def a_policy(path: Path, mode: str = "lora", dtype: Any = "float32", **training: Any) -> Policy:
    """A policy whose weights have already been moved away from the folder's."""
    model = ModelConfig(path=path, dtype=dtype, lora=MODES[mode])
    options = {"steps": 4, "learning_rate": 1e-2, **training}
    policy = Policy(model, TrainingConfig(**options), 0.8, build_accelerator(seed=0), seed=0)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():  # B = 0 would leave A without a gradient and the adapter without a trace
        for parameter in policy.parameters:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=noise))
    return policy


def scores(path: Path, ids: list[int]) -> list[float]:
    """Log-probabilities of `ids[1:]` by the plain model in `path`; all its weights are there, and no others."""
    model, info = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0, :-1].float(), -1)
    found: list[float] = logprobs.gather(-1, torch.tensor(ids)[1:, None])[:, 0].tolist()
    return found


# --- chat


@pytest.mark.parametrize("name", TALKING)
@pytest.mark.parametrize("has_system", [True, False])
def test_a_conversation_goes_round(name: str, has_system: bool) -> None:
    """Prompt, sampled call, result: what the model reads is what its template renders for the whole conversation."""
    chat = Chat(family_tokenizer(name))
    decode = chat.tokenizer.decode
    changes = {} if has_system else {"messages": [{"role": "user", "content": "Heart attack"}]}
    item = an_item(**changes)
    assert decode([chat.end_of_turn]) == END.get(name, "<|im_end|>")
    assert {chat.end_of_turn, chat.tokenizer.eos_token_id} == set(chat.stop_token_ids)
    prompt = decode(chat.first_prompt(item))
    assert "Heart attack" in prompt and '"search"' in prompt and ("Be brief." in prompt) == has_system
    sampled = spell(chat, CALL[chat.dialect])
    message = chat.parse(sampled, item, "r12-3")
    (call,) = message.tool_calls
    assert call.error is None and json.loads(call.arguments) == {"query": "mi"}
    messages = [message, tool_message(ToolResult(call_id=call.call_id, output="I21.9 infarction"))]
    found = chat.continuation(item, messages, sampled)
    read = decode(found.ids) if found.is_fork else prompt + decode(sampled) + decode(found.ids)
    chats = chat._opening(item).messages + chat._chat_messages(messages)
    whole = chat._render(chats, chat._template_tools(item), prompt=True)
    assert "I21.9 infarction" in read and read.count("Heart attack") == 1
    assert found.is_fork == (has_system and chat.dialect == "mistral"), "it shows its system text at the end only"
    assert whole.endswith(decode(found.ids))
    if found.is_fork or chat.dialect != "mistral":  # which adds the call's id
        assert "".join(read.split()) == "".join(whole.split())
    assert found.is_fork or chat.continuation(item, messages, sampled[:-1]).ids == [chat.end_of_turn, *found.ids]


def test_mistral_moves_its_tools_behind_a_reply_of_the_user() -> None:
    chat = Chat(family_tokenizer("mistral"))
    item = an_item(messages=[{"role": "user", "content": "Heart attack"}])
    sampled = spell(chat, "Which one?")
    messages = [chat.parse(sampled, item, "p"), Message(role="user", content="The acute one")]
    found = chat.continuation(item, messages, sampled)
    text = chat.tokenizer.decode(found.ids)
    assert found.is_fork and text.index("Heart attack") < text.index("[AVAILABLE_TOOLS]") < text.index("The acute one")


def test_ids_of_calls_are_short_for_mistral_and_differ() -> None:
    chat = Chat(family_tokenizer("mistral"))
    item = an_item(messages=[{"role": "user", "content": "Heart attack"}])
    calls = '[TOOL_CALLS] [{"name": "search", "arguments": {}}, {"name": "search", "arguments": {"query": "b"}}]'
    sampled = spell(chat, calls)
    message = chat.parse(sampled, item, "r12-3")
    results = [tool_message(ToolResult(call_id=call.call_id, output="none")) for call in message.tool_calls]
    text = chat.tokenizer.decode(chat.continuation(item, [message, *results], sampled).ids)
    ids = [part.partition('"')[0] for part in text.split('"call_id": "')[1:]]
    assert [len(each) for each in ids] == [9, 9] and len(set(ids)) == 2


def test_a_system_text_opens_the_first_message_where_there_is_no_system_role() -> None:
    tokenizer = family_tokenizer("gemma3")
    tokenizer.chat_template = replace(FAMILIES["gemma3"], template="gemma").chat_template  # raises at a system role
    prompt = tokenizer.decode(Chat(tokenizer).first_prompt(an_item()))
    assert prompt.startswith("<bos><start_of_turn>user\nBe brief.")
    assert prompt.index("<tool_call>") < prompt.index("Heart attack<end_of_turn>")


def test_a_base_model_has_no_template_until_one_is_put_beside_it(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no chat template(.|\n)*chat_template\.jinja"):
        Chat.from_folder(folders["gpt2"])
    chat = Chat.from_folder(with_template("gpt2", tmp_path / "gpt2"))
    assert chat.tokenizer.decode(chat.first_prompt(an_item(tools=[]))).endswith("user: Heart attack\nassistant:")
    assert chat.stop_token_ids == (chat.tokenizer.eos_token_id,)


def with_template(name: str, path: Path) -> Path:
    """A model folder one can chat with: GPT-2's gets a template as a user would write it."""
    family_folder(name, path)
    if not FAMILIES[name].template:
        text = (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token if m.role == 'assistant' }}\n{% endfor %}"
        )
        (path / "chat_template.jinja").write_text(text + "{% if add_generation_prompt %}assistant:{% endif %}")
    return path
