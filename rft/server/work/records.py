"""What the worker knows of a job beside the wire's object: what was asked of it, and how far its run was told.

Kept in the index, so that a server that was killed neither forgets a request nor tells a step twice. `Parts` is what
the worker's modules share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from rft.server.index import Index
from rft.server.jobs.store import Jobs
from rft.server.models import Models
from rft.server.settings import ServerConfig
from rft.store import RunStore

Ask = Literal["pause", "cancel"]
Json = dict[str, Any]
_KIND = "work"


class Work(BaseModel):
    """Of one job."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    ask: Ask | None = None
    why: str = ""  # of a pause that nobody but the server asked for
    step: int = 0  # the last one that has its metrics event
    num_restarts: int = 0  # since it was started or resumed
    ran_s: float = 0.0  # since it was started or resumed
    has_started: bool = False
    result_file: str | None = None


class Works:
    """The records by job; a job without one has the default."""

    def __init__(self, index: Index) -> None:
        self._index = index

    def get(self, job_id: str) -> Work:
        found = self._index.get(_KIND, job_id)
        return Work(id=job_id) if found is None else Work.model_validate(found)

    def update(self, job_id: str, **fields: Any) -> Work:
        work = Work.model_validate(self.get(job_id).model_dump() | fields)
        self._index.put(_KIND, work.model_dump(), parent=job_id)
        return work


@dataclass(frozen=True, slots=True)
class Seams:
    """What other parts of the server do for the worker."""

    metrics_events: Callable[[RunStore, Json, int], list[tuple[str, Json]]]  # of the steps after one: message, data
    usage_metrics: Callable[[RunStore], Json]
    result_csv: Callable[[RunStore, Json], str]
    add_file: Callable[[bytes, str, str, str], Json]  # data, filename, purpose, project; the wire's file
    job_ended: Callable[[Json, str], None]  # the job, its project


@dataclass(frozen=True, slots=True)
class Parts:
    """What the worker's modules work with."""

    config: ServerConfig
    jobs: Jobs
    models: Models
    works: Works
    seams: Seams
