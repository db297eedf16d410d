"""The simulation of scale on a small scale: 500 rollouts on 8 engines, of which one dies, with weights that change."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_model_folder

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.slow  # tens of CPU seconds, most of them imports


def simulate(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "simulate_scale"), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)


def test_500_rollouts_on_8_engines(tmp_path: Path) -> None:
    model = tiny_model_folder(tmp_path / "model")
    small = ["--rollouts", "504", "--engines", "8", "--rounds", "1", "--http", "64"]
    result = simulate(*small, "--model", str(model), "--json", "--check")
    rows = json.loads(result.stdout.splitlines()[-1])
    values = {name: row["value"] for name, row in rows.items()}
    cpu = "CPU per 1,000 turns"
    missed = {name for name, row in rows.items() if row["is_met"] is False}
    assert missed <= {cpu}, "how fast a busy machine is, is not tested"
    assert result.returncode == bool(missed), result.stderr
    assert 0 < values[cpu] < 30 and 0 < values["of it, writing the records of rollouts"] < values[cpu]
    assert values[f"{cpu}, real HTTP client"] > 0
    assert values["rollouts discarded"] == 0 and values["requests that went on elsewhere"] >= 1
    assert 0.5 < values["least busy engine over the mean of its kind"] <= 1
    assert 1 <= values["busiest engine over the mean of its kind"] < 1.5
    assert values["rollouts of several versions"] > 0.5
    assert values["mean end of a rollout, merged weights"] > values["the same, adapters"] > 10
    assert 0 < values["lost at an update of merged weights"] < 30
    assert values["GPUs it drives, turns of 500 tokens"] == pytest.approx(
        values["turns per second of one core, a third of it free"] * 500 / 2500
    )


def test_what_is_too_small_is_refused() -> None:
    result = simulate("--engines", "2")
    assert result.returncode == 2 and "at least 8 rollouts, 8 engines and 2 turns" in result.stderr
