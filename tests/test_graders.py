"""The first grader types: what they see, what they say, and what they refuse at configuration time."""

from __future__ import annotations

import asyncio
import inspect
import json
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from rft.errors import GraderError
from rft.graders import GraderSpec, build_grader
from rft.graders.python import PythonGrader, PythonGraderSpec
from rft.graders.sample import sample_of
from rft.graders.string_check import StringCheckGrader, StringCheckSpec
from rft.graders.template import TemplateError, check_template, render
from rft.types import Grade, Item, Message, Rollout, StopReason, ToolCall, ToolResult, Turn

ROW = {"messages": [{"role": "user", "content": "?"}], "answer": "Paris", "size": 3, "deep": {"list": [{"x": "y"}]}}
ITEM = Item(id="1", row=ROW, messages=[Message(role="user", content="?")])


def turn(content: str, calls: list[ToolCall] | None = None, results: list[ToolResult] | None = None) -> Turn:
    message = Message(role="assistant", content=content, tool_calls=calls or [])
    return Turn(
        input_ids=[1], output_ids=[2], logprobs=[-0.1], finish_reason="stop", policy_version=0, message=message,
        results=results or [],
    )  # fmt: skip


def rollout(*turns: Turn) -> Rollout:
    return Rollout(
        id="trace_1", item_id="1", split="train", step=1, attempt=0, seed=0, turns=list(turns),
        stop_reason=StopReason.ANSWERED, started_at=0.0, duration_s=1.0,
    )  # fmt: skip


def call(number: int, error: str | None = None) -> ToolCall:
    arguments = json.dumps({"n": number})
    return ToolCall(id=f"fc_{number}", call_id=f"call_{number}", name="search", arguments=arguments, error=error)


# --- sample ----------------------------------------------------------------------------------------------------------


def test_sample_has_the_contracts_shape() -> None:
    """The captured payload of the hosted service for an empty answer, plus our trace and stop reason."""
    assert sample_of(rollout(turn(""))) == {
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": "", "tool_calls": []}, "finish_reason": "stop"}
        ],
        "output_text": "",
        "output_json": None,
        "output_tools": [],
        "output_reasoning_summary": None,
        "stop_reason": "answered",
        "trace": [{"role": "assistant", "content": ""}],
    }


def test_sample_holds_all_calls_and_what_tools_answered() -> None:
    answers = [ToolResult(call_id="call_1", output="one"), ToolResult(call_id="call_2", output="bad", is_error=True)]
    sample = sample_of(rollout(turn("", [call(1), call(2, "malformed")], answers), turn("done")))
    assert [entry["id"] for entry in sample["output_tools"]] == ["call_1", "call_2"]
    assert sample["output_tools"][0]["function"] == {"name": "search", "arguments": '{"n": 1}'}
    assert [message["role"] for message in sample["trace"]] == ["assistant", "tool", "tool", "assistant"]
    assert sample["trace"][2] == {"role": "tool", "tool_call_id": "call_2", "content": "bad", "is_error": True}
    assert sample["choices"][0]["message"]["content"] == sample["output_text"] == "done"
    json.dumps(sample, allow_nan=False)


def test_sample_of_a_rollout_that_ended_early() -> None:
    assert sample_of(rollout())["output_text"] == ""
    assert sample_of(rollout(turn("", [call(1)])))["choices"][0]["finish_reason"] == "tool_calls"
    cut = turn("and th").model_copy(update={"finish_reason": "length"})
    assert sample_of(rollout(cut))["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("text", "value"),
    [('{"a": [1]}', {"a": [1]}), (" 5 ", 5), ("null", None), ("{", None), ("NaN", None), ("[" * 200_000, None)],
)  # fmt: skip
def test_output_json(text: str, value: Any) -> None:
    assert sample_of(rollout(turn(text)))["output_json"] == value


