"""The files of a job: what is wrong with them, in which words; copies, restarts, cancelling meanwhile."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from job_server import DEADLINE_S, Api, a_config, an_api, reinforcement, row
from openai import BadRequestError

from rft.server.jobs import validation
from rft.server.jobs.validation import StoppedError, inspect
from rft.server.services import Services
from rft.server.settings import LimitsConfig

TOOL = {"name": "search", "server_url": "http://127.0.0.1:9/search"}


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with an_api(tmp_path_factory.mktemp("server")) as found:
        yield found


def many(count: int, **fields: Any) -> list[dict[str, Any]]:
    return [row(number, **fields) for number in range(count)]


def failure(api: Api, rows: Any, **body: Any) -> Any:
    """The error of a job that fails, as every failed job shows it."""
    job = api.wait(api.create(rows, **body))
    assert job.status == "failed" and job.error is not None and job.finished_at is not None
    assert api.messages(job)[-1].startswith("The job failed due to an invalid ")
    assert api.messages(job)[-1].endswith(job.error.message)
    assert (job.id, "failed") in api.told.ended
    assert str(api.services.config.data_dir) not in job.error.message
    return job.error


def test_row_08_too_few_examples(api: Api) -> None:
    error = failure(api, many(7))
    assert error.code == "invalid_n_examples" and error.param == "training_file"
    assert error.message == "Training file has 7 example(s), but must have at least 10 examples"


def test_an_empty_file_has_no_examples(api: Api) -> None:
    assert failure(api, "\n\n").message == "Training file has 0 example(s), but must have at least 10 examples"
    error = failure(api, many(12), validation_file=api.uploads.add(""))
    assert (error.code, error.param) == ("invalid_n_examples", "validation_file")
    assert error.message == "Validation file has 0 example(s), but must have at least 1 examples"


def test_too_many_examples(tmp_path: Path) -> None:
    limits = {"max_training_rows": 20, "max_validation_rows": 2}
    with an_api(tmp_path, a_config(tmp_path, limits=limits)) as api:
        error = failure(api, many(21))
        assert error.message == "Training file has 21 example(s), but must have at most 20 examples"
        error = failure(api, many(20), validation_file=api.uploads.add(many(3)))
        assert error.message == "Validation file has 3 example(s), but must have at most 2 examples"


ROW_ERRORS: list[tuple[Any, str, str]] = [
    ('{"messages": [}', "invalid_file_format", "line 3: row: is not JSON"),
    ("[1, 2]", "invalid_file_format", "line 3: row: is a JSON array, not an object"),
    ('{"messages": NaN}', "invalid_file_format", "line 3: row: is not JSON: NaN"),
    ('{"messages": "\\ud800"}', "invalid_file_format", "line 3: row: contains half of a surrogate pair"),
    ({}, "invalid_training_example", "line 3: messages: is missing"),
    ({"messages": []}, "invalid_training_example", "line 3: messages: must be a non-empty list"),
    (
        {"messages": [{"role": "boss", "content": "x"}]},
        "invalid_training_example",
        'line 3: messages[0].role: is "boss"',
    ),
    ({"messages": [{"role": "user"}]}, "invalid_training_example", "line 3: messages[0].content: is missing"),
    (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        "invalid_training_example",
        "line 3: messages[1].role: the last message is from assistant, not from user",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
        "invalid_training_example",
        "line 3: messages[0].content[0]: is not a text block",
    ),
    (
        row(1, parallel_tool_calls="no"),
        "invalid_training_example",
        "line 3: parallel_tool_calls: must be true or false",
    ),
    (row(1, tools=[{"name": "x"}]), "invalid_training_example", "line 3: tools[0]: is not a function tool"),
    (
        row(1, tools=[{"type": "function", "function": {"name": "other"}}]),
        "invalid_training_example",
        "tools[0].function.name: other has no endpoint (add it to method.reinforcement.tools with its server_url)",
    ),
]


@pytest.mark.parametrize("param", ["training_file", "validation_file"])
@pytest.mark.parametrize(("bad", "code", "words"), ROW_ERRORS)
def test_a_row_that_is_wrong_is_named(api: Api, bad: Any, code: str, words: str, param: str) -> None:
    line = bad if isinstance(bad, str) else json.dumps(bad)
    good = [json.dumps(each) for each in many(12)]
    text = "\n".join([*good[:2], line, *good[2:]])
    wrong, right = api.uploads.add(text), api.uploads.add(many(12))
    files = {"training_file": wrong} if param == "training_file" else {"training_file": right, "validation_file": wrong}
    error = failure(api, None, method=reinforcement(tools=[TOOL]), **files)
    assert (error.code, error.param) == (code, param)
    assert words in error.message


def test_ten_problems_at_once(api: Api) -> None:
    error = failure(api, [{}] * 50)
    assert error.message.count("messages: is missing") == 10
    assert "line 1: " in error.message and "line 10: " in error.message and "line 11: " not in error.message


def test_a_row_cannot_name_a_tool_of_a_job_without_tools(api: Api) -> None:
    rows = many(12, tools=[{"type": "function", "function": {"name": "search"}}])
    assert "line 1: tools[0].function.name: search has no endpoint" in failure(api, rows).message


def test_rows_in_both_files_are_a_warning(api: Api) -> None:
    held_out = api.uploads.add([row(3), row(4), row(500)])
    job = api.wait(api.create(validation_file=held_out))
    assert job.status == "queued"
    events = list(api.client.fine_tuning.jobs.list_events(job.id))
    assert [event.level for event in events] == ["info", "warn", "info", "info"]
    assert events[1].message == "2 rows of the validation file are also in the training file"


def test_rows_that_can_call_no_tool_are_a_warning(api: Api) -> None:
    named = {"tools": [{"type": "function", "function": {"name": "search"}}]}
    rows = [*many(10, **named), row(90), row(91, tools=None)]
    job = api.wait(api.create(rows, method=reinforcement(tools=[TOOL])))
    (warning,) = [event for event in api.client.fine_tuning.jobs.list_events(job.id) if event.level == "warn"]
    assert warning.message.startswith("2 row(s) of the training file can call no tool")
    brought = {**TOOL, "parameters": {"type": "object"}}
    job = api.wait(api.create(rows, method=reinforcement(tools=[brought])))
    assert [event.level for event in api.client.fine_tuning.jobs.list_events(job.id)] == ["info"] * 3


def test_supervised_rows_end_with_the_assistant(api: Api) -> None:
    said = {"role": "assistant", "content": "x", "weight": 1, "reasoning_content": "hm"}
    tools = [{"type": "function", "function": {"name": "search"}}]  # nothing is called
    rows = [{"messages": [*row(number)["messages"], said], "tools": tools} for number in range(12)]
    method = {"type": "supervised"}
    assert api.wait(api.create(rows, method=method)).status == "queued"
    assert "is from user, not from assistant" in failure(api, many(12), method=method).message


def test_a_file_that_is_deleted_later_changes_nothing(api: Api) -> None:
    job = api.create(validation_file=api.uploads.add([row(77)]))
    for file_id in (job.training_file, job.validation_file):
        api.uploads.delete(file_id)
    assert api.wait(job).status == "queued"
    config = api.config_of(job)
    assert len(config.data.train.read_text().splitlines()) == 12
    assert config.data.validation is not None and config.data.validation.is_file()


def test_a_file_that_goes_while_the_job_is_made_is_a_clear_state(tmp_path: Path) -> None:
    with an_api(tmp_path) as api:
        find = api.uploads.path

        def vanishing(file_id: str, project: str, **options: Any) -> Path:
            path = find(file_id, project, **options)
            path.unlink()
            return path

        api.uploads.path = vanishing  # type: ignore[method-assign]
        job = api.create()
        assert job.status == "failed" and job.error.code == "file_not_found"
        assert "deleted while the job was made" in job.error.message


def test_a_disk_that_takes_no_files_is_a_clear_state(tmp_path: Path) -> None:
    with an_api(tmp_path) as api:
        api.uploads.path = lambda *_, **__: tmp_path  # type: ignore[method-assign]
        job = api.create()
        assert job.status == "failed" and job.error.code == "storage_error"
        assert str(tmp_path) not in job.error.message


def idle(services: Services) -> None:
    """Nothing is validated, as where a server ends at once."""
    services.validation.submit = lambda job_id: None  # type: ignore[method-assign]


class TestRestart:
    """A job that was being looked at when the server ended."""

    def test_is_looked_at_again(self, tmp_path: Path) -> None:
        job = self.interrupted(tmp_path)
        with an_api(tmp_path) as api:
            assert api.wait(job).status == "queued"
            assert len(api.messages(job)) == 3  # nothing is told twice

    def test_fails_clearly_without_its_config(self, tmp_path: Path) -> None:
        job = self.interrupted(tmp_path)
        (tmp_path / "data" / "runs" / job.id / "job_config.yaml").unlink()
        with an_api(tmp_path) as api:
            found = api.wait(job)
            assert found.status == "failed" and found.error.code == "job_incomplete"

    def test_fails_clearly_without_its_copy(self, tmp_path: Path) -> None:
        job = self.interrupted(tmp_path)
        (tmp_path / "data" / "runs" / job.id / "data" / "train.jsonl").unlink()
        with an_api(tmp_path) as api:
            found = api.wait(job)
            assert (found.error.code, found.error.param) == ("file_not_found", "training_file")

    def test_fails_clearly_without_its_folder(self, tmp_path: Path) -> None:
        job = self.interrupted(tmp_path)
        shutil.rmtree(tmp_path / "data" / "runs" / job.id)
        with an_api(tmp_path) as api:
            assert api.wait(job).error.code == "job_incomplete"

    def test_cannot_be_paused_before_it_is_queued(self, tmp_path: Path) -> None:
        with an_api(tmp_path, prepare=idle) as api:
            job = api.create()
            with pytest.raises(BadRequestError) as caught:
                api.client.fine_tuning.jobs.pause(job.id)
            assert caught.value.code == "invalid_job_status"
            assert api.client.fine_tuning.jobs.cancel(job.id).status == "cancelled"

    @staticmethod
    def interrupted(tmp_path: Path) -> Any:
        with an_api(tmp_path, prepare=idle) as api:
            return api.create()


def test_a_job_cancelled_while_its_files_are_looked_at_stays_cancelled(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_looking, go_on, has_looked = threading.Event(), threading.Event(), threading.Event()

    def slowly(*arguments: Any) -> Any:
        is_looking.set()
        assert go_on.wait(DEADLINE_S)
        try:
            return inspect(*arguments)
        finally:
            has_looked.set()

    monkeypatch.setattr(validation, "inspect", slowly)
    cancelled = api.create()
    assert is_looking.wait(DEADLINE_S)
    assert api.client.fine_tuning.jobs.cancel(cancelled.id).status == "cancelled"
    go_on.set()
    assert has_looked.wait(DEADLINE_S)
    assert api.wait(api.create()).status == "queued"  # by then the server has seen how the other one went
    assert api.client.fine_tuning.jobs.retrieve(cancelled.id).status == "cancelled"
    assert len(api.messages(cancelled)) == 2


def test_a_stop_ends_the_reading_of_a_large_file(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(each) + "\n" for each in many(12)))
    (tmp_path / "job_config.yaml").write_text("{}")
    job = {"method": reinforcement(), "validation_file": None}
    stop = threading.Event()
    train, held_out = inspect(job, tmp_path, LimitsConfig(), stop)
    assert len(train.digests) == 12 and held_out is None
    stop.set()
    with pytest.raises(StoppedError):
        inspect(job, tmp_path, LimitsConfig(), stop)
