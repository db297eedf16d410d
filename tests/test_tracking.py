"""Trackers get every row of a run, may fail without harm, and keep secrets to themselves."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from test_job import a_tree

from rft import tracking
from rft.config import RunConfig, validate_config
from rft.errors import ConfigError, UserError
from rft.job import run_job, run_warmup
from rft.store import RunStore
from rft.tracking import TrackerConfig, check_trackers, numbers

# A package of that name which keeps what it gets in a file, or does what TROUBLE says.
FAKE_TRACKIO = """
import json, os, threading

class Run:
    def __init__(self, options):
        self.options = options
        self.note(init=options)
    def note(self, **what):
        with open(os.environ["TRACKIO_DIR"] + "/rows.jsonl", "a") as file:
            file.write(json.dumps(what) + chr(10))
    def log(self, values, step=None):
        if os.environ.get("TROUBLE") == "log":
            raise RuntimeError("the server refused " + os.environ["HUB_TOKEN"])
        self.note(step=step, values=values)
    def finish(self):
        if os.environ.get("TROUBLE") == "finish":
            threading.Event().wait()
        self.note(finished=True)

def init(**options):
    if os.environ.get("TROUBLE") == "init":
        raise SystemExit("no network")
    return Run(options)
"""


@pytest.fixture
def trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the fake keeps what it gets."""
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "trackio.py").write_text(FAKE_TRACKIO)
    monkeypatch.syspath_prepend(tmp_path / "path")
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    monkeypatch.setenv("TRACKIO_DIR", "")
    monkeypatch.setenv("HUB_TOKEN", "VERY-SECRET")
    (tmp_path / "kept").mkdir()
    return tmp_path / "kept"


def a_config(tmp_path: Path, *trackers: dict[str, Any], steps: int = 3) -> RunConfig:
    tree = a_tree(tmp_path, trackers=list(trackers))
    tree["training"]["steps"] = steps
    return validate_config(tree, where="test")


