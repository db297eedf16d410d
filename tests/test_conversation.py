"""A conversation that a client sends back is sampled after the ids that training would have had."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from test_chat import SEARCH, TEMPLATES, a_chat, spell

from rft.chat import Chat, tool_message
from rft.server.inference.answer import Choice
from rft.server.inference.conversation import Conversations
from rft.server.inference.request import parse
from rft.server.inference.sampler import Delta
from rft.types import Item, Message, ToolResult

ASKED: list[dict[str, Any]] = [
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": "Heart attack"},
]


def an_item(messages: list[dict[str, Any]]) -> Item:
    return parse({"model": "m", "messages": messages, "tools": [SEARCH]}).item()


def call_text(chat: Chat, query: str) -> str:
    if chat.dialect == "llama3":
        return f'{{"name": "search", "parameters":  {{"query":"{query}"}}}}'
    return f'<tool_call>{{"name": "search",  "arguments": {{"query":"{query}"}}}}</tool_call>'


def said_as(chat: Chat, item: Item, sampled: list[int]) -> tuple[Choice, dict[str, Any]]:
    """What a client gets for sampled ids."""
    choice = Choice(item, chat.dialect)
    text = chat.tokenizer.decode(sampled[:-1], skip_special_tokens=False)
    choice.feed(Delta(0, text, sampled, "stop"))
    return choice, choice.body(0)["message"]


@pytest.mark.parametrize("template", [None, *TEMPLATES])
@pytest.mark.parametrize("seed", range(4))
def test_a_tool_loop_is_sampled_after_the_ids_of_training(template: str | None, seed: int) -> None:
    """Whatever ids spelled the calls: those of the rollout loop and those of the API are the same, turn after turn."""
    chat, random = a_chat(template), Random(seed)
    conversations, messages = Conversations(chat), list(ASKED)
    opening = an_item(ASKED)
    ids, history = chat.first_prompt(opening), list[Message]()
    for turn in range(3):
        item = an_item(messages)
        prompt = conversations.prompt(item)
        assert prompt == ids
        lead = "" if chat.dialect == "llama3" else random.choice(["", "I look.\n", "<think>\nhm\n</think>\n\nNow: "])
        sampled = spell(chat, lead + call_text(chat, f"q{turn}"))
        choice, said = said_as(chat, item, sampled)
        conversations.remember(item, choice.message, prompt, sampled)
        output = random.choice(["I21.9", "nothing", 'a "quoted" {answer}'])
        (call,) = said["tool_calls"]
        messages += [said, {"role": "tool", "tool_call_id": call["id"], "content": output}]
        message = chat.parse(sampled, opening, choice.prefix)
        history += [message, tool_message(ToolResult(call_id=call["id"], output=output))]
        more = chat.continuation(opening, history, sampled)
        ids = more.ids if more.is_fork else [*ids, *sampled, *more.ids]
    assert Conversations(chat).prompt(an_item(ASKED)) == chat.first_prompt(opening)


@pytest.mark.parametrize("template", [None, *TEMPLATES])
def test_turns_that_nobody_remembers_are_spelled_as_the_model_would(template: str | None) -> None:
    chat = a_chat(template)
    opening = an_item(ASKED)
    said = Message.model_validate(
        {
            "role": "assistant",
            "tool_calls": [{"id": "fc", "call_id": "call_1", "name": "search", "arguments": '{"query": "mi"}'}],
        }
    )
    result = tool_message(ToolResult(call_id="call_1", output="I21.9"))
    sampled = chat.spell(opening, [said])
    assert sampled is not None
    more = chat.continuation(opening, [said, result], sampled)
    expected = more.ids if more.is_fork else [*chat.first_prompt(opening), *sampled, *more.ids]
    echoed = [*ASKED, said.as_chat(), {"role": "tool", "tool_call_id": "call_1", "content": "I21.9"}]
    assert Conversations(chat).prompt(an_item(echoed)) == expected


@pytest.mark.parametrize("template", [None, *TEMPLATES])
def test_what_is_no_sequence_of_turns_is_rendered_whole(template: str | None) -> None:
    """An answer at the end, two answers in a row, a broken call: all is there, nothing raises."""
    chat = a_chat(template)
    broken = {"id": "c1", "type": "function", "function": {"name": "search", "arguments": "{oops"}}
    histories = [
        [*ASKED, {"role": "assistant", "content": "first words"}],
        [
            *ASKED,
            {"role": "assistant", "content": "first words"},
            {"role": "assistant", "content": "and more"},
            ASKED[1],
        ],
        [
            *ASKED,
            {"role": "assistant", "content": "first words", "tool_calls": [broken]},
            {"role": "tool", "tool_call_id": "c1", "content": "not JSON"},
        ],
    ]
    for messages in histories:
        text = chat.tokenizer.decode(Conversations(chat).prompt(an_item(messages)))
        assert "first words" in text or str(template).startswith("llama")  # Llama's templates drop text beside a call
        assert "Heart attack" in text


def test_a_history_of_calls_in_a_row_looks_as_in_a_rollout() -> None:
    """Also for a template without tools: the calls and their results are text there."""
    chat = a_chat()
    calls = [
        {"id": f"c{i}", "type": "function", "function": {"name": "search", "arguments": f'{{"query": "q{i}"}}'}}
        for i in range(2)
    ]
    messages = [
        *ASKED,
        {"role": "assistant", "content": "I look.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c0", "content": "one"},
        {"role": "tool", "tool_call_id": "c1", "content": "two"},
    ]
    text = chat.tokenizer.decode(chat.first_prompt(an_item(messages)))
    assert '<tool_call>{"name": "search", "arguments": {"query": "q0"}}</tool_call>' in text
    assert "user\n<tool_response>one</tool_response>\n<tool_response>two</tool_response>" in text
