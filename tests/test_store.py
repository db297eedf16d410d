"""The run folder: rows survive crashes, readers never fail on a cut line, one process writes, nothing is deleted."""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from rft.errors import StorageError, UserError
from rft.store import RunStore
from rft.types import Message, Rollout, Split, StopReason, Turn, rollout_id


def rollout(step: int = 1, attempt: int = 0, split: Split = "train", text: str = "hello") -> Rollout:
    turn = Turn(
        input_ids=[1, 2], output_ids=[3], logprobs=[-0.5], finish_reason="stop", policy_version=step,
        message=Message(role="assistant", content=text),
    )  # fmt: skip
    return Rollout(
        id=rollout_id("run", split, step, "item", attempt), item_id="item", split=split, step=step, attempt=attempt,
        seed=0, turns=[turn], stop_reason=StopReason.ANSWERED, started_at=1.5, duration_s=0.1,
    )  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore.create(tmp_path / "runs", "run-001", {"name": "run"})


def reopen(store: RunStore) -> RunStore:
    """What a resumed run does: the writer is gone, another opens the folder."""
    store.close()
    return RunStore.open(store.path)


def test_a_run_folder_is_laid_out_as_designed(store: RunStore) -> None:
    store.append_rollout(rollout())
    store.append_metrics({"step": 1})
    store.append_event("info", "started")
    store.write_state({"status": "running"})
    assert not store.is_done
    store.mark_done()
    assert store.is_done
    files = {str(path.relative_to(store.path)) for path in store.path.rglob("*") if path.is_file()}
    assert files == {
        *("config.json", "state.json", "events.jsonl", "metrics.jsonl", "DONE", ".lock"),
        *("rollouts/step_000001.jsonl", "rollouts/step_000001.idx"),
    }
    assert (store.config(), store.read_state(), store.run_id) == ({"name": "run"}, {"status": "running"}, "run-001")
    assert store.checkpoints.is_dir()
    assert store.weights.is_dir()
    assert store.engine_log.parent == store.path


def test_rows_come_back_as_written(store: RunStore) -> None:
    written = [
        rollout(2, 0),
        rollout(1, 0, text="\ud800 lone surrogate, \n newline \u2028"),
        rollout(1, 1, "validation"),
    ]
    for entry in written:
        store.append_rollout(entry)
    assert list(store.rollouts()) == [written[1], written[2], written[0]]
    assert list(store.rollouts(step=1, split="validation")) == [written[2]]
    assert list(store.rollouts(step=3)) == []
    store.append_metrics({"step": 1, "train/grade": math.nan, "validation/grade": 0.5})
    assert list(store.metrics()) == [{"step": 1, "train/grade": None, "validation/grade": 0.5}]
    store.append_event("warn", "careful", {"x": math.inf})
    (event,) = store.events()
    assert (event["level"], event["message"], event["data"]) == ("warn", "careful", {"x": None})


def test_numbers_and_letters_of_a_rollout_come_back_exactly(store: RunStore) -> None:
    written = rollout(text="é \u2028 \x85 中")
    written.turns[0].logprobs = [-0.0, 0.1 + 0.2, -1e-7, -1e22, -5e-324, -math.inf]
    written.environment = {"big": 2**70, "nested": [{"x": None}, "é", True]}
    store.append_rollout(written)
    assert list(store.rollouts()) == [written]
    line = store.rollout_path(1).read_bytes()
    assert line.isascii() and line.count(b"\n") == 1


def test_a_rollout_made_again_comes_once_as_made_last(store: RunStore) -> None:
    store.append_rollout(rollout(text="first"))
    store.append_rollout(rollout(text="second"))
    assert [entry.output_text for entry in store.rollouts()] == ["second"]
    found = store.find(rollout().id)
    assert found is not None
    assert found.output_text == "second"


@pytest.mark.parametrize("cut", [1, 2, 10])
def test_every_cut_of_the_last_line_is_survived(store: RunStore, cut: int) -> None:
    """Cut by a crash, read, appended to by the resumed run, read again."""
    for step in (1, 2):
        store.append_metrics({"step": step, "x": "y" * 20})
    path = store.path / "metrics.jsonl"
    data = path.read_bytes()
    path.write_bytes(data[:-cut])
    expected = [1, 2] if cut == 1 else [1]  # without its newline only, the row is whole
    assert [row["step"] for row in store.metrics()] == expected
    resumed = reopen(store)
    resumed.append_metrics({"step": 3})
    assert [row["step"] for row in resumed.metrics()] == [*expected, 3]


def test_every_length_of_a_rollout_file_can_be_read(store: RunStore) -> None:
    store.append_rollout(rollout(attempt=0))
    store.append_rollout(rollout(attempt=1))
    path = store.rollout_folder / "step_000001.jsonl"
    data = path.read_bytes()
    for size in range(0, len(data), 7):
        path.write_bytes(data[:size])
        num_whole = (size >= data.index(b"\n")) + (size >= len(data) - 1)  # the last one needs no newline to be whole
        assert len(list(store.rollouts())) == num_whole


