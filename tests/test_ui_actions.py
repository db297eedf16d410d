"""What the page does, over real HTTP: pausing a run, trying graders on its rollouts, looking through a dataset."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
from fakes import ScriptedServer, verdict
from page import ask, assert_guarded, children, post, rft_ui
from run_folders import a_run, an_item, train_step, write_data
from serving import served

from rft.data import load_items
from rft.errors import DataError
from rft.store import RunStore
from rft.ui.app import build_ui
from rft.ui.playground import MAX_DATASET_BYTES
from rft.ui.tries.process import TryError, run_apart

pytestmark = pytest.mark.slow  # each try of a grader is a process of its own

RUN = "ftjob-1"
EXACT = {
    "type": "string_check",
    "name": "exact",
    "input": "{{ sample.output_text }}",
    "reference": "{{ item.answer }}",
    "operation": "eq",
}
JUDGE = {"type": "score_model", "name": "judged", "model": "gpt-4o", "input": [{"role": "user", "content": "Grade."}]}
KEY = "sk-of-the-judge"
OUTSIDE = "a-file-of-the-user"


def python(body: str) -> dict[str, Any]:
    return {"type": "python", "name": "p", "source": f"def grade(sample, item):\n    {body}\n"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page") / "runs"
    a_run(folder, steps=2, every=2, num_items=2)
    (folder.parent / "secret.txt").write_text(OUTSIDE)
    return folder


@pytest.fixture(scope="module")
def page(runs: Path) -> Iterator[str]:
    with served(build_ui(runs)) as address:
        yield address


def grade(page: str, grader: Any, **asked: Any) -> Any:
    answer = post(page, f"/ui/api/runs/{RUN}/grade", {"grader": grader, "num_rollouts": 3} | asked)
    assert answer.status == 200, answer
    assert_guarded(answer)
    return answer.json


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a run."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- a run of a folder ---


def test_a_live_run_can_be_paused_and_nothing_else(tmp_path: Path) -> None:
    with RunStore.create(tmp_path, "live", {}) as store, served(build_ui(tmp_path)) as address:
        store.write_state({"status": "running", "step": 1, "steps": 4})
        for action in ("resume", "cancel"):
            answer = post(address, f"/ui/api/runs/live/{action}")
            assert answer.status == 400 and "rft train CONFIG --resume" in answer.message
        assert not store.is_pause_asked
        answer = post(address, "/ui/api/runs/live/pause")
        assert answer.status == 200 and answer.json["run"]["id"] == "live" and store.is_pause_asked
        assert_guarded(answer)
        assert post(address, "/ui/api/runs/none/pause").status == 404


def test_a_run_that_has_ended_cannot_be_paused(page: str, runs: Path) -> None:
    assert post(page, f"/ui/api/runs/{RUN}/pause").status == 400
    assert not RunStore.open(runs / RUN).is_pause_asked


# --- graders ---


def test_stored_rollouts_are_graded_again_and_the_run_is_as_it_was(page: str, runs: Path) -> None:
    before = contents(runs / RUN)
    found = grade(page, EXACT)
    assert found["problem"] is None and len(found["graded"]) == 3
    newest = [rollout for rollout in RunStore.open(runs / RUN).rollouts(2)][::-1][:3]
    assert [each["rollout"]["id"] for each in found["graded"]] == [rollout.id for rollout in newest]
    assert [each["grade"]["score"] for each in found["graded"]] == [1.0, 1.0, 1.0]
    old = [rollout.grade.score for rollout in newest if rollout.grade is not None]
    assert found["mean_old"] == pytest.approx(sum(old) / 3) and found["mean_new"] == 1.0
    assert contents(runs / RUN) == before


def test_rollouts_can_be_named(page: str, runs: Path) -> None:
    ids = [rollout.id for rollout in RunStore.open(runs / RUN).rollouts(1)][:2]
    found = grade(page, EXACT, rollout_ids=[*ids, ids[0]])
    assert [each["rollout"]["id"] for each in found["graded"]] == ids
    for name in ("trace_none", "../../x", "x" * 5000):
        refused = grade(page, EXACT, rollout_ids=[name])
        assert refused["graded"] == [] and refused["field"] == "rollout_ids" and "has no rollout" in refused["problem"]


def test_the_parts_of_a_grade_are_shown(page: str) -> None:
    parts = {"a": EXACT, "b": {**python("return 0.5"), "name": "half"}}
    found = grade(page, {"type": "multi", "name": "m", "graders": parts, "calculate_output": "(a + b) / 2"})
    assert found["graded"][0]["grade"]["score"] == 0.75
    assert {part["name"]: part["score"] for part in found["graded"][0]["grade"]["parts"]} == {"a": 1.0, "b": 0.5}


@pytest.mark.parametrize(
    ("grader", "field", "words"),
    [
        ({"type": "string_check", "input": "x"}, "grader.name", None),
        ({**EXACT, "operation": "near"}, "grader.operation", "eq"),
        ({**EXACT, "colour": 1}, "grader.colour", "unknown key"),
        ({"type": "python", "name": "p", "source": "def grade(:"}, "grader.source", "not valid Python"),
        (
            {"type": "python", "name": "p", "source": "1 / 0\ndef grade(a, b):\n    return 1\n"},
            "grader",
            "ZeroDivision",
        ),
        ({}, "grader", None),
        (JUDGE, "grader", "no URL for it"),
        ({**EXACT, "type": "text_similarity", "evaluation_metric": "cosine"}, None, None),
        (
            {"type": "endpoint", "name": "e", "url": "http://h/", "headers": {"a": "[redacted]"}},
            "grader.headers",
            "again",
        ),
    ],
)
def test_a_wrong_grader_is_one_clear_problem(page: str, grader: Any, field: str | None, words: str | None) -> None:
    found = grade(page, grader)
    assert found["graded"] == [] and found["problem"] and found["mean_new"] is None
    assert field is None or found["field"] == field or found["field"].startswith("grader"), found
    assert words is None or words in found["problem"], found


def test_a_grader_that_raises_shows_its_traceback(page: str) -> None:
    found = grade(page, python("raise ValueError(f'no {item[\"answer\"]}')"))
    for each in found["graded"]:
        assert each["grade"]["score"] == 0.0
        assert "ValueError: no yes" in each["grade"]["errors"]["python_grader_runtime_error"]


def test_a_grader_that_loops_forever_is_ended(runs: Path) -> None:
    app = build_ui(runs)
    app.state.playground.grading_s = 2.0
    with served(app) as address:
        before = children(os.getpid())
        slow = python("while sample['stop_reason'] == 'answered': pass")
        found = grade(address, {"type": "multi", "name": "m", "graders": {"slow": slow}, "calculate_output": "slow"})
        assert [each["grade"] for each in found["graded"]] == [None] * 3
        assert all("before the time was over" in each["problem"] for each in found["graded"])
        assert children(os.getpid()) <= before
        assert grade(address, EXACT)["mean_new"] == 1.0, "the page goes on"


def test_what_is_there_in_time_is_shown(runs: Path) -> None:
    app = build_ui(runs)
    app.state.playground.grading_s = 8.0
    loops_on_one = python("while item['messages'][0]['content'] == 'question 0': pass\n    return 1")
    with served(app) as address:
        found = grade(address, loops_on_one, num_rollouts=4)
    assert {(each["grade"] or {}).get("score") for each in found["graded"]} == {None, 1.0}
    assert found["mean_new"] == 1.0


def test_a_grader_reaches_no_network_and_no_file(page: str, runs: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        found = grade(page, python(f"import socket; socket.create_connection(('127.0.0.1', {port}), timeout=2)"))
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert "unreachable" in json.dumps(found["graded"])
    for path in (runs.parent / "secret.txt", runs / RUN / "config.json", Path("/proc/self/environ")):
        found = grade(page, python(f"raise ValueError(open({str(path)!r}).read())"))
        said = json.dumps(found)
        assert OUTSIDE not in said and "runs_dir" not in said and "HOME=" + str(Path.home()) not in said


def test_a_grader_sees_no_value_of_the_environment(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    found = grade(page, python("import os; raise ValueError(str(dict(os.environ)))"))
    assert "PATH" in json.dumps(found) and KEY not in json.dumps(found)


def test_one_try_at_a_time(page: str) -> None:
    slow = python("import time; time.sleep(1.5); return 1")
    with ThreadPoolExecutor(2) as threads:
        before = children(os.getpid())
        tried = [
            threads.submit(post, page, f"/ui/api/runs/{RUN}/grade", {"grader": slow, "num_rollouts": 1})
            for _ in range(2)
        ]
        while not children(os.getpid()) - before:  # the process of the try: this is how the other tests look for it
            assert wait(tried, timeout=0.02).not_done, "the try had no process"
        answers = sorted((each.result() for each in tried), key=lambda answer: answer.status)
    assert [answer.status for answer in answers] == [200, 429]
    assert answers[1].code == "busy"
    assert grade(page, EXACT)["mean_new"] == 1.0


def test_the_judges_of_the_run_are_asked_with_their_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    a_run(tmp_path / "runs", steps=1, num_items=2)
    config = tmp_path / "runs" / RUN / "config.json"
    with ScriptedServer(lambda number, body: verdict({"result": 0.25, "steps": []})) as judge:
        judges = {"gpt-4o": {"url": f"{judge.base_url}/v1", "api_key_env": "JUDGE_KEY"}, "at-home": {"path": "/m"}}
        config.write_text(json.dumps(json.loads(config.read_text()) | {"judges": judges}))
        with served(build_ui(tmp_path / "runs")) as address:
            found = grade(address, JUDGE)
            assert [each["grade"]["score"] for each in found["graded"]] == [0.25] * 3
            assert KEY not in json.dumps(found)
            assert "no URL for it" in grade(address, {**JUDGE, "model": "at-home"})["problem"]
            judge.script = lambda number, body: (500, {"error": "down"})
            monkeypatch.setattr("rft.wire.RetryPolicy.wait_s", lambda self, attempt: 0.0)
            (failed,) = grade(address, JUDGE, num_rollouts=1)["graded"]
            assert failed["grade"] is None and "HTTP 500" in failed["problem"] and KEY not in failed["problem"]


def test_without_its_data_a_run_says_which_file_is_gone(tmp_path: Path) -> None:
    a_run(tmp_path / "runs", steps=1, num_items=1)
    (tmp_path / "runs" / "validation.jsonl").unlink()
    with served(build_ui(tmp_path / "runs")) as address:
        assert "cannot be read: No such file" in grade(address, EXACT)["problem"]


def test_data_is_found_from_where_the_run_was_started(tmp_path: Path) -> None:
    """A run's paths are relative to the folder it was started in, not to where the page is served."""
    store = RunStore.create(
        tmp_path / "there" / "runs", "run", {"runs_dir": "runs", "data": {"train": "v/validation.jsonl"}}
    )
    (tmp_path / "there" / "v").mkdir()
    write_data(tmp_path / "there" / "v" / "validation.jsonl", 2)
    train_step(store, [an_item(0), an_item(1)], 1, 2, lambda step, attempt: 0.5)
    store.close()
    with served(build_ui(tmp_path / "there" / "runs")) as address:
        answer = post(address, "/ui/api/runs/run/grade", {"grader": EXACT})
    assert answer.json["mean_new"] == 1.0, answer


