"""The benchmark's two sides do the same: one loss and one gradient, however TRL splits its batch."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest
import torch
from tiny import tiny_model_folder

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"

pytestmark = pytest.mark.slow  # TRL takes seconds to import


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The benchmark with one thread; it can take a minute on a busy machine."""
    command = [sys.executable, str(SCRIPTS / "bench_trainer"), "--threads", "1", "--repeats", "1", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_both_sides_have_one_gradient_for_every_micro_batch(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from bench_sides import RftSide, Shape, TrlSide, copy_weights, gradients, record

    torch.set_num_threads(1)
    path = tiny_model_folder(tmp_path / "model")
    rft, trl = RftSide(path, "float32", has_lora=True), TrlSide(path, "float32", has_lora=True)
    with torch.no_grad():
        for seed, parameter in enumerate(rft.weights.values()):
            torch.manual_seed(seed)
            parameter.add_(0.05 * torch.randn_like(parameter))
    copy_weights(rft, trl)
    for shape in (Shape(30, (6,)), Shape(20, (5, 5), result=7), Shape(30, (6,), rollouts=1)):
        noise = torch.randn(shape.num_tokens, generator=torch.Generator().manual_seed(0))
        recorded = record(shape, path, logprobs=rft.logprobs(record(shape, path)) + 0.2 * noise)
        loss, expected = gradients(rft, lambda recorded=recorded: rft.step(recorded))
        for size in (8, 4, 2, 1):
            trl.micro_batch_size = size
            other_loss, found = gradients(trl, lambda recorded=recorded: trl.step(recorded))
            assert other_loss == pytest.approx(loss, rel=1e-4)
            assert (found - expected).norm() / expected.norm() < 1e-4 and expected.norm() > 0


def test_measured_rows_are_one_object(tmp_path):
    path = tiny_model_folder(tmp_path / "model")
    result = run("--model", str(path), "--only", "i,j", "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    rows = {row["name"][0]: row for row in reversed(found["rows"])}
    assert rows["i"]["value"] > 0 and rows["i"]["target"] == 1.0
    assert 0 < rows["j"]["value"] < 1 and rows["j"]["ok"] == (rows["j"]["value"] >= 0.8)
    assert found["machine"]["trl"] and found["machine"]["threads"] == 1


def test_check_names_each_missed_target(monkeypatch, capsys):
    bench = SourceFileLoader("bench_trainer", str(SCRIPTS / "bench_trainer")).load_module()
    made = [bench.row("x: slow", [0.5, 1.0, 2.0], "", 3.0), bench.row("y: small", [0.1], "s", 1.0, is_most=True)]
    monkeypatch.setattr(bench, "MEASUREMENTS", {"x": lambda: iter(made)})
    monkeypatch.setattr(bench, "machine", dict)
    monkeypatch.setattr(bench, "options", Namespace(json=False, check=True))
    assert bench.report(["x"]) == 1
    said = capsys.readouterr()
    assert "bench_trainer: x: slow: 1, target 3" in said.err and "y: small" not in said.err
    assert "MISSED" in said.out and "ok" in said.out


def test_an_unknown_row_is_refused_before_any_work():
    result = run("--only", "z")
    assert result.returncode == 2 and "there is no row z" in result.stderr
