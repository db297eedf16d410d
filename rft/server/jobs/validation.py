"""Validating the files of new jobs, in a thread beside the event loop: validating_files -> queued | failed.

A job found in validating_files when the server starts is validated again. The texts are the hosted service's where it
published them. Loads no tokenizer: whether prompts fit the model is found when the job runs.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rft.data import Problems, ToolSpecs, load_rows, parse_item
from rft.errors import DataError, RftError
from rft.files import storing
from rft.server.jobs.automatic import resolved
from rft.server.jobs.resolve import JOB_CONFIG, TRAIN, VALIDATION, schedule
from rft.server.settings import LimitsConfig

if TYPE_CHECKING:
    from rft.server.services import Services

logger = logging.getLogger("rft.server")
_MAX_AT_ONCE = 2
_CURE = "add it to method.reinforcement.tools with its server_url"
Param = Literal["training_file", "validation_file"]


class InvalidFileError(Exception):
    """Why a file cannot be used, as the job's error has it."""

    def __init__(self, code: str, message: str, param: Param | None) -> None:
        self.error = {"code": code, "message": message, "param": param}
        super().__init__(message)


class StoppedError(Exception):
    """The server ends; the file is looked at again when it is back."""


@dataclass(frozen=True, slots=True)
class Rows:
    """What validation keeps of a file: a digest of the messages of every row, and how many can call no tool."""

    digests: list[bytes]
    num_toolless: int = 0

    def shared_with(self, other: Rows) -> int:
        """How many rows of `other` have the messages of a row of this file."""
        known = set(self.digests)
        return sum(digest in known for digest in other.digests)


class Validation:
    """The jobs whose files are looked at. One event loop."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._tasks: set[asyncio.Task[None]] = set()
        self._slots = asyncio.Semaphore(_MAX_AT_ONCE)
        self._stop = threading.Event()

    def start(self) -> None:
        """Go on with what the last server left."""
        for job in self._services.jobs.with_status("validating_files"):
            self.submit(job["id"])

    def submit(self, job_id: str) -> None:
        task = asyncio.create_task(self._validate(job_id))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Threads end at their next row; jobs keep their status."""
        self._stop.set()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _validate(self, job_id: str) -> None:
        services = self._services
        try:
            async with self._slots:
                await self._look(job_id)
        except InvalidFileError as problem:
            if services.jobs.get(job_id)["status"] == "validating_files":
                end_failed(services, job_id, problem.error)
        except StoppedError:
            return
        except RftError as error:  # the disk: the job keeps its status, and the next start tries again
            logger.error("job %s: %s", job_id, error)
        except Exception:  # a bug must not leave a job that nobody looks at without a word
            logger.exception("job %s: its files cannot be validated", job_id)
            message = "The server had an error while validating the files."
            end_failed(services, job_id, {"code": "server_error", "message": message, "param": None})

    async def _look(self, job_id: str) -> None:
        jobs = self._services.jobs
        job = jobs.get(job_id)
        if job["status"] != "validating_files":
            return
        files = [f"training file: {job['training_file']}", f"validation file: {job['validation_file']}"]
        self._tell(job_id, "Validating " + " and ".join(files if job["validation_file"] else files[:1]))
        folder, limits = jobs.folder(job_id), self._services.config.limits
        train, held_out = await asyncio.to_thread(inspect, job, folder, limits, self._stop)
        if jobs.get(job_id)["status"] != "validating_files":
            return  # cancelled meanwhile
        shared = train.shared_with(held_out) if held_out is not None else 0
        if shared:
            verb = "row of the validation file is" if shared == 1 else "rows of the validation file are"
            self._tell(job_id, f"{shared} {verb} also in the training file", level="warn")
        if train.num_toolless:
            text = f"{train.num_toolless} row(s) of the training file can call no tool: they name none under `tools`"
            self._tell(job_id, f"{text}, and no tool of the job has a `function` to give them", level="warn")
        self._queue(job, len(train.digests))

    def _queue(self, job: dict[str, Any], num_rows: int) -> None:
        """Every auto becomes a number, in the job's object and in what runs."""
        jobs, kind = self._services.jobs, job["method"]["type"]
        given = job["method"][kind]["hyperparameters"]
        numbers = resolved(given, num_rows, is_supervised=kind == "supervised")
        schedule(jobs.folder(job["id"]) / JOB_CONFIG, numbers, num_rows)
        method = {**job["method"], kind: {**job["method"][kind], "hyperparameters": numbers}}
        jobs.update(job["id"], status="queued", method=method, hyperparameters=numbers)
        self._tell(job["id"], "Files validated, moving job to queued state")
        self._services.worker.wake()

    def _tell(self, job_id: str, message: str, level: Literal["info", "warn"] = "info") -> None:
        """Once, also where a validation is done again."""
        told = self._services.jobs.events(job_id, limit=10, after=None).data
        if all(event["message"] != message for event in told):
            self._services.jobs.add_event(job_id, message, level=level)


