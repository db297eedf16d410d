"""A run in the list and at the top of its page, and whether anything of it has changed. Reads no rollouts.

What cannot be read is said in `problem` and `problems`; the rest is shown.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rft.cluster import queue
from rft.errors import StorageError
from rft.files import parsed
from rft.live import Live, live_lines
from rft.redaction import without_any_secret
from rft.show import status
from rft.store import RunStore
from rft.types import Rollout, Split
from rft.ui.columns import Columns
from rft.ui.growing import last_lines
from rft.ui.runs import Known, Runs
from rft.ui.schema import Event, Kind, Revision, RunLine, RunView
from rft.ui.thinning import thinned

_NUM_EVENTS, _EVENT_BYTES, _MAX_MESSAGE = 200, 1 << 20, 2_000
_NUM_GRADES = 60
_NUM_NEWEST = 8  # rollout files that a run may be writing
_ACTIVE = ("starting", "running")
_FILES = ("config.json", "state.json", "metrics.jsonl", "events.jsonl", "live.json", "DONE", "PAUSE", ".lock")


@dataclass(frozen=True, slots=True)
class Grades:
    """What the metrics say of a run in a list."""

    kind: Kind  # unknown: they have no row yet
    split: Split | None
    values: list[float | None]


def run_line(runs: Runs, known: Known, grades: Grades | None) -> RunLine:
    """grades: None for a job that has not run yet."""
    name = known.job.model if known.job is not None else known.id
    queued = RunLine(
        id=known.id,
        name=name,
        kind="training" if known.job is not None else "unknown",
        status=known.job.status if known.job is not None else "unknown",
        job=known.job,
        actions=runs.actions(known),
        started_at=known.job.created_at if known.job is not None else None,
    )
    if known.store is None or grades is None:
        return queued
    config, problem = _config(known.store)
    state, found = _state(known.store)
    problem = problem or found
    begun: Kind = "warmup" if config.get("warmup") else "training"
    return queued.model_copy(
        update={
            "name": str(config.get("name") or known.id)[:200],
            "kind": grades.kind if grades.kind != "unknown" else begun,
            "status": known.job.status if known.job is not None else _status(known.store),
            "step": _count(state.get("step")),
            "steps": _count(state.get("steps")),
            "started_at": _started_at(known.store) or queued.started_at,
            "updated_at": _updated_at(known.store),
            "split": grades.split,
            "grades": grades.values,
            "problem": problem,
        }
    )


def run_view(line: RunLine, store: RunStore | None, columns: Columns | None, unreadable: dict[int, int]) -> RunView:
    """unreadable: step -> lines of its rollout file that are no rollouts."""
    problems = [line.problem] if line.problem else []
    if store is None or columns is None:
        return RunView(run=line, config={}, events=[], doing=[], problems=problems)
    config, _ = _config(store)
    doing, problem = _doing(store, line.status)
    problems += [problem] if problem else []
    if num := columns.read(lambda numbers: numbers.num_unreadable):
        problems.append(f"{num} lines of metrics.jsonl cannot be read: cut off when they were written, or changed")
    problems += _rollout_problems(store, unreadable)
    return RunView(run=line, config=without_any_secret(config), events=_events(store), doing=doing, problems=problems)


def revision(known: Known) -> Revision:
    """From sizes and times of change alone."""
    if known.store is None:
        state = known.job.status if known.job is not None else "unknown"
        return Revision(revision=state, status=state)
    digest = hashlib.sha256()
    for path in _watched(known.store):
        try:
            found = path.stat()
        except OSError:
            continue
        digest.update(f"{path.name} {found.st_ino} {found.st_size} {found.st_mtime_ns}\n".encode("utf-8", "replace"))
    state = known.job.status if known.job is not None else _status(known.store)
    digest.update(state.encode("utf-8", "replace"))
    return Revision(revision=digest.hexdigest()[:32], status=state)


# --- parts ---


def _watched(store: RunStore) -> Iterator[Path]:
    yield from (store.path / name for name in _FILES)
    yield store.rollout_folder
    try:
        names = (name for name in os.listdir(store.rollout_folder) if name.endswith(".jsonl"))
        yield from (store.rollout_folder / name for name in sorted(names)[-_NUM_NEWEST:])
    except OSError:  # it has none yet
        return


def _status(store: RunStore) -> str:
    try:
        return status(store)
    except StorageError:  # the run's page says so
        return "unknown"


def _config(store: RunStore) -> tuple[dict[str, Any], str | None]:
    """The config, and what is wrong with it."""
    try:
        return store.config(), None
    except StorageError as error:
        return {}, error.problem


def _state(store: RunStore) -> tuple[dict[str, Any], str | None]:
    try:
        return store.read_state(), None
    except StorageError as error:
        return {}, error.problem


def grades_of(columns: Columns) -> Grades:
    """What the run is, and its grades: of the validation split where that was evaluated."""
    kinds: tuple[Kind, ...] = ("warmup", "training", "sampling", "evaluation")
    kind: Kind = next((kind for kind in kinds if kind in columns.kinds()), "unknown")
    evaluated = columns.table("evaluation", "validation").series("grade")[1]
    trained = columns.table("training").series("train/grade")[1] or columns.table("sampling").series("train/grade")[1]
    tested = columns.table("evaluation", "test").series("grade")[1]
    candidates: list[tuple[Split, list[float]]] = [("validation", evaluated), ("train", trained), ("test", tested)]
    split, values = next(((split, values) for split, values in candidates if values), (None, []))
    chosen = [values[index] for index in thinned(values, _NUM_GRADES)]
    return Grades(kind, split, [value if value - value == 0 else None for value in chosen])


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _started_at(store: RunStore) -> float | None:
    """When its config was written, which is the first thing a run does."""
    try:
        return (store.path / "config.json").stat().st_mtime
    except OSError:
        return None


def _updated_at(store: RunStore) -> float | None:
    times = []
    for path in _watched(store):
        try:
            times.append(path.stat().st_mtime)
        except OSError:
            continue
    return max(times, default=None)


def _events(store: RunStore) -> list[Event]:
    try:
        rows = [parsed(line) for line in last_lines(store.path / "events.jsonl", _EVENT_BYTES)]
    except OSError:
        return []
    found = [
        Event(
            time=row["time"] if isinstance(row.get("time"), int | float) else 0.0,
            level=_sound(row.get("level", "info"))[:20],
            message=_sound(row.get("message", ""))[:_MAX_MESSAGE],
        )
        for row in rows
        if row is not None
    ]
    return found[-_NUM_EVENTS:]


def _sound(text: object) -> str:
    """Without half surrogate pairs, which no answer can hold."""
    return str(text).encode("utf-8", "replace").decode()


def _doing(store: RunStore, state: str) -> tuple[list[str], str | None]:
    """What an active run does now, and what of that cannot be read."""
    if state == "queued" and (job := queue.look(store.path)) is not None:
        return [f"it waits for Slurm: {job.told()}"], None
    if state not in _ACTIVE:
        return [], None
    try:
        found = store.read_live()
        return (live_lines(Live.model_validate(found)) if found else ["nothing was sampled yet"]), None
    except (ValidationError, KeyError):  # live_lines reads the engine's load by name
        return [], "live.json is not what this version of rft writes"
    except StorageError as error:
        return [], error.problem


def _rollout_problems(store: RunStore, unreadable: dict[int, int]) -> list[str]:
    found = []
    if unreadable:
        steps = ", ".join(map(str, sorted(unreadable)[:5])) + (", ..." if len(unreadable) > 5 else "")
        num = sum(unreadable.values())
        found.append(
            f"{num} lines of the rollout files of step {steps} are no rollouts: cut off when they were written"
        )
    steps_there = store_steps(store)
    if steps_there and (other := _other_version(store.rollout_path(steps_there[-1]))):
        found.append(f"rollouts were written by another version of rft, and are shown as far as it goes: {other}")
    return found


def store_steps(store: RunStore) -> list[int]:
    """The steps that have rollouts, by the names of the files."""
    try:
        names = os.listdir(store.rollout_folder)
    except OSError:
        return []
    stems = (name.removesuffix(".jsonl").removeprefix("step_") for name in names if name.endswith(".jsonl"))
    return sorted(int(stem) for stem in stems if stem.isdecimal())


def _other_version(path: Path) -> str | None:
    """What the first rollout of a file has that this version does not write, or lacks."""
    try:
        with path.open("rb") as file:
            row = parsed(file.readline())
        if row is not None:
            Rollout.model_validate(row)
    except OSError:
        return None
    except ValidationError as error:
        wrong = error.errors()[0]
        place = ".".join(str(part) for part in wrong["loc"])
        return _sound(json.dumps(f"{place}: {wrong['msg']}", ensure_ascii=False))[1:200].rstrip('"')
    return None
