"""Responses and remote models with the real SDK: the model is a scripted server elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel
from serving import serving
from upstream import Upstream, a_call, answering

from rft.server.index import Index
from rft.server.inference.response_objects import output_items
from rft.server.inference.response_request import ResponseRequest
from rft.server.inference.responses import chat_body
from rft.server.inference.stored import StoredResponses
from rft.server.settings import ServerConfig

SEARCH = {
    "type": "function",
    "name": "search",
    "description": "Search the table",
    "parameters": {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]},
}
Connect = Callable[..., Any]


class Capital(BaseModel):
    city: str
    country: str


@pytest.fixture
def connect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Connect:
    """A client of a server whose model `m` is the upstream, under the name `there`."""
    monkeypatch.setenv("UPSTREAM_KEY", "sk-secret")

    @contextmanager
    def connected(upstream: Upstream) -> Iterator[OpenAI]:
        with answering(upstream) as url:
            model = {"url": url, "model": "there", "api_key_env": "UPSTREAM_KEY"}
            config = {"data_dir": tmp_path / "data", "models": {"m": model, "local": {"path": tmp_path / "nothing"}}}
            with serving(ServerConfig.model_validate(config)) as base_url:
                yield OpenAI(base_url=base_url, api_key="x", max_retries=0)

    return connected


def test_models_are_listed_retrieved_and_not_deleted(connect: Connect) -> None:
    with connect(Upstream({"content": "x"})) as client:
        assert [model.id for model in client.models.list()] == ["m", "local"]
        assert client.models.retrieve("m").object == "model"
        with pytest.raises(openai.NotFoundError) as missing:
            client.models.retrieve("ft:m:rft:x:abc:ckpt-step-10")
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.PermissionDeniedError):
            client.models.delete("m")


def test_a_remote_model_gets_the_request_under_its_own_name(connect: Connect) -> None:
    upstream = Upstream({"content": "Paris"})
    with connect(upstream) as client:
        messages: Any = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:x"}}]}]
        reply = client.chat.completions.create(model="m", messages=messages, temperature=0.5)
        assert reply.choices[0].message.content == "Paris"
        chunks = list(client.chat.completions.create(model="m", messages=messages, stream=True))
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Paris"
    assert upstream.bodies[0] == {"model": "there", "messages": messages, "temperature": 0.5}
    assert upstream.keys == ["Bearer sk-secret"] * 2


@pytest.mark.parametrize(
    ("status", "error", "code"),
    [
        (400, openai.BadRequestError, "some_code"),
        (401, openai.InternalServerError, "model_not_available"),
        (429, openai.RateLimitError, "rate_limit_exceeded"),
        (500, openai.InternalServerError, "server_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_of_a_remote_model_are_mapped_without_its_key(
    connect: Connect, status: int, error: type[openai.APIStatusError], code: str, stream: bool
) -> None:
    with connect(Upstream(status)) as client:
        with pytest.raises(error) as caught:
            client.chat.completions.create(model="m", messages=[{"role": "user", "content": "x"}], stream=stream)
        assert caught.value.code == code
        assert "sk-secret" not in caught.value.message


def test_a_remote_model_that_is_away_is_said_to_be(tmp_path: Path) -> None:
    model = {"url": "http://127.0.0.1:9/v1"}
    with serving(ServerConfig.model_validate({"data_dir": tmp_path / "data", "models": {"m": model}})) as base_url:
        client = OpenAI(base_url=base_url, api_key="x", max_retries=0)
        with pytest.raises(openai.InternalServerError, match="cannot be reached") as caught:
            client.responses.create(model="m", input="x")
        assert caught.value.status_code == 503


def test_text_in_text_out(connect: Connect) -> None:
    upstream = Upstream({"content": "Paris"})
    with connect(upstream) as client:
        response = client.responses.create(
            model="m", input="The capital of France?", instructions="Be brief.", reasoning={"effort": "minimal"}
        )
    assert response.output_text == "Paris"
    assert response.status == "completed" and response.id.startswith("resp_")
    assert response.usage is not None and response.usage.input_tokens == 7
    assert (response.usage.output_tokens, response.usage.total_tokens) == (5, 12)
    assert upstream.bodies[0]["messages"] == [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "The capital of France?"},
    ]
    assert upstream.bodies[0]["reasoning_effort"] == "minimal"


def test_parse_gives_objects(connect: Connect) -> None:
    upstream = Upstream({"content": '{"city": "Paris", "country": "France"}'})
    with connect(upstream) as client:
        response = client.responses.parse(
            model="m",
            reasoning={"effort": "low"},
            input=[{"role": "user", "content": "The capital of France?"}],
            text_format=Capital,
        )
        assert response.output_parsed == Capital(city="Paris", country="France")
        with client.responses.stream(model="m", input="again", text_format=Capital) as stream:
            assert stream.get_final_response().output_parsed == Capital(city="Paris", country="France")
    form = upstream.bodies[0]["response_format"]
    assert form["type"] == "json_schema" and form["json_schema"]["name"] == "Capital"
    assert form["json_schema"]["schema"]["additionalProperties"] is False


def test_an_agent_loop_with_echoed_items(connect: Connect) -> None:
    """The loop of published agent code: outputs go back as they came, with thoughts that nobody can read."""
    calls = [a_call("search", "call_1", query="a"), a_call("search", "call_2", query="b")]
    upstream = Upstream(
        {"content": "I look.", "reasoning_content": "hm", "tool_calls": calls}, {"content": '{"answer": "I21.9"}'}
    )
    context: list[Any] = [{"role": "developer", "content": "Find codes."}, {"role": "user", "content": "Heart attack"}]
    with connect(upstream) as client:
        for _ in range(4):
            response = client.responses.create(
                model="m",
                input=context,
                tools=[SEARCH],  # type: ignore[list-item]
                tool_choice="auto",
                reasoning={"effort": "low"},
                store=False,
                include=["reasoning.encrypted_content"],
                parallel_tool_calls=True,
                text={"format": {"type": "json_object"}},
            )
            context += response.output
            asked = [item for item in response.output if item.type == "function_call"]
            if not asked:
                break
            for call in asked:
                query = json.loads(call.arguments)["query"]
                context.append({"type": "function_call_output", "call_id": call.call_id, "output": f"found {query}"})
    assert json.loads(response.output_text) == {"answer": "I21.9"}
    first, second = upstream.bodies
    assert first["tools"][0]["function"]["name"] == "search"
    assert second["messages"][2:] == [
        {"role": "assistant", "content": "I look.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "call_1", "content": "found a"},
        {"role": "tool", "tool_call_id": "call_2", "content": "found b"},
    ]


@pytest.mark.parametrize("summary", [None, "detailed"])
def test_streams_say_what_the_whole_response_says(connect: Connect, summary: Any) -> None:
    calls = [a_call("search", "call_1", query="a"), a_call("search", "call_2", query="b")]
    with connect(Upstream({"reasoning_content": "let me think", "content": "I look.", "tool_calls": calls})) as client:
        options: Any = {"model": "m", "input": "x", "tools": [SEARCH], "reasoning": {"summary": summary}}
        whole = client.responses.create(**options)
        events = list(client.responses.create(**options, stream=True))
        with client.responses.stream(**options) as stream:
            kinds = [event.type for event in stream]
            final = stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events] == kinds
    assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.completed"
    assert ("response.reasoning_summary_text.delta" in kinds) == (summary is not None)
    completed = events[-1].response  # type: ignore[union-attr]
    for other in (completed, final):
        assert [unnamed(item.to_dict()) for item in other.output] == [unnamed(i.to_dict()) for i in whole.output]
        assert other.usage == whole.usage
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == "I look."
    assert [item.type for item in whole.output] == ["reasoning", "message", "function_call", "function_call"]


def unnamed(item: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in item.items() if key not in ("id", "parsed_arguments", "parsed")} | {
        "content": [{k: v for k, v in part.items() if k != "parsed"} for part in item.get("content") or []]
    }


def test_responses_are_kept_and_continued(connect: Connect) -> None:
    upstream = Upstream({"content": "one"}, {"content": "two"}, {"content": "three"})
    with connect(upstream) as client:
        first = client.responses.create(model="m", input="a", instructions="only here", metadata={"k": "v"})
        second = client.responses.create(model="m", input="b", previous_response_id=first.id)
        third = client.responses.create(
            model="m", input=[{"role": "user", "content": "c"}], previous_response_id=second.id, store=False
        )
        assert [m["content"] for m in upstream.bodies[2]["messages"]] == ["a", "one", "b", "two", "c"]
        found = client.responses.retrieve(second.id)
        assert found.output_text == "two" and found.previous_response_id == first.id
        assert client.responses.retrieve(first.id).metadata == {"k": "v"}
        items = client.responses.input_items.list(second.id).data
        assert [item.content[0].text for item in items] == ["b"]  # type: ignore[union-attr]
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(third.id)
        with pytest.raises(openai.BadRequestError, match="Cannot cancel"):
            client.responses.cancel(first.id)
        client.responses.delete(first.id)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(first.id)
        with pytest.raises(openai.BadRequestError) as gone:
            client.responses.create(model="m", input="d", previous_response_id=second.id)
        assert gone.value.code == "previous_response_not_found"


def test_input_items_are_paged(connect: Connect) -> None:
    with connect(Upstream({"content": "x"})) as client:
        asked: Any = [{"role": "user", "content": f"m{i}"} for i in range(5)]
        response = client.responses.create(model="m", input=asked)
        pages = client.responses.input_items.list(response.id, limit=2, order="asc")
        assert [item.content for item in pages] == [f"m{i}" for i in range(5)]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"include": ["message.input_image.image_url"]}, "include[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format"),
        ({"extra_body": {"nonsense": 1}}, "nonsense"),
        ({"model": "local", "tools": [SEARCH], "tool_choice": {"type": "function", "name": "find"}}, "tool_choice"),
    ],
)
def test_what_means_nothing_here_is_refused(connect: Connect, fields: dict[str, Any], param: str) -> None:
    """Before a model is loaded: the local one has no folder."""
    upstream = Upstream({"content": "x"})
    with connect(upstream) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            client.responses.create(**({"model": "m", "input": "x"} | fields))
        assert caught.value.param == param
    assert upstream.bodies == []


def test_thoughts_make_the_round_trip_to_a_local_model() -> None:
    said = {"reasoning_content": "hm \u00e9", "content": "yes", "tool_calls": [a_call("search", "c1", query="a")]}
    for fields in ({"include": ["reasoning.encrypted_content"]}, {"reasoning": {"summary": "auto"}}, {}):
        request = ResponseRequest.model_validate({"model": "m", "input": "x"} | fields)
        items = output_items(request, said)
        if "include" in fields:
            assert "hm" not in items[0]["encrypted_content"]
            items[0].pop("content")  # as from a server that shows no thoughts
        echoed = chat_body(request, items, is_local=True)["messages"][0]
        assert echoed == {"role": "assistant", **said}
        assert "reasoning_content" not in chat_body(request, items, is_local=False)["messages"][0]


def test_an_answer_that_met_its_limit_is_incomplete() -> None:
    request = ResponseRequest(model="m", input="x")
    assert output_items(request, {"content": "half"}, is_cut=True)[0]["status"] == "incomplete"


def test_old_responses_go(tmp_path: Path) -> None:
    index = Index(tmp_path / "i.sqlite")
    stored = StoredResponses(index, keep_days=1)
    for name, created_at in (("old", 1), ("new", 2**33)):
        body = {"id": name, "created_at": created_at, "output": [], "previous_response_id": None}
        stored.add(body, [], "p")
    assert [entry["id"] for entry in index.every("response")] == ["new"]
    assert stored.history("new", "p") == []
