"""`rft eval` and the small baseline in `rft train`: real runs on a tiny model, a scripted server over real HTTP."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from test_cli import rft
from test_job import a_config, a_tree
from upstream import Upstream, a_call, answering

from rft.baseline.numbers import baseline_of
from rft.config import RunConfig, validate_config
from rft.engines.remote import RemoteConfig
from rft.errors import EngineError, NoProgressError, UserError
from rft.evaluation import Extent, Subject, run_baseline, run_evaluation, subject_of
from rft.job import run_job
from rft.reuse import is_whole
from rft.store import RunStore
from rft.types import StopReason

CONSTANT = "def grade(sample, item):\n    return 0.0\n"
RIGHT = "def grade(sample, item):\n    return float('41' in sample['output_text'])\n"


def evaluations(store: RunStore) -> list[dict[str, Any]]:
    return [row for row in store.metrics() if row["kind"] == "evaluation"]


# --- our own models ---


def test_the_base_model_leaves_a_run_folder_like_a_trainings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = a_config(tmp_path)
    path = run_evaluation(config, subject_of(config), Extent("validation", 2, 5))
    store = RunStore.open(path)
    assert path.name == "tiny-eval-001" and store.is_done
    state = store.read_state()
    assert (state["status"], state["kind"], state["label"], state["split"]) == (
        *("succeeded", "evaluation", "model", "validation"),
    )
    (row,) = evaluations(store)
    assert (row["step"], row["split"], row["num_items"], row["num_rollouts"]) == (0, "validation", 5, 10)
    rollouts = list(store.rollouts(0, "validation"))
    assert len(rollouts) == 10 and all(rollout.grade is not None for rollout in rollouts)
    assert store.config()["evaluation"]["rollouts_per_item"] == 2
    told = capsys.readouterr().out
    assert "validation at step 0: grade" in told and str(path) in told


@pytest.mark.slow
def test_a_checkpoint_is_sampled_with_its_own_weights(tmp_path: Path) -> None:
    """They answer as the training's own evaluation of that step did, and the base model does not."""
    config = a_config(tmp_path)
    run = run_job(config, run_id="tuned")
    for of, label, step in [(str(run), "tuned step 3", 3), (str(run / "checkpoints/step_000002"), "tuned step 2", 2)]:
        subject = subject_of(config, of)
        assert (subject.label, subject.version) == (label, step)
        store = RunStore.open(run_evaluation(config, subject, Extent("validation", 1)))
        (row,) = evaluations(store)
        assert row["step"] == step
        assert {turn.policy_version for rollout in store.rollouts(step) for turn in rollout.turns} == {step}
        was = {rollout.item_id: rollout for rollout in RunStore.open(run).rollouts(step, "validation")}
        now = {rollout.item_id: rollout for rollout in store.rollouts(step, "validation")}
        assert was.keys() == now.keys()
        # ids and so seeds are those of another place of the run only in the run's name
        assert all(was[key].turns[0].output_ids == now[key].turns[0].output_ids for key in was)
        assert not store.weights.exists() or not any(store.weights.iterdir()), "published weights are left over"
    best = subject_of(config, f"best:{run}")
    assert best.weights is not None and best.weights.parent == run / "checkpoints"


def test_what_cannot_be_measured_is_told_before_anything_is_loaded(tmp_path: Path) -> None:
    config = a_config(tmp_path)
    with pytest.raises(UserError, match="no complete checkpoint"):
        subject_of(config, str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="name one model"):
        subject_of(config, "x", RemoteConfig(url="http://h/v1", model="m"))
    with pytest.raises(UserError, match="no data of this split"):
        run_evaluation(config, subject_of(config), Extent("test", 1))
    assert not (tmp_path / "runs").exists()


