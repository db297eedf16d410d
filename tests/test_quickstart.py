"""The real thing, short: SmolLM2, real vLLM, the real tool server; without a network, exported."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from test_job import a_tree

from rft.export import export
from rft.store import RunStore

ROOT = Path(__file__).parent.parent
ONLY_LOOPBACK = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
pytestmark = pytest.mark.slow


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


def without_network(command: list[str]) -> list[str]:
    """`command` in a network namespace that has only loopback, where this machine allows one."""
    is_possible = shutil.which("unshare") and shutil.which("ip")
    if is_possible and subprocess.run([*ONLY_LOOPBACK, "true"], capture_output=True).returncode == 0:
        return [*ONLY_LOOPBACK, *command]
    pytest.skip("needs unshare, ip and the right to make a network namespace")


def test_a_step_of_the_quickstart_without_a_network(tmp_path: Path) -> None:
    overrides = [
        "training.steps=1",
        "training.items_per_step=3",
        "training.base_rollouts=4",
        "evaluation.validation_items=4",
        "evaluation.test_items=4",
        f"runs_dir={tmp_path}",
    ]
    command = [sys.executable, "-m", "rft", "train", "configs/quickstart.yaml", *overrides, "--run-id", "short"]
    result = launched(without_network(command), timeout_s=400)
    assert result.returncode == 0, result.stderr[-3000:]
    store = RunStore.open(tmp_path / "short")
    assert store.is_done
    (row,) = [row for row in store.metrics() if row["kind"] == "training"]
    assert row["probe/mean"] < 2e-3
    assert row["logprob_gap/mean"] < 2e-3
    rollouts = list(store.rollouts(split="train"))
    assert len(rollouts) == 12
    results = [result for rollout in rollouts for turn in rollout.turns for result in turn.results]
    assert all(result.latency_s > 0 for result in results if not result.is_error)
    report = json.loads((tmp_path / "short" / "report.json").read_text())
    assert report
    folder = export(tmp_path / "short", tmp_path / "model")
    _answers(folder)


def _answers(folder: Path) -> None:
    """The exported folder is a model that plain transformers loads and that still speaks."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0])


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
