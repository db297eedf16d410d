"""A run folder as the wire shows it: metrics events, checkpoints, the CSV file, what was used."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from openai.types.fine_tuning.jobs import FineTuningJobCheckpoint
from run_folders import GRADER, a_job, a_run, an_item, train_step

from rft.checkpoints import name_of
from rft.server.views.checkpoints import checkpoint_objects
from rft.server.views.metrics import metrics_events
from rft.server.views.results import result_csv, usage_metrics
from rft.store import RunStore

# `data` of an event of the hosted service, as its guide prints it.
HOSTED = json.loads("""
{"step":10,
  "usage":{"graders":[{"name":"basic_model_grader","type":"score_model","model":"gpt-4o-2024-08-06",
     "train_prompt_tokens_mean":241.0,"valid_prompt_tokens_mean":241.0,"train_prompt_tokens_count":120741.0,
     "valid_prompt_tokens_count":4820.0,
     "train_completion_tokens_mean":138.52694610778443,"valid_completion_tokens_mean":140.5,
     "train_completion_tokens_count":69402.0,"valid_completion_tokens_count":2810.0}],
   "samples":{"train_reasoning_tokens_mean":3330.017964071856,"valid_reasoning_tokens_mean":1948.9,
     "train_reasoning_tokens_count":1668339.0,"valid_reasoning_tokens_count":38978.0}},
  "errors":{"graders":[{"name":"basic_model_grader","type":"score_model","train_other_error_mean":0.0,
     "valid_other_error_mean":0.0,"train_other_error_count":0.0,"valid_other_error_count":0.0,
     "train_sample_parse_error_mean":0.0,"valid_sample_parse_error_mean":0.0,"train_sample_parse_error_count":0.0,
     "valid_sample_parse_error_count":0.0,
     "train_invalid_variable_error_mean":0.0,"valid_invalid_variable_error_mean":0.0,
     "train_invalid_variable_error_count":0.0,"valid_invalid_variable_error_count":0.0}]},
  "scores":{"graders":[{"name":"basic_model_grader","type":"score_model","train_reward_mean":0.4471057884231537,
     "valid_reward_mean":0.675}],
     "train_reward_mean":0.4215686274509804,"valid_reward_mean":0.675},
  "timing":{"step":{"eval":101.69386267662048,"sampling":226.82190561294556,"training":402.43121099472046,
     "full_iteration":731.5038568973541},
     "graders":[{"name":"basic_model_grader","type":"score_model","train_execution_latency_mean":2.6894934929297594,
     "valid_execution_latency_mean":4.141402995586395}]},
  "total_steps":20,"train_mean_reward":0.4215686274509804,"reasoning_tokens_mean":3330.017964071856,
  "completion_tokens_mean":3376.0019607843137,
  "full_valid_mean_reward":0.675,"mean_unresponsive_rewards":0.0,
  "model_graders_token_usage":{"gpt-4o-2024-08-06":{"eval_cached_tokens":0,"eval_prompt_tokens":4820,
     "train_cached_tokens":0,"train_prompt_tokens":120741,"eval_completion_tokens":2810,
     "train_completion_tokens":69402}},
  "full_valid_mean_parse_error":0.0,"valid_reasoning_tokens_mean":1948.9}
