"""The worker: real processes of jobs that pause, go on, crash, fail, are cancelled, and outlive their server."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from test_job import a_tree, stable, weights
from test_warmup import a_config as a_warmup
from workers import DEADLINE_S, PLAIN, PROJECT, Workplace, in_loop, workplace

from rft.server.errors import ApiError
from rft.server.jobs.store import Jobs
from rft.server.models import tuned_name
from rft.server.services import open_index
from rft.server.work.endings import blackened, judge
from rft.server.work.follower import Follower
from rft.store import RunStore

FAULTY = [sys.executable, str(Path(__file__).with_name("faulty_run.py"))]
LONG = {"steps": 60, "items_per_step": 2, "base_rollouts": 2, "learning_rate": 0.001}


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the last bits do not depend on the machine's load."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))


def uninterrupted(place: Workplace, job_id: str, tmp_path: Path) -> RunStore:
    """The same run by hand, in another folder: its ids, and so its seeds, are those of the job."""
    config = place.jobs.folder(job_id).resolve() / "job_config.yaml"
    command = [*PLAIN, "-m", "rft", "train", str(config), f"runs_dir={tmp_path / 'by-hand'}", "--run-id", job_id]
    subprocess.run(command, check=True, timeout=120, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True)
    return RunStore.open(tmp_path / "by-hand" / job_id)


def assert_same_run(store: RunStore, other: RunStore) -> None:
    assert [stable(row) for row in store.metrics()] == [stable(row) for row in other.metrics()]
    ours, theirs = weights(store.path), weights(other.path)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# --- to its end ---


@pytest.mark.slow
@in_loop
async def test_a_job_runs_to_its_model(tmp_path: Path) -> None:
    """With the launcher that is the default."""
    async with workplace(tmp_path / "data", launch=[]) as place:
        job_id = place.add(a_tree(tmp_path))
        job = await place.until_status(job_id, "succeeded", "failed")
        assert job["status"] == "succeeded", place.messages(job_id)
        name = job["fine_tuned_model"]
        assert name == f"ft:tiny:rft:s:{job_id[-8:]}"
        assert place.messages(job_id) == [
            f"Created fine-tuning job: {job_id}",
            "Fine-tuning job started",
            "Step 1",
            "Step 2",
            "Step 3",
            f"New fine-tuned model created: {name}",
            "The job has successfully completed",
        ]
        assert place.others.files[job["result_files"][0]].startswith(b"step,train_mean_reward\n1,")
        assert place.others.ended == [(job_id, "succeeded")]
        assert job["trained_tokens"] > 0 and job["usage_metrics"]["training_s"] > 0
        assert job["estimated_finish"] is None and job["finished_at"] >= job["created_at"]
        for tuned in (name, f"{name}:ckpt-step-3", f"{name}:ckpt-step-2"):
            assert place.parts.models.target(tuned, PROJECT).checkpoint is not None


@pytest.mark.slow
@in_loop
async def test_a_supervised_job_is_a_warmup(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="TRL is not installed: scripts/setup --warmup")
    tree = a_warmup(tmp_path, epochs=1).model_dump(mode="json")
    async with workplace(tmp_path / "data") as place:
        job_id = place.add(tree, kind="supervised")
        job = await place.until_status(job_id, "succeeded", "failed")
        assert job["status"] == "succeeded", job["error"]
        assert place.parts.models.target(job["fine_tuned_model"], PROJECT).checkpoint is not None
        assert job["trained_tokens"] > 0


# --- pause, cancel, the queue ---


@pytest.mark.slow
@in_loop
async def test_a_paused_job_goes_on_exactly(tmp_path: Path) -> None:
    async with workplace(tmp_path / "data") as place:
        training = LONG | {"steps": 6, "checkpoint_every": 4}
        job_id = place.add(a_tree(tmp_path, training=training, evaluation={"every": 6, "validation_items": 2}))
        await place.until(lambda: place.steps(job_id) != [])
        place.worker.ask(job_id, "pause")
        place.worker.ask(job_id, "pause")
        job = await place.until_status(job_id, "paused")
        step = max(place.steps(job_id))
        assert 1 <= step < 6 and RunStore(place.jobs.folder(job_id)).writer() is None
        name = tuned_name(job, "rft")
        assert job["fine_tuned_model"] == name and place.messages(job_id)[-1].endswith(f"{name}:ckpt-step-{step}")
        for tuned in (name, f"{name}:ckpt-step-{step}"):
            found = place.parts.models.target(tuned, PROJECT).checkpoint
            assert found is not None and found.name == f"step_{step:06d}"
        place.worker.ask(job_id, "pause")  # nothing more happens
        assert place.parts.works.get(job_id).ask is None

        place.jobs.update(job_id, status="queued")
        place.worker.wake()
        await place.until_status(job_id, "running")
        assert place.jobs.get(job_id)["fine_tuned_model"] is None
        await place.until_status(job_id, "succeeded")
        assert place.steps(job_id) == [1, 2, 3, 4, 5, 6]
        assert place.messages(job_id).count("Fine-tuning job resumed") == 1
        assert_same_run(RunStore.open(place.jobs.folder(job_id)), uninterrupted(place, job_id, tmp_path))


@pytest.mark.slow
@in_loop
async def test_jobs_wait_for_their_turn_and_obey_at_once_while_they_wait(tmp_path: Path) -> None:
    async with workplace(tmp_path / "data") as place:
        first, second, third = (place.add(a_tree(tmp_path, training=LONG)) for _ in range(3))
        await place.until(lambda: place.steps(first) != [])
        assert [place.status(job_id) for job_id in (first, second, third)] == ["running", "queued", "queued"]
        assert place.jobs.get(first)["estimated_finish"] >= int(time.time())
        place.worker.ask(second, "pause")
        place.worker.ask(third, "cancel")
        assert [place.status(job_id) for job_id in (second, third)] == ["paused", "cancelled"]
        assert place.jobs.get(second)["fine_tuned_model"] is None
        assert "Fine-tuning job paused before its first step" in place.messages(second)

        place.worker.ask(first, "cancel")
        place.worker.ask(first, "pause")  # comes too late
        job = await place.until_status(first, "cancelled")
        assert job["fine_tuned_model"] is None and job["finished_at"] is not None
        newest = max(path.name for path in place.jobs.folder(first).glob("checkpoints/step_*"))
        tuned = f"{tuned_name(job, 'rft')}:ckpt-step-{int(newest[-6:])}"
        assert place.parts.models.target(tuned, PROJECT).checkpoint is not None, "what it made stays"
        assert RunStore(place.jobs.folder(first)).writer() is None
        place.worker.ask(second, "cancel")
        assert place.status(second) == "cancelled"
        assert place.others.ended == [(third, "cancelled"), (first, "cancelled"), (second, "cancelled")]
        for job_id in (first, second, third):
            place.worker.ask(job_id, "cancel")  # idempotent


@pytest.mark.slow
@in_loop
async def test_a_job_beyond_its_budget_is_paused_with_the_reason(tmp_path: Path) -> None:
    async with workplace(tmp_path / "data", budget_s=0.1) as place:
        job_id = place.add(a_tree(tmp_path, training=LONG))
        await place.until_status(job_id, "paused")
        last = place.jobs.events(job_id, limit=1, after=None).data[0]
        assert last["level"] == "warn" and "it has run for its budget of 0.1 s" in last["message"]


# --- what goes wrong ---


@pytest.mark.slow
@in_loop
async def test_a_killed_process_is_started_again_and_nothing_is_told_twice(tmp_path: Path) -> None:
    async with workplace(tmp_path / "data", launch=[*FAULTY, "killed once"]) as place:
        job_id = place.add(a_tree(tmp_path))
        await place.until_status(job_id, "succeeded", "failed")
        assert place.steps(job_id) == [1, 2, 3]
        (told,) = [text for text in place.messages(job_id) if "restarted" in text]
        assert told.startswith("The training process ended unexpectedly and is restarted (1 of 3)")
        assert_same_run(RunStore.open(place.jobs.folder(job_id)), uninterrupted(place, job_id, tmp_path))


@pytest.mark.slow
@in_loop
async def test_a_failure_after_a_checkpoint_succeeds_with_it_and_says_so(tmp_path: Path) -> None:
    async with workplace(tmp_path / "data", launch=[*FAULTY, "fails"]) as place:
        job_id = place.add(a_tree(tmp_path))
        job = await place.until_status(job_id, "succeeded", "failed")
        assert job["status"] == "succeeded" and job["error"] is None
        (warning,) = [e for e in place.jobs.events(job_id, limit=99, after=None).data if e["level"] == "warn"]
        assert "ended after step 1 of an error: the loss was not finite" in warning["message"]
        found = place.parts.models.target(job["fine_tuned_model"], PROJECT).checkpoint
        assert found is not None and found.name == "step_000001"


@pytest.mark.slow
@in_loop
async def test_a_full_disk_pauses_a_job_and_a_bug_is_tried_again(tmp_path: Path) -> None:
    """Both after step 1: what is lost is at most a step."""
    async with workplace(tmp_path / "data", launch=[*FAULTY, "disk"]) as place:
        job_id = place.add(a_tree(tmp_path))
        await place.until_status(job_id, "paused", "succeeded", "failed")
        assert place.status(job_id) == "paused"
        assert "paused after step 1" in place.messages(job_id)[-1] and "No space left" in place.messages(job_id)[-1]
    async with workplace(tmp_path / "data", launch=[*FAULTY, "bug"], max_restarts=1) as place:
        place.jobs.update(job_id, status="queued")
        place.worker.wake()
        await place.until_status(job_id, "succeeded", "failed")
        told = place.messages(job_id)
        assert any("restarted (1 of 1): KeyError: 'a bug'" in text for text in told)
        assert any("ended after step 1 of an error: KeyError: 'a bug'" in text for text in told)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sections", "code", "param", "words"),
    [
        (
            {"grader": {"type": "python", "source": "def grade(sample, item):\n    return item['gold']\n"}},
            "grader_failure_rate_exceeded",
            "method.reinforcement.grader",
            "KeyError: 'gold'",
        ),
        (
            {
                "environment": {
                    "type": "http",
                    "tools": [
                        {
                            "name": "search",
                            "server_url": "http://127.0.0.1:9/search",
                            "headers": {"Authorization": "Bearer sk-secret-9"},
                        }
                    ],
                }
            },
            "tool_endpoint_unreachable",
            "method.reinforcement.tools",
            "search",
        ),
        ({"model": {"path": "/nowhere"}}, "training_failed", None, "/nowhere is not a model folder"),
    ],
    ids=["grader", "tools", "user"],
)
@in_loop
async def test_a_run_that_says_why_it_failed_is_not_started_again(
    tmp_path: Path, sections: dict[str, Any], code: str, param: str | None, words: str
) -> None:
    sections = sections | {"evaluation": {"validation_items": 12}}
    async with workplace(tmp_path / "data") as place:
        job_id = place.add(a_tree(tmp_path, **sections))
        job = await place.until_status(job_id, "failed", "succeeded")
        assert job["error"]["code"] == code and job["error"]["param"] == param
        assert words in job["error"]["message"]
        assert "sk-secret" not in json.dumps([job, place.messages(job_id)])
        assert not any("restarted" in text for text in place.messages(job_id))
        assert place.others.ended == [(job_id, "failed")]


@in_loop
async def test_a_process_that_always_dies_is_given_up(tmp_path: Path) -> None:
    die = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    async with workplace(tmp_path / "data", launch=die, max_restarts=2) as place:
        job_id = place.add(a_tree(tmp_path))
        job = await place.until_status(job_id, "failed")
        assert job["error"] == {
            "code": "training_failed",
            "message": "it was killed before it said anything",
            "param": None,
        }
        assert [text for text in place.messages(job_id) if "restarted" in text] != []
        assert place.parts.works.get(job_id).num_restarts == 2


@in_loop
async def test_a_silent_process_is_ended(tmp_path: Path) -> None:
    sleep = [sys.executable, "-c", "import time; time.sleep(1000)"]
    async with workplace(tmp_path / "data", launch=sleep, max_restarts=0, heartbeat_timeout_s=0.5) as place:
        job = await place.until_status(place.add(a_tree(tmp_path)), "failed")
        assert "there was no sign of life for" in job["error"]["message"]


@in_loop
async def test_a_job_without_its_folder_fails_clearly(tmp_path: Path) -> None:
    sleep = [sys.executable, "-c", "import time; time.sleep(1000)"]
    async with workplace(tmp_path / "data", launch=sleep) as place:
        first, second = place.add(a_tree(tmp_path)), place.add(a_tree(tmp_path))
        shutil.rmtree(place.jobs.folder(second))
        place.worker.ask(first, "cancel")
        job = await place.until_status(second, "failed")
        assert job["error"]["code"] == "run_folder_missing" and "somebody deleted it" in job["error"]["message"]


def test_a_clock_that_jumps_back_does_not_change_the_order(tmp_path: Path) -> None:
    with open_index(tmp_path) as index:
        jobs = Jobs(index, tmp_path / "runs")
        first, second = (jobs.add({"created_at": created_at}, PROJECT)["id"] for created_at in (2000, 1000))
        for job_id in (second, first):
            jobs.update(job_id, status="queued")
        assert [job["id"] for job in jobs.with_status("queued")] == [first, second]


@in_loop
async def test_what_was_asked_before_the_server_died_is_done_by_the_next(tmp_path: Path) -> None:
    sleep = [sys.executable, "-c", "import time; time.sleep(1000)"]
    async with workplace(tmp_path / "data", launch=sleep) as place:
        first, second = place.add(a_tree(tmp_path)), place.add(a_tree(tmp_path))
    async with workplace(tmp_path / "data", launch=sleep) as place:
        assert [place.status(job_id) for job_id in (first, second)] == ["queued", "queued"]
        place.parts.works.update(first, ask="pause")  # as if the server had died right after it was asked
        place.parts.works.update(second, ask="cancel")
        place.worker._is_closing = True
    async with workplace(tmp_path / "data", launch=sleep) as place:
        assert [place.status(job_id) for job_id in (first, second)] == ["paused", "cancelled"]
        with pytest.raises(ApiError, match="Could not find"):
            place.worker.ask("ftjob-unheard-of", "pause")


# --- servers come and go ---


@pytest.mark.slow
@in_loop
async def test_a_stopped_server_is_continued_by_the_next_and_a_lost_index_is_made_again(tmp_path: Path) -> None:
    data = tmp_path / "data"
    async with workplace(data) as place:
        job_id = place.add(a_tree(tmp_path, training=LONG | {"steps": 8}))
        await place.until(lambda: len(place.steps(job_id)) >= 2)
    assert RunStore(data / "runs" / job_id).writer() is None, "nothing outlives the server"
    assert json.loads((data / "runs" / job_id / "job.json").read_text())["job"]["status"] == "queued"
    for path in data.glob("index.sqlite*"):
        path.unlink()
    async with workplace(data) as place:
        job = await place.until_status(job_id, "succeeded", "failed")
        assert place.steps(job_id) == list(range(1, 9))
        assert_same_run(RunStore.open(place.jobs.folder(job_id)), uninterrupted(place, job_id, tmp_path))
    for path in data.glob("index.sqlite*"):
        path.unlink()
    async with workplace(data) as place:
        assert place.jobs.get(job_id) == job
        assert place.steps(job_id) == list(range(1, 9))
        assert place.parts.models.target(job["fine_tuned_model"], PROJECT).checkpoint is not None


class Server:
    """A process that works on a data folder until it is killed."""

    def __init__(self, data: Path) -> None:
        script = Path(__file__).with_name("workers.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script), str(data), "{}"], stdout=subprocess.PIPE, text=True, env=os.environ
        )
        assert self.process.stdout is not None and self.process.stdout.readline() == "started\n"

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(timeout=30)


def wait_for(path: Path, text: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not (path.exists() and text in path.read_text()):
        assert time.monotonic() < deadline, f"{text} never appeared in {path}"
        time.sleep(0.05)


@pytest.mark.slow
@in_loop
async def test_a_killed_server_is_continued_by_the_next_exactly(tmp_path: Path) -> None:
    """Killed twice: while the first of two jobs trains, and while the second does."""
    data = tmp_path / "data"
    tree = a_tree(tmp_path, training=LONG | {"steps": 8})
    async with workplace(data, launch=[sys.executable, "-c", "import time; time.sleep(1000)"]) as place:
        jobs = [place.add(tree), place.add(tree)]
    for job_id in jobs:
        server = Server(data)
        wait_for(data / "runs" / job_id / "metrics.jsonl", '"step": 3')
        server.kill()
    async with workplace(data) as place:
        for job_id in jobs:
            await place.until_status(job_id, "succeeded", "failed")
            assert place.status(job_id) == "succeeded", place.messages(job_id)
            assert place.steps(job_id) == list(range(1, 9)), "neither repeated nor lost"
            assert_same_run(RunStore.open(place.jobs.folder(job_id)), uninterrupted(place, job_id, tmp_path))


# --- the parts ---


def test_how_a_process_ended_is_what_it_said() -> None:
    def kind(told: dict[str, Any] | None, **state: Any) -> str:
        return judge(told, state, is_done=state.get("status") == "succeeded", last_lines=[]).kind

    assert kind(None, status="succeeded") == "succeeded"
    assert kind(None, status="paused") == "paused"
    assert kind(None, status="running") == kind(None) == kind(None, status="cancelled") == "crashed"
    assert kind({"kind": "UserError", "where": "", "error": ""}) == "failed"
    assert kind({"kind": "StorageError", "where": "", "error": ""}, status="failed") == "paused"


def test_secrets_of_the_config_are_blackened(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    tree = {"environment": {"tools": [{"name": "search", "headers": {"X-Key": "Bearer abcdefgh"}}]}, "name": "search"}
    config.write_text(json.dumps(tree))
    text = "search said abcdefgh to Bearer abcdefgh"
    assert blackened(text, config) == "search said [redacted] to [redacted]"
    assert blackened(text, tmp_path / "gone.yaml") == text


def test_the_worker_imports_nothing_that_a_run_needs() -> None:
    heavy = "{'torch', 'transformers', 'vllm', 'accelerate'}"
    code = f"import sys, rft.server.work.worker; print({heavy} & sys.modules.keys())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "set()"


@in_loop
async def test_following_costs_little_when_nothing_happens(tmp_path: Path) -> None:
    async with workplace(tmp_path / "data", max_running=1) as place:
        place.worker._is_closing = True  # nothing shall run
        job_id = place.add(a_tree(tmp_path))
        store = RunStore(place.jobs.folder(job_id))
        with store:
            for step in range(1, 501):
                store.append_metrics({"kind": "training", "step": step, "train/grade": 0.5, "time/step_s": 1.0})
            store.write_state({"status": "running", "step": 500, "steps": 600})
        follower = Follower(place.parts, job_id)
        follower.begin()
        assert await follower.look() and place.steps(job_id) == list(range(1, 501))
        assert 95 <= place.jobs.get(job_id)["estimated_finish"] - time.time() <= 105
        began = time.perf_counter()
        for _ in range(100):
            assert not await follower.look()
        assert time.perf_counter() - began < 1.0, "100 looks"
        again = Follower(place.parts, job_id)  # of the next server
        await again.look()
        assert place.steps(job_id) == list(range(1, 501))
