"""A server for tests of fine-tuning jobs: uploaded files that lie in a folder, and a worker that starts nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from openai import OpenAI
from serving import serving

from rft.config import RunConfig, load_config
from rft.server.errors import ApiError
from rft.server.services import Services
from rft.server.settings import ServerConfig

DEADLINE_S = 20.0
KEY = "sk-none"
GRADER = {
    "type": "string_check",
    "name": "exact",
    "input": "{{ sample.output_text }}",
    "reference": "{{ item.answer }}",
    "operation": "eq",
}
Bodies = dict[str, Any]


def row(number: int, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": f"What is {number} + 1?"}], "answer": str(number + 1), **fields}


def reinforcement(**section: Any) -> Bodies:
    return {"type": "reinforcement", "reinforcement": {"grader": GRADER, **section}}


def tuned_by(**hyperparameters: Any) -> Bodies:
    return reinforcement(hyperparameters=hyperparameters)


@dataclass
class Uploads:
    """Files as the server's own part keeps them: by id, in a folder, each with its purpose."""

    folder: Path
    purposes: dict[str, str] = field(default_factory=dict)

    def add(self, rows: list[Any] | str, purpose: str = "fine-tune") -> str:
        text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
        file_id = f"file-{len(self.purposes):03d}"
        self.folder.mkdir(exist_ok=True)
        (self.folder / file_id).write_text(text, encoding="utf-8")
        self.purposes[file_id] = purpose
        return file_id

    def delete(self, file_id: str) -> None:
        (self.folder / file_id).unlink()

    def path(self, file_id: str, project: str, *, purpose: str | None = None, param: str = "file_id") -> Path:
        if file_id not in self.purposes or not (self.folder / file_id).is_file():
            raise ApiError(f"No such File object: {file_id}", status=404, code="file_not_found", param=param)
        if purpose not in (None, self.purposes[file_id]):
            raise ApiError("The file has another purpose.", code="invalid_file_purpose", param=param)
        return self.folder / file_id


@dataclass
class Hosts:
    """Refuses one host."""

    denied: str = "169.254.169.254"

    def check(self, url: str, param: str) -> None:
        if self.denied in url:
            raise ApiError("This URL is not allowed.", code="url_not_allowed", param=param)


@dataclass
class Queue:
    """A worker that starts nothing: what waits is paused and cancelled at once, what runs when a test says so."""

    services: Services
    num_wakes: int = 0
    asked: list[tuple[str, str]] = field(default_factory=list)

    def wake(self) -> None:
        self.num_wakes += 1

    def ask(self, job_id: str, what: Literal["pause", "cancel"]) -> None:
        self.asked.append((job_id, what))
        if self.services.jobs.get(job_id)["status"] != "running":
            self.services.jobs.update(job_id, status="paused" if what == "pause" else "cancelled")


@dataclass
class Told:
    """Webhooks that only remember."""

    ended: list[tuple[str, str]] = field(default_factory=list)

    def job_ended(self, job: dict[str, Any], project: str) -> None:
        self.ended.append((job["id"], job["status"]))


@dataclass
class Api:
    """The SDK's client of a running server, and what lies behind it."""

    client: OpenAI
    services: Services
    uploads: Uploads
    told: Told

    def create(self, rows: list[Any] | str | None = None, **body: Any) -> Any:
        """A job; by default of 12 good rows, graded by `GRADER`."""
        rows = [row(number) for number in range(12)] if rows is None else rows
        body = {"model": "m", "method": reinforcement(), "training_file": None} | body
        body["training_file"] = body["training_file"] or self.uploads.add(rows)
        return self.client.fine_tuning.jobs.create(**body)

    def wait(self, job: Any, *statuses: str) -> Any:
        """The job when it has one of the statuses; by default when its files have been looked at."""
        statuses = statuses or ("queued", "failed")
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            job = self.client.fine_tuning.jobs.retrieve(job.id)
            if job.status in statuses:
                return job
        raise TimeoutError(f"the job is still {job.status}")

    def messages(self, job: Any) -> list[str]:
        """Of its events, the oldest first."""
        return [event.message for event in self.client.fine_tuning.jobs.list_events(job.id)][::-1]

    def config_of(self, job: Any) -> RunConfig:
        """What runs, read as `rft train` reads it."""
        return load_config(self.folder(job) / "job_config.yaml")

    def tree_of(self, job: Any) -> dict[str, Any]:
        tree: dict[str, Any] = yaml.safe_load((self.folder(job) / "job_config.yaml").read_text(encoding="utf-8"))
        return tree

    def folder(self, job: Any) -> Path:
        return self.services.jobs.folder(job.id)


def a_config(tmp_path: Path, **fields: Any) -> ServerConfig:
    """A table with a local model, other names of it, and one that answers elsewhere."""
    model = tmp_path / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text("{}")
    run = {"rollout": {"max_tokens_per_turn": 100}, "training": {"learning_rate": 0.001, "base_rollouts": 4}}
    models: dict[str, Any] = {
        "m": {"path": model, "dtype": "float32", "max_model_len": 1024, "run": run},
        "o4-mini-2025-04-16": {"alias": "m"},
        "gpt-4o-2024-08-06": {"alias": "m"},
        "far": {"url": "http://127.0.0.1:9/v1", "model": "name-there", "api_key_env": "FAR_KEY"},
        "lost": {"path": tmp_path / "nowhere"},
    }
    return ServerConfig.model_validate({"data_dir": tmp_path / "data", "models": models, **fields})


@contextmanager
def an_api(
    tmp_path: Path,
    config: ServerConfig | None = None,
    *,
    key: str | None = None,
    prepare: Callable[[Services], None] = lambda services: None,
) -> Iterator[Api]:
    """A server with its client. `key`: the client's; without one the server asks for none."""
    uploads, told, found = Uploads(tmp_path / "uploads"), Told(), list[Services]()

    def joined(services: Services) -> None:
        services.files, services.outgoing = uploads, Hosts()
        services.worker, services.webhooks = Queue(services), told
        prepare(services)
        found.append(services)

    with serving(config or a_config(tmp_path), has_auth=key is not None, prepare=joined) as url:
        client = OpenAI(base_url=url, api_key=key or KEY, timeout=DEADLINE_S)
        with client:
            yield Api(client, found[0], uploads, told)
