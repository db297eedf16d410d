"""Trackers: every row of a run's metrics also goes to wandb, tensorboard or trackio, through accelerate.

The run folder stays the truth: a tracker that fails is given up with one warning, and never ends or changes a run.
Sent are numbers, names of steps, and those parts of the config that hold no secrets. Imports no accelerate.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import netrc
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import TimeoutError as LateError
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rft.errors import StorageError, UserError
from rft.files import read_json, replace
from rft.plain import plain
from rft.threads import DaemonThreads
from rft.wire import without_secrets

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

    from rft.store import RunStore

T = TypeVar("T")

_PACKAGES = {"wandb": ("wandb",), "tensorboard": ("tensorboard", "tensorboardX"), "trackio": ("trackio",)}
_START_S, _END_S = 120.0, 60.0
_OFFLINE = ("offline", "disabled", "dryrun")  # values of WANDB_MODE that need no key
_NOT_SECRET = ("name", "seed", "rollout", "training", "evaluation")  # of a run's config
_SECRET_MARKS = ("KEY", "TOKEN", "SECRET", "PASSWORD")  # in the names of environment variables
_log = logging.getLogger(__name__)


class TrackerConfig(BaseModel):
    """One tracker of a run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["wandb", "tensorboard", "trackio"]
    project: str = Field("rft", min_length=1, max_length=128)
    entity: str | None = Field(None, description="wandb: the user or team; null: the key's own")
    name: str | None = Field(None, min_length=1, max_length=128, description="of the run there; null: the run's id")
    tags: list[str] = Field(default_factory=list, description="wandb")
    dir: Path | None = Field(None, description="its files; null: in the run folder, for trackio its own place")

    @model_validator(mode="after")
    def _fits_its_type(self) -> TrackerConfig:
        if self.type != "wandb" and (self.entity is not None or self.tags):
            raise ValueError(f"entity and tags are for wandb; leave them out of a tracker of type {self.type}")
        if self.type == "tensorboard" and self.name is not None and (self.name.startswith(".") or "/" in self.name):
            raise ValueError("name is the name of a folder for tensorboard: without `/`, not starting with `.`")
        return self


def check_trackers(trackers: Sequence[TrackerConfig]) -> None:
    """To be called before anything heavy. Raises UserError naming the package or the key that is missing."""
    for number, tracker in enumerate(trackers):
        where, packages = f"trackers[{number}]", _PACKAGES[tracker.type]
        if not any(importlib.util.find_spec(package) for package in packages):
            raise UserError(f"{packages[0]} is not installed", where=where, cure=f"pip install {packages[0]}")
        if tracker.type == "wandb" and not _has_wandb_access():
            cure = "export WANDB_API_KEY=..., or WANDB_MODE=offline to keep everything on this machine"
            raise UserError("wandb has no API key", where=where, cure=cure)


@contextmanager
def tracked(
    trackers: Sequence[TrackerConfig], store: RunStore, config: dict[str, Any], first_step: int
) -> Iterator[None]:
    """Send the rows that are appended to the store meanwhile; on rank 0, inside accelerate's process group.

    config: of the run, as JSON. first_step: rows of it and later ones, from an interrupted attempt, are superseded.
    """
    running = _Running(trackers, store, {name: config[name] for name in _NOT_SECRET if name in config}, first_step)
    store.on_metrics = running.log
    try:
        yield
    finally:
        store.on_metrics = None
        running.finish()


class _Running:
    """The trackers that have started and not failed."""

    def __init__(
        self, trackers: Sequence[TrackerConfig], store: RunStore, config: dict[str, Any], first_step: int
    ) -> None:
        self._store, self._threads = store, DaemonThreads()
        self._trackers: dict[str, GeneralTracker] = {}
        for number, tracker in enumerate(trackers):
            name = f"{tracker.type} (trackers[{number}])"
            started = self._guarded(name, _START_S, partial(_start, tracker, store, config, first_step))
            if started is not None:
                self._trackers[name] = started

    def log(self, row: dict[str, Any]) -> None:
        values = numbers(row)
        for name, tracker in list(self._trackers.items()):
            self._guarded(name, _START_S, partial(tracker.log, values, step=row.get("step")))

    def finish(self) -> None:
        for name, tracker in list(self._trackers.items()):
            self._guarded(name, _END_S, tracker.finish)

    def _guarded(self, name: str, deadline_s: float, call: Callable[[], T]) -> T | None:
        """What the call gives; None, and one warning, when it fails or never returns: then the tracker is given up."""
        try:
            return self._threads.submit(call).result(deadline_s)
        except LateError:
            problem = f"no answer within {deadline_s:g} s"
        except (Exception, SystemExit) as error:  # code of others, which talks to services: no run ends because of it
            problem = f"{type(error).__name__}: {error}"
        self._trackers.pop(name, None)
        text = f"the tracker {name} is given up: {plain(without_secrets(problem, _secrets()), max_chars=300)}"
        self._store.append_event("warn", text)
        _log.warning("%s; the run goes on, its metrics are in metrics.jsonl", text)
        return None


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """The finite numbers of a row, by their names; those of an evaluation under the name of its split."""
    prefix = f"{row['split']}/" if row.get("kind") == "evaluation" else ""
    return {
        prefix + name: value
        for name, value in row.items()
        if name != "step" and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def _start(tracker: TrackerConfig, store: RunStore, config: dict[str, Any], first_step: int) -> GeneralTracker:
    from accelerate import tracking

    name = tracker.name or store.run_id
    folder = tracker.dir or store.path / "trackers"
    if tracker.type == "tensorboard":
        purge = {"purge_step": first_step} if first_step > 1 else {}
        started: GeneralTracker = tracking.TensorBoardTracker(name, folder, **purge)
        started.start()
        started.log({"config": f"```json\n{json.dumps(config, indent=2)}\n```"}, step=first_step)
        return started
    if tracker.type == "wandb":
        folder.mkdir(parents=True, exist_ok=True)
        options = {"entity": tracker.entity, "tags": tracker.tags, "dir": str(folder), "id": _wandb_id(store)}
        settings = {"console": "off"}  # the terminal's text is not ours to send
        started = tracking.WandBTracker(
            tracker.project, name=name, config=config, resume="allow", settings=settings, **options
        )
    else:
        if tracker.dir is not None:
            os.environ["TRACKIO_DIR"] = str(tracker.dir.resolve())  # read when trackio is imported
        started = tracking.TrackioTracker(tracker.project, name=name, config=config, resume="allow")
    started.start()
    return started


def _wandb_id(store: RunStore) -> str:
    """The run's id there: new for a run folder, the same when the run is resumed."""
    path = store.path / "tracking.json"
    try:
        return str(read_json(path)["wandb_id"])
    except (StorageError, KeyError):
        wandb_id = uuid.uuid4().hex
        replace(path, json.dumps({"wandb_id": wandb_id}).encode())
        return wandb_id


def _has_wandb_access() -> bool:
    """As wandb looks for it: it would ask at the terminal, hours later, or fail."""
    if os.environ.get("WANDB_MODE") in _OFFLINE or os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1"):
        return True
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _secrets() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if any(mark in name for mark in _SECRET_MARKS) and value}
