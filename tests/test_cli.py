"""The command line: one clear message and an exit code per failure, a clean end on Ctrl-C."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from test_job import a_tree

from rft.store import RunStore


def rft(*arguments: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rft", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "300"},
    )


def written(tmp_path: Path, **sections: object) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(a_tree(tmp_path, **sections)))
    return path


def test_help_names_the_commands() -> None:
    result = rft("--help")
    assert result.returncode == 0
    assert all(command in result.stdout for command in ("train", "tools", "export"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.stepz=2", "training.stepz: unknown key"),
        ("model.path=nowhere", "nowhere is not a model folder"),
        ("data.train=none.jsonl", "none.jsonl"),
    ],
)
def test_a_user_error_is_one_message_and_exit_code_2(tmp_path: Path, override: str, message: str) -> None:
    result = rft("train", str(written(tmp_path)), override)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "runs").exists()


def test_an_unknown_option_is_a_usage_error() -> None:
    result = rft("train", "x.yaml", "--nope")
    assert result.returncode == 2
    assert "--nope" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = rft("tools", "icd10", "--port", str(port))
    assert result.returncode == 2
    assert f"127.0.0.1:{port}" in result.stderr and "--port" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow  # processes that import torch or vLLM
def test_an_engine_that_dies_at_start_is_quoted_and_the_run_is_marked_failed(tmp_path: Path) -> None:
    path = written(tmp_path, engine={"type": "vllm", "max_model_len": 256, "args": ["--no-such-flag"]})
    result = rft("train", str(path), timeout_s=120)
    assert result.returncode == 1
    assert "--no-such-flag" in result.stderr and "engine.args" in result.stderr
    assert "Traceback" not in result.stderr
    state = RunStore.open(tmp_path / "runs" / "tiny-001").read_state()
    assert state["status"] == "failed" and "--no-such-flag" in state["error"]


@pytest.mark.slow  # processes that import torch or vLLM
def test_a_full_disk_is_named_and_what_was_written_stays(tmp_path: Path) -> None:
    """A file size limit stands for the full disk: both make the kernel refuse a write."""
    tree = a_tree(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    limited = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000));"
        "sys.argv = ['rft', 'train', sys.argv[1]]; from rft.cli import main; main()"
    )
    result = subprocess.run(
        [sys.executable, "-c", limited, str(path)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "300"},
    )
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "cure" in result.stderr and str(tmp_path / "runs" / "tiny-001") in result.stderr
    store = RunStore.open(tmp_path / "runs" / "tiny-001")
    assert list(store.rollouts())


@pytest.mark.slow  # processes that import torch or vLLM
def test_ctrl_c_ends_cleanly_and_resume_continues(tmp_path: Path) -> None:
    path = written(tmp_path)
    # a shell that starts pytest in the background makes it, and so its children, ignore SIGINT
    listening = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "sys.argv[0] = 'rft'; from rft.cli import main; main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", listening, "train", str(path), "training.steps=500"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    store_path = tmp_path / "runs" / "tiny-001"
    deadline = time.monotonic() + 60
    while not list((store_path / "checkpoints").glob("step_*/MANIFEST")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "--resume" in stderr and "Traceback" not in stderr
    assert RunStore.open(store_path).read_state()["status"] == "cancelled"
    steps = [row["step"] for row in RunStore.open(store_path).metrics() if row["kind"] == "training"]
    result = rft("train", str(path), f"training.steps={steps[-1] + 1}", "--resume", timeout_s=120)
    assert result.returncode == 0, result.stderr
    store = RunStore.open(store_path)
    training = [row["step"] for row in store.metrics() if row["kind"] == "training"]
    assert training == list(range(1, steps[-1] + 2))
    assert store.is_done
