"""Eval runs that ask a model, rows from files, and how questions are made: with the parts that the server joins."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from fakes import verdict

from rft.errors import GraderError
from rft.server.errors import ApiError
from rft.server.evals.runs import Assignment, EvalRuns
from rft.server.evals.sources import question_of, rows_of, sample_of_completion
from rft.server.evals.store import ITEM, RUN
from rft.server.index import Index
from rft.server.jobs.store import Jobs
from rft.server.models import Models, Target
from rft.server.settings import ServerConfig

EQUAL = {
    **{"type": "string_check", "name": "equal", "operation": "eq"},
    **{"input": "{{sample.output_text}}", "reference": "{{item.answer}}"},
}
TEMPLATE = {"type": "template", "template": [{"role": "user", "content": "Say {{item.answer}}"}]}
TOOL = {"type": "function", "name": "search", "parameters": {}, "strict": True}


class EchoInference:
    """Answers with the last word of the last message; refuses the word `refuse`."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.targets: list[Target] = []

    async def chat(self, target: Target, body: dict[str, Any]) -> dict[str, Any]:
        self.targets.append(target)
        self.bodies.append(body)
        word = body["messages"][-1]["content"].split()[-1]
        if word == "refuse":
            raise ApiError("no", code="context_length_exceeded")
        message = {"role": "assistant", "content": word}
        usage = {"prompt_tokens": 3, "completion_tokens": 1}
        return {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "model": "m", "usage": usage}


