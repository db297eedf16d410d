"""Grades remembered: what makes two requests the same, what is never kept, and a broken file."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from fakes import ScriptedServer

from rft.graders import GraderTools, build_grader
from rft.graders.cache import GradeCache, without_call_ids
from rft.graders.run import validate
from rft.graders.sample import sample_of_text
from rft.types import Grade, Item

Request = tuple[dict[str, Any], dict[str, Any]]  # row, sample


def grades(path: Path, tree: dict[str, Any], requests: list[Request], at_once: bool = False) -> list[Grade]:
    async def story() -> list[Grade]:
        cache = GradeCache(path)
        grader = build_grader(validate(tree), GraderTools(cache=cache))
        try:
            asked = [grader.grade(Item(id="1", row=row, messages=[]), sample) for row, sample in requests]
            return await asyncio.gather(*asked) if at_once else [await one for one in asked]
        finally:
            await grader.close()
            cache.close()

    return asyncio.run(story())


def python(source: str, **fields: Any) -> dict[str, Any]:
    return {"type": "python", "source": f"def grade(sample, item):\n    return {source}\n", **fields}


def hits(found: list[Grade]) -> list[bool]:
    return [grade.is_cached for grade in found]


A, B = ({"answer": 1}, sample_of_text("a")), ({"answer": 1}, sample_of_text("b"))


def test_the_same_is_remembered_across_processes_and_anything_else_is_not(tmp_path: Path) -> None:
    path, tree = tmp_path / "cache" / "grades.sqlite", python("len(sample['output_text'])")
    assert hits(grades(path, tree, [A, A, B, A])) == [False, True, False, True]
    again = grades(path, tree, [A, B, ({"answer": 2}, A[1])])
    assert hits(again) == [True, True, False], "kept on disk; another row is another request"
    assert [grade.score for grade in again] == [1.0, 1.0, 1.0]
    assert hits(grades(path, python("2.0"), [A])) == [False], "another source is another grader"
    assert hits(grades(path, {**tree, "name": "renamed"}, [A])) == [True], "a name changes no score"


def test_a_grader_can_be_left_out(tmp_path: Path) -> None:
    assert hits(grades(tmp_path / "g", python("1.0", cache=False), [A, A])) == [False, False]
    check = {"type": "string_check", "input": "a", "reference": "a", "operation": "eq"}
    assert hits(grades(tmp_path / "g", check, [A, A])) == [False, False], "cheaper than looking it up"
    assert hits(grades(tmp_path / "g", {**check, "cache": True}, [A, A])) == [False, True]


def test_only_what_a_template_shows_counts(tmp_path: Path) -> None:
    tree = {
        "type": "text_similarity",
        "input": "{{ sample.output_text }}",
        "reference": "x",
        "evaluation_metric": "gleu",
    }
    assert hits(grades(tmp_path / "g", tree, [A, ({"answer": 2}, A[1])])) == [False, True]


def test_errors_are_not_remembered(tmp_path: Path) -> None:
    assert hits(grades(tmp_path / "g", python("1 / 0"), [A, A])) == [False, False]


def test_equal_requests_at_once_are_graded_once(tmp_path: Path) -> None:
    with ScriptedServer(lambda n, body: (200, {"score": n}), delay_s=0.05) as server:
        tree = {"type": "endpoint", "url": server.base_url, "cache": True}
        found = grades(tmp_path / "g", tree, [A, B, A, A, B], at_once=True)
    assert len(server.requests) == 2
    assert sorted(hits(found)) == [False, False, True, True, True]
    assert found[0].score == found[2].score == found[3].score != found[1].score


def test_parts_of_a_multi_grader_are_remembered(tmp_path: Path) -> None:
    tree = {"type": "multi", "graders": {"a": python("0.5")}, "calculate_output": "2 * a"}
    first, second = grades(tmp_path / "g", tree, [A, A])
    assert (first.parts["a"].is_cached, second.parts["a"].is_cached, second.score) == (False, True, 1.0)


def sample_with_calls(prefix: str, output: str = "found") -> dict[str, Any]:
    call = {"id": f"call_{prefix}", "type": "function", "function": {"name": "search", "arguments": "{}"}}
    message = {"role": "assistant", "content": "", "tool_calls": [call]}
    answer = {"role": "tool", "tool_call_id": f"call_{prefix}", "content": output, "is_error": False}
    return {**sample_of_text("x"), "output_tools": [call], "trace": [message, answer]}


def test_the_random_ids_of_calls_do_not_count(tmp_path: Path) -> None:
    one, other = sample_with_calls("f00"), sample_with_calls("ba2")
    assert one != other
    assert without_call_ids(one) == without_call_ids(other)
    assert (
        without_call_ids(one)["trace"][1]["tool_call_id"] == without_call_ids(one)["output_tools"][0]["id"] == "call_0"
    )
    requests = [({}, one), ({}, other), ({}, sample_with_calls("f00", "nothing found"))]
    assert hits(grades(tmp_path / "g", python("1.0"), requests)) == [False, True, False]


@pytest.mark.parametrize("content", [b"this is no database" * 100, b""])
def test_a_broken_file_costs_a_warning_at_most(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "grades.sqlite"
    path.write_bytes(content)
    assert [grade.score for grade in grades(path, python("1.0"), [A, A])] == [1.0, 1.0]


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    assert grades(tmp_path / "file" / "grades.sqlite", python("1.0"), [A])[0].score == 1.0
    assert "cannot be opened" in caplog.text
