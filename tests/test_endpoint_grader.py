"""The endpoint grader: what it sends, what it takes for a grade, how it fails, how fast it may ask."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest
from fakes import ScriptedServer
from pydantic import TypeAdapter, ValidationError

from rft.errors import GraderError
from rft.graders import GraderSpec
from rft.graders.endpoint import EndpointGrader, EndpointSpec
from rft.graders.sample import sample_of_text
from rft.types import Grade, Item
from rft.wire import RetryPolicy

ROW = {"messages": [{"role": "user", "content": "?"}], "target": 28}
ITEM = Item(id="1", row=ROW, messages=[])
Script = Callable[[int, dict[str, Any]], tuple[int, Any] | None]


def grade(server: ScriptedServer, answer: str = "28", **fields: Any) -> Grade:
    return grades(server, 1, answer, **fields)[0]


def grades(server: ScriptedServer, count: int, answer: str = "28", **fields: Any) -> list[Grade]:
    async def story() -> list[Grade]:
        spec = EndpointSpec.model_validate({"type": "endpoint", "url": f"{server.base_url}/grade", **fields})
        grader = EndpointGrader(spec, RetryPolicy(first_wait_s=0.001))
        try:
            return await asyncio.gather(
                *(grader.grade(ITEM, sample_of_text(answer), f"trace_{number}") for number in range(count))
            )
        finally:
            await grader.close()

    return asyncio.run(story())


def test_the_request_is_the_contracts() -> None:
    with ScriptedServer(lambda n, body: (200, {"score": 0.5, "extra": "ignored"})) as server:
        assert grade(server, headers={"X-Key": "hidden"}).score == 0.5
    assert server.requests == [{"sample": sample_of_text("28"), "item": ROW, "trace_id": "trace_0"}]
    assert server.headers[0]["x-key"] == "hidden"
    assert server.paths == ["/grade"]


@pytest.mark.parametrize("score", [0, 1, 7.5, -2])
def test_any_finite_number_is_a_grade(score: float) -> None:
    with ScriptedServer(lambda n, body: (200, {"score": score})) as server:
        assert grade(server).score == score


BAD = [
    *((500, {}), (503, {}), (404, {"error": "no"}), (302, {}), (413, {}), None, (200, {"score": "1"}), (200, {})),
    *((200, {"score": True}), (200, [1]), (200, b"<html>"), (200, b'{"score": NaN}'), (200, b'{"score": 1e999}')),
    (200, {"score": 10**400}),
]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_anything_else_is_tried_again_and_then_an_error(bad: tuple[int, Any] | None) -> None:
    with ScriptedServer(lambda n, body: bad if n < 3 else (200, {"score": 1})) as server:
        assert grade(server).score == 1.0
    assert len(server.requests) == 4
    with ScriptedServer(lambda n, body: bad) as server, pytest.raises(GraderError, match="failed 4 times") as caught:
        grade(server)
    assert (caught.value.flag, len(server.requests)) == ("endpoint_grader_server_error", 4)


def test_a_hanging_endpoint_meets_its_deadline() -> None:
    slow = ScriptedServer(lambda n, body: (200, {"score": 1}), delay_s=30)
    with slow as server, pytest.raises(GraderError, match="no answer within"):
        grade(server, timeout_s=0.1)


def test_headers_stay_out_of_texts() -> None:
    leaky = ScriptedServer(lambda n, body: (500, {"error": "your key was hidden-key"}))
    with leaky as server, pytest.raises(GraderError) as caught:
        grade(server, headers={"Authorization": "hidden-key"})
    spec = EndpointSpec.model_validate({"type": "endpoint", "url": "http://a/b", "headers": {"A": "hidden-key"}})
    assert "hidden-key" not in str(caught.value) + repr(spec) + spec.model_dump_json()


def test_requests_keep_to_the_rate_limit() -> None:
    with ScriptedServer(lambda n, body: (200, {"score": 1})) as server:
        started = time.monotonic()
        grades(server, 30, rate_limit=50)
    assert time.monotonic() - started > 0.48, "30 requests at 50 a second, 5 of them at once"


def test_a_sample_beyond_the_cap_is_an_error() -> None:
    willing = ScriptedServer(lambda n, body: (200, {"score": 1}))
    with willing as server, pytest.raises(GraderError, match="more than the endpoint grader sends"):
        grade(server, "x" * 1_000_001)
    assert server.requests == []


def test_a_dead_endpoint_is_found_at_the_start() -> None:
    async def story() -> None:
        grader = EndpointGrader(EndpointSpec(url="http://127.0.0.1:1/grade"))
        try:
            await grader.start()
        finally:
            await grader.close()

    with pytest.raises(GraderError, match=r"http://127\.0\.0\.1:1/grade cannot be reached"):
        asyncio.run(story())


@pytest.mark.parametrize("url", ["host/grade", "ftp://host", "http://", "https://[::1", "http://host:99999/"])
def test_bad_urls_are_refused(url: str) -> None:
    with pytest.raises(ValidationError, match="url must be complete"):
        TypeAdapter(GraderSpec).validate_python({"type": "endpoint", "url": url})
