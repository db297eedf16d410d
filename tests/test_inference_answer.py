"""Requests are refused by the path of their field; deltas add up to the message; what is forced has training's form."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from test_chat import SEARCH

from rft.server.errors import ApiError
from rft.server.inference.answer import Choice
from rft.server.inference.constraint import constraint
from rft.server.inference.request import parse
from rft.server.inference.sampler import Delta
from rft.types import Item

USER: list[dict[str, Any]] = [{"role": "user", "content": "hi"}]
CALL = '<tool_call>{"name": "search", "arguments": {"query": "a"}}</tool_call>'


def a_request(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": USER} | fields


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "x"}]}]}, "messages[0].tool_calls"),
        ({"temperature": 3}, "temperature"),
        ({"n": 0}, "n"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"audio": {}}, "audio"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tools": [SEARCH, SEARCH]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [SEARCH], "tool_choice": {"type": "function", "function": {"name": "find"}}}, "tool_choice"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"top_logprobs": 2}, "top_logprobs"),
    ],
)
def test_what_a_local_model_cannot_do_is_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse(a_request(**fields))
    assert caught.value.status == 400
    assert caught.value.param == param


def test_null_counts_as_not_given_and_blocks_are_joined() -> None:
    content = [{"type": "text", "text": "a"}, {"type": "text", "text": "b\ud800"}]
    chat = parse(a_request(messages=[{"role": "user", "content": content}], stop=None, tools=None, n=None))
    assert chat.item().messages[0].content == "ab?"
    assert chat.stop == []


TEXTS = [
    "plain words",
    "  white space around \n\n",
    "<think>\nshort thought\n</think>\n\nThe answer < 5.",
    "<think>a thought that does not end",
    "<thin is no thought",
    f"I look.\n{CALL}",
    f"{CALL}\n{CALL}",
    f"before {CALL} between <tool_call>{{oops</tool_call> after",
    "<tool_call>{oops",
    "a < b and <tool is nothing",
    '{"name": "search", "parameters": {"query": "a"}}',
    "[1, 2]",
    "",
]


@pytest.mark.parametrize("dialect", ["hermes", "llama3", "mistral"])
@pytest.mark.parametrize("has_tools", [True, False])
@pytest.mark.parametrize("text", TEXTS)
def test_deltas_add_up_to_the_message(text: str, has_tools: bool, dialect: Any) -> None:
    item = Item(id="x", row={}, messages=[], tools=[SEARCH] if has_tools else [])
    for seed in range(8):
        random, choice, at = Random(seed), Choice(item, dialect), 0
        total: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
        while True:
            end = min(len(text), at + random.randint(1, 6))
            for delta in choice.feed(Delta(0, text[at:end], [1], "stop" if end == len(text) else None)):
                for key, part in delta.items():
                    total[key] += part
            if end == len(text):
                break
            at = end
        message = choice.body(0)["message"]
        assert total["content"] == (message["content"] or "")
        assert total["reasoning_content"] == message.get("reasoning_content", "")
        calls = [{key: value for key, value in call.items() if key != "index"} for call in total["tool_calls"]]
        assert calls == message.get("tool_calls", [])


def test_calls_that_cannot_be_parsed_stay_text() -> None:
    item = Item(id="x", row={}, messages=[], tools=[SEARCH])
    choice = Choice(item, "hermes")
    choice.feed(Delta(0, "<tool_call>{oops</tool_call>", [1], "stop"))
    assert choice.body(0)["message"]["content"] == "<tool_call>{oops</tool_call>"
    assert choice.wire_finish_reason == "stop"


def test_without_parallel_calls_the_first_is_kept() -> None:
    item = Item(id="x", row={}, messages=[], tools=[SEARCH], parallel_tool_calls=False)
    choice = Choice(item, "hermes")
    choice.feed(Delta(0, CALL + CALL, [1], "stop"))
    message = choice.body(0)["message"]
    assert len(message["tool_calls"]) == 1 and message["content"] is None
    assert choice.wire_finish_reason == "tool_calls"


@pytest.mark.parametrize("dialect", ["hermes", "llama3"])
@pytest.mark.parametrize("is_generic", [True, False])
def test_forced_calls_are_calls_when_they_are_parsed(dialect: Any, is_generic: bool) -> None:
    """What the constraint lets a model write is what training's parser reads."""
    chat = parse(a_request(tools=[SEARCH], tool_choice="required"))
    form = constraint(chat, dialect, is_generic=is_generic)
    assert form is not None
    (tag,) = form["format"]["tags"]
    choice = Choice(chat.item(), dialect)
    text = form["format"]["separator"].join([f'{tag["begin"]}{{"query": "a"}}{tag["end"]}'] * 2)
    choice.feed(Delta(0, text, [1], "stop"))
    message = choice.body(0)["message"]
    assert [call["function"]["arguments"] for call in message["tool_calls"]] == ['{"query": "a"}'] * 2
    assert message["content"] is None


def test_a_format_beside_tools_leaves_both_open() -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    form = constraint(parse(a_request(tools=[SEARCH], response_format=schema)), "hermes", is_generic=True)
    assert form is not None
    assert [part["type"] for part in form["format"]["elements"]] == ["json_schema", "tags_with_separator"]
    assert constraint(parse(a_request(tools=[SEARCH])), "hermes", is_generic=True) is None