# --- template --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "rendered"),
    [
        ("no variables, {one} {{ nor two", "no variables, {one} {{ nor two"),
        ("{{item.answer}}/{{  item.answer  }}", "Paris/Paris"),
        ("{{ item.size }} {{ item.deep }}", '3 {"list":[{"x":"y"}]}'),
        ("{{ item.deep.list[0].x }}", "y"),
        ("{{ sample.output_tools[0].function.arguments }}", '{"n": 1}'),
        ("{{ sample.output_json }}", "null"),
        ("{{ item.messages[0].content }}", "?"),
    ],
)
def test_render(text: str, rendered: str) -> None:
    sample = sample_of(rollout(turn("", [call(1)])))
    assert render(text, ROW, sample) == rendered


def test_data_is_never_a_template() -> None:
    sample = {"output_text": "{{ item.answer }}"}
    assert render("{{ sample.output_text }}{{ item.a }}", {"answer": "x", "a": "{{ b"}, sample) == (
        "{{ item.answer }}{{ b"
    )


@pytest.mark.parametrize("name", ["item.no", "item.answer.x", "item.deep.list[1].x", "item.answer[0]", "sample.no"])
def test_unknown_variable_carries_the_contracts_flag(name: str) -> None:
    with pytest.raises(TemplateError, match="invalid_variable_error") as caught:
        render(f"{{{{ {name} }}}}", ROW, {})
    assert caught.value.flag == "invalid_variable_error"
    assert caught.value.namespace == name.split(".")[0]


@pytest.mark.parametrize("text", ["{{ answer }}", "{{ item }}", "{{}}", "{{ item.a + 1 }}", "{{ item.a[-1] }}"])
def test_template_that_can_never_work_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a variable"):
        check_template(text)


# --- string_check ----------------------------------------------------------------------------------------------------


def string_check(operation: str, text: str, reference: str = "{{ item.answer }}") -> Grade:
    spec = StringCheckSpec.model_validate(
        {"type": "string_check", "input": "{{ sample.output_text }}", "reference": reference, "operation": operation}
    )
    return asyncio.run(StringCheckGrader(spec).grade(ITEM, sample_of(rollout(turn(text)))))


@pytest.mark.parametrize(
    ("operation", "text", "score"),
    [
        ("eq", "Paris", 1), ("eq", "paris", 0), ("eq", "Paris ", 0), ("ne", "paris", 1), ("ne", "Paris", 0),
        ("like", "It is Paris.", 1), ("like", "It is paris.", 0), ("ilike", "It is PARIS.", 1), ("ilike", "Rome", 0),
    ],
)  # fmt: skip
def test_string_check(operation: str, text: str, score: float) -> None:
    assert string_check(operation, text) == Grade(score=score)


def test_variable_missing_in_the_sample_is_zero_and_flagged() -> None:
    grade = string_check("eq", "no json", "{{ sample.output_json.name }}")
    assert grade.score == 0
    assert "sample.output_json.name" in grade.errors["invalid_variable_error"]


def test_variable_missing_in_the_item_is_never_a_grade() -> None:
    with pytest.raises(GraderError, match=r"item\.missing"):
        string_check("ne", "x", "{{ item.missing }}")


# --- python ----------------------------------------------------------------------------------------------------------


def python_grade(body: str, wall_s: float = 20.0) -> Grade:
    async def tell() -> Grade:
        grader = PythonGrader(PythonGraderSpec(source=body), num_workers=1, wall_s=wall_s)
        try:
            return await grader.grade(ITEM, sample_of(rollout(turn("Paris"))))
        finally:
            await grader.close()

    return asyncio.run(tell())


def returning(expression: str) -> str:
    return f"def grade(sample, item):\n    return {expression}\n"


def test_python_grader_sees_sample_and_item() -> None:
    grade = python_grade(returning("0.5 * (sample['output_text'] == item['answer']) + 0.1 * len(sample['trace'])"))
    assert grade.score == pytest.approx(0.6)
    assert grade.errors == {}
    assert grade.latency_s > 0


@pytest.mark.parametrize(("expression", "score"), [("1", 1), ("-2.5", -2.5), ("True", 1), ("False", 0)])
def test_numbers_are_scores(expression: str, score: float) -> None:
    grade = python_grade(returning(expression))
    assert (grade.score, type(grade.score), grade.errors) == (score, float, {})