def end_failed(services: Services, job_id: str, error: dict[str, Any]) -> dict[str, Any]:
    """The job, ended by what is wrong with its files; also where somebody removed its folder."""
    folder = services.jobs.folder(job_id)
    with storing(folder):
        folder.mkdir(mode=0o700, exist_ok=True)
    job = services.jobs.update(job_id, status="failed", error=error)
    kind = (error["param"] or "").replace("_", " ")
    reason = f"The job failed due to an invalid {kind}. " if kind else "The job failed. "
    services.jobs.add_event(job_id, reason + error["message"], level="error")
    if services.webhooks is not None:
        services.webhooks.job_ended(job, services.jobs.project_of(job_id))
    return job


def inspect(job: dict[str, Any], folder: Path, limits: LimitsConfig, stop: threading.Event) -> tuple[Rows, Rows | None]:
    """The rows of the training file, and of the validation file where there is one. Raises InvalidFileError."""
    if not (folder / JOB_CONFIG).is_file():
        text = "The server stopped while this job was being made, or its folder was removed; create the job again."
        raise InvalidFileError("job_incomplete", text, None)
    section = job["method"][job["method"]["type"]]
    if job["method"]["type"] == "supervised":
        reader = _Reader(None, "assistant", stop)
    else:
        reader = _Reader({tool["name"]: _spec(tool) for tool in section.get("tools") or []}, "user", stop)
    train = reader.rows(folder / TRAIN, "training_file")
    _check_count(train, "training_file", limits.min_training_rows, limits.max_training_rows)
    if job["validation_file"] is None:
        return train, None
    held_out = reader.rows(folder / VALIDATION, "validation_file")
    _check_count(held_out, "validation_file", 1, limits.max_validation_rows)
    return train, held_out


def _check_count(rows: Rows, param: Param, lowest: int, highest: int) -> None:
    number = len(rows.digests)
    if lowest <= number <= highest:
        return
    bound = f"at least {lowest}" if number < lowest else f"at most {highest}"
    message = f"{_name(param)} has {number} example(s), but must have {bound} examples"
    raise InvalidFileError("invalid_n_examples", message, param)


def _name(param: Param) -> str:
    return param.replace("_", " ").capitalize()


@dataclass(frozen=True, slots=True)
class _Reader:
    tool_specs: ToolSpecs | None
    ends_with: Literal["user", "assistant"]
    stop: threading.Event

    def rows(self, path: Path, param: Param) -> Rows:
        if not path.is_file():
            message = f"{_name(param)} is no longer in the folder of the job; create the job again"
            raise InvalidFileError("file_not_found", message, param)
        try:
            found = load_rows(path, self._digest)
            num_toolless = sum(not has_tools for _, has_tools in found) if self.tool_specs else 0
            return Rows([digest for digest, _ in found], num_toolless)
        except DataError as error:
            if not error.found and "no rows" in error.problem:
                return Rows([])
            raise _invalid(error, param) from None

    def _digest(self, row: dict[str, Any], item_id: str, problems: Problems) -> tuple[bytes, bool] | None:
        """Of a row's messages; and whether it has tools."""
        if self.stop.is_set():
            raise StoppedError
        if self.ends_with == "assistant":
            row = {**row, "messages": _without_extras(row.get("messages"))}
        item = parse_item(row, item_id, self.tool_specs, problems, ends_with=self.ends_with)
        if item is None:
            return None
        messages = json.dumps([message.model_dump() for message in item.messages], sort_keys=True)
        return hashlib.blake2b(messages.encode(), digest_size=16).digest(), bool(item.tools)


def _spec(tool: dict[str, Any]) -> dict[str, Any] | None:
    """What rows without tools get of a job's tool: something, where it brings a spec."""
    return {"name": tool["name"]} if tool.get("function") or tool.get("parameters") else None


def _without_extras(messages: Any) -> Any:
    """Messages without the keys that only demonstrations have."""
    if not isinstance(messages, list):
        return messages
    extras = ("weight", "reasoning_content")
    return [
        {key: part for key, part in message.items() if key not in extras} if isinstance(message, dict) else message
        for message in messages
    ]


def _invalid(error: DataError, param: Param) -> InvalidFileError:
    """What is wrong with the rows, by line and field, in the words of somebody who has a file and no folder of ours."""
    if not error.found:
        return InvalidFileError("invalid_file_format", f"{_name(param)} {error.problem}", param)
    places = [
        f"line {line}: {field}: {problem} ({_CURE if 'environment.tools' in cure else cure})"
        for line, field, problem, cure in error.found
    ]
    is_format = error.found[0][1] == "row"
    code = "invalid_file_format" if is_format else "invalid_training_example"
    return InvalidFileError(code, f"{_name(param)} has invalid examples. " + "; ".join(places), param)
