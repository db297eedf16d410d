"""Runs as jobs of a real Slurm: trained, preempted, gone on, cancelled, refused with the cure; a server's jobs, too."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import slurm
import torch
import yaml
from slurm import Cluster
from test_job import a_tree, stable, weights
from tiny import tiny_model_folder
from workers import in_loop, workplace

from rft.cluster import queue
from rft.cluster.attempt import Attempt, attempts_of
from rft.listener import bound
from rft.store import RunStore

DEADLINE_S = 240.0

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(slurm.why_not()), reason=slurm.why_not()),
    pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="needs pip install 'rft-local[cluster]'"),
]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with slurm.cluster(tmp_path_factory.mktemp("slurm")) as found:
        yield found


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the last bits do not depend on the machine's load."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))


def write(tmp_path: Path, **sections: Any) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(a_tree(tmp_path, **sections)))
    return str(path)


def begin(here: Cluster, *arguments: str) -> subprocess.Popen[str]:
    """`rft submit` in a process of its own; its words in one stream."""
    command = [sys.executable, "-m", "rft", "submit", *arguments]
    return subprocess.Popen(
        command, env=os.environ | here.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def told(process: subprocess.Popen[str], code: int) -> str:
    """Its words, once it has ended with that code."""
    words, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == code, words
    return words


def until(is_so: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not is_so():
        assert process is None or process.poll() is None, process.stdout and process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def steps(run: Path) -> list[int]:
    if not (run / "metrics.jsonl").exists():
        return []
    return [row["step"] for row in RunStore(run).metrics() if row["kind"] == "training"]


def job_id(run: Path) -> str:
    return str(json.loads((run / queue.JOB).read_text())["job_id"])


def by_hand(tmp_path: Path) -> RunStore:
    """The same run without Slurm, in another folder: its id, and so its seeds, are the same."""
    where = f"runs_dir={tmp_path / 'by-hand'}"
    command = [sys.executable, "-m", "rft", "train", str(tmp_path / "run.yaml"), where, "--run-id", "r"]
    subprocess.run(command, check=True, timeout=DEADLINE_S, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    return RunStore.open(tmp_path / "by-hand" / "r")


def assert_same_run(store: RunStore, other: RunStore) -> None:
    assert [stable(row) for row in store.metrics()] == [stable(row) for row in other.metrics()]
    ours, theirs = weights(store.path), weights(other.path)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    ids = [rollout.id for rollout in store.rollouts()]
    lines = sum(len(path.read_text().splitlines()) for path in store.rollout_folder.glob("*.jsonl"))
    assert len(ids) == len(set(ids)) == lines, "no rollout is counted twice"


def processes_of(run: Path) -> list[str]:
    """Command lines of processes of this machine that name the run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(run) in words:
            found.append(words)
    return found


LONG = {"steps": 12, "items_per_step": 2, "base_rollouts": 4, "learning_rate": 0.01}
RARELY = {"every": 12, "validation_items": 2}


def test_preempted_and_gone_on_equals_uninterrupted_bit_for_bit(here: Cluster, tmp_path: Path) -> None:
    """Slurm takes the node back twice: by an administrator's requeue, and by the notice before the time limit."""
    config, run = write(tmp_path, training=LONG, evaluation=RARELY), tmp_path / "runs" / "r"
    process = begin(here, config, "--run-id", "r", "--wait")
    until(lambda: (run / queue.JOB).exists(), process)
    assert oct((run / "job_config.yaml").stat().st_mode)[-3:] == "600"
    write(tmp_path, training=LONG | {"learning_rate": 0.5}, evaluation=RARELY)  # changes nothing any more
    job = job_id(run)
    for num, command in ((2, ["scontrol", "requeue", job]), (6, ["scancel", "--signal=USR2", job])):
        until(lambda num=num: len(steps(run)) >= num, process)  # type: ignore[misc]
        here.run(*command)
        asked_at, step = time.monotonic(), max(steps(run))
        restart = 1 if num == 2 else 2
        until(lambda restart=restart: (Attempt(run, job, restart).path / "node-0.json").exists(), process)  # type: ignore[misc]
        until(lambda step=step: max(steps(run)) > step + 1, process)  # type: ignore[misc]
        assert time.monotonic() - asked_at < 90.0
    words = told(process, 0)
    assert "queued (BeginTime)" in words and words.rstrip().endswith(f"job {job}: completed")
    ends = [attempt.ended(0) for attempt in attempts_of(run, job)]
    assert [end.code for end in ends if end is not None] == [75, 75, 0]
    assert ends[1] is not None and ends[1].why.endswith("queued again"), "the notice requeues the job itself"
    assert json.loads((run / queue.QUEUE).read_text())["state"] == "completed"
    write(tmp_path, training=LONG, evaluation=RARELY)
    assert_same_run(RunStore.open(run), by_hand(tmp_path))


