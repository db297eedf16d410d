"""Graders and tools tried through the real SDK: rows 20 to 30 and 35 of the feature table."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import ScriptedServer, verdict
from openai import BadRequestError, NotFoundError, OpenAI
from serving import serving

from rft.graders.python import PythonGrader
from rft.server.settings import ServerConfig
from rft.wire import RetryPolicy

SECRET = "Bearer very-secret-value"
CHECK = {"type": "string_check", "name": "c", "input": "{{sample.output_text}}", "reference": "{{item.answer}}"}
PYTHON = {"type": "python", "name": "p", "source": "def grade(sample, item):\n    return 0.5\n"}
SCORE = {"type": "score_model", "name": "s", "model": "judge", "input": [{"role": "user", "content": "Grade."}]}
LABEL = {**SCORE, "type": "label_model", "labels": ["good", "bad"], "passing_labels": ["good"]}
SIMILAR = {"type": "text_similarity", "input": "{{sample.output_text}}", "reference": "{{ item.answer }}"}
ENDPOINT = {"type": "endpoint", "name": "e", "url": "http://127.0.0.1:1/grade", "headers": {"Authorization": SECRET}}


class Scripts:
    """What the judge and the tool server answer; each test writes its own."""

    def judge(self, number: int, body: dict[str, Any]) -> tuple[int, Any] | None:
        return verdict({"result": 0.5, "steps": []})


@pytest.fixture(scope="module")
def scripts() -> Scripts:
    return Scripts()


@pytest.fixture(scope="module")
def judge(scripts: Scripts) -> Iterator[ScriptedServer]:
    with ScriptedServer(lambda number, body: scripts.judge(number, body)) as server:
        yield server


@pytest.fixture(scope="module")
def client(judge: ScriptedServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    folder = tmp_path_factory.mktemp("server")
    models = {
        "m": {"path": folder / "m"},
        "judge": {"url": f"{judge.base_url}/v1"},
        "gpt-4o": {"alias": "judge"},
    }
    config = ServerConfig.model_validate({"data_dir": folder / "data", "models": models})
    with serving(config) as url:
        yield OpenAI(base_url=url, api_key="none", max_retries=2)


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RetryPolicy, "wait_s", lambda self, attempt: 0.0)


def grade(client: OpenAI, grader: dict[str, Any], sample: str = "yes", **item: Any) -> Any:
    return client.fine_tuning.alpha.graders.run(grader=grader, model_sample=sample, item=item)  # type: ignore[arg-type]


def multi(formula: str, **graders: Any) -> dict[str, Any]:
    return {"type": "multi", "name": "m", "graders": graders, "calculate_output": formula}


EQUAL = {**CHECK, "operation": "eq"}


@pytest.mark.parametrize(
    "grader",
    [EQUAL, {**SIMILAR, "evaluation_metric": "bleu"}, PYTHON, SCORE, LABEL, ENDPOINT, multi("2 * a", a=EQUAL)],
    ids=lambda grader: grader["type"],
)
def test_row_20_validate_gives_the_grader_back_and_names_it(client: OpenAI, grader: dict[str, Any]) -> None:
    nameless = {key: value for key, value in grader.items() if key != "name"}
    raw = client.fine_tuning.alpha.graders.with_raw_response.validate(grader=nameless)  # type: ignore[arg-type]
    given = json.loads(raw.text)["grader"]
    assert given["name"].startswith("grader-") and len(given["name"]) == len("grader-") + 12
    assert SECRET not in raw.text
    assert {key: value for key, value in given.items() if key not in ("name", "headers")} == {
        key: value for key, value in nameless.items() if key != "headers"
    }


@pytest.mark.parametrize(
    ("grader", "param"),
    [
        ({**CHECK, "operation": "neq"}, "grader.operation"),
        (multi("a", a=multi("b", b=EQUAL)), "grader.graders"),
        ({"type": "python", "source": "def score(sample, item): return 1"}, "grader.source"),
        ({"type": "python", "source": PYTHON["source"] + "#" * 256_000}, "grader.source"),
        (multi("a", a={**CHECK, "operation": "neq"}), "grader.graders.a.operation"),
        ({"type": "multi", "graders": {"input": "text"}, "calculate_output": "input"}, "grader.graders.input"),
        ("text", "grader"),
        ({"type": "reward_function", "path": "/etc/passwd"}, "grader.type"),
        (multi("a", a={"type": "environment"}), "grader.graders.a.type"),
        ({**SIMILAR, "evaluation_metric": "bleu", "embedding_model": "/etc"}, "grader.evaluation_metric"),
        ({**EQUAL, "surprise": 1}, "grader.surprise"),
    ],
)
def test_row_20_validate_refuses_naming_the_field(client: OpenAI, grader: Any, param: str) -> None:
    with pytest.raises(BadRequestError) as refused:
        client.fine_tuning.alpha.graders.validate(grader=grader)
    assert (refused.value.code, refused.value.param) == ("invalid_grader", param)


def test_row_20_a_text_in_place_of_a_grader_is_said_in_the_hosted_words(client: OpenAI) -> None:
    with pytest.raises(BadRequestError, match="expected an object, but got a string instead"):
        client.fine_tuning.alpha.graders.validate(
            grader={"type": "multi", "graders": {"input": "text"}, "calculate_output": "input"}  # type: ignore[arg-type]
        )


def test_row_21_run_answers_with_reward_errors_and_usage(client: OpenAI, scripts: Scripts) -> None:
    scripts.judge = lambda number, body: verdict({"result": 0.25, "steps": []})  # type: ignore[method-assign]
    found = grade(client, multi("a + j", a=EQUAL, j=SCORE), answer="yes")
    assert found.reward == 1.25 and found.sub_rewards == {"a": 1.0, "j": 0.25}
    assert found.metadata.type == "multi" and found.metadata.errors.formula_parse_error is False
    assert found.api_model_grader_token_usage_per_model == {
        "judge": {"prompt_tokens": 10, "completion_tokens": 5, "cached_tokens": 3}
    }
    missing = grade(
        client, {**SIMILAR, "evaluation_metric": "bleu", "input": "{{sample.output_json.x}}"}, "no", answer="no"
    )
    assert missing.reward == 0 and missing.metadata.errors.invalid_variable_error is True


@pytest.mark.parametrize(
    ("operation", "answer", "reference", "reward"),
    [
        ("eq", "Yes", "Yes", 1),
        ("eq", "Yes", "yes", 0),
        ("ne", "Yes", "yes", 1),
        ("ne", "Yes", "Yes", 0),
        ("like", "a Yes b", "Yes", 1),
        ("like", "a yes b", "Yes", 0),
        ("ilike", "a yes b", "Yes", 1),
        ("ilike", "Yes", "a Yes", 0),
    ],
)
def test_row_22_string_check(client: OpenAI, operation: str, answer: str, reference: str, reward: int) -> None:
    assert grade(client, {**CHECK, "operation": operation}, answer, answer=reference).reward == reward


METRICS = "fuzzy_match bleu gleu meteor rouge_1 rouge_2 rouge_3 rouge_4 rouge_5 rouge_l"


@pytest.mark.parametrize("metric", METRICS.split())
def test_row_23_text_similarity(client: OpenAI, metric: str) -> None:
    reference = "the quick brown fox jumps over the lazy dog"
    same = grade(client, {**SIMILAR, "evaluation_metric": metric}, reference, answer=reference).reward
    other = grade(client, {**SIMILAR, "evaluation_metric": metric}, "the quick brown cat", answer=reference).reward
    assert same == pytest.approx(1.0, abs=0.01) and 0 <= other < same


def test_row_23_cosine_is_refused(client: OpenAI) -> None:
    with pytest.raises(BadRequestError, match="cosine") as refused:
        grade(client, {**SIMILAR, "evaluation_metric": "cosine"}, answer="x")
    assert refused.value.param == "grader.evaluation_metric"


@pytest.mark.parametrize(
    ("result", "reward", "flag"),
    [(4, 4, None), (7, 5, None), (-1, 0, None), ("four", 0, "api_model_grader_parse_error")],
)
def test_row_24_score_model(client: OpenAI, scripts: Scripts, result: Any, reward: float, flag: str | None) -> None:
    asked: list[dict[str, Any]] = []

    def answer(number: int, body: dict[str, Any]) -> tuple[int, Any]:
        asked.append(body)
        return verdict({"result": result, "steps": []})

    scripts.judge = answer  # type: ignore[method-assign]
    found = grade(client, {**SCORE, "model": "gpt-4o", "range": [0, 5]})
    assert found.reward == reward
    assert flag is None or getattr(found.metadata.errors, flag) is True
    schema = asked[0]["response_format"]["json_schema"]["schema"]
    assert set(schema["properties"]) == {"result", "steps"}


def test_row_24_an_unknown_judge_and_one_that_fails(client: OpenAI, scripts: Scripts) -> None:
    with pytest.raises(NotFoundError) as refused:
        grade(client, {**SCORE, "model": "gpt-nothing"})
    assert refused.value.code == "model_not_found"
    scripts.judge = lambda number, body: (500, {"error": "down"})  # type: ignore[method-assign]
    found = grade(client, SCORE)
    assert found.reward == 0 and found.metadata.errors.api_model_grader_server_error is True


@pytest.mark.parametrize(("label", "reward"), [("good", 1), ("bad", 0)])
def test_row_25_label_model_in_multi(client: OpenAI, scripts: Scripts, label: str, reward: int) -> None:
    scripts.judge = lambda number, body: verdict({"label": label, "steps": []})  # type: ignore[method-assign]
    assert grade(client, multi("a", a=LABEL)).reward == reward


def test_row_26_the_python_grader_has_no_network(client: OpenAI) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connect = f"    socket.create_connection(('127.0.0.1', {listener.getsockname()[1]}), 5)\n"
        source = "import socket\ndef grade(sample, item):\n" + connect + "    return 1.0\n"
        found = grade(client, {**PYTHON, "source": source})
    assert found.reward == 0 and found.metadata.errors.python_grader_runtime_error is True


def test_row_26_the_python_grader_has_an_end(client: OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = PythonGrader.__init__.__kwdefaults__
    assert defaults is not None and defaults["wall_s"] == 120.0, "two minutes, as documented"
    monkeypatch.setitem(defaults, "wall_s", 1.0)
    found = grade(client, {**PYTHON, "source": "def grade(sample, item):\n    while True: pass\n"})
    assert found.reward == 0 and found.metadata.errors.python_grader_runtime_error is True


def test_row_26_sources_of_256_kb_are_refused(client: OpenAI) -> None:
    with pytest.raises(BadRequestError) as refused:
        grade(client, {**PYTHON, "source": PYTHON["source"] + "#" * 257_000})
    assert (refused.value.code, refused.value.param) == ("invalid_grader", "grader.source")


def test_row_27_a_whole_module_is_a_source(client: OpenAI) -> None:
    source = (
        '"""A module."""\nimport re\n\nFACTOR = 0.5\n\n\ndef helper(text):\n    return len(re.findall("a", text))\n\n\n'
        "def grade(sample, item):\n    return helper(sample['output_text']) * FACTOR * item['weight']\n"
    )
    assert grade(client, {**PYTHON, "source": source}, "banana", weight=2).reward == 3
    with pytest.raises(BadRequestError, match="exactly two positional"):
        grade(client, {**PYTHON, "source": "def grade(sample, item, more):\n    return 1\n"})


@pytest.mark.parametrize(
    ("formula", "reward"),
    [
        ("a + b * 2 - 1 / 4", 0.75),
        ("-(a - b) ^ 2 + 1e-9", -0.999999999),
        ("2 * a * b / max(a + b, 1e-9)", 0.0),
        ("min(a, b) + max(a, b) + abs(-a) + floor(1.5) + ceil(0.5) + exp(b) + sqrt(4) + log(a)", 7.0),
    ],
)
def test_row_28_formulas(client: OpenAI, formula: str, reward: float) -> None:
    other = {**EQUAL, "reference": "no"}
    assert grade(client, multi(formula, a=EQUAL, b=other), answer="yes").reward == pytest.approx(reward)


def test_row_28_formulas_that_are_refused_or_fail(client: OpenAI) -> None:
    for formula in ("a + nothing", "a +", "open(a)"):
        with pytest.raises(BadRequestError) as refused:
            grade(client, multi(formula, a=EQUAL), answer="yes")
        assert refused.value.param == "grader.calculate_output"
    found = grade(client, multi("1 / (a - 1)", a=EQUAL), answer="yes")
    assert found.metadata.errors.formula_parse_error is True


def test_row_29_templates(client: OpenAI) -> None:
    spaced = {**EQUAL, "input": "{{  sample.output_json.a[1].b }}", "reference": "{{item.deep.list[0]}}"}
    assert grade(client, spaced, '{"a": [0, {"b": "x"}]}', deep={"list": ["x"]}).reward == 1
    found = grade(client, {**EQUAL, "reference": "{{ item.nothing }}"})
    assert found.reward == 0 and found.metadata.errors.invalid_variable_error is True


def test_row_30_the_endpoint_grader(client: OpenAI) -> None:
    def twice_down(number: int, body: dict[str, Any]) -> tuple[int, Any]:
        return (500, {"error": "busy"}) if number < 2 else (200, {"score": 0.75})

    with ScriptedServer(twice_down) as endpoint:
        grader = {**ENDPOINT, "url": f"{endpoint.base_url}/grade"}
        found = client.fine_tuning.alpha.graders.run(
            grader=grader,  # type: ignore[arg-type]
            model_sample="yes",
            item={"answer": "yes"},
            extra_body={"trace_id": "trace_1"},
        )
        assert found.reward == 0.75 and len(endpoint.requests) == 3
        body, headers = endpoint.requests[0], endpoint.headers[0]
    assert body["trace_id"] == "trace_1" and body["item"] == {"answer": "yes"}
    assert body["sample"]["output_text"] == "yes" and body["sample"]["output_tools"] == []
    assert headers["authorization"] == SECRET


def test_row_30_an_endpoint_that_stays_down_is_an_error_flag(client: OpenAI) -> None:
    with ScriptedServer(lambda number, body: (500, {"error": SECRET})) as endpoint:
        found = grade(client, {**ENDPOINT, "url": endpoint.base_url})
        assert len(endpoint.requests) == 4, "the first and three more"
    assert found.reward == 0
    assert found.metadata.errors.endpoint_grader_server_error is True
    assert SECRET not in found.to_json()


def call_tool(client: OpenAI, **body: Any) -> Any:
    call = {"type": "function_call", "name": "search", "arguments": '{"q": 1}', "item": {"a": 1}, **body}
    return client.post("/fine_tuning/alpha/tool/run", body=call, cast_to=object)


def test_row_35_tool_run_posts_what_a_rollout_would(client: OpenAI) -> None:
    def answer(number: int, body: dict[str, Any]) -> tuple[int, Any]:
        return 200, {"output": "found", "call_id": body["call_id"], "id": body["id"], "more": 1}

    with ScriptedServer(answer) as tool:
        ids = {"id": "fc_1", "call_id": "call_1", "trace_id": "trace_1"}
        url = f"{tool.base_url}/search"
        found = call_tool(client, server_url=url, headers={"Authorization": SECRET}, rate_limit=50, **ids)
        assert found == {"output": "found", "call_id": "call_1", "id": "fc_1", "more": 1}
        assert tool.requests == [
            {
                **{"type": "function_call", "name": "search", "arguments": '{"q": 1}', "item": {"a": 1}},
                **ids,
                "rate_limit": 50,
            }
        ]
        assert tool.headers[0]["authorization"] == SECRET
        call_tool(client, server_url=url)
        assert tool.requests[1]["trace_id"].startswith("trace_") and tool.requests[1]["call_id"].startswith("call_")


def test_row_35_tool_run_shows_what_the_model_would_see(client: OpenAI) -> None:
    with ScriptedServer(lambda number, body: (404, {"error": "no such document"})) as tool:
        found = call_tool(client, server_url=tool.base_url)
        assert json.loads(found["result"]["output"]) == {"error": "no such document"}
    with ScriptedServer(lambda number, body: (200, {"output": "x" * 1_100_000})) as tool:
        assert call_tool(client, server_url=tool.base_url)["result"]["output"].startswith("413: ")


def test_row_35_a_tool_that_fails_is_refused_once(client: OpenAI) -> None:
    with ScriptedServer(lambda number, body: (500, {"error": SECRET})) as tool:
        with pytest.raises(BadRequestError) as refused:
            call_tool(client, server_url=tool.base_url, headers={"Authorization": SECRET})
        assert len(tool.requests) == 4 and refused.value.code == "tool_endpoint_failed"
        assert SECRET not in str(refused.value)
    with pytest.raises(BadRequestError) as refused:
        call_tool(client, server_url="http://127.0.0.1:1/x")
    assert refused.value.code == "tool_endpoint_unreachable" and refused.value.param == "server_url"
    for url in ("ftp://host/x", "nothing"):
        with pytest.raises(BadRequestError) as refused:
            call_tool(client, server_url=url)
        assert refused.value.param == "server_url"


@pytest.mark.parametrize("text", ['{"a": NaN}', '{"a": "\\ud83d"}', '{"a": 1e999}'])
def test_json_that_cannot_be_written_again_is_refused(client: OpenAI, text: str) -> None:
    body = f'{{"grader": {json.dumps(EQUAL)}, "model_sample": "x", "item": {text}}}'
    with pytest.raises(BadRequestError) as refused:
        client.post(
            "/fine_tuning/alpha/graders/run",
            content=body.encode(),
            options={"headers": {"content-type": "application/json"}},
            cast_to=object,
        )
    assert (refused.value.code, refused.value.param) == ("invalid_value", "item")


def test_a_tool_that_answers_odd_json_is_shown_anyway(client: OpenAI) -> None:
    with ScriptedServer(lambda number, body: (200, b'{"output": "half \\ud83d", "n": NaN}')) as tool:
        assert call_tool(client, server_url=tool.base_url) == {"output": "half ?", "n": None}


def test_urls_are_checked_where_the_server_has_a_list(client: OpenAI, tmp_path: Path) -> None:
    """Until then every URL is allowed; the service `outgoing` is joined by its name."""
    from rft.server.errors import ApiError
    from rft.server.grading.judging import wire_grader

    class Outgoing:
        def check(self, url: str, param: str) -> None:
            raise ApiError(f"{url} is not allowed", code="url_not_allowed", param=param)

    class WithOutgoing:
        outgoing = Outgoing()

    with pytest.raises(ApiError) as refused:
        wire_grader(WithOutgoing(), multi("a", a=ENDPOINT), "grader")  # type: ignore[arg-type]
    assert (refused.value.code, refused.value.param) == ("url_not_allowed", "grader.graders.a.url")
