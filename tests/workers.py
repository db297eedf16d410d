"""A worker on a data folder of its own, with jobs that train a model of some thousand parameters in seconds.

Run as a script it is a server that does nothing but work: `workers.py DATA_DIR [key=value of the worker's config]`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import yaml

from rft.server.ids import new_id
from rft.server.jobs.store import Jobs
from rft.server.models import Models
from rft.server.services import open_index
from rft.server.settings import ServerConfig
from rft.server.work.records import Parts, Seams, Works
from rft.server.work.worker import Worker
from rft.store import RunStore

PROJECT = "proj_test"
DEADLINE_S = 120.0
PLAIN = [sys.executable]  # without accelerate launch: a second less


class OtherParts:
    """What other parts of the server do, in small: steps as events, a CSV of grades, files that are kept."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.ended: list[tuple[str, str]] = []

    def metrics_events(self, store: RunStore, job: dict[str, Any], after: int) -> list[tuple[str, dict[str, Any]]]:
        rows = [row for row in store.metrics() if row["kind"] == "training" and row["step"] > after]
        return [(f"Step {row['step']}", {"step": row["step"], "train_mean_reward": row["train/grade"]}) for row in rows]

    def usage_metrics(self, store: RunStore) -> dict[str, Any]:
        return {"training_s": sum(row.get("time/step_s", 0.0) for row in store.metrics())}

    def result_csv(self, store: RunStore, job: dict[str, Any]) -> str:
        rows = [f"{row['step']},{row['train/grade']}" for row in store.metrics() if row["kind"] == "training"]
        return "\n".join(["step,train_mean_reward", *rows]) + "\n"

    def add_file(self, data: bytes, filename: str, purpose: str, project: str) -> dict[str, Any]:
        assert purpose == "fine-tune-results" and project == PROJECT
        file = {"id": new_id("file-"), "filename": filename}
        self.files[file["id"]] = data
        return file

    def job_ended(self, job: dict[str, Any], project: str) -> None:
        self.ended.append((job["id"], job["status"]))

    def seams(self) -> Seams:
        return Seams(self.metrics_events, self.usage_metrics, self.result_csv, self.add_file, self.job_ended)


def server_config(data: Path, **worker: Any) -> ServerConfig:
    tree = {"data_dir": data, "models": {"tiny": {"path": data / "model"}}, "worker": {"launch": PLAIN} | worker}
    return ServerConfig.model_validate(tree)


class Workplace:
    """The worker and what it works with."""

    def __init__(self, config: ServerConfig, index: Any) -> None:
        self.others = OtherParts()
        self.jobs = Jobs(index, config.data_dir / "runs")
        models = Models(config, index, self.jobs)
        self.parts = Parts(config, self.jobs, models, Works(index), self.others.seams())
        self.worker = Worker(self.parts)

    def add(self, tree: dict[str, Any], kind: str = "reinforcement") -> str:
        """A queued job that trains as the config of a run says."""
        body = {"model": "tiny", "user_provided_suffix": "s", "method": {"type": kind}, "result_files": []}
        job_id: str = self.jobs.add(body | {"fine_tuned_model": None, "error": None}, PROJECT)["id"]
        folder = self.jobs.folder(job_id).resolve()
        (folder / "job_config.yaml").write_text(yaml.safe_dump(tree | {"runs_dir": str(folder.parent)}))
        self.jobs.update(job_id, status="queued")
        self.worker.wake()
        return job_id

    def status(self, job_id: str) -> str:
        return str(self.jobs.get(job_id)["status"])

    def messages(self, job_id: str) -> list[str]:
        """Of its events, oldest first."""
        return [event["message"] for event in reversed(self.jobs.events(job_id, limit=10_000, after=None).data)]

    def steps(self, job_id: str) -> list[int]:
        """Of its metrics events, oldest first."""
        events = reversed(self.jobs.events(job_id, limit=10_000, after=None).data)
        return [event["data"]["step"] for event in events if event["type"] == "metrics"]

    async def until(self, is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not is_so():  # noqa: ASYNC110  of another process: nothing tells us
                await asyncio.sleep(0.05)

    async def until_status(self, job_id: str, *statuses: str) -> dict[str, Any]:
        await self.until(lambda: self.status(job_id) in statuses)
        return self.jobs.get(job_id)


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """An asynchronous test as pytest runs it."""

    @functools.wraps(test)
    def run(*args: Any, **options: Any) -> None:
        asyncio.run(test(*args, **options))

    return run


@asynccontextmanager
async def workplace(data: Path, **worker: Any) -> AsyncIterator[Workplace]:
    config = server_config(data, **worker)
    with open_index(config.data_dir) as index:
        place = Workplace(config, index)
        await place.worker.start()
        try:
            yield place
        finally:
            await place.worker.close()


async def serve(data: Path, worker: dict[str, Any]) -> None:
    """Work until SIGTERM; a line when it has started."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with workplace(data, **worker):
        print("started", flush=True)
        await stop.wait()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(Path(sys.argv[1]), json.loads(sys.argv[2])))