def test_a_node_that_is_lost_is_queued_again(here: Cluster, tmp_path: Path) -> None:
    config, run = write(tmp_path, training=LONG, evaluation=RARELY), tmp_path / "runs" / "r"
    process = begin(here, config, "--run-id", "r", "--wait")
    until(lambda: len(steps(run)) >= 2, process)
    (task,) = _pids("submitit.core._submit", str(run), but="srun")
    os.kill(task, signal.SIGKILL)
    told(process, 0)
    assert [len(attempts_of(run, job_id(run))), steps(run)] == [2, list(range(1, 13))]
    assert not processes_of(run)


def _pids(*words: str, but: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if all(word in line for word in words) and not line.startswith((but, "/bin/bash")):
            found.append(int(path.parent.name))
    return found


def test_ending_the_follower_cancels_the_job_and_all_of_it(here: Cluster, tmp_path: Path) -> None:
    training = LONG | {"steps": 500}
    config, run = write(tmp_path, training=training, evaluation=RARELY), tmp_path / "runs" / "r"
    process = begin(here, config, "--run-id", "r", "--nodes", "2", "--wait")
    until(lambda: len(steps(run)) >= 1, process)
    again = begin(here, config, "--run-id", "r", "--resume")
    assert "is still active: it was not submitted again" in told(again, 0)
    process.terminate()
    told(process, 130)
    until(lambda: not processes_of(run))
    assert queue_state(here, job_id(run)) == "CANCELLED"


def queue_state(here: Cluster, job: str) -> str:
    words = here.run("scontrol", "--oneliner", "show", "job", job).split()
    return next(word for word in words if word.startswith("JobState=")).removeprefix("JobState=")


def test_two_nodes_train_as_two_ranks(here: Cluster, tmp_path: Path) -> None:
    config, run = write(tmp_path), tmp_path / "runs" / "r"
    told(begin(here, config, "--run-id", "r", "--nodes", "2", "--wait"), 0)
    assert steps(run) == [1, 2, 3]
    (attempt,) = attempts_of(run, job_id(run))
    assert [end and end.code for end in map(attempt.ended, range(2))] == [0, 0]
    assert [one and one.name for one in map(attempt.announced, range(2))] == ["node1", "node2"]
    log = (attempt.path / "node-1.log").read_text()
    assert "run folder" not in log, "the second rank tells no story of its own"


def test_one_node_trains_while_another_samples_with_vllm(here: Cluster, tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    engine = {"type": "vllm", "max_model_len": 256, "kv_cache_gib": 0.1, "max_concurrent": 8}
    heads = tiny_model_folder(tmp_path / "heads", hidden_size=128, num_attention_heads=4)  # of 32: vLLM has kernels
    model = {"path": str(heads), "dtype": "float32", "lora": {"rank": 4}}
    config, run = write(tmp_path, engine=engine, model=model), tmp_path / "runs" / "r"
    told(begin(here, config, "--run-id", "r", "--nodes", "2", "--engine-nodes", "1", "--wait"), 0)
    assert steps(run) == [1, 2, 3]
    (attempt,) = attempts_of(run, job_id(run))
    assert attempt.engines(1) and attempt.engines(0) is None and (attempt.path / "engine-1-0.log").exists()
    assert not (run / "engine.log").exists(), "the run launched none itself"
    until(lambda: not processes_of(run))


# --- what is wrong is said, with the cure ---


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--partition", "nope"], "Slurm does not take the job; sbatch says:.*Invalid partition name specified"),
        (["--gpus-per-node", "7"], "Requested node configuration is not available"),
        (["--slurm", "novel=1"], "unrecognized option"),
        (["--nodes", "2", "--engine-nodes", "1"], "transformers samples inside the run"),
        (["data.train=nowhere.jsonl"], "nowhere.jsonl"),
        (["--gpus-per-node", "1", "--wait"], "node1 has 0 GPUs that its driver knows, 1 were asked for"),
    ],
)
def test_what_cannot_be_is_said(here: Cluster, tmp_path: Path, options: list[str], words: str) -> None:
    process = begin(here, write(tmp_path), *options)
    text, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode in (1, 2), text
    assert _found(words, text) and "cure:" in text, text
    if "--wait" not in options:
        assert not list((tmp_path / "runs").glob("*")), "what Slurm does not take leaves no folder"