def test_what_was_cut_off_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a kill leaves it: some rollouts, a torn line, no row and no DONE."""
    config, extent = a_config(tmp_path), Extent("train", 2, 5)
    store = RunStore.open(run_evaluation(config, subject_of(config), extent, run_id="cut"))
    whole = {rollout.id: rollout for rollout in store.rollouts()}
    lines = store.rollout_path(0).read_bytes().splitlines(keepends=True)
    store.rollout_path(0).write_bytes(b"".join(lines[:4]) + lines[4][:50])
    (store.path / "metrics.jsonl").unlink()
    (store.path / "DONE").unlink()
    run_evaluation(config, subject_of(config), extent, run_id="cut", resume=True)
    assert "going on: 4 finished rollouts are used" in capsys.readouterr().out
    (row,) = evaluations(store)
    assert (row["rollouts/reused"], row["num_rollouts"]) == (4, 10) and store.is_done
    again = {rollout.id: rollout for rollout in store.rollouts()}
    said = [{key: each.turns[0].output_ids for key, each in found.items()} for found in (whole, again)]
    assert said[0] == said[1], "an item's rollouts have the same seeds"


@pytest.mark.slow
def test_killed_and_resumed_keeps_the_rollouts_that_had_ended(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(a_tree(tmp_path)))
    options = ["eval", str(path), "--split", "validation", "--samples", "6", "--items", "8", "--run-id", "killed"]
    process = subprocess.Popen(
        [sys.executable, "-m", "rft", *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    rollouts = tmp_path / "runs/killed/rollouts/step_000000.jsonl"
    deadline = time.monotonic() + 120
    while not (rollouts.exists() and rollouts.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    store = RunStore.open(tmp_path / "runs/killed")
    before = {rollout.id: rollout for rollout in store.rollouts()}
    assert all(is_whole(rollout, "killed") for rollout in before.values())
    other = rft(*options, "--resume", "--samples", "4")
    assert other.returncode == 2 and "num_samples was 6 when it was started, now it is 4" in other.stderr
    resumed = rft(*options, "--resume", timeout_s=120)
    assert resumed.returncode == 0, resumed.stderr
    after = {rollout.id: rollout for rollout in store.rollouts()}
    assert len(after) == 8 * 6 and before.items() <= after.items()
    (row,) = evaluations(store)
    assert row["rollouts/reused"] >= 3 and store.is_done


# --- a model behind a URL ---


def a_remote_config(tmp_path: Path, **sections: Any) -> RunConfig:
    """Questions with a tool that counts; no model folder is needed."""
    row = {"messages": [{"role": "developer", "content": "Count."}, {"role": "user", "content": "to 41"}]}
    (tmp_path / "sums.jsonl").write_text((json.dumps(row) + "\n") * 3)
    tree: dict[str, Any] = {
        "name": "sums",
        "runs_dir": str(tmp_path / "runs"),
        "model": {"path": str(tmp_path / "no-such-model")},
        "data": {"train": str(tmp_path / "sums.jsonl"), "test": str(tmp_path / "sums.jsonl")},
        "environment": {"type": "functions", "functions": ["world:count"]},
        "grader": {"type": "python", "source": RIGHT},
        "rollout": {"max_turns": 4, "max_tokens_per_turn": 50},
        "training": {"steps": 1},
    }
    return validate_config(tree | sections, "test")


def measured(config: RunConfig, url: str, samples: int = 1, **remote: Any) -> RunStore:
    subject = subject_of(config, None, RemoteConfig(url=url, model="gpt-x", **remote))
    return RunStore.open(run_evaluation(config, subject, Extent("test", samples)))


def test_parallel_calls_over_http(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "sk-secret")
    calls = [a_call("count", "same", by=41), a_call("count", "same", by=2), a_call("nope", "x")]
    upstream = Upstream({"content": None, "tool_calls": calls}, {"content": "41", "reasoning_content": "I count on"})
    with answering(upstream) as url:
        config = a_remote_config(
            tmp_path,
            rollout={"max_turns": 4, "max_tokens_per_turn": 50, "max_concurrent": 1},
            evaluation={"test_items": 1},
        )
        store = measured(config, url, api_key_env="SOME_KEY")
    (rollout,) = store.rollouts(0, "test")
    assert rollout.stop_reason is StopReason.ANSWERED and rollout.output_text == "41"
    assert rollout.grade is not None and rollout.grade.score == 1.0
    outputs = [(call.name, result.output if result else None) for call, result in rollout.tool_calls]
    assert outputs[:2] == [("count", "41"), ("count", "2")]
    assert rollout.tool_calls[2][0].error is not None
    assert len({call.call_id for call, _ in rollout.tool_calls}) == 3, "ids of ours, whatever the server says"
    assert [turn.usage.completion_tokens for turn in rollout.turns if turn.usage] == [5, 5]
    assert rollout.num_sampled_tokens == 10 and rollout.sequences == []
    assert rollout.turns[1].message.reasoning == "I count on" and rollout.turns[1].reasoning_tokens == 4
    first, second = upstream.bodies
    assert [message["role"] for message in first["messages"]] == ["system", "user"]
    assert first["max_completion_tokens"] == 50 and first["tools"][0]["function"]["name"] == "count"
    assert [message["role"] for message in second["messages"]] == ["system", "user", "assistant", *["tool"] * 3]
    sent = [call["id"] for call in second["messages"][2]["tool_calls"]]
    assert sent == [message["tool_call_id"] for message in second["messages"][3:]]
    assert upstream.keys == ["Bearer sk-secret"] * 2
    (row,) = evaluations(store)
    assert (row["sampled_tokens"], row["tool_calls"], row["grade"]) == (10, 3, 1)
    assert store.read_state()["label"] == "gpt-x"
    for file in store.path.rglob("*"):
        assert not file.is_file() or b"sk-secret" not in file.read_bytes(), f"the key is in {file}"


@pytest.mark.slow
def test_a_failing_server_is_retried_and_a_wrong_key_ends_it(tmp_path: Path) -> None:
    upstream = Upstream(503, 429, {"content": "41"})
    with answering(upstream) as url:
        store = measured(a_remote_config(tmp_path, rollout={"max_concurrent": 1}), url)
    assert [rollout.output_text for rollout in store.rollouts()] == ["41"] * 3
    with answering(Upstream(401)) as url, pytest.raises(EngineError, match="HTTP 401"):
        measured(a_remote_config(tmp_path), url)


class ShortUpstream(Upstream):
    """Its context holds one turn."""

    async def _answer(self, request: Request) -> Response:
        body = await request.json()
        if len(body["messages"]) > 2:
            error = {"message": "This model's maximum context length is 8 tokens.", "code": "context_length_exceeded"}
            return JSONResponse({"error": error}, status_code=400)
        return await super()._answer(request)


def test_a_full_context_and_a_malformed_call_are_the_models_doing(tmp_path: Path) -> None:
    bad = a_call("count", "c")
    bad["function"]["arguments"] = '{"by": '
    config = a_remote_config(tmp_path, evaluation={"test_items": 1})
    with answering(ShortUpstream({"content": "", "tool_calls": [bad]})) as url:
        (rollout,) = measured(config, url).rollouts()
    assert rollout.stop_reason is StopReason.MAX_TOKENS and rollout.grade is not None
    ((call, result),) = rollout.tool_calls
    assert call.error is not None and result is not None and result.is_error
    with answering(upstream := Upstream({"content": "", "tool_calls": [bad]}, {"content": "41"})) as url:
        (rollout,) = measured(config, url).rollouts()
    assert rollout.stop_reason is StopReason.ANSWERED
    sent = upstream.bodies[1]["messages"][2]["tool_calls"][0]["function"]["arguments"]
    assert json.loads(sent) == {"malformed": '{"by": '}, "a server must be able to read what we send"


def test_a_refused_request_costs_its_rollout_and_too_many_end_the_run(tmp_path: Path) -> None:
    with answering(Upstream(400)) as url, pytest.raises(NoProgressError, match="HTTP 400"):
        measured(a_remote_config(tmp_path), url, samples=4)
    store = RunStore.open(tmp_path / "runs/sums-eval-001")
    assert store.read_state()["status"] == "failed"
    assert {rollout.stop_reason for rollout in store.rollouts()} >= {StopReason.ENGINE_FAILED}


@pytest.mark.slow
def test_the_command_measures_a_url(tmp_path: Path) -> None:
    tree = a_remote_config(tmp_path, environment=None).model_dump(mode="json")
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    with answering(Upstream({"content": "41"})) as url:
        result = rft("eval", str(path), "rollout.temperature=1", "--url", url, "--model", "gpt-x", "--items", "2")
    assert result.returncode == 0, result.stderr
    assert "test at step 0: grade 1.000" in result.stdout and "sums-eval-001" in result.stdout
    assert RunStore.open(tmp_path / "runs/sums-eval-001").config()["rollout"]["temperature"] == 1


@pytest.mark.slow
def test_a_missing_key_and_half_a_place_are_user_errors(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(a_tree(tmp_path)))
    url = ["--url", "http://127.0.0.1:9/v1"]
    missing = rft("eval", str(path), *url, "--model", "m", "--api-key-env", "RFT_NO_SUCH_KEY")
    assert missing.returncode == 2 and "RFT_NO_SUCH_KEY" in missing.stderr
    half = rft("eval", str(path), *url)
    assert half.returncode == 2 and "--url, --model" in half.stderr
    assert not (tmp_path / "runs").exists()


def test_nobody_listening_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="cannot be reached"):
        measured(a_remote_config(tmp_path), "http://127.0.0.1:9/v1")


# --- baseline ---


def test_a_baseline_samples_and_judges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run_baseline(a_config(tmp_path), Extent("train", 4, 3))
    found = json.loads((path / "baseline.json").read_text())
    assert path.name == "tiny-baseline-001"
    assert (found["num_items"], found["num_rollouts"], found["split"], found["label"]) == (3, 12, "train", "model")
    assert (path / "baseline.png").is_file() and RunStore.open(path).is_done
    assert f"verdict: {found['advice']['verdict']}" in capsys.readouterr().out


# --- the small one in a training ---


def judgement(store: RunStore) -> dict[str, Any]:
    (event,) = [event for event in store.events() if (event["data"] or {}).get("check") == "baseline"]
    return event


SMALL = {"steps": 1, "items_per_step": 2, "base_rollouts": 4}
NEVER = {"grader": {"type": "python", "source": CONSTANT}, "training": SMALL}


def training_row(store: RunStore) -> dict[str, Any]:
    (row,) = [row for row in store.metrics() if row["kind"] == "training"]
    return row


def test_a_training_says_what_its_first_groups_are_worth(tmp_path: Path) -> None:
    store = RunStore.open(run_job(a_config(tmp_path, training=SMALL)))
    event, row = judgement(store), training_row(store)
    num_useful = row["groups/total"] - row["groups/no_signal"]
    assert num_useful and event["level"] == "info" and event["data"]["useful"] == num_useful
    assert f"before the first update: {num_useful} of 2 groups have signal" in event["message"]
    assert baseline_of(store).varied == num_useful / 2, "the run folder says the same afterwards"


def test_a_training_without_signal_is_warned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = RunStore.open(run_job(a_config(tmp_path, **NEVER)))
    event = judgement(store)
    assert event["level"] == "warn" and "0 of 2 groups have signal" in event["message"]
    assert event["data"]["verdict"] in ("warm up first", "make the task easier")
    told = capsys.readouterr().out
    assert "warning: before the first update: 0 of 2 groups have signal" in told and "cure: " in told


def test_a_strict_training_ends_before_its_first_update_and_can_go_on(tmp_path: Path) -> None:
    config = a_config(tmp_path, **NEVER)
    for resume in (False, True):
        with pytest.raises(UserError, match=r"0 of 2 groups have signal(.|\n)*Verdict: (.|\n)*--resume"):
            run_job(config, run_id="strict", resume=resume, is_strict=True)
    store = RunStore.open(tmp_path / "runs/strict")
    assert store.read_state()["status"] == "failed"
    assert not [row for row in store.metrics() if row["kind"] == "training"]
    num_told = len(list(store.events()))
    run_job(config, run_id="strict", resume=True)
    assert training_row(store)["rollouts/reused"] == len(list(store.rollouts(1, "train"))) == 8
    assert not any("groups have signal" in event["message"] for event in list(store.events())[num_told:])


@pytest.mark.slow
def test_a_resumed_and_a_replayed_training_judge_nothing(tmp_path: Path) -> None:
    first = RunStore.open(run_job(a_config(tmp_path, training=SMALL), run_id="first"))
    more = a_config(tmp_path, training=SMALL | {"steps": 2})
    run_job(more, run_id="first", resume=True)
    judgement(first)
    replayed = RunStore.open(run_job(a_config(tmp_path, training=SMALL), run_id="again", replay=first.path))
    assert not [event for event in replayed.events() if (event["data"] or {}).get("check") == "baseline"]


def test_subjects_are_named_as_a_person_would() -> None:
    remote = RemoteConfig(url="https://u:p@host/v1", model="gpt-x")
    assert Subject("gpt-x", remote=remote).label == "gpt-x"
