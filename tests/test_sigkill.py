"""A run killed with SIGKILL at any point goes on as if nothing had happened: weights, optimizer, rows, order of items.

Real runs of the command line in processes of their own (sigkill_driver.py), on one thread, in float32.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from sigkill_driver import POINTS
from test_job import a_tree, stable

from rft.checkpoints import complete, latest
from rft.store import RunStore

pytestmark = pytest.mark.slow
DEADLINE_S = 120
GRADER = "def grade(sample, item):\n    return sum(map(ord, sample['output_text'])) % 97 / 97\n"
KINDS = ("lora", "full", "adaptive", "ahead")
# Which call of a point is the last one. Two steps of 2 x 2 rollouts of one turn, 2 validation items.
CASES = [
    ("sampling a turn", 6),
    ("between two rollouts", 8),  # validation at 0: 2, step 1: 4, then in step 2
    ("between two rollouts", 2),  # in the first evaluation
    ("between two rollouts", 11),  # in the evaluation of step 2
    ("writing a rollout", 8),
    ("grading", 9),
    ("forward", 2),
    ("optimizer", 2),
    ("saving", 1),
    ("saving", 2),
    ("saved", 1),
    ("saved", 2),
    ("pruning", 2),
    ("publishing", 2),
    ("probing", 3),  # the first one is before step 1
    ("metrics", 3),  # of step 2; the first one is the evaluation at 0
    ("metrics", 4),  # of the evaluation of step 2
    ("measured", 3),
    ("state", 4),
]


class Driver:
    """The process that forks the runs."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("sigkill_driver.py")
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        self.process = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(self, folder: Path, *args: str, point: str | None = None, count: int = 1, is_pause: bool = False) -> str:
        """Run `rft train` in `folder` to its end, or to the `count`-th call at a point; what it said.

        is_pause: it is not killed there but asked to pause.
        """
        log = folder / "log"
        log.unlink(missing_ok=True)
        command = ["train", str(folder / "run.yaml"), "--run-id", "run", *args]
        pause = str(folder / "runs" / "run") if is_pause else None
        status = self._ask({"point": point, "count": count, "pause": pause, "args": command, "log": str(log)})
        ending = -signal.SIGKILL if point is not None and not is_pause else 0
        assert os.waitstatus_to_exitcode(status) == ending, log.read_text()
        return log.read_text()

    def _ask(self, case: dict[str, Any]) -> int:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(case) + "\n")
        self.process.stdin.flush()
        assert select.select([self.process.stdout], [], [], DEADLINE_S)[0], f"no end of {case} in {DEADLINE_S} s"
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    driver = Driver()
    yield driver
    driver.process.kill()
    driver.process.wait(timeout=30)


