"""A run that was asked to pause ends after its step, with a checkpoint, and goes on as if nothing had happened."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from test_job import a_config, a_tree
from test_sigkill import (  # noqa: F401  two of them are fixtures
    Driver,
    assert_clean,
    driver,
    shared,
    stable_rollouts,
    stable_rows,
    training_state,
    write_config,
)
from test_warmup import a_config as a_warmup

from rft.checkpoints import complete
from rft.errors import UserError
from rft.job import run_job, run_sampling, run_warmup
from rft.show import live_view, open_run, status
from rft.store import RunStore

PAUSED = "paused after step"


def edit(folder: Path, **training: object) -> None:
    """Change the training section of a config that `write_config` wrote."""
    path = folder / "run.yaml"
    tree = yaml.safe_load(path.read_text())
    tree["training"] |= training
    path.write_text(yaml.safe_dump(tree))


def steps(run: Path) -> list[str]:
    return [path.name for path in complete(run / "checkpoints")]


@pytest.fixture(scope="module")
def whole(driver: Driver, shared: Path) -> Path:  # noqa: F811
    """A run of four steps that saves every second one, and that nothing happened to."""
    write_config(shared / "paused", "lora", shared)
    edit(shared / "paused", steps=4, checkpoint_every=2)
    driver.run(shared / "paused")
    return shared / "paused" / "runs" / "run"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("point", "count", "step"),
    [
        ("sampling a turn", 1, 0),  # in the evaluation at step 0
        ("grading", 4, 1),  # in step 1, after which no checkpoint is due
        ("optimizer, lora", 2, 2),
        ("measured", 5, 3),  # of step 3
    ],
)
def test_paused_and_resumed_equals_uninterrupted(
    driver: Driver,  # noqa: F811
    whole: Path,
    shared: Path,  # noqa: F811
    tmp_path: Path,
    point: str,
    count: int,
    step: int,
) -> None:
    write_config(tmp_path, "lora", shared)
    edit(tmp_path, steps=4, checkpoint_every=2)
    told = driver.run(tmp_path, point=point, count=count, is_pause=True)
    run = tmp_path / "runs" / "run"
    store = RunStore.open(run)
    assert (f"{PAUSED} {step}" if step else "paused before its first step") in told
    assert store.read_state()["status"] == "paused" and store.writer() is None and not store.is_done
    assert [event["message"] for event in store.events()][-1] == "job paused"
    assert steps(run)[-1:] == ([f"step_{step:06d}"] if step else []), "also where none was due"
    assert not (run / "weights").exists(), "what was published is freed"
    driver.run(tmp_path, "--resume")
    assert not store.is_pause_asked
    assert stable_rows(run) == stable_rows(whole)
    assert stable_rollouts(run) == stable_rollouts(whole)
    assert all((a == b).all() for a, b in zip(training_state(run), training_state(whole), strict=True))
    assert_clean(run)


@pytest.mark.slow
def test_a_run_that_samples_ahead_pauses_and_goes_on(driver: Driver, shared: Path, tmp_path: Path) -> None:  # noqa: F811
    """What it had sampled of the next step is used."""
    write_config(tmp_path, "ahead", shared)
    driver.run(tmp_path, point="optimizer, lora", is_pause=True)
    run = tmp_path / "runs" / "run"
    assert RunStore.open(run).read_state() == {"status": "paused", "step": 1, "steps": 3, "error": None}
    driver.run(tmp_path, "--resume")
    rows = [row for row in RunStore.open(run).metrics() if row["kind"] == "training"]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert_clean(run)


@pytest.mark.slow
def test_two_ranks_pause_together(tmp_path: Path) -> None:
    """Rank 0 decides; the other one is let go and ends too."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(a_tree(tmp_path)))
    asking = (
        "import sys; from rft.store import RunStore; from rft.trainers.leader import Leader; record = Leader.record\n"
        "def asked(self, *args):\n    self.store.ask_to_pause(); record(self, *args)\n"
        "Leader.record = asked; sys.argv[0] = 'rft'; from rft.cli import main; main()"
    )
    (tmp_path / "asking.py").write_text(asking)
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    options = ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command = [*launch, *options, str(tmp_path / "asking.py"), "train", str(tmp_path / "run.yaml"), "--run-id", "r"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert RunStore.open(tmp_path / "runs" / "r").read_state()["status"] == "paused"
    assert steps(tmp_path / "runs" / "r") == ["step_000001"]


def test_asked_before_it_starts_it_pauses_before_it_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = a_config(tmp_path, training={"steps": 1, "items_per_step": 2, "base_rollouts": 4})
    store = RunStore(tmp_path / "runs" / "r")
    store.path.mkdir(parents=True)
    store.ask_to_pause()
    run_job(config, run_id="r")
    assert "paused before its first step; --resume continues it" in capsys.readouterr().out
    assert store.read_state() == {"status": "paused", "error": None}
    assert list(store.rollouts()) == [] and not store.is_done
    assert "paused" in str(live_view(store)) and status(store) == "paused"
    with pytest.raises(UserError, match="this run is paused, nobody trains it now"):
        from rft.cli.training import pause

        pause(store.path)
    run_job(config, run_id="r", resume=True)
    assert store.is_done and not store.is_pause_asked
    assert store.read_state()["status"] == "succeeded"


def test_a_run_that_only_samples_pauses_too(tmp_path: Path) -> None:
    config = a_config(tmp_path, training={"steps": 2, "items_per_step": 1, "base_rollouts": 2})
    store = RunStore(tmp_path / "runs" / "r")
    store.path.mkdir(parents=True)
    store.ask_to_pause()
    run_sampling(config, run_id="r")
    assert store.read_state()["status"] == "paused" and not list(store.rollouts())
    run_sampling(config, run_id="r", resume=True)
    assert store.is_done and len(list(store.rollouts())) == 4


@pytest.mark.slow
def test_a_warmup_pauses_with_its_weights_and_then_does_it_again(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="TRL is not installed: scripts/setup --warmup")
    config = a_warmup(tmp_path, epochs=2)
    whole = run_warmup(config, run_id="whole")
    store = RunStore(whole.with_name("paused"))
    store.path.mkdir(parents=True)
    store.ask_to_pause()
    run_warmup(config, run_id="paused")
    assert store.read_state()["status"] == "paused" and steps(store.path) == ["step_000001"]
    run_warmup(config, run_id="paused", resume=True)
    assert store.is_done and stable_rows(store.path) == stable_rows(whole)
    assert steps(store.path) == steps(whole)


def test_the_command_asks_a_run_that_is_at_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rft.cli.training import pause

    with RunStore.create(tmp_path, "r", {}) as store:
        store.write_state({"status": "running", "step": 1, "steps": 3})
        pause(store.path)
        assert store.is_pause_asked
    assert "r pauses after the step it is in" in capsys.readouterr().out


def test_a_folder_of_runs_is_refused(tmp_path: Path) -> None:
    from rft.cli.training import pause

    RunStore.create(tmp_path, "r", {}).close()
    with pytest.raises(UserError, match="this is a folder of runs"):
        pause(tmp_path)
    assert open_run(tmp_path / "r").is_pause_asked is False