def _found(words: str, text: str) -> bool:
    return re.search(words, text, re.DOTALL) is not None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--slurm", "nodelist=node2"], r"Slurm could not write into .* on node2: the run folder is not shared"),
        (["--nodes", "2"], "node2 did not announce itself within 30 s: the run folder is not shared"),
    ],
    ids=["the first node", "another node"],
)
def test_a_folder_that_is_not_shared_is_named(here: Cluster, tmp_path: Path, options: list[str], words: str) -> None:
    runs = here.unshared / tmp_path.name
    text = told(begin(here, write(tmp_path), f"runs_dir={runs}", "--wait", *options), 1)
    assert _found(words, text) and "cure: set runs_dir to a folder of the shared file system" in text, text


def test_unequal_versions_and_a_taken_port_are_named(
    here: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Node 2 does not see the folder `unshared`, which comes first on the path here."""
    package = here.unshared / "site" / "accelerate-99.0.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: accelerate\nVersion: 99.0\n")
    before = os.environ["PYTHONPATH"]
    monkeypatch.setenv("PYTHONPATH", f"{package.parent}:{before}")
    text = told(begin(here, write(tmp_path), "--nodes", "2", "--wait"), 1)
    assert _found(r"unequal versions: accelerate is 99\.0 on node1 and \S+ on node2\n  cure: install the same", text)
    monkeypatch.setenv("PYTHONPATH", before)
    with bound("127.0.0.1", 0) as listener:
        listener.listen()
        port = listener.getsockname()[1]
        text = told(begin(here, write(tmp_path), "--port", str(port), "--wait"), 1)
    assert f"on node1: cannot listen: Address already in use on 127.0.0.1:{port}" in text and "cure:" in text, text


# --- the server ---


@in_loop
async def test_a_server_s_job_runs_on_slurm(here: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in here.env.items():
        monkeypatch.setenv(name, value)
    async with workplace(tmp_path / "data", type="slurm", slurm={"job-name": "ours"}) as place:
        job = place.add(a_tree(tmp_path))
        await place.until_status(job, "running")
        assert RunStore(place.jobs.folder(job)).read_state()["status"] != "queued"
        found = await place.until_status(job, "succeeded", "failed")
        assert found["status"] == "succeeded", place.messages(job)
        assert place.steps(job) == [1, 2, 3]
        run = place.jobs.folder(job)
        assert queue.job_of(run) is not None and attempts_of(run.resolve(), job_id(run))
        broken = place.add(a_tree(tmp_path, model={"path": str(tmp_path / "nowhere"), "dtype": "float32"}))
        failed = await place.until_status(broken, "failed")
        assert "nowhere is not a model folder" in failed["error"]["message"]