@pytest.mark.parametrize("expression", ["float('nan')", "float('inf')", "'0.5'", "None", "[1]", "10**400", "{1}"])
def test_what_is_no_finite_number_is_zero_and_flagged(expression: str) -> None:
    grade = python_grade(returning(expression))
    assert grade.score == 0
    assert list(grade.errors) == ["python_grader_runtime_error"]


def test_exception_is_zero_with_its_traceback() -> None:
    grade = python_grade(returning("item['no_such_key']"))
    assert grade.score == 0
    assert "item['no_such_key']" in grade.errors["python_grader_runtime_error"]
    assert "KeyError" in grade.errors["python_grader_runtime_error"]


def test_timeout_is_zero_and_flagged() -> None:
    grade = python_grade("def grade(sample, item):\n    while True: pass", wall_s=0.3)
    assert grade.score == 0
    assert "0.3 s" in grade.errors["python_grader_runtime_error"]


def test_failing_sandbox_is_never_a_grade() -> None:
    with pytest.raises(GraderError):
        python_grade("import os\ndef grade(sample, item):\n    os.kill(os.getpid(), 9)")


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("def grade(sample, item:", "not valid Python"),
        ("def score(sample, item): return 1", "defines `grade` 0 times"),
        ("class A:\n    def grade(sample, item): return 1", "defines `grade` 0 times"),
        (returning("1") + returning("0"), "defines `grade` 2 times"),
        ("def grade(sample): return 1", "two positional"),
        ("def grade(*args): return 1", "two positional"),
        ("def grade(sample, item, extra=1): return 1", "two positional"),
        ("def grade(sample, item, *, key): return 1", "two positional"),
        ("async def grade(sample, item): return 1", "async"),
        (returning("1") + "#" * 256_000, "256 kB"),
        ("\0", "not valid Python"),
    ],
)
def test_bad_source_is_refused_with_the_cure(source: str, problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        PythonGraderSpec(source=source)


def test_whole_modules_are_sources() -> None:
    """The contract lets users send `inspect.getsource(module)`: helpers and imports around `grade` work."""
    source = "import math\nTOP = 2\ndef half(x): return x / TOP\n" + inspect.getsource(_module_level).replace(
        "_module_level", "grade"
    )
    assert python_grade(source).score == 1.5


def _module_level(sample: Any, item: Any) -> Any:
    return half(math.floor(3.2))  # type: ignore[name-defined] # noqa: F821


HOSTED_PACKAGES = [
    *(
        "numpy",
        "scipy.stats",
        "sympy",
        "pandas",
        "rapidfuzz",
        "sklearn.metrics",
        "rouge_score",
        "deepdiff",
        "jsonschema",
    ),
    *("pydantic", "yaml", "nltk", "sqlparse", "rdkit.Chem", "skbio", "ast_grep_py"),
]


@pytest.mark.slow  # pandas, scikit-learn and rdkit take seconds to load
def test_python_graders_may_import_what_hosted_ones_may() -> None:
    """All at once, within the memory limit."""
    source = "".join(f"import {name}\n" for name in HOSTED_PACKAGES) + "def grade(sample, item):\n    return 1.0\n"
    grade = python_grade(source, wall_s=90.0)
    assert (grade.score, grade.errors) == (1.0, {})


# --- specs -----------------------------------------------------------------------------------------------------------


def test_specs_are_the_contracts_json() -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(GraderSpec)
    python = {"type": "python", "name": "p", "source": returning("1"), "image_tag": "2025-05-08", "pass_threshold": 0.5}
    check = {"type": "string_check", "name": "c", "input": "a", "reference": "b", "operation": "eq"}
    for tree, kind in [(python, PythonGrader), (check, StringCheckGrader)]:
        spec = adapter.validate_python(tree)
        assert spec.model_dump(exclude={"cache"}) == tree
        assert isinstance(build_grader(spec), kind)
        with pytest.raises(ValidationError, match="extra"):
            adapter.validate_python({**tree, "unknown": 1})
