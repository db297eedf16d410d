"""A local model as a chat model, with a sampler that says what a test tells it to."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
from test_chat import SEARCH, a_chat

from rft.server.errors import ApiError
from rft.server.inference.model import ChatModel
from rft.server.inference.request import LocalChat
from rft.server.inference.sampler import Delta, Prompt

CALL = '<tool_call>{"name": "search", "arguments": {"query": "a"}}</tool_call>'


class ScriptedSampler:
    """Says each text in turn, one byte (which is a token here) at a time, for every choice."""

    def __init__(self, *texts: str) -> None:
        self.chat, self.texts, self.prompts = a_chat(), list(texts), list[Prompt]()

    async def start(self) -> None: ...

    async def sample(self, prompt: Prompt, chat: LocalChat) -> AsyncGenerator[Delta]:
        self.prompts.append(prompt)
        text = self.texts[min(len(self.prompts), len(self.texts)) - 1]
        ids = self.chat.tokenizer.encode(text, add_special_tokens=False)
        for index in range(chat.n):
            for letter, token in zip(text, ids, strict=True):
                yield Delta(index, letter, [token], None)
            yield Delta(index, "", [self.chat.end_of_turn], "stop")
        yield Delta(0, "", [], None, num_cached=3)

    async def add_adapter(self, name: str, path: Path) -> None: ...

    async def died(self) -> None: ...

    async def close(self) -> None: ...


def a_model(*texts: str, max_model_len: int = 2000) -> tuple[ChatModel, ScriptedSampler]:
    sampler = ScriptedSampler(*texts)
    return ChatModel(sampler.chat, sampler, max_model_len), sampler


def a_body(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": "hi"}]} | fields


async def all_of(chunks: AsyncGenerator[dict[str, Any]]) -> list[dict[str, Any]]:
    return [chunk async for chunk in chunks]


def test_usage_counts_every_sampled_token() -> None:
    model, sampler = a_model("<think>hm</think>yes")
    answer = asyncio.run(model.complete(a_body(n=2)))
    num_prompt = len(sampler.prompts[0].ids)
    assert answer["usage"]["prompt_tokens"] == num_prompt
    assert answer["usage"]["completion_tokens"] == 2 * (len("<think>hm</think>yes") + 1)
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 4
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 3
    assert [c["message"]["content"] for c in answer["choices"]] == ["yes", "yes"]
    assert answer["choices"][1]["message"]["reasoning_content"] == "hm"


def test_a_stream_ends_each_choice_once_and_says_the_usage_when_asked() -> None:
    model, _ = a_model(f"I look. {CALL}")
    body = a_body(n=2, tools=[SEARCH], stream=True)
    chunks = asyncio.run(all_of(model.stream(body)))
    assert all("usage" not in chunk for chunk in chunks)
    ends = [c["choices"][0] for c in chunks if c["choices"][0]["finish_reason"]]
    assert [(end["index"], end["finish_reason"]) for end in ends] == [(0, "tool_calls"), (1, "tool_calls")]
    firsts = {c["choices"][0]["index"]: c["choices"][0]["delta"] for c in reversed(chunks)}
    assert [delta["role"] for delta in firsts.values()] == ["assistant"] * 2
    chunks = asyncio.run(all_of(model.stream(body | {"stream_options": {"include_usage": True}})))
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] > 0
    assert chunks[0]["usage"] is None


def test_a_loop_goes_on_from_the_ids_that_were_sampled() -> None:
    """The second prompt begins with the first one and what was sampled after it, spelled as no template would."""
    odd = '<tool_call>{"arguments": {"query":   "a"}, "name": "search"}</tool_call>'
    model, sampler = a_model(odd, "done")
    body = a_body(tools=[SEARCH])
    answer = asyncio.run(model.complete(body))
    said = answer["choices"][0]["message"]
    result = {"role": "tool", "tool_call_id": said["tool_calls"][0]["id"], "content": "I21.9"}
    asyncio.run(model.complete(body | {"messages": [*body["messages"], said, result]}))
    first, second = (prompt.ids for prompt in sampler.prompts)
    sampled = [*sampler.chat.tokenizer.encode(odd, add_special_tokens=False), sampler.chat.end_of_turn]
    assert second[: len(first) + len(sampled)] == [*first, *sampled]


def test_the_context_is_a_limit() -> None:
    model, sampler = a_model("x", max_model_len=120)
    with pytest.raises(ApiError) as caught:
        asyncio.run(model.complete(a_body(messages=[{"role": "user", "content": "x" * 200}])))
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "messages"
    asyncio.run(model.complete(a_body(max_tokens=5000)))
    assert sampler.prompts[0].max_tokens == 120 - len(sampler.prompts[0].ids)
    asyncio.run(model.complete(a_body(max_completion_tokens=7)))
    assert sampler.prompts[1].max_tokens == 7


def test_what_a_template_cannot_write_is_the_clients_to_change() -> None:
    model, sampler = a_model("x")
    sampler.chat.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ApiError, match="roles must alternate") as caught:
        asyncio.run(model.complete(a_body()))
    assert caught.value.status == 400


def test_tools_may_have_null_fields_and_odd_names() -> None:
    model, sampler = a_model("x")
    tool = {"type": "function", "function": {"name": 'a"b', "description": None, "parameters": None}}
    asyncio.run(model.complete(a_body(tools=[tool], tool_choice="required")))
    form = sampler.prompts[0].constraint
    assert form is not None and '"a\\"b"' in form["format"]["tags"][0]["begin"]


def test_without_tool_choice_the_tools_are_not_shown() -> None:
    model, sampler = a_model(CALL)
    answer = asyncio.run(model.complete(a_body(tools=[SEARCH], tool_choice="none")))
    assert "search" not in sampler.chat.tokenizer.decode(sampler.prompts[0].ids)
    assert answer["choices"][0]["message"]["content"] == CALL


def test_the_server_process_imports_nothing_heavy() -> None:
    heavy = "torch transformers vllm peft accelerate"
    code = f"import sys, rft.server.app; print(*sorted(set('{heavy}'.split()) & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.split() == []
