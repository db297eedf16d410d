"""Model names: what a name that a client uses stands for. The table of the config, and what jobs have made.

A tuned model is a checkpoint of a job's run: `ft:{base}:{organization}:{suffix}:{8 characters}` is its last one, the
same with `:ckpt-step-N` the one of that step. Loads no weights.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rft import checkpoints
from rft.server.errors import ApiError
from rft.server.index import Index
from rft.server.jobs.store import Jobs
from rft.server.settings import LocalModel, Model, RemoteModel, ServerConfig

MODEL, TUNED = "model", "tuned"  # kinds in the index: the wire's object, and what it stands for


@dataclass(frozen=True, slots=True)
class Target:
    """What answers to a name."""

    name: str
    base: Model
    checkpoint: Path | None = None  # the weights on top of (LoRA) or instead of the base's

    @property
    def local(self) -> LocalModel:
        """Raises ApiError (400) when the model is elsewhere."""
        if isinstance(self.base, RemoteModel):
            message = f"Model {self.name} answers at another server and cannot be trained here."
            raise ApiError(message, code="model_not_available", param="model")
        return self.base


class Models:
    """Names -> targets. A tuned model belongs to a project; the table's models to all."""

    def __init__(self, config: ServerConfig, index: Index, jobs: Jobs) -> None:
        self._config, self._index, self._jobs = config, index, jobs
        self._started_at = int(time.time())

    def target(self, name: str, project: str) -> Target:
        """Raises ApiError (404) for a name that the caller's project does not have."""
        base = self._config.model(name)
        if base is not None:
            return Target(name, base)
        tuned = self._tuned(name, project)
        model = self._config.model(tuned["base"]) if tuned is not None else None
        if tuned is None or model is None:
            raise unknown_model(name)
        folder = self._jobs.folder(tuned["job_id"]) / "checkpoints"
        step = tuned["step"]
        found = checkpoints.latest(folder) if step is None else folder / checkpoints.name_of(step)
        if found is None or not (found / checkpoints.MANIFEST).is_file():
            raise unknown_model(name)
        return Target(name, model, found)

    def judge(self, name: str, project: str) -> Target:
        """Who answers when a grader names this model: itself, or the model that the table says judges for it.

        Raises ApiError (404).
        """
        found = self.target(name, project)
        substitute = found.base.judged_by if isinstance(found.base, LocalModel) else None
        return found if substitute is None else self.target(substitute, project)

    def add_tuned(self, job: dict[str, Any], name: str, *, step: int | None, project: str) -> None:
        """A model that a job has made; step None: whatever its last checkpoint is. Adding it again changes nothing."""
        if self._index.get(MODEL, name) is not None:
            return
        owner = self._config.organization
        body = {"id": name, "object": "model", "created": int(time.time()), "owned_by": owner}
        base = job["model"]
        while base.startswith("ft:"):
            base = (self._index.get(TUNED, base) or {"base": base.split(":")[1]})["base"]
        with self._index.transaction():
            self._index.put(MODEL, body, project=project)
            self._index.put(TUNED, {"id": name, "job_id": job["id"], "step": step, "base": base}, project=project)

    def remove_tuned(self, name: str, project: str) -> None:
        """The name only: the weights stay in the run folder. Raises ApiError (404, or 403 for a model of the table)."""
        if self._config.model(name) is not None:
            message = f"The model {name} is part of the server's configuration and cannot be deleted here."
            raise ApiError(message, status=403, code="model_not_deletable", param="model")
        if self._index.get(MODEL, name, project=project) is None:
            raise unknown_model(name)
        with self._index.transaction():
            self._index.delete(MODEL, name)
            self._index.delete(TUNED, name)

    def describe(self, name: str, project: str) -> dict[str, Any]:
        """The wire's object. Raises ApiError (404)."""
        self.target(name, project)
        return self._index.get(MODEL, name) or self._table_entry(name)

    def every(self, project: str) -> list[dict[str, Any]]:
        """The table's, then the project's own."""
        table = [self._table_entry(name) for name in self._config.models]
        return [*table, *self._index.every(MODEL, project=project)]

    def _table_entry(self, name: str) -> dict[str, Any]:
        owner = self._config.organization
        return {"id": name, "object": "model", "created": self._started_at, "owned_by": owner}

    def _tuned(self, name: str, project: str) -> dict[str, Any] | None:
        found = self._index.get(TUNED, name, project=project)
        if found is None and self._index.get("permission", f"{name}|{project}") is not None:
            found = self._index.get(TUNED, name)  # another project gave access to this checkpoint
        return found


def tuned_name(job: dict[str, Any], organization: str) -> str:
    """`ft:base:org:suffix:id`; the name of the base model, also for a job that goes on from a tuned one."""
    base = job["model"].split(":")[1] if job["model"].startswith("ft:") else job["model"]
    return f"ft:{base}:{organization}:{job['user_provided_suffix'] or ''}:{job['id'][-8:]}"


def checkpoint_name(model: str, step: int) -> str:
    return f"{model}:ckpt-step-{step}"


def unknown_model(name: str) -> ApiError:
    message = f"The model `{name}` does not exist or you do not have access to it."
    return ApiError(message, status=404, code="model_not_found", param="model")
