"""Graders that ask a model: the request, every kind of answer, failures of the server, secrets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from fakes import ScriptedServer, verdict
from pydantic import TypeAdapter, ValidationError

from rft.errors import GraderError
from rft.graders import GraderSpec, GraderTools, PartSpec, build_grader
from rft.graders.judge import JudgeConfig, Judges
from rft.graders.sample import sample_of_text
from rft.types import Grade, Item

SCORE = {
    "type": "score_model",
    "name": "judge",
    "model": "gpt-4o",
    "input": [
        {"role": "developer", "content": "Grade. The truth: {{ item.answer }}"},
        {"role": "user", "content": "{{ sample.output_text }}"},
    ],
}
LABEL = {
    **{"type": "label_model", "model": "gpt-4o", "labels": ["right", "wrong", "unclear"], "passing_labels": ["right"]},
    "input": [{"role": "user", "content": "{{ sample.output_text }}"}],
}
ITEM = Item(id="1", row={"answer": "{{ sample.output_text }} is not a template here"}, messages=[])


def ask(
    server: ScriptedServer | str, tree: dict[str, Any], answer: str = "forty-two", row: dict[str, Any] | None = None,
    **judge: Any,
) -> Grade:  # fmt: skip
    async def story() -> Grade:
        url = server if isinstance(server, str) else f"{server.base_url}/v1"
        judges = Judges({"gpt-4o": JudgeConfig(url=url, timeout_s=5.0, **judge)})
        grader = build_grader(TypeAdapter(PartSpec).validate_python(tree), GraderTools(judges))
        try:
            item = Item(id="1", row=row, messages=[]) if row is not None else ITEM
            return await grader.grade(item, sample_of_text(answer), "trace_1")
        finally:
            await grader.close()
            await judges.close()

    return asyncio.run(story())


def always(answer: Any) -> Callable[[int, dict[str, Any]], tuple[int, Any]]:
    return lambda number, body: answer


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rft.wire.RetryPolicy.wait_s", lambda self, attempt: 0.0)


def test_the_request_forces_the_contracts_answer() -> None:
    params = {"temperature": 0.5, "top_p": 0.9, "seed": 3, "max_completions_tokens": 64, "reasoning_effort": "low"}
    with ScriptedServer(always(verdict({"steps": [], "result": 0.75}))) as server:
        grade = ask(server, {**SCORE, "sampling_params": params}, answer="{{ item.answer }}")
    body = server.requests[0]
    assert server.paths == ["/v1/chat/completions"]
    assert body["messages"] == [
        {"role": "developer", "content": "Grade. The truth: {{ sample.output_text }} is not a template here"},
        {"role": "user", "content": "{{ item.answer }}"},
    ], "neither data nor the model's answer is read as a template"
    assert body["model"] == "gpt-4o"
    assert {key: body[key] for key in ("temperature", "top_p", "seed", "reasoning_effort")} == {
        key: value for key, value in params.items() if key != "max_completions_tokens"
    }
    assert body["max_completion_tokens"] == 64
    schema = body["response_format"]["json_schema"]["schema"]
    assert body["response_format"]["type"] == "json_schema"
    assert set(schema["required"]) == {"steps", "result"}
    assert (grade.score, grade.errors) == (0.75, {})
    assert grade.usage["gpt-4o"].model_dump() == {"prompt_tokens": 10, "completion_tokens": 5, "cached_tokens": 3}


@pytest.mark.parametrize(("answer", "score"), [(0.5, 1.0), (7, 5.0), (-3, 1.0), (1e300, 5.0), (2, 2.0)])
def test_results_are_cut_to_the_range(answer: float, score: float) -> None:
    with ScriptedServer(always(verdict({"steps": [], "result": answer}))) as server:
        assert ask(server, {**SCORE, "range": [1.0, 5.0]}).score == score


@pytest.mark.parametrize(
    ("reply", "flag"),
    [
        (verdict("I think 0.7"), "model_grader_parse_error"),
        (verdict('{"result": "high"}'), "model_grader_parse_error"),
        (verdict('{"result": true}'), "model_grader_parse_error"),
        (verdict('{"result": NaN}'), "model_grader_parse_error"),
        (verdict('{"result": 1' + "0" * 400 + "}"), "model_grader_parse_error"),
        (verdict("[1]"), "model_grader_parse_error"),
        (verdict('{"result": 1e999}'), "model_grader_parse_error"),
        (verdict('{"steps": [', "length"), "model_grader_exceeded_max_tokens_error"),
        (verdict("", refusal="I cannot help"), "model_grader_refusal_error"),
        (verdict("{}"), "model_grader_parse_error"),
        (verdict("[" * 100_000), "model_grader_parse_error"),
    ],
)
def test_what_is_no_number_is_zero_and_flagged(reply: tuple[int, Any], flag: str) -> None:
    with ScriptedServer(always(reply)) as server:
        grade = ask(server, SCORE)
    assert (grade.score, list(grade.errors)) == (0.0, [flag])
    assert grade.usage["gpt-4o"].prompt_tokens == 10, "a failed judgement was paid for, too"


@pytest.mark.parametrize("usage", [{"prompt_tokens": "many"}, {"prompt_tokens": 1e999}, [1]])
def test_hostile_usage_is_an_error_and_not_a_crash(usage: Any) -> None:
    status, body = verdict({"steps": [], "result": 1.0})
    hostile = ScriptedServer(always((status, {**body, "usage": usage})))
    with hostile as server, pytest.raises(GraderError, match="not a chat completion"):
        ask(server, SCORE)


def test_a_key_stays_out_of_texts_after_all_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sk-hidden")
    leaky = ScriptedServer(always((500, {"error": "your key sk-hidden is fine, we are not"})))
    with leaky as server, pytest.raises(GraderError) as caught:
        ask(server, SCORE, api_key_env="JUDGE_KEY")
    assert "sk-hidden" not in str(caught.value)


def test_a_complete_answer_at_the_token_limit_counts() -> None:
    with ScriptedServer(always(verdict({"steps": [], "result": 1.0}, "length"))) as server:
        assert ask(server, SCORE).score == 1.0


def test_several_judgements_are_averaged_and_their_spread_is_kept() -> None:
    with ScriptedServer(lambda number, body: verdict({"steps": [], "result": [0.2, 0.4, 0.9][number]})) as server:
        grade = ask(server, {**SCORE, "samples": 3})
    assert grade.score == pytest.approx(0.5)
    assert grade.spread == pytest.approx(0.2943920288)
    assert grade.usage["gpt-4o"].prompt_tokens == 30
    assert len(server.requests) == 3


@pytest.mark.parametrize("trouble", [(500, {}), (503, {}), (429, {}), None])
def test_a_server_in_trouble_is_asked_again(trouble: tuple[int, Any] | None) -> None:
    with ScriptedServer(lambda n, body: trouble if n < 3 else verdict({"steps": [], "result": 1.0})) as server:
        assert ask(server, SCORE).score == 1.0
    assert len(server.requests) == 4


def test_a_dead_server_is_never_a_grade() -> None:
    with ScriptedServer(always((500, {}))) as server, pytest.raises(GraderError, match="failed 4 times") as caught:
        ask(server, SCORE)
    assert (caught.value.flag, caught.value.retryable) == ("model_grader_server_error", True)
    with pytest.raises(GraderError, match="cannot connect"):
        ask("http://127.0.0.1:1/v1", SCORE)


def test_a_refused_request_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sk-hidden")
    refusing = ScriptedServer(always((401, {"error": {"message": "Incorrect API key provided: sk-hidden"}})))
    with refusing as server, pytest.raises(GraderError, match="HTTP 401") as caught:
        ask(server, SCORE, api_key_env="JUDGE_KEY")
    assert len(server.requests) == 1
    assert server.headers[0]["authorization"] == "Bearer sk-hidden"
    assert "sk-hidden" not in str(caught.value)
    assert "judges.gpt-4o" in str(caught.value)


def test_a_missing_key_names_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(GraderError, match="set JUDGE_KEY"):
        ask("http://127.0.0.1:1/v1", SCORE, api_key_env="JUDGE_KEY")


@pytest.mark.parametrize("reply", [{}, {"choices": []}, {"choices": [{}]}, [], "text"])
def test_what_is_no_chat_completion_is_an_error(reply: Any) -> None:
    with ScriptedServer(always((200, reply))) as server, pytest.raises(GraderError, match="not a chat completion"):
        ask(server, SCORE)


def test_a_judge_that_ignores_the_form_is_found_at_the_start() -> None:
    async def check(url: str) -> None:
        judges = Judges({"gpt-4o": JudgeConfig(url=url)})
        try:
            await judges["gpt-4o"].check()
        finally:
            await judges.close()

    chatty = ScriptedServer(always(verdict("Sure! I am ready.")))
    with chatty as server, pytest.raises(GraderError, match="structured output"):
        asyncio.run(check(f"{server.base_url}/v1"))
    with ScriptedServer(always(verdict({"ok": True}))) as server:
        asyncio.run(check(f"{server.base_url}/v1"))


def test_concurrency_is_bounded() -> None:
    with ScriptedServer(always(verdict({"steps": [], "result": 1.0})), delay_s=0.05) as server:
        ask(server, {**SCORE, "samples": 20}, max_concurrent=4)
    assert server.max_concurrent == 4


@pytest.mark.parametrize(("label", "score"), [("right", 1.0), ("wrong", 0.0), ("unclear", 0.0)])
def test_label_model(label: str, score: float) -> None:
    with ScriptedServer(always(verdict({"steps": [], "label": label}))) as server:
        grade = ask(server, LABEL)
    assert (grade.score, grade.errors) == (score, {})
    schema = server.requests[0]["response_format"]["json_schema"]["schema"]
    assert schema["properties"]["label"]["enum"] == ["right", "wrong", "unclear"]


def test_label_that_is_none_is_flagged() -> None:
    with ScriptedServer(always(verdict({"label": "excellent"}))) as server:
        grade = ask(server, LABEL)
    assert (grade.score, list(grade.errors)) == (0.0, ["model_grader_parse_error"])


def test_blocks_become_chat_parts() -> None:
    blocks = [
        {"type": "input_text", "text": "Look: {{ item.answer }}"},
        {"type": "input_image", "image_url": "{{ item.picture }}", "detail": "low"},
        "and say",
    ]
    with ScriptedServer(always(verdict({"steps": [], "result": 1}))) as server:
        row = {"answer": "x", "picture": "data:image/png;base64,AA"}
        ask(server, {**SCORE, "input": [{"role": "user", "content": blocks}]}, row=row)
    assert server.requests[0]["messages"][0]["content"] == [
        {"type": "text", "text": "Look: x"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA", "detail": "low"}},
        {"type": "text", "text": "and say"},
    ]


def test_the_published_sketch_is_a_score_model() -> None:
    sketch = {
        "type": "model",
        "model": "gpt-4o",
        "response_format": {"type": "json_schema", "json_schema": {"name": "grader_response", "schema": {}}},
        "prompt": 'Ground truth: {ground_truth}\nAgent answer: {final_answer}\nJSON: {{ item.deep }} {"a": 1}',
    }
    with ScriptedServer(always(verdict({"steps": [], "result": 0.5}))) as server:
        grade = ask(server, sketch, row={"ground_truth": "Paris", "deep": {"b": 2}})
    assert grade.score == 0.5
    assert server.requests[0]["messages"] == [
        {"role": "user", "content": 'Ground truth: Paris\nAgent answer: forty-two\nJSON: {"b":2} {"a": 1}'}
    ]


@pytest.mark.parametrize(
    ("tree", "problem"),
    [
        ({**SCORE, "range": [1, 0]}, "the first smaller"),
        ({**SCORE, "input": []}, "at least 1"),
        ({**SCORE, "samples": 0}, "greater than or equal to 1"),
        ({**SCORE, "temperature": 1}, "Extra inputs"),
        ({**SCORE, "input": [{"role": "user", "content": "{{ truth }}"}]}, "is not a variable"),
        ({**SCORE, "input": [{"role": "tool", "content": "x"}]}, "role"),
        (
            {**SCORE, "input": [{"role": "user", "content": [{"type": "input_text", "text": "{{ x }}"}]}]},
            "not a variable",
        ),
        ({"type": "model", "model": "gpt-4o"}, "needs one"),
        ({"type": "model", "prompt": "x", "url": "y"}, "unknown key"),
        (LABEL, "does not match any of the expected tags"),
    ],
)
def test_what_is_refused(tree: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        TypeAdapter(GraderSpec).validate_python(tree)


@pytest.mark.parametrize(
    ("tree", "problem"),
    [
        ({}, "either url"),
        ({"url": "http://a", "path": "b"}, "either url"),
        ({"url": "ftp://a"}, "http://"),
        ({"path": "/nowhere"}, "no config.json"),
        ({"url": "http://a", "key": "sk"}, "Extra inputs"),
    ],
)
def test_judge_configs_that_are_refused(tree: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        JudgeConfig.model_validate(tree)


def test_a_model_without_a_judge_is_named() -> None:
    with pytest.raises(GraderError, match="no judge is configured for the model gpt-4o"):
        build_grader(TypeAdapter(GraderSpec).validate_python(SCORE))


def test_surrogates_do_not_break_a_request() -> None:
    with ScriptedServer(always(verdict({"steps": [], "result": 1}))) as server:
        assert ask(server, SCORE, answer="half \ud83d a pair").score == 1.0
    assert json.dumps(server.requests[0])