def test_find_with_and_without_a_right_index(store: RunStore) -> None:
    entries = [rollout(step, attempt) for step in (1, 2) for attempt in range(3)]
    for entry in entries:
        store.append_rollout(entry)
    index = store.rollout_folder / "step_000002.idx"
    right = index.read_text()
    offsets = [line.split()[1] for line in right.splitlines()]
    for text in [
        right,
        right.replace(offsets[2], offsets[1]),
        right.replace(offsets[2], "99999"),
        right[:-3],
        "\x00 \n",
        None,
    ]:
        index.unlink() if text is None else index.write_text(text)
        assert store.find(entries[-1].id) == entries[-1]
    assert store.find("trace_none") is None


def test_index_offsets_are_right_after_a_cut_line(store: RunStore) -> None:
    store.append_rollout(rollout(attempt=0))
    path = store.rollout_folder / "step_000001.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    resumed = reopen(store)
    resumed.append_rollout(rollout(attempt=1))
    offset = int(path.with_suffix(".idx").read_text().splitlines()[-1].split()[1])
    assert json.loads(path.read_bytes()[offset:])["attempt"] == 1


def test_a_whole_row_of_another_version_is_an_error(store: RunStore) -> None:
    (store.rollout_folder / "step_000001.jsonl").write_text('{"id": "x", "unknown": 1}\n')
    with pytest.raises(StorageError, match="version"):
        list(store.rollouts())


# --- resume ---


def test_rewind_moves_later_steps_aside_and_deletes_nothing(store: RunStore) -> None:
    for step in (1, 2, 3):
        store.append_rollout(rollout(step))
        store.append_metrics({"step": step})
    store.mark_done()
    resumed = reopen(store)
    resumed.rewind(1)
    assert [entry.step for entry in resumed.rollouts()] == [1]
    assert [row["step"] for row in resumed.metrics()] == [1]
    assert not resumed.is_done
    superseded = resumed.path / "metrics.superseded.jsonl"
    assert [json.loads(line)["step"] for line in superseded.read_text().splitlines()] == [2, 3]

    resumed.append_rollout(rollout(2, text="again"))
    resumed.append_metrics({"step": 2})
    resumed.rewind(1)
    moved = sorted(path.name for path in (resumed.rollout_folder / "superseded").glob("*.jsonl*"))
    assert moved == ["step_000002.jsonl", "step_000002.jsonl.1", "step_000003.jsonl"]
    assert [row["step"] for row in resumed.metrics()] == [1]
    assert len(superseded.read_text().splitlines()) == 3


def test_rewind_to_the_last_step_changes_nothing(store: RunStore) -> None:
    store.append_metrics({"step": 2})
    before = (store.path / "metrics.jsonl").read_bytes()
    store.rewind(2)
    assert (store.path / "metrics.jsonl").read_bytes() == before


# --- one writer ---


def test_two_processes_cannot_write_one_run(store: RunStore) -> None:
    store.append_metrics({"step": 1})
    other = RunStore.open(store.path)
    assert len(list(other.metrics())) == 1, "readers need no lock"
    with pytest.raises(UserError, match=f"process {os.getpid()} is writing this run"):
        other.append_metrics({"step": 2})
    store.close()
    other.append_metrics({"step": 2})
    assert len(list(other.metrics())) == 2


def test_a_dead_writer_leaves_no_lock(tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from rft.store import RunStore\n"
        "store = RunStore.create(Path(sys.argv[1]), 'run', {}); store.append_metrics({'step': 1}); os._exit(9)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=environment, timeout=60, check=False)
    assert ended.returncode == 9
    store = RunStore.open(tmp_path / "run")
    store.append_metrics({"step": 2})
    assert [row["step"] for row in store.metrics()] == [1, 2]


def test_a_run_is_not_created_twice(store: RunStore) -> None:
    store.close()
    with pytest.raises(UserError, match="exists already"):
        RunStore.create(store.path.parent, "run-001", {})
    assert store.config() == {"name": "run"}


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "a" * 200])
def test_bad_run_ids_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="run id"):
        RunStore.create(tmp_path, name, {})
    assert list(tmp_path.iterdir()) == []


def test_opening_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json is missing"):
        RunStore.open(tmp_path)


# --- the disk's failures ---


def test_full_disk_names_the_folder_and_the_cure(store: RunStore) -> None:
    """A file size limit stands for a disk that fills up in the middle of a line."""
    store.append_metrics({"step": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(StorageError, match="free space") as caught:
            store.append_metrics({"step": 2, "x": "y" * 200})
        assert str(store.path) in str(caught.value)
        with pytest.raises(StorageError):
            store.write_state({"x": "y" * 200})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    store.append_metrics({"step": 3})
    assert [row["step"] for row in store.metrics()] == [1, 3]
    assert not list(store.path.glob(".*.tmp"))


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(StorageError, match="runs"):
        RunStore.create(tmp_path / "runs", "run", {})