def test_what_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    store = a_run(tmp_path / "runs", steps=1, num_items=1)
    with store.rollout_path(1).open("ab") as file:
        file.write(b'{"id": "trace_of_another_version"}\n{"id": "cut o')
    with served(build_ui(tmp_path / "runs")) as address:
        found = grade(address, EXACT)
        assert found["mean_new"] == 1.0 and len(found["graded"]) == 3
        refused = grade(address, EXACT, rollout_ids=["trace_of_another_version"])
        assert "that can be read" in refused["problem"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        ({"grader": {}, "num_rollouts": 51}, 400),
        ({"grader": {}, "rollout_ids": ["x"] * 51}, 400),
        ({"grader": {}, "other": 1}, 400),
        ({"grader": []}, 400),
        ({"grader": {"x": "y" * 1_000_001}}, 413),
    ],
)
def test_requests_that_are_refused(page: str, body: Any, status: int) -> None:
    answer = post(page, f"/ui/api/runs/{RUN}/grade", body)
    assert answer.status == status and answer.message
    assert_guarded(answer)


def test_a_try_that_is_stuck_ends_with_its_process(tmp_path: Path) -> None:
    """A run folder of somebody else's may hold anything, here a pipe that nobody writes."""
    store = a_run(tmp_path / "runs", steps=1, num_items=1)
    os.mkfifo(store.rollout_path(9))
    before = children(os.getpid())
    request = {
        "run": str(store.path),
        "grader": EXACT,
        "rollout_ids": [],
        "num_rollouts": 1,
        "deadline_s": 60,
        "grading_s": 60,
    }
    with pytest.raises(TryError, match="no result within 3 s"):
        asyncio.run(run_apart("grade", request, deadline_s=3.0))
    assert children(os.getpid()) <= before


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_a_try_dies_with_its_server(runs: Path, number: int) -> None:
    slow = {"grader": python("while True: pass"), "num_rollouts": 1}
    with ThreadPoolExecutor(1) as threads, rft_ui(runs) as (url, process):
        tried = threads.submit(post, url, f"/ui/api/runs/{RUN}/grade", slow)
        started = set[int]()
        deadline = time.monotonic() + 60
        while len(started) < 3:  # who supervises it, the try itself, a worker of its sandbox
            assert time.monotonic() < deadline and not tried.done()
            started |= children(process.pid)
            time.sleep(0.02)  # other processes: nothing tells us
        process.send_signal(number)
        process.wait(timeout=30)
        while left := [pid for pid in started if is_running(pid)]:
            assert time.monotonic() < deadline, left
            time.sleep(0.02)
        assert tried.exception() is not None or tried.result().status == 500