""")


def assert_has_shape(given: Any, wanted: Any, path: str = "data") -> None:
    """Every key of `wanted` is there, with a value of its kind."""
    if isinstance(wanted, dict):
        assert wanted.keys() <= given.keys(), f"{path} lacks {wanted.keys() - given.keys()}"
        for key, value in wanted.items():
            assert_has_shape(given[key], value, f"{path}.{key}")
    elif isinstance(wanted, list):
        for index, entry in enumerate(given):
            assert_has_shape(entry, wanted[0], f"{path}[{index}]")
    elif isinstance(wanted, int | float):
        assert isinstance(given, int | float), f"{path} is {given!r}"
    else:
        assert isinstance(given, type(wanted)), f"{path} is {given!r}"


def test_row_13_metrics_events_have_the_hosted_shape(tmp_path: Path) -> None:
    single = GRADER["graders"]["judge"]  # type: ignore[index]
    store = a_run(tmp_path)
    job = a_job(single | {"model": "gpt-4o-2024-08-06"})
    events = metrics_events(store, job, after=1)
    assert [data["step"] for _, data in events] == [2, 3, 4]
    message, data = events[0]
    wanted = json.loads(json.dumps(HOSTED).replace("gpt-4o-2024-08-06", "gpt-4o"))
    data["model_graders_token_usage"]["gpt-4o"]  # of the rollouts of the folder
    assert_has_shape(data, wanted)
    assert message == (
        "Step 2/4 , train mean reward=0.75, full validation mean reward=0.75, full validation mean parse error=0.00"
    )
    assert events[1][0] == "Step 3/4 , train mean reward=0.75"
    assert events[1][1]["full_valid_mean_reward"] is None and events[1][1]["timing"]["step"]["eval"] is None
    json.dumps(events, allow_nan=False)


def test_row_13_a_multi_grader_has_an_entry_for_itself_and_each_part(tmp_path: Path) -> None:
    _, data = metrics_events(a_run(tmp_path), a_job(), after=1)[0]
    scores = {entry["name"]: entry for entry in data["scores"]["graders"]}
    assert list(scores) == ["both", "is_exact", "a_judge"]
    assert scores["a_judge"] == {
        "name": "a_judge",
        "type": "score_model",
        "train_reward_mean": 0.5,
        "valid_reward_mean": 0.5,
    }
    [usage] = data["usage"]["graders"]
    assert (usage["model"], usage["train_prompt_tokens_mean"], usage["valid_completion_tokens_count"]) == (
        "gpt-4o",
        10,
        24,
    )
    assert data["model_graders_token_usage"]["gpt-4o"]["eval_prompt_tokens"] == 60
    assert data["errors"]["graders"][2]["train_model_grader_parse_error_count"] == 0
    assert data["completion_tokens_mean"] == 6 and data["reasoning_tokens_mean"] == 1
    assert data["tools"]["tools"] == [
        {
            "name": "search",
            "train_calls_mean": 1.0,
            "train_calls_count": 6,
            "train_error_count": 0,
            "train_execution_latency_mean": 0.5,
            "valid_calls_mean": 1.0,
            "valid_calls_count": 6,
            "valid_error_count": 0,
            "valid_execution_latency_mean": 0.5,
        }
    ]
    assert data["tools"]["train_tokens_per_call_mean"] == 2


def test_a_step_waits_for_its_evaluation_unless_the_run_went_on(tmp_path: Path) -> None:
    store = a_run(tmp_path / "done")
    rows = list(store.metrics())
    config = store.config()
    cut = RunStore.create(tmp_path / "cut", "ftjob-1", config)
    for row in rows:
        if not (row["kind"] == "evaluation" and row["step"] == 2) and row["step"] <= 2:
            cut.append_metrics(row)
    assert [data["step"] for _, data in metrics_events(cut, a_job(), 0)] == [1], "step 2 is being evaluated"
    train_step(cut, [an_item(0)], 3, 2, lambda step, attempt: attempt)
    assert [data["step"] for _, data in metrics_events(cut, a_job(), 0)] == [1, 2, 3]
    cut.close()
    config["data"]["validation"] = None
    bare = RunStore.create(tmp_path / "bare", "ftjob-1", config)
    train_step(bare, [an_item(0)], 1, 2, lambda step, attempt: attempt)
    train_step(bare, [an_item(0)], 2, 2, lambda step, attempt: attempt)
    assert [data["step"] for _, data in metrics_events(bare, a_job(), 1)] == [2]
    bare.close()


def test_row_15_checkpoints_are_the_best_three_and_the_last(tmp_path: Path) -> None:
    store = a_run(tmp_path, steps=6, every=1, score=lambda step, attempt: {3: 0.9, 1: 0.8, 2: 0.7}.get(step, 0.1))
    found = checkpoint_objects(store, a_job())
    assert [checkpoint["step_number"] for checkpoint in found] == [6, 3, 2, 1]
    assert found[0]["fine_tuned_model_checkpoint"] == "ft:m:org::ftjob-1:ckpt-step-6"
    assert found == checkpoint_objects(store, a_job()), "derived, ids included"
    assert len({checkpoint["id"] for checkpoint in found}) == 4 and found[0]["id"].startswith("ftckpt_")
    parsed = FineTuningJobCheckpoint.model_validate(found[1])
    assert (parsed.metrics.step, parsed.metrics.train_loss) == (3, -0.5)
    assert parsed.metrics.full_valid_mean_reward == pytest.approx(0.95)  # type: ignore[attr-defined]
    assert found[1]["metrics"]["train_mean_reward"] == pytest.approx(0.95)
    shutil.rmtree(store.checkpoints / name_of(3))
    assert [checkpoint["step_number"] for checkpoint in checkpoint_objects(store, a_job())] == [6, 2, 1]


def test_row_14_the_csv_has_the_hosted_columns(tmp_path: Path) -> None:
    hostile = 'x",\n=cmd|"y'
    grader = json.loads(json.dumps(GRADER))
    grader["graders"]["judge"]["name"] = hostile
    rows = list(csv.DictReader(io.StringIO(result_csv(a_run(tmp_path), a_job(grader)))))
    assert [row["step"] for row in rows] == ["0", "1", "2", "3", "4"]
    assert rows[0]["train_mean_reward"] == "" and rows[0]["full_valid_mean_reward"] == "0.75"
    assert rows[1]["full_valid_mean_reward"] == "" and rows[2]["full_valid_mean_reward"] == "0.75"
    assert rows[1][f"scores/graders/score_model/{hostile}/train_reward_mean"] == "0.5"
    assert rows[1]["errors/graders/multi/both/errors/train_sample_parse_error_count"] == "0.0"
    columns = (
        "step train_mean_reward full_valid_mean_reward completion_tokens_mean reasoning_tokens_mean"
        " mean_unresponsive_rewards sampling_duration training_duration eval_duration total_duration pg_loss_sum"
        " total_loss_sum entropy_loss_sum train_error_count_search tool_calls_to_search"
    )
    assert set(columns.split()) <= rows[0].keys()
    assert rows[1]["tool_calls_to_search"] == "6.0" and rows[1]["pg_loss_sum"] == "-0.5"


def test_row_39_usage_grows_with_every_row(tmp_path: Path) -> None:
    used = usage_metrics(a_run(tmp_path, steps=2))
    assert used["steps"] == 2 and used["sampled_tokens"] == {"train": 72, "evaluation": 72}
    assert used["grader_tokens"] == {
        "gpt-4o": {"prompt_tokens": 240, "completion_tokens": 96, "cached_tokens": 0, "num_grades": 24}
    }
    assert used["seconds"]["evaluation"] == 6.0 and used["seconds"]["grading"] == 6.0
    assert usage_metrics(a_run(tmp_path / "more", steps=3))["seconds"]["total"] > used["seconds"]["total"]


def test_steps_of_a_warm_up(tmp_path: Path) -> None:
    store = RunStore.create(tmp_path, "ftjob-1", {"warmup": {"held_out_share": 0.1}})
    store.write_state({"status": "running", "step": 2, "steps": 2})
    job = a_job() | {"method": {"type": "supervised"}}
    store.append_metrics({"step": 1, "kind": "warmup", "update/loss": 0.5, "update/token_accuracy": 0.75})
    assert metrics_events(store, job, 0) == [], "it may yet be measured on what is held out"
    store.append_metrics({"step": 1, "kind": "warmup", "held_out/loss": 0.25})
    store.append_metrics({"step": 2, "kind": "warmup", "update/loss": 0.25})
    store.mark_done()
    store.close()
    (message, data), (_, last) = metrics_events(store, job, 0)
    assert message == "Step 1/2: training loss=0.50"
    assert (data["train_loss"], data["train_mean_token_accuracy"], data["full_valid_loss"]) == (0.5, 0.75, 0.25)
    assert last["full_valid_loss"] is None and result_csv(store, job).startswith("step,train_loss,")


@pytest.mark.slow
def test_row_13_events_of_a_real_training(tmp_path: Path) -> None:
    """What the trainer writes is what the views read: no number is missing that the hosted event has."""
    from test_job import a_tree

    from rft.config import validate_config
    from rft.job import run_job

    tree = a_tree(tmp_path, evaluation={"every": 2, "validation_items": 2})
    store = RunStore.open(run_job(validate_config(tree, "test")))
    job = a_job(tree["grader"])
    events = metrics_events(store, job, after=0)
    evaluated = [data for _, data in events if data["full_valid_mean_reward"] is not None]
    assert [data["step"] for _, data in events] == [1, 2, 3] and [data["step"] for data in evaluated] == [2, 3]
    for data in evaluated:
        assert_has_shape(data, {**HOSTED, "model_graders_token_usage": {}})
    assert {checkpoint["step_number"] for checkpoint in checkpoint_objects(store, job)} == {2, 3}
    rows = list(csv.DictReader(io.StringIO(result_csv(store, job))))
    assert [row["step"] for row in rows] == ["0", "1", "2", "3"]
    assert all(row["sampling_duration"] for row in rows[1:])
    assert any(row["total_loss_sum"] for row in rows), "a step without a useful group has no loss"
    assert usage_metrics(store)["seconds"]["sampling"] > 0
