"""`rft grade`: validate, run, test, probe and rerun, as a user calls them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fakes import ScriptedServer, verdict
from typer.testing import CliRunner, Result

from rft.cli import app
from rft.errors import ConfigError, DataError, UserError
from rft.store import RunStore
from rft.types import Grade, Message, Rollout, StopReason, Turn

CONTAINS = {
    **{"type": "string_check", "name": "contains", "input": "{{ sample.output_text }}"},
    **{"reference": "{{ item.answer }}", "operation": "ilike"},
}
EXACT = {**CONTAINS, "name": "exact", "operation": "eq"}
LENGTH = {
    **{"type": "text_similarity", "name": "alike", "input": "{{ sample.output_text }}"},
    **{"reference": "{{ item.answer }}", "evaluation_metric": "rouge_1"},
}
JUDGE = {
    "type": "score_model",
    "name": "j",
    "model": "m",
    "input": [{"role": "user", "content": "{{ sample.output_text }}"}],
}


def write(path: Path, value: Any) -> str:
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return str(path)


def rft(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["grade", *arguments])


@pytest.fixture
def rows(tmp_path: Path) -> str:
    lines = [
        {"messages": [{"role": "user", "content": f"Capital of {country}?"}], "answer": capital}
        for country, capital in [("France", "Paris"), ("Italy", "Rome"), ("Spain", "Madrid")]
    ]
    return write(tmp_path / "rows.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def test_validate_prints_the_grader(tmp_path: Path) -> None:
    result = rft("validate", write(tmp_path / "g.json", {**EXACT, "name": ""}))
    assert result.exit_code == 0
    assert json.loads(result.stdout)["grader"]["name"].startswith("grader-")


def test_the_grader_of_a_config_is_taken_too(tmp_path: Path) -> None:
    config = write(tmp_path / "run.yaml", "grader: " + json.dumps(EXACT))
    assert json.loads(rft("validate", config).output)["grader"] == EXACT
    cases = write(tmp_path / "cases.jsonl", json.dumps({"item": {"answer": "x"}, "answer": "x", "score": 1}))
    assert rft("test", config, cases).exit_code == 0


@pytest.mark.parametrize(
    ("text", "problem"),
    [("name: x", "has no grader"), ("grader: " + json.dumps(EXACT | {"operation": "is"}), "grader.operation")],
)
def test_a_config_without_a_good_grader_is_named(tmp_path: Path, text: str, problem: str) -> None:
    error = rft("validate", write(tmp_path / "run.yaml", text)).exception
    assert isinstance(error, ConfigError) and problem in str(error) and "run.yaml" in str(error)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "is not JSON"),
        ({**EXACT, "operation": "equals"}, "g.json.operation"),
        ({"type": "nothing"}, "expected tags"),
    ],
)
def test_validate_names_what_is_wrong(tmp_path: Path, content: Any, problem: str) -> None:
    result = rft("validate", write(tmp_path / "g.json", content))
    assert isinstance(result.exception, ConfigError)
    assert problem in str(result.exception)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    result = rft("validate", str(tmp_path / "no.json"))
    assert isinstance(result.exception, ConfigError)
    assert "no.json" in str(result.exception)


def test_run_prints_the_contracts_response(tmp_path: Path) -> None:
    grader, item = write(tmp_path / "g.json", EXACT), write(tmp_path / "i.json", {"answer": "Paris"})
    body = json.loads(rft("run", grader, "--item", item, "--sample", "Paris").stdout)
    assert (body["reward"], body["metadata"]["name"], body["sub_rewards"]) == (1.0, "exact", {})
    assert json.loads(rft("run", grader, "--sample", "Paris").stdout)["metadata"]["errors"]["invalid_variable_error"]


def test_run_asks_a_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-hidden")
    with ScriptedServer(lambda n, body: verdict({"steps": [], "result": 0.5})) as server:
        grader = write(tmp_path / "g.json", JUDGE)
        result = rft("run", grader, "--sample", "x", "--judge", f"m={server.base_url}/v1")
    body = json.loads(result.stdout)
    assert (body["reward"], body["metadata"]["token_usage"], body["metadata"]["sampled_model_name"]) == (0.5, 15, "m")
    assert server.headers[0]["authorization"] == "Bearer sk-hidden"
    assert isinstance(rft("run", grader, "--sample", "x", "--judge", "m").exception, UserError)


def test_test_compares_scores_and_orders(tmp_path: Path) -> None:
    grader = write(tmp_path / "g.json", LENGTH)
    good = [
        {"item": {"answer": "a b c"}, "answer": "a b c", "score": 1.0},
        {"item": {"answer": "a b c"}, "answers": {"good": "a b c", "fair": "a b", "bad": "x"}},
    ]
    lines = "\n".join(json.dumps(case) for case in good)
    result = rft("test", grader, write(tmp_path / "c.jsonl", lines), "--repeats", "3", "--json")
    assert result.exit_code == 0
    order = json.loads(result.stdout)[1]
    assert (order["passed"], order["means"]["fair"], order["spreads"]["fair"]) == (True, pytest.approx(0.8), 0.0)


def test_a_case_can_say_what_tools_answered(tmp_path: Path) -> None:
    source = (
        "def grade(sample, item):\n"
        "    told = [m['content'] for m in sample['trace'] if m['role'] == 'tool' and not m['is_error']]\n"
        "    return float(told == ['7', '8'] and sample['output_text'] == sample['trace'][-1]['content'] == 'x')\n"
    )
    grader = write(tmp_path / "g.json", {"type": "python", "name": "p", "source": source})
    told = {"answer": "x", "score": 1.0, "results": ["7", "8"]}
    cases = write(tmp_path / "c.jsonl", "\n".join(map(json.dumps, [told, {"answer": "x", "score": 0.0}])))
    assert rft("test", grader, cases).exit_code == 0


@pytest.mark.parametrize(
    ("case", "problem"),
    [
        ({"item": {"answer": "a"}, "answer": "b", "score": 1.0}, "scored 0, expected 1"),
        ({"item": {"answer": "a"}, "answers": {"good": "b", "bad": "a"}}, "good (0) is not above bad (1)"),
        ({"item": {"answer": "a"}, "answers": {"good": "a", "twin": "a"}}, "is not above twin"),
        ({"item": {}, "answer": "b", "score": 1.0}, "item.answer"),
    ],
)
def test_test_fails_with_the_reason(tmp_path: Path, case: dict[str, Any], problem: str) -> None:
    result = rft("test", write(tmp_path / "g.json", EXACT), write(tmp_path / "c.jsonl", case), "--json")
    assert result.exit_code == 1
    assert problem in json.loads(result.stdout)[0]["problem"]
    assert "line 1" in result.stderr


def test_test_shows_a_judges_variance(tmp_path: Path) -> None:
    case = write(tmp_path / "c.jsonl", {"answer": "x", "score": 0.5, "tolerance": 0.2})
    with ScriptedServer(lambda n, body: verdict({"steps": [], "result": [0.4, 0.6][n % 2]})) as server:
        judge = f"m={server.base_url}/v1"
        result = rft("test", write(tmp_path / "g.json", JUDGE), case, "--repeats", "4", "--judge", judge, "--json")
    assert json.loads(result.stdout)[0]["spreads"]["answer"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("line", "where"),
    [
        ({"answer": "x"}, "c.jsonl:1"),
        ({"answers": {"only": "one"}}, "c.jsonl:1"),
        ("[", "c.jsonl:1"),
        ({"answer": "x", "score": "high"}, "c.jsonl:1: score"),
        ({"answr": "x"}, "c.jsonl:1: answr"),
        ("", "c.jsonl"),
    ],
)
def test_bad_cases_are_named(tmp_path: Path, line: Any, where: str) -> None:
    result = rft("test", write(tmp_path / "g.json", EXACT), write(tmp_path / "c.jsonl", line))
    assert isinstance(result.exception, DataError)
    assert where in result.exception.where


def test_probe_finds_a_grader_that_can_be_gamed(tmp_path: Path, rows: str) -> None:
    result = rft("probe", write(tmp_path / "g.json", CONTAINS), "--items", rows, "--json")
    found = {row["probe"]: row for row in json.loads(result.stdout)}
    assert result.exit_code == 1
    assert found["answers of many items"]["too_high"] == 1.0
    assert found["empty"]["highest"] == 0.0
    assert "answers of many items" in result.stderr
    assert "prompt injection" not in result.stderr


def test_probe_is_content_with_a_strict_grader(tmp_path: Path, rows: str) -> None:
    result = rft("probe", write(tmp_path / "g.json", EXACT), "--items", rows)
    assert result.exit_code == 0, result.stderr
    assert "prompt injection" in result.stdout


def test_probe_sends_injections_to_a_judge(tmp_path: Path, rows: str) -> None:
    def gullible(number: int, body: dict[str, Any]) -> tuple[int, Any]:
        text = body["messages"][0]["content"]
        return verdict({"steps": [], "result": 1.0 if "Ignore all previous instructions" in text else 0.0})

    with ScriptedServer(gullible) as server:
        judge = ("--judge", f"m={server.base_url}/v1")
        result = rft("probe", write(tmp_path / "g.json", JUDGE), "--items", rows, *judge, "--json")
    failed = [row["probe"] for row in json.loads(result.stdout) if row["too_high"]]
    assert failed == ["prompt injection"]


def a_run(tmp_path: Path, rows: str) -> RunStore:
    store = RunStore.create(tmp_path / "runs", "run-001", {"data": {"train": rows, "validation": None, "test": None}})
    with store:
        from rft.data import load_items

        for number, (item, answer) in enumerate(
            zip(load_items(Path(rows), None), ["Paris", "rome", "Lisbon"], strict=True)
        ):
            message = Message(role="assistant", content=answer)
            turn = Turn(
                input_ids=[1], output_ids=[2], logprobs=[-0.1], finish_reason="stop", policy_version=0, message=message
            )
            store.append_rollout(
                Rollout(
                    id=f"trace_{number}",
                    item_id=item.id,
                    split="train",
                    step=1,
                    attempt=0,
                    seed=0,
                    turns=[turn],
                    stop_reason=StopReason.ANSWERED,
                    grade=Grade(score=[1.0, 0.0, 0.0][number]),
                    started_at=0.0,
                    duration_s=1.0,
                )
            )
    return store


def test_rerun_grades_stored_rollouts_again(tmp_path: Path, rows: str) -> None:
    store = a_run(tmp_path, rows)
    before = [rollout.model_dump() for rollout in store.rollouts()]
    grader = write(tmp_path / "g.json", CONTAINS)
    result = rft("rerun", str(store.path), "--grader", grader, "--json")
    found = json.loads(result.stdout)
    assert (found["num_rollouts"], found["mean_old"], found["mean_new"]) == (
        3,
        pytest.approx(1 / 3),
        pytest.approx(2 / 3),
    )
    assert found["rank_correlation"] == pytest.approx(0.5)
    assert found["farthest"][0] == {"rollout": "trace_1", "old": 0.0, "new": 1.0}
    lines = [json.loads(line) for line in (store.path / "regrades" / "contains.jsonl").read_text().splitlines()]
    assert [line["grade"]["score"] for line in lines] == [1.0, 1.0, 0.0]
    assert [rollout.model_dump() for rollout in store.rollouts()] == before, "the run itself is not touched"
    assert "mean 0.3333 in the run, 0.6667 now" in rft("rerun", str(store.path), "--grader", grader).stdout


def test_rerun_needs_the_runs_data(tmp_path: Path, rows: str) -> None:
    store = a_run(tmp_path, rows)
    Path(rows).write_text(json.dumps({"messages": [{"role": "user", "content": "x"}]}) + "\n")
    result = rft("rerun", str(store.path), "--grader", write(tmp_path / "g.json", CONTAINS))
    assert isinstance(result.exception, UserError)