def is_running(pid: int) -> bool:
    """Not one that has ended and waits to be looked at."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_try_that_dies_says_so() -> None:
    with pytest.raises(TryError, match="ended without a result"):
        asyncio.run(run_apart("none", {}, deadline_s=30.0))


# --- datasets ---

GOOD = {"messages": [{"role": "user", "content": "hi"}], "answer": "a"}


def validate(page: str, text: str, **asked: Any) -> Any:
    answer = post(page, "/ui/api/datasets/validate", {"text": text} | asked)
    assert answer.status == 200, answer
    assert_guarded(answer)
    return answer.json


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_a_good_dataset(page: str) -> None:
    tool = {"type": "function", "function": {"name": "search", "parameters": {"type": "object"}}}
    found = validate(page, lines(GOOD, {**GOOD, "tools": [tool], "extra": 1}) + "\n\n")
    assert found["num_rows"] == 2 and found["num_problems"] == 0 and found["problems"] == []
    assert found["columns"] == {"messages": 2, "answer": 2, "tools": 1, "extra": 1} and found["tools"] == ["search"]
    assert json.loads(found["example"]) == GOOD["messages"]


def test_all_problems_are_counted_and_the_first_hundred_shown(page: str) -> None:
    bad = {"messages": [{"role": "robot", "content": 1}]}
    found = validate(page, lines(GOOD, *[bad] * 200, [], GOOD))
    assert found["num_rows"] == 203 and found["num_problems"] == 401 and len(found["problems"]) == 100
    first = found["problems"][0]
    assert first["line"] == 2 and first["field"] == "messages[0].role" and first["cure"].startswith("use one of")
    assert found["columns"]["messages"] == 202 and found["example"] is not None


def test_the_problems_are_those_of_a_run(page: str, tmp_path: Path) -> None:
    text = lines({"messages": []}, [1], GOOD, {"messages": GOOD["messages"], "tools": "x"}) + '{"a": \n"\\ud800"\n'
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(DataError) as refused:
        load_items(tmp_path / "rows.jsonl", None)
    shown = [tuple(each.values()) for each in validate(page, text)["problems"]]
    assert shown == list(refused.value.found)


def test_an_empty_dataset_is_a_problem(page: str) -> None:
    found = validate(page, "\n\n")
    assert found["num_rows"] == 0 and found["num_problems"] == 1 and "no rows" in found["problems"][0]["problem"]


def test_tools_that_the_environment_does_not_serve(page: str) -> None:
    tool = {"type": "function", "function": {"name": "search", "parameters": {"type": "object"}}}
    served_ = {"type": "http", "tools": [{"name": "lookup", "server_url": "http://h/"}]}
    (problem,) = validate(page, lines({**GOOD, "tools": [tool]}), environment=served_)["problems"]
    assert problem["field"] == "tools[0].function.name" and "no endpoint" in problem["problem"]
    assert validate(page, lines({**GOOD, "tools": [tool]}))["num_problems"] == 0


@pytest.mark.parametrize(
    "environment",
    [
        {"type": "mcp", "servers": {"x": {"command": "touch", "args": ["MARK"]}}},
        {"type": "functions", "module": "os:abort"},
        {"type": "http", "tools": [{"server_url": "http://h/"}]},
        {"type": "http", "tools": 1},
    ],
)
def test_no_environment_is_started_for_a_dataset(page: str, environment: dict[str, Any], tmp_path: Path) -> None:
    asked = json.loads(json.dumps(environment).replace("MARK", str(tmp_path / "mark")))
    answer = post(page, "/ui/api/datasets/validate", {"text": lines(GOOD), "environment": asked})
    assert answer.status == 400 and answer.json["error"]["param"].startswith("environment")
    assert not (tmp_path / "mark").exists()


def test_hostile_rows_are_cut(page: str) -> None:
    rows = [
        {"messages": [{"role": "x" * 1_000_000, "content": ""}]},
        {f"k{i}": 1 for i in range(5000)},
        {"y" * 9000: 1},
    ]
    found = validate(page, lines(*rows, GOOD))
    assert len(json.dumps(found)) < 200_000 and found["num_rows"] == 4


def test_a_dataset_that_is_too_large_is_refused_as_it_arrives(page: str, tmp_path: Path) -> None:
    answer = post(page, "/ui/api/datasets/validate", b'{"text": "' + b" " * MAX_DATASET_BYTES + b'"}')
    assert answer.status == 413 and f"{MAX_DATASET_BYTES:,}" in answer.message


def test_a_body_that_stops_arriving_is_not_waited_for(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rft.ui.routes.tries.SILENCE_S", 0.2)
    for path in ("/ui/api/datasets/validate", f"/ui/api/runs/{RUN}/grade"):
        answer = ask(page, path, method="POST", body=b"{", content_type="application/json", content_length="100")
        assert answer.status == 408 and "no part of the body" in answer.message
        assert_guarded(answer)


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"text": 1}', b'{"text": "", "x": 1}', b'{"text": "\xff"}'])
def test_what_is_no_try_is_refused(page: str, body: bytes) -> None:
    answer = post(page, "/ui/api/datasets/validate", body)
    assert answer.status == 400 and answer.message


def test_nothing_of_a_try_is_left(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = children(os.getpid())
    assert validate(page, lines(GOOD))["num_rows"] == 1
    assert grade(page, python("return 1"))["mean_new"] == 1.0
    assert list(tmp_path.iterdir()) == [] and children(os.getpid()) <= before