class FolderFiles:
    """Files by their names in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, file_id: str, project: str, *, purpose: str | None = None, param: str = "file_id") -> Path:
        if not (self._folder / file_id).is_file():
            raise ApiError(f"No such File object: {file_id}", status=404, code="file_not_found", param=param)
        return self._folder / file_id


class Parts:
    """The services that a run uses."""

    def __init__(self, folder: Path) -> None:
        config = ServerConfig.model_validate({"data_dir": folder, "models": {"m": {"path": folder / "m"}}})
        self.index = Index(folder / "index.sqlite")
        self.models = Models(config, self.index, Jobs(self.index, folder / "runs"))
        self.inference, self.files = EchoInference(), FolderFiles(folder)


def run(parts: Any, data_source: dict[str, Any], trees: list[dict[str, Any]]) -> tuple[Any, list[dict[str, Any]]]:
    """A run to its end, and its items."""

    async def story() -> Any:
        runs = EvalRuns(parts.index)
        question, rows = question_of(data_source), await rows_of(parts, data_source, "p")
        started = runs.start(parts, "eval_1", {"name": "n", "model": "m"}, Assignment(rows, question, trees, "p"))
        async with asyncio.timeout(30):
            await runs.ended()
        return parts.index.get(RUN, started["id"])

    ended = asyncio.run(story())
    return ended, parts.index.every(ITEM, parent=ended["id"])


def content(*answers: str) -> dict[str, Any]:
    return {"type": "file_content", "content": [{"item": {"answer": answer}} for answer in answers]}


def test_a_run_asks_the_model_and_grades_its_answers(tmp_path: Path) -> None:
    parts = Parts(tmp_path)
    params = {"temperature": 0.5, "max_completion_tokens": 9, "seed": None, "nonsense": 1}
    source = {
        **{"type": "completions", "source": content("yes", "no", "refuse"), "model": "m"},
        **{"input_messages": TEMPLATE, "sampling_params": params},
    }
    ended, items = run(parts, source, [EQUAL])
    assert ended["status"] == "completed"
    assert ended["result_counts"] == {"total": 3, "errored": 1, "failed": 0, "passed": 2}
    assert ended["per_model_usage"][0]["invocation_count"] == 2 and ended["per_model_usage"][0]["total_tokens"] == 8
    body = {"model": "m", "messages": [{"role": "user", "content": "Say yes"}], "temperature": 0.5}
    assert parts.inference.bodies[0] == body | {"max_completion_tokens": 9}
    assert items[0]["sample"]["input"] == [{"role": "user", "content": "Say yes"}]
    assert items[0]["sample"]["output"][0]["content"] == "yes" and items[0]["sample"]["usage"]["total_tokens"] == 4
    assert items[2]["status"] == "error" and items[2]["sample"]["error"]["code"] == "context_length_exceeded"
    assert parts.inference.targets[0].name == "m"


def test_rows_come_from_files_too(tmp_path: Path) -> None:
    parts = Parts(tmp_path)
    lines = [{"messages": [{"role": "user", "content": "Say yes"}], "answer": "yes"}, {"item": {"answer": "x"}}]
    (tmp_path / "file-1").write_text("".join(json.dumps(line) + "\n\n" for line in lines))
    source = {"type": "responses", "source": {"type": "file_id", "id": "file-1"}, "model": "m"}
    ended, items = run(parts, source, [EQUAL])
    assert [item["status"] for item in items] == ["pass", "error"], "the second row has no messages"
    assert ended["status"] == "completed"
    with pytest.raises(ApiError) as refused:
        run(parts, {"type": "jsonl", "source": {"type": "file_id", "id": "gone"}}, [EQUAL])
    assert refused.value.status == 404 and refused.value.param == "data_source.source.id"
    (tmp_path / "file-2").write_bytes(b'{"item": {}}\nnot JSON\n')
    with pytest.raises(ApiError, match="row 2"):
        run(parts, {"type": "jsonl", "source": {"type": "file_id", "id": "file-2"}}, [EQUAL])


def test_a_model_that_is_not_there_fails_the_run(tmp_path: Path) -> None:
    source = {"type": "completions", "source": content("yes"), "model": "gone", "input_messages": TEMPLATE}
    ended, _ = run(Parts(tmp_path), source, [EQUAL])
    assert (ended["status"], ended["error"]["code"]) == ("failed", "model_not_found")


def test_a_grader_that_cannot_start_fails_the_run(tmp_path: Path) -> None:
    broken = {"type": "python", "name": "p", "source": "import nothing_such\ndef grade(sample, item): return 1\n"}
    ended, items = run(Parts(tmp_path), {"type": "jsonl", "source": content("yes")}, [broken])
    assert ended["status"] == "failed" and ended["error"]["code"] == "python_grader_runtime_error"
    assert "nothing_such" in ended["error"]["message"] and items == []


def test_what_the_responses_api_says_is_translated() -> None:
    shape = {"type": "json_schema", "name": "N", "schema": {"type": "object"}, "strict": True}
    question = question_of(
        {
            **{"type": "responses", "model": "m", "input_messages": TEMPLATE},
            "sampling_params": {"text": {"format": shape}, "tools": [TOOL], "reasoning_effort": "low"},
        }
    )
    assert question is not None
    assert question.params == {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "N", "schema": {"type": "object"}, "strict": True},
        },
        "tools": [{"type": "function", "function": {"name": "search", "parameters": {}, "strict": True}}],
        "reasoning_effort": "low",
    }


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"type": "template", "template": [{"role": "user", "content": "{{ what }}"}]}, "template"),
        ({"type": "template", "template": [{"role": "alien", "content": "x"}]}, "template.0.role"),
        ({"type": "template"}, "template"),
        ({"type": "item_reference", "item_reference": "os.environ"}, "item_reference"),
    ],
)
def test_questions_that_are_refused(given: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as refused:
        question_of({"type": "completions", "model": "m", "input_messages": given})
    assert refused.value.param == f"data_source.input_messages.{param}"


def test_messages_of_an_item_by_reference() -> None:
    given = {"type": "item_reference", "item_reference": "item.chat.turns"}
    question = question_of({"type": "completions", "model": "m", "input_messages": given})
    assert question is not None
    messages = [{"role": "user", "content": "{{ item.secret }}"}]
    assert question.body({"chat": {"turns": messages}, "secret": "x"})["messages"] == messages, "text, no template"
    with pytest.raises(GraderError):
        question.body({"chat": {"turns": "text"}})


@pytest.mark.parametrize("answer", [{}, {"choices": []}, {"choices": [{"message": None}]}, {"choices": "x"}])
def test_what_is_no_completion_is_an_error(answer: dict[str, Any]) -> None:
    with pytest.raises(GraderError, match="not a chat completion"):
        sample_of_completion(answer)


class JudgingInference(EchoInference):
    """Says of everything what a judge would."""

    async def chat(self, target: Target, body: dict[str, Any]) -> dict[str, Any]:
        self.bodies.append(body)
        if body["messages"][0]["content"] == "refuse":
            raise ApiError("the prompt is too long", code="context_length_exceeded")
        _, completion = verdict({"steps": [], "result": 0.75})
        return completion


def test_a_local_model_judges_through_the_servers_own_inference(tmp_path: Path) -> None:
    parts = Parts(tmp_path)
    parts.inference = JudgingInference()
    judge = {
        "type": "score_model",
        "name": "j",
        "model": "m",
        "input": [{"role": "user", "content": "{{item.answer}}"}],
    }
    ended, items = run(parts, {"type": "jsonl", "source": content("yes", "refuse")}, [judge])
    assert ended["result_counts"] == {"total": 2, "errored": 1, "failed": 0, "passed": 1}
    assert items[0]["results"][0]["score"] == 0.75 and "too long" in items[1]["results"][0]["error"]
    assert ended["per_model_usage"][0]["model_name"] == "m"
    [asked] = [body for body in parts.inference.bodies if body["messages"][0]["content"] == "yes"]
    assert "maxItems" in json.dumps(asked["response_format"]), "small models need an end to every list"


def test_a_run_says_so_when_the_server_has_a_bug(tmp_path: Path) -> None:
    parts = Parts(tmp_path)

    async def broken(target: Target, body: dict[str, Any]) -> dict[str, Any]:
        raise ZeroDivisionError

    parts.inference.chat = broken  # type: ignore[method-assign]
    source = {"type": "completions", "source": content("yes"), "model": "m", "input_messages": TEMPLATE}
    ended, _ = run(parts, source, [EQUAL])
    assert (ended["status"], ended["error"]["code"]) == ("failed", "server_error")
