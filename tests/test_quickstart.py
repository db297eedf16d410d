"""The real thing, short: SmolLM2, real vLLM, the real tool server; without a network, exported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import browsing
import pytest
import yaml
from loopback import without_network
from serving import served
from test_job import a_tree

from rft.export import export
from rft.store import RunStore
from rft.ui.app import build_ui

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow
# The doctor's findings that are true of a model before it has learnt; which of them a single step of 12 rollouts shows
# depends on how requests arrive at vLLM, so the test holds the doctor to everything else.
OF_AN_UNTRAINED_MODEL = {
    *("malformed_calls", "unknown_tools", "refused_calls", "empty_answers"),
    *("groups_all_fail", "groups_stuck", "truncated_by_tokens", "truncated_by_turns"),
}


def launched(command: list[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        cwd=ROOT,
        # one thread each: two ranks of two threads that spin for each other take minutes on two cores
        env=os.environ | {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a step of the quickstart, made without a network."""
    runs = tmp_path_factory.mktemp("runs")
    overrides = [
        "training.steps=1",
        "training.items_per_step=3",
        "training.base_rollouts=4",
        "evaluation.validation_items=4",
        "evaluation.test_items=4",
        f"runs_dir={runs}",
    ]
    command = [sys.executable, "-m", "rft", "train", "configs/quickstart.yaml", *overrides, "--run-id", "short"]
    result = launched(without_network(command), timeout_s=400)
    assert result.returncode == 0, result.stderr[-3000:]
    return runs / "short"


def test_a_step_of_the_quickstart_without_a_network(run: Path, tmp_path: Path) -> None:
    store = RunStore.open(run)
    assert store.is_done
    (row,) = [row for row in store.metrics() if row["kind"] == "training"]
    assert row["probe/mean"] < 2e-3
    assert row["logprob_gap/mean"] < 2e-3
    rollouts = list(store.rollouts(split="train"))
    assert len(rollouts) == 12
    results = [result for rollout in rollouts for turn in rollout.turns for result in turn.results]
    assert all(result.latency_s > 0 for result in results if not result.is_error)
    assert json.loads((run / "report.json").read_text())
    _answers(export(run, tmp_path / "model"))


def test_the_run_is_judged_compared_diagnosed_and_reported(run: Path, tmp_path: Path) -> None:
    said = {
        "baseline": [run, "--json"],
        "compare": [run, "--json"],
        "doctor": [run, "--json"],
        "report": [run, "--out", tmp_path / "report.html"],
        "show": [run, next(RunStore.open(run).rollouts(split="train")).id],
    }
    outputs = {}
    for name, arguments in said.items():
        result = launched([sys.executable, "-m", "rft", name, *map(str, arguments)], timeout_s=120)
        assert result.returncode == 0, (name, result.stderr[-3000:])
        outputs[name] = result.stdout
    assert json.loads(outputs["baseline"])["num_rollouts"] == 12
    compared = json.loads(outputs["compare"])
    assert len(compared["sides"]) == 2
    severe = {found["check"] for found in json.loads(outputs["doctor"])["findings"] if found["severity"] == "high"}
    assert severe <= OF_AN_UNTRAINED_MODEL, outputs["doctor"]
    assert "Find the ICD-10-CM code" in outputs["show"]
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")


@pytest.mark.skipif(browsing.missing() is not None, reason=str(browsing.missing()))
def test_the_page_shows_every_view_of_the_run(run: Path) -> None:
    rollout = next(RunStore.open(run).rollouts(split="train"))
    views = ["", *(f"runs/short/{tab}" for tab in ("charts", "rollouts", "doctor", "events", "config"))]
    views += [f"runs/short/trace/{rollout.id}", "runs/short/grader", "dataset"]
    with served(build_ui(run.parent)) as address, browsing.chromium() as browser:
        for viewport in (browsing.WIDE, browsing.NARROW):
            with browsing.opened(browser, address, viewport=viewport) as page:
                for view in views:
                    browsing.go(page, view)
                    browsing.assert_sound(page)


def _answers(folder: Path) -> None:
    """The exported folder is a model that plain transformers loads, and that a step has not taken English from.

    What it answers depends on which rollouts the step saw; how likely it finds a sentence hardly does.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    losses = {}
    for path in (ROOT / "models/smollm2-135m-instruct", folder):
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(path, local_files_only=True, dtype=torch.float32)
        ids = tokenizer("The capital of France is Paris, and its largest river is the Seine.", return_tensors="pt")
        with torch.no_grad():
            losses[path] = float(model(**ids, labels=ids["input_ids"]).loss)
    before, after = losses.values()
    assert before != after, "the step is in the exported weights"
    assert after < before + 1, losses


@pytest.mark.parametrize(
    "launcher",
    [
        ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"],
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    ],
    ids=["accelerate-launch", "two-ranks"],
)
def test_launchers_do_the_same_as_rft_train(tmp_path: Path, launcher: list[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(a_tree(tmp_path)))
    result = launched([sys.executable, *launcher, "-m", "rft", "train", str(path), "--run-id", "l"], 200)
    assert result.returncode == 0, result.stderr[-3000:]
    plain = launched([sys.executable, "-m", "rft", "train", str(path), "--run-id", "p"], 200)
    assert plain.returncode == 0, plain.stderr[-3000:]
    launched_rows, plain_rows = (
        [row["step"] for row in RunStore.open(tmp_path / "runs" / name).metrics() if row["kind"] == "training"]
        for name in ("l", "p")
    )
    assert launched_rows == plain_rows == [1, 2, 3]
