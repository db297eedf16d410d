"""The HTTP environment against a server that misbehaves in every way the contract speaks of."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from pydantic import ValidationError

from rft.envs.http import HttpEnvironment, HttpEnvironmentConfig, HttpToolConfig
from rft.errors import ToolError, UserError
from rft.types import Item, Message, ToolCall, ToolResult
from rft.wire import MAX_BODY_BYTES, RetryPolicy, redact, safe_url
from tests.fakes import FaultyToolServer

SECRET = "sk-very-secret"
QUICK = RetryPolicy(first_wait_s=0.01, max_wait_s=0.02)


def item_with(*names: str, **row: Any) -> Item:
    tools = [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in names]
    return Item(id="rows-00001", row={"code": "K35", **row}, messages=[Message(role="user", content="x")], tools=tools)


def call_of(name: str, arguments: str = '{"query": "x"}', index: int = 0) -> ToolCall:
    return ToolCall(id=f"fc_{index}", call_id=f"call_{index}", name=name, arguments=arguments)


def run_with(behaviour: str, use: Callable[[HttpEnvironment, FaultyToolServer], Awaitable[Any]], **tool: Any) -> Any:
    """Run `use` with an environment of one tool, `t`, that behaves as told."""

    async def body() -> Any:
        tools = (HttpToolConfig(name="t", server_url=server.base_url + "/t", **tool),)
        environment = HttpEnvironment(HttpEnvironmentConfig(tools=tools), retry=QUICK)
        try:
            return await asyncio.wait_for(use(environment, server), 10)
        finally:
            await environment.close()

    with FaultyToolServer({"t": behaviour}) as server:
        return asyncio.run(body())


def call_once(behaviour: str, **tool: Any) -> tuple[ToolResult, list[dict[str, Any]]]:
    async def use(environment: HttpEnvironment, server: FaultyToolServer) -> tuple[ToolResult, list[dict[str, Any]]]:
        session = await environment.open(item_with("t"), "trace_1")
        result = await session.call(call_of("t"))
        await session.close()
        return result, server.requests

    result: tuple[ToolResult, list[dict[str, Any]]] = run_with(behaviour, use, **tool)
    return result


def failure_of(behaviour: str, **tool: Any) -> tuple[ToolError, list[dict[str, Any]]]:
    async def use(environment: HttpEnvironment, server: FaultyToolServer) -> tuple[ToolError, list[dict[str, Any]]]:
        session = await environment.open(item_with("t"), "trace_1")
        with pytest.raises(ToolError) as caught:
            await session.call(call_of("t"))
        return caught.value, server.requests

    result: tuple[ToolError, list[dict[str, Any]]] = run_with(behaviour, use, **tool)
    return result


def test_the_request_has_the_body_of_the_contract() -> None:
    result, requests = call_once("ok")
    assert requests == [
        {
            "type": "function_call",
            "id": "fc_0",
            "call_id": "call_0",
            "name": "t",
            "arguments": '{"query": "x"}',
            "trace_id": "trace_1",
            "item": {"code": "K35"},
        }
    ]
    assert result.output == '{"query": "x"}' and not result.is_error
    assert result.call_id == "call_0" and result.num_attempts == 1 and result.latency_s > 0


@pytest.mark.parametrize("behaviour", ["500_once", "drop_once"])
def test_a_transient_failure_is_retried_with_the_same_call_id(behaviour: str) -> None:
    result, requests = call_once(behaviour)
    assert result.num_attempts == 2 and not result.is_error
    assert len(requests) == 2 and requests[0] == requests[1]


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        ("500", "HTTP 500"),
        ("half_closed", "connection broke"),
        ("invalid_json", "is not JSON"),
        ("no_output", 'no string "output"'),
        ("wrong_call_id", "is to another call"),
    ],
)
def test_a_lasting_failure_discards_the_rollout_after_all_attempts(behaviour: str, words: str) -> None:
    error, requests = failure_of(behaviour)
    assert len(requests) == 4
    assert "tool t" in str(error) and words in str(error)


def test_a_hanging_server_is_left_at_the_deadline() -> None:
    started = time.monotonic()
    error, requests = failure_of("hang", timeout_s=0.2, max_attempts=2)
    assert "no answer within 0.2 s" in str(error)
    assert len(requests) == 2 and time.monotonic() - started < 3


def test_a_slow_server_within_the_deadline_is_waited_for() -> None:
    result, _ = call_once("slow:0.3", timeout_s=5)
    assert not result.is_error and result.latency_s >= 0.3


@pytest.mark.parametrize("status", ["400", "404"])
def test_4xx_is_shown_to_the_model_and_not_retried(status: str) -> None:
    result, requests = call_once(status)
    assert result.is_error and json.loads(result.output) == {"error": f"refused with {status}"}
    assert len(requests) == 1


def test_4xx_with_an_output_shows_the_output() -> None:
    result, _ = call_once("4xx_output")
    assert result.is_error and result.output == "Error: no such document"


@pytest.mark.parametrize("behaviour", ["too_large", "too_large_400"])
def test_an_answer_above_the_cap_is_a_413_for_the_model(behaviour: str) -> None:
    result, requests = call_once(behaviour)
    assert result.is_error and result.output.startswith("413: the answer of t")
    assert len(requests) == 1


def test_a_request_above_the_cap_is_never_sent() -> None:
    async def use(environment: HttpEnvironment, server: FaultyToolServer) -> None:
        session = await environment.open(item_with("t", filler="x" * MAX_BODY_BYTES), "trace_1")
        result = await session.call(call_of("t"))
        assert result.is_error and result.output.startswith("413: the request of t")
        assert server.requests == []

    run_with("ok", use)


def test_a_redirect_is_not_followed() -> None:
    error, requests = failure_of("redirect")
    assert "redirect" in str(error) and "cure" in str(error)
    assert len(requests) == 1


def test_half_a_surrogate_pair_is_replaced() -> None:
    result, _ = call_once("surrogate")
    assert result.output == "half ?"


def test_a_tool_the_row_does_not_have_is_an_error_for_the_model() -> None:
    async def use(environment: HttpEnvironment, server: FaultyToolServer) -> None:
        session = await environment.open(item_with("other"), "trace_1")
        result = await session.call(call_of("t"))
        assert result.is_error and "there is no tool t; the tools are: other" in result.output
        assert server.requests == []

    run_with("ok", use)


def test_calls_run_at_once() -> None:
    async def use(environment: HttpEnvironment, server: FaultyToolServer) -> None:
        session = await environment.open(item_with("t"), "trace_1")
        started = time.monotonic()
        results = await asyncio.gather(*(session.call(call_of("t", f"[{i}]", i)) for i in range(50)))
        assert time.monotonic() - started < 5  # one after the other they would take 15 s
        assert [result.output for result in results] == [f"[{i}]" for i in range(50)]
        assert server.max_concurrent > 10

    run_with("slow:0.3", use)


def test_several_tools_may_share_a_url_and_are_told_apart_by_name() -> None:
    async def use() -> None:
        tools = [HttpToolConfig(name=name, server_url=server.base_url + "/tools") for name in ("a", "b")]
        environment = HttpEnvironment(HttpEnvironmentConfig(tools=tuple(tools)), retry=QUICK)
        session = await environment.open(item_with("a", "b"), "trace_1")
        first, second = [await session.call(call_of(name)) for name in ("a", "b")]
        await environment.close()
        assert not first.is_error and second.is_error
        assert [request["name"] for request in server.requests] == ["a", "b"]
        assert server.paths == ["/tools", "/tools"]

    with FaultyToolServer({"a": "ok", "b": "404"}) as server:
        asyncio.run(use())


def test_headers_are_sent_and_never_shown(caplog: pytest.LogCaptureFixture) -> None:
    async def use(environment: HttpEnvironment, server: FaultyToolServer) -> None:
        session = await environment.open(item_with("t"), "trace_1")
        with pytest.raises(ToolError) as caught:
            await session.call(call_of("t"))
        assert server.headers[0]["authorization"] == f"Bearer {SECRET}"
        for text in (str(caught.value), repr(environment.config), environment.config.model_dump_json(), caplog.text):
            assert SECRET not in text

    with caplog.at_level(logging.DEBUG):
        run_with("500", use, headers={"Authorization": f"Bearer {SECRET}"}, max_attempts=2)


def test_urls_and_headers_are_redacted() -> None:
    assert safe_url(f"https://user:{SECRET}@host:8/path?key={SECRET}#x") == "https://host:8/path"
    assert redact({"Authorization": SECRET}) == {"Authorization": "***"}


def test_check_names_tool_url_and_cure() -> None:
    async def use() -> None:
        url = f"http://user:{SECRET}@127.0.0.1:1/t"
        environment = HttpEnvironment(HttpEnvironmentConfig(tools=(HttpToolConfig(name="t", server_url=url),)))
        with pytest.raises(UserError) as caught:
            await environment.check()
        await environment.close()
        text = str(caught.value)
        assert "tool t" in text and "http://127.0.0.1:1/t" in text and "rft tools icd10 --port 1" in text
        assert SECRET not in text

    asyncio.run(use())


def test_check_passes_where_somebody_listens() -> None:
    run_with("ok", lambda environment, _: environment.check())


def test_a_served_task_needs_no_urls() -> None:
    async def use() -> None:
        environment = HttpEnvironment(HttpEnvironmentConfig(serve="icd10"))
        specs = await environment.discover()
        assert specs.keys() == {"search_codes", "lookup_code"} and all(specs.values())
        environment.base_url = "http://127.0.0.1:1"
        with pytest.raises(UserError, match=r"http://127\.0\.0\.1:1/(search_codes|lookup_code)"):
            await environment.check()
        await environment.close()

    asyncio.run(use())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"tools": [{"name": "a", "server_url": "ftp://x"}]}, "server_url of a must start with http"),
        ({"tools": [{"name": "a", "server_url": "http://h:port/x"}]}, "server_url of a"),
        ({"tools": [{"name": "a", "server_url": "/a"}]}, "server_url of a"),
        ({"tools": [{"name": "a", "server_url": "http://h/a"}] * 2}, "a appears twice"),
        ({"tools": []}, "at least one is needed"),
        ({"tools": [{"name": "a", "server_url": "http://h", "retries": 3}]}, "Extra inputs"),
        ({"tools": [{"name": "a", "server_url": "http://h", "headers": {"X": f"{SECRET}\n"}}]}, "cannot send"),
    ],
)
def test_a_wrong_config_is_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words) as caught:
        HttpEnvironmentConfig.model_validate(config)
    assert SECRET not in str(caught.value)


def test_further_keys_travel_with_every_call_and_replace_none_of_the_contract() -> None:
    async def use(environment: HttpEnvironment, server: FaultyToolServer) -> list[dict[str, Any]]:
        session = await environment.open(item_with("t"), "trace_1")
        await session.call(call_of("t"))
        return server.requests

    (request,) = run_with("ok", use, extra={"region": "eu", "trace_id": "forged"})
    assert request["region"] == "eu" and request["trace_id"] == "trace_1"


def test_a_tool_may_have_a_spec_for_rows_that_name_no_tools() -> None:
    spec = {"type": "function", "function": {"name": "a", "parameters": {"type": "object"}}}

    async def use() -> None:
        tools = [{"name": "a", "server_url": "http://h/a", "function": spec}, {"name": "b", "server_url": "http://h/b"}]
        environment = HttpEnvironment(HttpEnvironmentConfig.model_validate({"tools": tools}))
        assert await environment.discover() == {"a": spec, "b": None}
        await environment.close()

    asyncio.run(use())


def test_a_tool_with_a_rate_limit_is_not_called_faster() -> None:
    async def use(environment: HttpEnvironment, server: FaultyToolServer) -> None:
        session = await environment.open(item_with("t"), "trace_1")
        started = time.monotonic()
        await asyncio.gather(*(session.call(call_of("t", f"[{i}]", i)) for i in range(30)))
        assert time.monotonic() - started > 0.48, "30 requests at 50 a second, 5 of them at once"

    run_with("ok", use, rate_limit=50)