def kept(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def warnings(run: Path) -> list[str]:
    return [event["message"] for event in RunStore.open(run).events() if "tracker" in event["message"]]


@pytest.mark.slow
def test_a_tracker_gets_every_row_of_a_run_and_of_its_resumption(tmp_path: Path, trackio: Path) -> None:
    tracker = {"type": "trackio", "project": "ours", "dir": str(trackio)}
    run = run_job(a_config(tmp_path, tracker, steps=1))
    (run / "DONE").unlink()
    assert run_job(a_config(tmp_path, tracker), resume=True) == run
    found = kept(trackio)
    begins = [row["init"] for row in found if "init" in row]
    assert [(begin["project"], begin["name"], begin["resume"]) for begin in begins] == [("ours", run.name, "allow")] * 2
    assert begins[0]["config"]["training"]["learning_rate"] == 0.01
    assert set(begins[0]["config"]) <= {"name", "seed", "rollout", "training", "evaluation"}
    rows = [(row["step"], row["values"]) for row in found if "step" in row]
    assert rows == [(row["step"], numbers(row)) for row in RunStore.open(run).metrics()]
    assert {step for step, _ in rows} == {0, 1, 2, 3}
    assert any("validation/grade" in values for _, values in rows)
    assert found[-1] == {"finished": True} and warnings(run) == []


@pytest.mark.slow  # TRL
def test_a_tracker_gets_the_rows_of_a_warm_up(tmp_path: Path, trackio: Path) -> None:
    pytest.importorskip("trl", reason="the warm-up needs TRL: scripts/setup --warmup")
    import test_warmup

    tree = test_warmup.a_tree(tmp_path) | {"trackers": [{"type": "trackio", "dir": str(trackio)}]}
    run = run_warmup(validate_config(tree, where="test"))
    rows = [(row["step"], row["values"]) for row in kept(trackio) if "step" in row]
    assert rows == [(row["step"], numbers(row)) for row in RunStore.open(run).metrics()]
    assert any("update/loss" in values for _, values in rows)


@pytest.mark.parametrize("trouble", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_given_up_and_the_run_succeeds(
    tmp_path: Path, trackio: Path, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    monkeypatch.setenv("TROUBLE", trouble)
    monkeypatch.setattr(tracking, "_END_S", 0.2)
    run = run_job(a_config(tmp_path, {"type": "trackio", "dir": str(trackio)}, steps=1))
    assert RunStore.open(run).read_state()["status"] == "succeeded"
    (warning,) = warnings(run)
    reason = {"init": "SystemExit: no network", "log": "refused ***", "finish": "no answer within 0.2 s"}[trouble]
    assert reason in warning and "trackio (trackers[0])" in warning and "VERY-SECRET" not in warning


def test_a_missing_package_is_said_before_anything_else(tmp_path: Path) -> None:
    missing = [name for name in ("wandb", "tensorboard", "trackio") if importlib.util.find_spec(name) is None]
    if not missing or importlib.util.find_spec("tensorboardX"):
        pytest.skip("all trackers are installed here: nothing is missing")
    config = a_config(tmp_path, {"type": missing[0]})
    (tmp_path / "rows.jsonl").unlink()  # would be complained of next
    with pytest.raises(UserError, match=rf"trackers\[0\]: {missing[0]} is not installed\n  cure: pip install"):
        run_job(config)


def test_wandb_without_a_key_is_refused_unless_it_stays_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wandb.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DISABLED", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    wanted = [TrackerConfig(type="wandb")]
    with pytest.raises(UserError, match="WANDB_MODE=offline"):
        check_trackers(wanted)
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password KEY\n")
    check_trackers(wanted)
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example")
    with pytest.raises(UserError, match="has no API key"):
        check_trackers(wanted)
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_trackers(wanted)


def test_only_finite_numbers_are_sent_under_names_that_tell_splits_apart() -> None:
    row = {"step": 3, "kind": "training", "a": 1, "b": math.nan, "c": math.inf, "d": None, "e": [1], "f": True}
    assert numbers(row) == {"a": 1}
    assert numbers({"step": 3, "kind": "evaluation", "split": "test", "grade": 0.5}) == {"test/grade": 0.5}


@pytest.mark.parametrize(
    ("tracker", "text"),
    [
        ({"type": "mlflow"}, "trackers.0.type"),
        ({"type": "trackio", "entity": "me"}, "entity and tags are for wandb"),
        ({"type": "tensorboard", "name": "../x"}, "name of a folder"),
        ({"type": "wandb", "key": "KEY"}, "unknown key"),
    ],
)
def test_wrong_trackers_are_refused(tmp_path: Path, tracker: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        a_config(tmp_path, tracker)


def test_tensorboard_shows_a_run(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = {"type": "tensorboard", "dir": str(tmp_path / "board")}
    run = run_job(a_config(tmp_path, tracker, steps=1))
    (run / "DONE").unlink()
    run_job(a_config(tmp_path, tracker), resume=True)
    board = EventAccumulator(str(tmp_path / "board" / run.name)).Reload()
    rows = list(RunStore.open(run).metrics())
    expected = [(row["step"], row["train/grade"]) for row in rows if row["kind"] == "training"]
    shown = [(event.step, event.value) for event in board.Scalars("train/grade")]
    assert [step for step, _ in shown] == [step for step, _ in expected] == [1, 2, 3]
    assert [value for _, value in shown] == pytest.approx([value for _, value in expected])
    evaluated = [row["step"] for row in rows if row["kind"] == "evaluation"]
    assert [event.step for event in board.Scalars("validation/grade")] == evaluated
    assert warnings(run) == []


def test_wandb_works_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed: pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = {"type": "wandb", "project": "ours", "name": "shown", "tags": ["a"]}
    run = run_job(a_config(tmp_path, tracker, steps=1))
    (folder,) = (run / "trackers" / "wandb").glob("offline-run-*")
    wandb_id = json.loads((run / "tracking.json").read_text())["wandb_id"]
    data = (folder / f"run-{wandb_id}.wandb").read_bytes()
    for name in (b"shown", b"ours", b"train/grade", b"validation/grade"):
        assert name in data
    assert warnings(run) == []
