"""The case studies: every entry of the manifest is whole, results add up over seeds, the README holds their table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import case_studies
import pytest
import yaml
from case_studies import Result, Shift, Study, half_width, read_manifest, table, with_table
from test_job import a_tree

from rft.config import load_config
from rft.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
STUDIES = read_manifest()
CODING = Study(title="Coding", config=Path("configs/coding.yaml"), prepare=[], measures={"code": "shadow/code"})


@pytest.mark.parametrize("name", STUDIES)
def test_an_entry_is_whole(name: str) -> None:
    study = STUDIES[name]
    config = load_config(ROOT / study.config)
    assert config.data.test is not None, "the result is told of the test split"
    for command in study.prepare:
        assert os.access(ROOT / command.split()[0], os.X_OK)
    assert study.cases is None or (ROOT / study.cases).is_file()
    assert not study.warmup or config.warmup is not None
    shadows = {measure.removeprefix("shadow/") for measure in study.measures.values() if measure.startswith("shadow/")}
    assert shadows <= config.shadow_graders.keys()


def test_the_readme_has_the_table_of_the_results() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    results = case_studies.read_results(STUDIES)
    assert with_table(text, table(results, STUDIES)) == text, "run scripts/run_case_study --table"


def test_results_are_of_studies() -> None:
    assert {path.stem for path in case_studies.RESULTS.glob("*.json")} <= STUDIES.keys()


def test_the_wider_interval_counts() -> None:
    # three seeds: 4.303 * 0.1 / sqrt(3) = 0.2484, by hand
    assert half_width([0.1, 0.2, 0.3], 0.15, 0.25) == pytest.approx(0.24843, abs=1e-4)
    assert half_width([0.2, 0.2, 0.2], 0.1, 0.3) == pytest.approx(0.1)
    assert half_width([0.2], 0.1, 0.3) == pytest.approx(0.1)


def a_result(change: float, width: float) -> Result:
    shift = Shift(before=0.1, after=0.1 + change, change=change, low=change - width, high=change + width)
    return Result(
        name="coding",
        title="Coding",
        seeds=[0, 1, 2],
        minutes=[10, 11, 12],
        num_items=96,
        rollouts_per_item=2.0,
        headline="code",
        changes=[change] * 3,
        half_width=width,
        shifts={"code": shift, "calls": Shift(before=4, after=2.5, change=-1.5, low=None, high=None)},
        baseline={"varied": 0.5},
        slow_s=3.0,
    )


def test_a_row_says_what_changed_and_how_surely() -> None:
    row = table([a_result(0.2, 0.05)], {"coding": CODING}).splitlines()[-1]
    assert "code, 96 items | 0.100 -> 0.300 | +0.200 ± 0.050 | 3, 11 | 50% | calls 4.00 -> 2.50" in row
    assert "not better" in table([a_result(0.04, 0.05)], {"coding": CODING})


def test_a_readme_without_marks_is_named() -> None:
    with pytest.raises(UserError, match="marks"):
        with_table("# rft", "table")


def test_a_wrong_entry_is_named(tmp_path: Path) -> None:
    path = tmp_path / "studies.yaml"
    path.write_text("mine: {title: a, config: b, prepare: [], measures: {}}\n")
    with pytest.raises(UserError, match="measures"):
        read_manifest(path)


def run_study(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts/run_case_study"), *words, "--manifest", str(folder / "studies.yaml")]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )


def write_study(folder: Path, **changes: Any) -> None:
    shadow = {"type": "python", "source": "def grade(sample, item):\n    return float('e' in sample['output_text'])\n"}
    counting = "def grade(sample, item):\n    said = sample['output_text']\n"
    counting += "    return (len(said) <= 40) * said.count('e') / 40\n"
    tree = a_tree(folder, grader={"type": "python", "source": counting}, shadow_graders={"any": shadow})
    tree["data"]["test"] = tree["data"]["train"]
    tree["training"] |= {"steps": 2}
    tree["evaluation"] |= {"test_items": 6, "rollouts_per_item": 2}
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    case = {"item": {"letter": "e"}, "answers": {"good": "e e e e e e e e", "bad": "no"}}
    (folder / "cases.jsonl").write_text(json.dumps(case) + "\n")
    study = {"title": "tiny", "config": str(folder / "run.yaml"), "prepare": [], "measures": {"any e": "shadow/any"}}
    study |= {"cases": str(folder / "cases.jsonl")} | changes
    (folder / "studies.yaml").write_text(yaml.safe_dump({"mine": study}))


@pytest.mark.slow
def test_a_study_runs_to_its_result_and_again_does_nothing(tmp_path: Path) -> None:
    write_study(tmp_path)
    words = ("mine", "--seeds", "0", "1", "--out", str(tmp_path / "out"))
    done = run_study(tmp_path, *words)
    assert done.returncode == 0, done.stderr[-3000:]
    result = Result.model_validate_json((tmp_path / "out/mine/result.json").read_text())
    assert (result.seeds, result.num_items, result.rollouts_per_item) == ([0, 1], 6, 2.0)
    assert result.shifts["any e"].change == pytest.approx(sum(result.changes) / 2)
    assert all(minutes > 0 for minutes in result.minutes)
    assert (tmp_path / "out/mine/seed-1/comparison/compare.html").is_file()
    assert (tmp_path / "out/mine/seed-0/report.html").is_file()
    again = run_study(tmp_path, *words)
    assert again.returncode == 0
    assert "seed-0" not in again.stdout, "nothing is trained twice"


@pytest.mark.slow
def test_a_stage_that_fails_is_named(tmp_path: Path) -> None:
    write_study(tmp_path)
    (tmp_path / "cases.jsonl").write_text(json.dumps({"item": {"letter": "e"}, "answer": "no", "score": 0.9}) + "\n")
    done = run_study(tmp_path, "mine", "--out", str(tmp_path / "out"))
    assert done.returncode == 1
    assert "mine: grade" in done.stderr
    assert (
        run_study(tmp_path, "other").stderr.strip() == "run_case_study: other: no such case study\n  cure: one of mine"
    )
