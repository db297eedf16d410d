"""The multi grader: parts at once, a formula over them, failures, and what is refused with its path."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fakes import ScriptedServer

from rft.errors import ConfigError, GraderError
from rft.graders import build_grader
from rft.graders.run import response, run, validate
from rft.graders.sample import sample_of_text
from rft.types import Grade, Item

EXACT = {
    "type": "string_check",
    "input": "{{ sample.output_text }}",
    "reference": "{{ item.answer }}",
    "operation": "eq",
}
ALIKE = {
    **{"type": "text_similarity", "input": "{{ sample.output_text }}", "reference": "{{ item.answer }}"},
    "evaluation_metric": "rouge_1",
}
RAISES = {"type": "python", "source": "def grade(sample, item):\n    raise KeyError('no such thing')\n"}


def multi(formula: str, graders: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    graders = {"exact": EXACT, "alike": ALIKE} if graders is None else graders
    return {"type": "multi", "graders": graders, "calculate_output": formula, **fields}


def grade(tree: dict[str, Any], answer: str, row: dict[str, Any]) -> Grade:
    async def story() -> Grade:
        grader = build_grader(validate(tree))
        try:
            return await grader.grade(Item(id="1", row=row, messages=[]), sample_of_text(answer), "trace_1")
        finally:
            await grader.close()

    return asyncio.run(story())


def test_parts_and_formula() -> None:
    found = grade(multi("0.75 * exact + 0.25 * alike"), "the cat", {"answer": "the cat sat"})
    assert found.sub_scores == {"exact": 0.0, "alike": pytest.approx(0.8)}
    assert found.score == pytest.approx(0.2)


def test_parts_run_at_once() -> None:
    with ScriptedServer(lambda n, body: (200, {"score": 0.5}), delay_s=0.3) as server:
        parts = {name: {"type": "endpoint", "url": f"{server.base_url}/{name}"} for name in "abcd"}
        found = grade(multi("(a + b + c + d) / 4", parts), "x", {})
    assert (found.score, server.max_concurrent) == (0.5, 4)
    assert found.latency_s < 1.0


def test_flags_of_parts_are_kept_apart_and_together() -> None:
    found = grade(multi("exact + code", {"exact": EXACT, "code": RAISES}), "a", {"answer": "a"})
    assert found.score == 1.0
    assert "no such thing" in found.parts["code"].errors["python_grader_runtime_error"]
    assert found.errors == {}
    assert [flag for flag, _ in found.all_errors] == ["python_grader_runtime_error"]
    assert found.failure is not None


def test_a_formula_without_a_value() -> None:
    with pytest.raises(GraderError, match="has no value") as caught:
        grade(multi("exact / alike"), "x", {"answer": "y"})
    assert caught.value.flag == "formula_parse_error"
    found = grade(multi("exact / alike", invalid_grade=-1.0), "x", {"answer": "y"})
    assert (found.score, list(found.errors), found.sub_scores) == (
        -1.0,
        ["formula_parse_error"],
        {"exact": 0.0, "alike": 0.0},
    )


def test_a_part_that_fails_fails_the_whole() -> None:
    parts = {"exact": EXACT, "far": {"type": "endpoint", "url": "http://127.0.0.1:1/", "timeout_s": 1}}
    with pytest.raises(GraderError, match=r"item\.answer"):
        grade(multi("exact + alike"), "x", {})
    found = grade(multi("exact + alike", invalid_grade=0.25), "x", {})
    assert (found.score, list(found.errors)) == (0.25, ["invalid_variable_error"])
    assert validate(multi("exact + far", parts)).graders["far"].url == "http://127.0.0.1:1/"


@pytest.mark.parametrize(
    ("tree", "where", "problem"),
    [
        (multi("a", {"a": {**EXACT, "operation": "equals"}}), "grader.graders.a.operation", "'eq', 'ne', 'like'"),
        (multi("a", {"a": {**ALIKE, "evaluation_metric": "x"}}), "grader.graders.a.evaluation_metric", "rouge_l"),
        (multi("a", {"a": multi("b", {"b": EXACT})}), "grader.graders", "a multi grader inside a multi grader"),
        (
            multi("a", {"a": {"type": "python", "source": "x = 1"}}),
            "grader.graders.a.source",
            "defines `grade` 0 times",
        ),
        (multi("b", {"a": EXACT}), "grader.calculate_output", "no grader named b"),
        (multi("a +", {"a": EXACT}), "grader.calculate_output", "not a formula"),
        (multi("a", {"a": {"type": "endpoint", "url": "x"}}), "grader.graders.a.url", "must be complete"),
        (multi("a", {"a b": EXACT}), "grader.graders", "cannot be a name"),
        (multi("a", {"if": EXACT}), "", "cannot be"),
        ({"type": "multi", "graders": [EXACT], "calculate_output": "a"}, "grader.graders", "expected an object"),
        (multi("a", {"a": {**EXACT, "operator": "eq"}}), "grader.graders.a.operator", "unknown key"),
        (multi("a", {"a": {"type": "exact"}}), "grader.graders.a", "does not match any of the expected tags"),
        ({"type": "python"}, "grader.source", "required"),
        ({"type": "exact"}, "grader", "expected tags"),
        ({}, "grader", "type"),
        ([], "grader", "type"),
        (multi("a", {}), "", "at least 1"),
    ],
)
def test_what_is_refused_names_its_path(tree: Any, where: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(tree)
    assert caught.value.where.startswith(where), caught.value.where
    assert problem in str(caught.value)


def test_validate_gives_a_name() -> None:
    assert len(validate(EXACT).name) == len("grader-") + 12
    assert validate({**EXACT, "name": "mine"}).name == "mine"
    assert validate({"type": "label_model", "model": "m", "input": [{"role": "user", "content": "x"}],
                     "labels": ["a", "b"], "passing_labels": ["a"]}).type == "label_model"  # fmt: skip


def test_run_answers_as_the_contract_does() -> None:
    body = asyncio.run(
        run(validate(multi("exact + code", {"exact": EXACT, "code": RAISES}, name="mine")), {"answer": "a"}, "a")
    )
    assert body["reward"] == 1.0
    assert body["sub_rewards"] == {"exact": 1.0, "code": 0.0}
    assert (body["metadata"]["name"], body["metadata"]["type"]) == ("mine", "multi")
    errors = body["metadata"]["errors"]
    assert errors["python_grader_runtime_error"] is True
    assert "no such thing" in errors["python_grader_runtime_error_details"]
    assert errors["model_grader_parse_error"] is False
    assert body["model_grader_token_usage_per_model"] == {}
    documented = {
        *("formula_parse_error", "sample_parse_error", "sample_parse_error_details", "truncated_observation_error"),
        *("unresponsive_reward_error", "invalid_variable_error", "invalid_variable_error_details", "other_error"),
        *("python_grader_server_error", "python_grader_server_error_type", "python_grader_runtime_error"),
        *("python_grader_runtime_error_details", "model_grader_server_error", "model_grader_refusal_error"),
        *("model_grader_refusal_error_details", "model_grader_parse_error", "model_grader_parse_error_details"),
        *("model_grader_exceeded_max_tokens_error", "model_grader_server_error_details"),
        *("endpoint_grader_internal_error", "endpoint_grader_internal_error_details", "endpoint_grader_server_error"),
        *("endpoint_grader_server_error_details", "endpoint_grader_safety_check_error"),
    }
    assert set(errors) == documented


def test_run_reports_a_failing_grader() -> None:
    body = asyncio.run(run(validate({"type": "endpoint", "url": "http://127.0.0.1:1/"}), {}, "a"))
    assert body["reward"] == 0.0
    assert body["metadata"]["errors"]["endpoint_grader_server_error"] is True
    assert response(validate(EXACT), Grade(score=1.0))["metadata"]["token_usage"] is None
