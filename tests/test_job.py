"""A whole run on a tiny model with the transformers engine: it finishes, it resumes exactly, it fails clearly."""

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
import torch
import yaml
from tiny import tiny_model_folder

from rft.config import RunConfig, validate_config
from rft.errors import DataError, GraderError, NoProgressError, UserError
from rft.job import run_job
from rft.store import RunStore
from rft.trainers import checkpoint

GRADER = "def grade(sample, item):\n    text = sample['output_text']\n    return text.count(item['letter']) / 8\n"
TIMINGS = (
    *("time/", "train/duration_s", "train/tool_latency_s", "seconds", "duration_s", "tool_latency_s"),
    *("grader/", "train/grader/"),  # latency, and what a resumed run finds in its cache
    "rollouts/reused",
)


def a_tree(tmp_path: Path, **sections: Any) -> dict[str, Any]:
    """A config of three steps on a model of some thousand parameters."""
    model = tmp_path / "model"
    if not model.exists():
        tiny_model_folder(model)
        rows = [{"messages": [{"role": "user", "content": f"say {i}"}], "letter": "e"} for i in range(12)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree: dict[str, Any] = {
        "name": "tiny",
        "runs_dir": str(tmp_path / "runs"),
        "model": {"path": str(model), "dtype": "float32", "lora": {"rank": 4}},
        # one at a time: which requests share a batch depends on timing, and so do their last bits
        "engine": {"type": "transformers", "max_model_len": 256, "max_concurrent": 1},
        "data": {"train": str(tmp_path / "rows.jsonl"), "validation": str(tmp_path / "rows.jsonl")},
        "grader": {"type": "python", "source": GRADER},
        "rollout": {"max_tokens_per_turn": 12, "temperature": 1.0},
        "training": {"steps": 3, "items_per_step": 2, "base_rollouts": 4, "learning_rate": 0.01},
        "evaluation": {"every": 2, "validation_items": 3},
    }
    return tree | sections


def a_config(tmp_path: Path, **sections: Any) -> RunConfig:
    return validate_config(a_tree(tmp_path, **sections), where="test")


def stable(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not key.startswith(TIMINGS)}


def weights(run: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    latest = checkpoint.latest(run / "checkpoints")
    assert latest is not None
    return load_file(next(latest.rglob("adapter_model.safetensors")))


def test_a_run_leaves_a_complete_folder(tmp_path: Path) -> None:
    run = run_job(a_config(tmp_path))
    store = RunStore.open(run)
    assert store.is_done
    assert store.read_state()["status"] == "succeeded"
    training = [row for row in store.metrics() if row["kind"] == "training"]
    assert [row["step"] for row in training] == [1, 2, 3]
    assert all(row["logprob_gap/mean"] < 1e-4 for row in training)
    evaluations = [(row["split"], row["step"]) for row in store.metrics() if row["kind"] == "evaluation"]
    assert evaluations == [("validation", 0), ("validation", 2), ("validation", 3)]
    assert len(list(store.rollouts(split="train"))) == 3 * 2 * 4
    assert {"report.json", "report.png", "config.json"} <= {path.name for path in run.iterdir()}


def test_the_policy_version_of_a_token_is_the_step_before(tmp_path: Path) -> None:
    run = run_job(a_config(tmp_path))
    for rollout in RunStore.open(run).rollouts(split="train"):
        assert {turn.policy_version for turn in rollout.turns} == {rollout.step - 1}


def test_a_grader_that_always_fails_stops_the_run_with_its_traceback(tmp_path: Path) -> None:
    source = "def grade(sample, item):\n    return item['gold'] == sample['output_text']\n"
    config = a_config(tmp_path, grader={"type": "python", "source": source}, evaluation={"validation_items": 12})
    with pytest.raises(NoProgressError, match=r"the grader failed on 9 rollouts of step 0(.|\n)*KeyError: 'gold'"):
        run_job(config, run_id="broken")
    store = RunStore.open(tmp_path / "runs" / "broken")
    assert store.read_state()["status"] == "failed"
    assert len(list(store.rollouts())) >= 9, "what was sampled is kept"


def test_a_run_says_what_protects_its_graders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = "import no_such_package\ndef grade(sample, item):\n    return 0.0\n"
    with pytest.raises(GraderError, match="No module named 'no_such_package'"):
        run_job(a_config(tmp_path, grader={"type": "python", "source": source}), run_id="early")
    store = RunStore.open(run_job(a_config(tmp_path, training={"steps": 0})))
    (event,) = [row for row in store.events() if "python graders run in a sandbox" in row["message"]]
    assert "network: " in event["message"]
    assert event["message"] in capsys.readouterr().out


@pytest.mark.slow
def test_two_runs_with_one_seed_are_equal(tmp_path: Path) -> None:
    first, second = (RunStore.open(run_job(a_config(tmp_path), run_id="same")), None)
    (tmp_path / "runs" / "same").rename(tmp_path / "runs" / "first")
    first = RunStore.open(tmp_path / "runs" / "first")
    second = RunStore.open(run_job(a_config(tmp_path), run_id="same"))
    assert [stable(row) for row in first.metrics()] == [stable(row) for row in second.metrics()]


def _train_until(tmp_path: Path, step: int, *arguments: str) -> None:
    """Run the CLI in a process of its own and kill it with SIGKILL once `step` is in the metrics."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(a_tree(tmp_path)))
    process = subprocess.Popen(
        [sys.executable, "-m", "rft", "train", str(path), "--run-id", "killed", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    metrics = tmp_path / "runs" / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if metrics.exists() and f'"step": {step}' in metrics.read_text().replace('"step":', '"step": ').replace(
            "  ", " "
        ):
            break
        assert process.poll() is None, process.stderr and process.stderr.read().decode()
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)


def _train(tmp_path: Path, *arguments: str) -> None:
    """Run the CLI to its end in a fresh process: threads that other tests set would change the last bits."""
    command = [sys.executable, "-m", "rft", "train", str(tmp_path / "run.yaml"), "--run-id", "killed", *arguments]
    subprocess.run(command, check=True, timeout=120, env=os.environ | {"HF_HUB_OFFLINE": "1"})


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path: Path) -> None:
    _train_until(tmp_path, 2)
    _train(tmp_path, "--resume")
    (tmp_path / "runs" / "killed").rename(tmp_path / "runs" / "resumed")
    _train(tmp_path)
    whole = RunStore.open(tmp_path / "runs" / "killed")
    killed = RunStore.open(tmp_path / "runs" / "resumed")
    assert [stable(row) for row in killed.metrics()] == [stable(row) for row in whole.metrics()]
    resumed, uninterrupted = weights(killed.path), weights(whole.path)
    assert resumed.keys() == uninterrupted.keys()
    assert all(torch.equal(resumed[name], uninterrupted[name]) for name in resumed)


def test_resume_refuses_another_objective_and_names_the_field(tmp_path: Path) -> None:
    run_job(a_config(tmp_path), run_id="r")
    other = a_tree(tmp_path)
    other["training"]["learning_rate"] = 0.5
    with pytest.raises(UserError, match=r"training\.learning_rate: the run was started with 0\.01"):
        run_job(validate_config(other, "test"), run_id="r", resume=True)


def test_resume_with_nothing_to_resume_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no unfinished run named tiny"):
        run_job(a_config(tmp_path), resume=True)


def test_bad_data_is_refused_before_a_run_folder_exists(tmp_path: Path) -> None:
    tree = a_tree(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"messages": []}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:1"):
        run_job(validate_config(tree, "test"))
    assert not (tmp_path / "runs").exists()


def test_a_model_path_that_does_not_exist_is_named(tmp_path: Path) -> None:
    tree = a_tree(tmp_path)
    tree["model"]["path"] = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match="nowhere is not a model folder"):
        run_job(validate_config(tree, "test"))


def test_a_tool_server_that_is_down_is_named(tmp_path: Path) -> None:
    tools = [{"name": "search", "server_url": "http://127.0.0.1:9/search"}]
    with pytest.raises(UserError, match="search"):
        run_job(a_config(tmp_path, environment={"type": "http", "tools": tools}))


@pytest.mark.slow
@pytest.mark.parametrize("is_background", [False, True], ids=["foreground", "background"])
def test_sigterm_ends_a_run_cleanly_and_it_can_go_on(tmp_path: Path, is_background: bool) -> None:
    """In the middle of sampling; a shell's `rft ... &` ignores SIGINT."""
    tree = a_tree(tmp_path, training={"steps": 50, "items_per_step": 4, "base_rollouts": 8})
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    process = subprocess.Popen(
        [sys.executable, "-m", "rft", "train", str(path), "--run-id", "ended"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        preexec_fn=(lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) if is_background else None,
    )
    rollouts = tmp_path / "runs" / "ended" / "rollouts" / "step_000001.jsonl"
    deadline = time.monotonic() + 120
    while not (rollouts.exists() and rollouts.stat().st_size):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, words = process.communicate(timeout=90)
    assert process.returncode == 130
    assert b"interrupted; nothing written is lost" in words and b"Traceback" not in words, words.decode()
    assert RunStore.open(tmp_path / "runs" / "ended").read_state()["status"] == "cancelled"
