"""Chat: what is rendered can be parsed, suffixes extend what was sampled, malformed calls are data."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
from tiny import tiny_tokenizer

from rft.chat import Chat, tool_message
from rft.errors import UserError
from rft.types import Item, Message, ToolCall, ToolResult

TEMPLATES = ["qwen2_5", "qwen3", "llama3_1", "llama3_2"]

SEARCH = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Search the table",
        "parameters": {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]},
    },
}


def an_item(**changes: object) -> Item:
    row = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Heart attack"}]}
    fields: dict = {"id": "x-1", "row": row, "messages": row["messages"], "tools": [SEARCH]} | changes
    return Item.model_validate(fields)


def a_chat(template: str | None = None) -> Chat:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    if template is not None:
        trl = pytest.importorskip("trl")
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot_id|>", "<|start_header_id|>"]})
        tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / f"{template}.jinja").read_text()
    return Chat(tokenizer)


def spell(chat: Chat, text: str) -> list[int]:
    return [*chat.tokenizer.encode(text, add_special_tokens=False), chat.end_of_turn]


def test_a_template_without_tools_gets_the_generic_convention() -> None:
    chat = a_chat()
    assert not chat.knows_tools
    prompt = chat.tokenizer.decode(chat.first_prompt(an_item()))
    assert '"name": "search"' in prompt and "<tool_call>" in prompt and "Be brief." in prompt
    assert prompt.endswith("<|im_start|>assistant\n")


def test_without_tools_nothing_is_added_and_nothing_is_parsed() -> None:
    chat = a_chat()
    item = an_item(tools=[])
    assert "tool_call" not in chat.tokenizer.decode(chat.first_prompt(item))
    message = chat.parse(spell(chat, 'see <tool_call>{"name": "search"}</tool_call>'), item, "p")
    assert message.tool_calls == []


def test_calls_are_parsed_with_unique_ids() -> None:
    chat = a_chat()
    call = '<tool_call>{"name": "search", "arguments": {"query": "a"}}</tool_call>'
    message = chat.parse(spell(chat, f"Let me look.\n{call}{call}"), an_item(), "p")
    assert message.content == "Let me look."
    assert [json.loads(c.arguments) for c in message.tool_calls] == [{"query": "a"}] * 2
    assert [c.error for c in message.tool_calls] == [None, None]
    assert len({c.call_id for c in message.tool_calls}) == 2


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("<tool_call>{'name': 'search'}</tool_call>", "not valid JSON"),
        ('<tool_call>{"name": "search", "arguments": {}}', "does not end with </tool_call>"),
        ('<tool_call>{"name": "find", "arguments": {}}</tool_call>', 'no tool "find"'),
        ('<tool_call>["search"]</tool_call>', "JSON object with name and arguments"),
        ('<tool_call>{"name": "search", "arguments": "a"}</tool_call>', "arguments must be a JSON object"),
        ('<tool_call>{"name": ["search"], "arguments": {}}</tool_call>', "there is no tool"),
    ],
)
def test_a_malformed_call_says_what_is_wrong(text: str, error: str) -> None:
    chat = a_chat()
    (call,) = chat.parse(spell(chat, text), an_item(), "p").tool_calls
    assert call.error is not None and error in call.error


def test_a_second_call_is_refused_when_the_row_forbids_parallel_calls() -> None:
    chat = a_chat()
    call = '<tool_call>{"name": "search", "arguments": {"query": "a"}}</tool_call>'
    first, second = chat.parse(spell(chat, call * 2), an_item(parallel_tool_calls=False), "p").tool_calls
    assert first.error is None
    assert second.error == "only one call per turn is allowed"


@pytest.mark.parametrize("template", [None, *TEMPLATES])
def test_the_suffix_extends_what_was_sampled(template: str | None) -> None:
    """Prompt + sampled + suffix spells what the template renders for the whole conversation."""
    chat, item = a_chat(template), an_item()
    text = {
        "hermes": '<tool_call>\n{"name": "search", "arguments": {"query": "mi"}}\n</tool_call>',
        "llama3": '{"name": "search", "parameters": {"query": "mi"}}',
    }[chat.dialect]
    sampled = spell(chat, text)
    message = chat.parse(sampled, item, "p")
    (call,) = message.tool_calls
    assert call.error is None
    result = tool_message(ToolResult(call_id=call.call_id, output="I21.9 Acute myocardial infarction"))
    continuation = chat.continuation(item, [message, result], sampled)
    assert not continuation.is_fork
    suffix = chat.tokenizer.decode(continuation.ids)
    assert "I21.9 Acute myocardial infarction" in suffix
    assert "Heart attack" not in suffix
    assert suffix.endswith(chat.tokenizer.decode(chat.first_prompt(item))[-12:])
    cut = chat.continuation(item, [message, result], sampled[:-1])
    assert cut.ids == [chat.end_of_turn, *continuation.ids]


@pytest.mark.parametrize("template", [None, *TEMPLATES])
def test_what_a_chat_has_learnt_changes_no_suffix(template: str | None) -> None:
    """A chat that has seen many conversations continues one exactly as a fresh chat does."""
    used, item = a_chat(template), an_item()
    random, end = Random(7), used.tokenizer.decode([used.end_of_turn])
    for _ in range(20):
        fresh, messages = a_chat(template), []
        for turn in range(random.randint(1, 3)):
            num_calls = random.choice([0, 1, 1, 3])
            calls = [
                ToolCall(id=f"fc_{i}", call_id=f"call_{turn}_{i}", name="search", arguments='{"query": "a"}')
                for i in range(num_calls)
            ]
            text = random.choice(["", "I will look."])
            messages.append(Message(role="assistant", content=text or ("" if calls else "No."), tool_calls=calls))
            said = random.choice(["I21.9", "", f"hostile {end} text", "two\nlines"])
            replies = [tool_message(ToolResult(call_id=call.call_id, output=said)) for call in calls]
            messages += replies or [Message(role="user", content=said)]
        sampled = spell(used, "x")
        assert used.continuation(item, messages, sampled) == fresh.continuation(item, messages, sampled)


def test_several_results_of_one_turn_come_in_order() -> None:
    chat, item = a_chat(), an_item()
    call = '<tool_call>{"name": "search", "arguments": {"query": "a"}}</tool_call>'
    sampled = spell(chat, call * 2)
    message = chat.parse(sampled, item, "p")
    results = [tool_message(ToolResult(call_id=c.call_id, output=f"r{i}")) for i, c in enumerate(message.tool_calls)]
    suffix = chat.tokenizer.decode(chat.continuation(item, [message, *results], sampled).ids)
    assert suffix.count("<tool_response>") == 2
    assert suffix.index("r0") < suffix.index("r1")


def test_reasoning_is_kept_apart_and_its_calls_are_not_executed() -> None:
    chat = a_chat("qwen3")
    text = '<think>maybe <tool_call>{"name": "search", "arguments": {}}</tool_call></think>I21.9'
    message = chat.parse(spell(chat, text), an_item(), "p")
    assert message.content == "I21.9"
    assert message.tool_calls == []
    assert message.reasoning.startswith("maybe")


@pytest.mark.parametrize(
    "text", ['[TOOL_CALLS][{"name": "search", "arguments": {"query": "a"}}]', '[TOOL_CALLS]search[ARGS]{"query": "a"}']
)
def test_both_spellings_of_mistral_are_parsed(text: str) -> None:
    chat = a_chat()
    chat.dialect = "mistral"
    (call,) = chat.parse(spell(chat, text), an_item(), "p").tool_calls
    assert (call.name, json.loads(call.arguments), call.error) == ("search", {"query": "a"}, None)


def test_a_folder_that_is_no_model_is_named_with_its_cure(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a model folder.*\n.*prepare_model"):
        Chat.from_folder(tmp_path / "missing")


def test_messages_survive_their_chat_form() -> None:
    message = Message(role="tool", content="x", tool_call_id="call_1")
    assert Message.model_validate(message.as_chat()) == message


def test_the_core_of_a_tokenizer_says_what_the_tokenizer_says() -> None:
    tokenizer = tiny_tokenizer()
    chat = Chat(tokenizer)
    assert chat._core is tokenizer.backend_tokenizer
    for text in ("", "plain", " a , b ' s", "Zürich <|im_end|>\n<|im_start|>user\n\u2028", "\x00 \t"):
        assert chat._encode(text) == tokenizer.encode(text, add_special_tokens=False)


class Shouting:
    """A tokenizer that changes what its core says."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def encode(self, text: str, **options: Any) -> list[int]:
        return self._tokenizer.encode(text.replace("b", "B"), **options)


def test_a_tokenizer_that_does_more_than_its_core_is_asked_itself() -> None:
    chat = Chat(Shouting(tiny_tokenizer()))
    assert chat._core is None and chat._encode("b") == Chat(tiny_tokenizer())._encode("B")
