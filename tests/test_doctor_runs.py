"""Four runs broken on purpose, really trained with a tiny model: the doctor names each cause first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from broken_runs import CAUSES, CONSTANT, LETTERS, OVERLAYS, WORDS, FlakyServer, tiny_tree, tool_model, tool_tree

from rft.config import load_config, validate_config
from rft.doctor import diagnose
from rft.doctor.finding import Finding
from rft.errors import ToolsDownError
from rft.job import run_job
from rft.store import RunStore

pytestmark = pytest.mark.slow  # real trainings of tiny models

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tool_model(tmp_path_factory.mktemp("taught"))


def trained(tree: dict[str, Any]) -> RunStore:
    return RunStore.open(run_job(validate_config(tree, "test"), run_id="r"))


def first_finding(store: RunStore) -> Finding:
    diagnosis = diagnose(store)
    assert diagnosis.findings and not diagnosis.problems
    return diagnosis.findings[0]


def warned_of(store: RunStore) -> list[str]:
    return [event["data"]["check"] for event in store.events() if event["level"] == "warn" and event["data"]]


def test_a_tool_that_fails_for_some_rollouts(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FlakyServer(0.2) as server:
        store = trained(tool_tree(tmp_path, model, server.base_url))
    finding = first_finding(store)
    assert (finding.check, finding.severity) == (CAUSES["dead_tool"], "high")
    assert "look" in finding.title and "500" in finding.evidence
    assert 0.05 < finding.numbers["discarded_share"] < 0.6
    assert all(store.find(rollout_id) for rollout_id in finding.rollout_ids) and finding.rollout_ids
    assert "groups" not in {other.check.split("_")[0] for other in diagnose(store).findings}, "it is a consequence"
    assert warned_of(store).count("dead_tool") == 1
    assert "warning: the tool look fails" in capsys.readouterr().out


def test_a_tool_that_dies_and_ends_the_run(model: Path, tmp_path: Path) -> None:
    with FlakyServer(0.0) as server, pytest.MonkeyPatch.context() as patch:
        from rft.trainers.leader import Leader

        record = Leader.record

        def dying(self: Leader, step: int, *rest: Any) -> None:
            record(self, step, *rest)
            server.share = 1.0

        patch.setattr(Leader, "record", dying)  # when it dies, not what the run does about it
        with pytest.raises(ToolsDownError):
            trained(tool_tree(tmp_path, model, server.base_url))
    store = RunStore.open(tmp_path / "runs" / "r")
    finding = first_finding(store)
    assert (finding.check, finding.severity, finding.weight) == ("dead_tool", "high", 1.0)
    assert "it ended the run" in finding.evidence and "It also explains: the tools ended the run" in finding.evidence
    assert all(store.find(rollout_id) for rollout_id in finding.rollout_ids) and finding.rollout_ids


def test_a_grader_that_does_not_look(tmp_path: Path) -> None:
    store = trained(tiny_tree(tmp_path, grader={"type": "python", "source": CONSTANT}, training={"steps": 3}))
    finding = first_finding(store)
    assert finding.check == CAUSES["constant_grader"]
    assert "the grade 0.5" in finding.evidence and "its code returns nothing else" in finding.evidence
    assert [other.check for other in diagnose(store).findings if other.severity == "high"] == ["constant_grader"]
    assert warned_of(store) == ["baseline", "constant_grader"]


def test_a_learning_rate_100_times_too_high(tmp_path: Path) -> None:
    store = trained(tiny_tree(tmp_path, training={"learning_rate": 6e-1}))
    finding = first_finding(store)
    assert (finding.check, finding.severity) == (CAUSES["learning_rate"], "high")
    assert "training.learning_rate (0.6)" in finding.cure
    assert warned_of(store)[0] == "learning_rate"


def test_a_grader_that_can_be_hacked(tmp_path: Path) -> None:
    shadow = {"words": {"type": "python", "source": WORDS}}
    tree = tiny_tree(tmp_path, grader={"type": "python", "source": LETTERS}, shadow_graders=shadow)
    tree["training"] |= {"steps": 24}
    store = trained(tree)
    finding = first_finding(store)
    assert (finding.check, finding.severity) == (CAUSES["hackable_grader"], "high")
    assert finding.rollout_ids


def test_the_same_run_with_nothing_wrong(tmp_path: Path) -> None:
    store = trained(tiny_tree(tmp_path))
    assert [finding for finding in diagnose(store).findings if finding.severity == "high"] == []


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_overlays_fit_the_quickstart(name: str) -> None:
    assert set(CAUSES) == set(OVERLAYS)
    config = load_config(ROOT / "configs" / "quickstart.yaml", OVERLAYS[name])
    assert config != load_config(ROOT / "configs" / "quickstart.yaml")