def write_config(folder: Path, kind: str, shared: Path) -> None:
    """One config for all runs of a kind: only where they write differs."""
    tree = a_tree(shared)
    tree["runs_dir"] = str(folder / "runs")
    tree["rollout"] = {"max_tokens_per_turn": 6, "temperature": 1.0}
    tree["training"] = {
        "steps": 2,
        "items_per_step": 2,
        "base_rollouts": 2,
        "learning_rate": 0.01,
        "keep_checkpoints": 1,
    }
    tree["evaluation"] = {"every": 2, "validation_items": 2}
    if kind == "full":
        tree["model"]["lora"] = None
        tree["training"] |= {"learning_rate": 0.001, "schedule": "cosine", "warmup_steps": 1}
    if kind != "adaptive":  # there some groups shall not vary
        tree["grader"] = {"type": "python", "source": GRADER}
    if kind == "adaptive":
        tree["training"] |= {"allocation": "adaptive", "first_rollouts": 2, "base_rollouts": 4}
    if kind == "ahead":
        tree["training"] |= {"staleness": 1, "steps": 3}
    folder.mkdir(exist_ok=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def uninterrupted(driver: Driver, shared: Path) -> dict[str, Path]:
    """The folder of a run of each kind that nothing happened to."""
    for kind in KINDS:
        write_config(shared / kind, kind, shared)
        driver.run(shared / kind)
    return {kind: shared / kind / "runs" / "run" for kind in KINDS}


def stable_rows(run: Path) -> list[dict[str, Any]]:
    return [stable(row) for row in RunStore.open(run).metrics()]


def stable_rollouts(run: Path) -> dict[str, Any]:
    """By id: what was asked, sampled and graded, and by which version."""
    found = {}
    for rollout in RunStore.open(run).rollouts():
        turns = [(turn.input_ids, turn.output_ids, turn.logprobs, turn.policy_version) for turn in rollout.turns]
        score = rollout.grade.score if rollout.grade is not None else None
        found[rollout.id] = (rollout.step, rollout.split, rollout.item_id, rollout.attempt, turns, score)
    return found


def training_state(run: Path) -> list[torch.Tensor]:
    """Weights, optimizer and random state of the newest checkpoint."""
    folder = latest(run / "checkpoints")
    assert folder is not None
    state = torch.load(folder / "trainer.pt", weights_only=True)
    moments = [value for own in state["optimizer"]["state"].values() for value in own.values()]
    weights = [value for file in sorted(folder.glob("*.safetensors")) for _, value in sorted(load_file(file).items())]
    rates = torch.tensor([state["step"], *state["scheduler"]["_last_lr"]])
    return [*weights, *moments, state["random"]["torch"], rates]


def assert_equal(run: Path, other: Path) -> None:
    assert stable_rows(run) == stable_rows(other)
    assert stable_rollouts(run) == stable_rollouts(other)
    states = training_state(run), training_state(other)
    assert [torch.equal(a, b) for a, b in zip(*states, strict=True)] == [True] * len(states[0])
    names = [[path.name for path in complete(folder / "checkpoints")] for folder in (run, other)]
    assert names[0] == names[1]


def assert_clean(run: Path) -> None:
    """Nothing half-written is left, no rollout is in a file twice, and every index points at its rollout."""
    assert RunStore.open(run).is_done
    assert [path for path in run.rglob(".*") if path.name != ".lock"] == []
    for path in sorted((run / "rollouts").glob("step_*.jsonl")):
        lines = [json.loads(line)["id"] for line in path.read_text().splitlines() if line.endswith("}")]
        assert len(lines) == len(set(lines))
        entries = dict(line.split() for line in path.with_suffix(".idx").read_text().splitlines())
        data = path.read_bytes()
        for name, offset in entries.items():
            assert json.loads(data[int(offset) :].split(b"\n")[0])["id"] == name
        assert entries.keys() == set(lines)


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize(("point", "count"), CASES)
def test_killed_anywhere_and_resumed_equals_uninterrupted(
    driver: Driver, uninterrupted: dict[str, Path], shared: Path, tmp_path: Path, kind: str, point: str, count: int
) -> None:
    write_config(tmp_path, kind, shared)
    driver.run(tmp_path, point=f"{point}, {kind}" if point == "optimizer" else point, count=count)
    driver.run(tmp_path, "--resume")
    assert_equal(tmp_path / "runs" / "run", uninterrupted[kind])
    assert_clean(tmp_path / "runs" / "run")


def test_every_point_has_a_case() -> None:
    assert {point.partition(",")[0] for point in POINTS} - {"rewinding"} == {point for point, _ in CASES}


@pytest.mark.parametrize("count", [4, 9])
def test_adaptive_rounds_go_on_where_they_were(
    driver: Driver, uninterrupted: dict[str, Path], shared: Path, tmp_path: Path, count: int
) -> None:
    write_config(tmp_path, "adaptive", shared)
    driver.run(tmp_path, point="between two rollouts", count=count)
    assert "finished rollout" in driver.run(tmp_path, "--resume")
    assert_equal(tmp_path / "runs" / "run", uninterrupted["adaptive"])
    assert_clean(tmp_path / "runs" / "run")


def test_finished_rollouts_are_used_and_told(
    driver: Driver, uninterrupted: dict[str, Path], shared: Path, tmp_path: Path
) -> None:
    """Killed twice in one step, the second time also in the middle of a line."""
    write_config(tmp_path, "lora", shared)
    driver.run(tmp_path, point="between two rollouts", count=8)
    told = driver.run(tmp_path, "--resume", point="writing a rollout", count=3)
    assert "continuing after step 1: 1 finished rollout of step 2 is used" in told
    told = driver.run(tmp_path, "--resume")
    assert "continuing after step 1: 3 finished rollouts of step 2 are used" in told
    run = tmp_path / "runs" / "run"
    assert [row["rollouts/reused"] for row in RunStore.open(run).metrics()] == [0, 0, 3, 0]
    assert_equal(run, uninterrupted["lora"])
    assert_clean(run)


def test_killed_while_it_makes_room_for_the_resumed_run(
    driver: Driver, uninterrupted: dict[str, Path], shared: Path, tmp_path: Path
) -> None:
    """Whatever file was about to be replaced: the next resume finds all of them."""
    write_config(tmp_path, "lora", shared)
    driver.run(tmp_path, point="writing a rollout", count=9)
    for count in (1, 2, 3):  # what goes aside, what stays, the index
        driver.run(tmp_path, "--resume", point="rewinding", count=count)
    driver.run(tmp_path, "--resume")
    assert_equal(tmp_path / "runs" / "run", uninterrupted["lora"])


@pytest.mark.parametrize(("point", "count"), [("grading", 10), ("forward", 3), ("saving", 2), ("publishing", 2)])
def test_a_run_that_samples_ahead_loses_at_most_the_step_in_flight(
    driver: Driver, uninterrupted: dict[str, Path], shared: Path, tmp_path: Path, point: str, count: int
) -> None:
    """What it samples from depends on timing, so it is not compared bit for bit; no token is too old, none is lost."""
    write_config(tmp_path, "ahead", shared)
    driver.run(tmp_path, point=point, count=count)
    run = tmp_path / "runs" / "run"
    last = max((row["step"] for row in RunStore.open(run).metrics() if row["kind"] == "training"), default=0)
    found = latest(run / "checkpoints")
    saved = int(found.name.removeprefix("step_")) if found is not None else 0
    assert saved >= last - 1
    before = {rollout.id: rollout for rollout in RunStore.open(run).rollouts() if rollout.split == "train"}
    driver.run(tmp_path, "--resume")
    rows = [row for row in RunStore.open(run).metrics() if row["kind"] == "training"]
    whole = [row for row in RunStore.open(uninterrupted["ahead"]).metrics() if row["kind"] == "training"]
    assert [row["step"] for row in rows] == [row["step"] for row in whole] == [1, 2, 3]
    after = {rollout.id: rollout for rollout in RunStore.open(run).rollouts(split="train")}
    assert len(after) == 3 * 2 * 2 and all(
        rollout.step - 2 <= turn.policy_version <= rollout.step - 1
        for rollout in after.values()
        for turn in rollout.turns
    )
    current = [
        rollout for rollout in before.values()
        if rollout.step > saved and all(turn.policy_version <= saved for turn in rollout.turns)
    ]  # fmt: skip
    assert current and all(after[rollout.id] == rollout for rollout in current)
    assert sum(row["rollouts/reused"] for row in rows) == len(current)
    assert_clean(run)
