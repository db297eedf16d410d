"""What the routes work with: one object per responsibility, made once when the server starts.

`services` and `caller` are what route functions ask for. What a project owns is read with its caller's project.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, cast

from fastapi import Depends, Request

from rft.errors import UserError
from rft.server.evals.job_runs import JobRuns
from rft.server.evals.runs import EvalRuns
from rft.server.evals.store import Evals
from rft.server.files.quota import Quota
from rft.server.files.store import Files
from rft.server.files.uploads import Uploads
from rft.server.index import Index
from rft.server.inference import Inference
from rft.server.inference.stored import StoredResponses
from rft.server.jobs.store import Jobs
from rft.server.jobs.validation import Validation
from rft.server.keys import Caller, Keys
from rft.server.models import Models
from rft.server.outgoing import Outgoing
from rft.server.settings import ServerConfig
from rft.server.views import metrics, results
from rft.server.webhooks import Webhooks
from rft.server.work.records import Parts, Seams, Works
from rft.server.work.worker import Worker

INDEX = "index.sqlite"


@dataclass(slots=True)
class Services:
    """Of one running server."""

    config: ServerConfig
    index: Index
    keys: Keys | None  # None: whoever reaches the server may use it
    jobs: Jobs
    models: Models
    quota: Quota
    files: Files
    uploads: Uploads
    outgoing: Outgoing
    webhooks: Webhooks
    worker: Worker
    evals: Evals
    eval_runs: EvalRuns
    job_runs: JobRuns
    inference: Inference
    responses: StoredResponses
    validation: Validation = field(init=False)

    @classmethod
    @asynccontextmanager
    async def started(cls, config: ServerConfig, *, has_auth: bool) -> AsyncIterator[Services]:
        """All of them, on a data folder that is ours alone until the end.

        Raises UserError when it is taken, ConfigError for what only shows now, as a secret that is not there.
        """
        async with AsyncExitStack() as stack:
            index = stack.enter_context(open_index(config.data_dir))
            services = await cls._built(config, index, Keys(index) if has_auth else None, stack)
            await services.worker.start()
            services.validation.start()
            yield services

    @classmethod
    async def _built(cls, config: ServerConfig, index: Index, keys: Keys | None, stack: AsyncExitStack) -> Services:
        """All of them; what has to end is on the stack."""
        data = config.data_dir
        jobs = Jobs(index, data / "runs")
        models = Models(config, index, jobs)
        quota = Quota(config.limits)
        files = Files(index, data / "files", quota)
        outgoing = Outgoing(config.outgoing)
        webhooks = await asyncio.to_thread(Webhooks, config.webhooks, index, outgoing)  # looks names up
        webhooks = await stack.enter_async_context(webhooks.delivering())
        inference = Inference(config.inference, data / "logs")
        stack.push_async_callback(inference.close)
        eval_runs = EvalRuns(index)
        stack.push_async_callback(eval_runs.close)
        seams = Seams(
            metrics_events=metrics.metrics_events,
            usage_metrics=results.usage_metrics,
            result_csv=results.result_csv,
            add_file=files.add,
            job_ended=webhooks.job_ended,
        )
        worker = Worker(Parts(config, jobs, models, Works(index), seams))
        stack.push_async_callback(worker.close)
        services = cls(
            config=config,
            index=index,
            keys=keys,
            jobs=jobs,
            models=models,
            quota=quota,
            files=files,
            uploads=Uploads(index, data / "uploads", files, quota),
            outgoing=outgoing,
            webhooks=webhooks,
            worker=worker,
            evals=Evals(index, jobs, data / "evals"),
            eval_runs=eval_runs,
            job_runs=JobRuns(),
            inference=inference,
            responses=StoredResponses(index, config.inference.keep_responses_days),
        )
        services.validation = Validation(services)
        stack.push_async_callback(services.validation.close)
        return services


@contextmanager
def open_index(data: Path) -> Iterator[Index]:
    """The index of a data folder, which is made where it is missing, and its lock."""
    lock = os.open(private_folder(data) / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            problem = "another rft serve uses this data folder"
            raise UserError(problem, where=str(data), cure="stop that one, or set data_dir=OTHER") from None
        index = Index(data / INDEX)
        try:
            yield index
        finally:
            index.close()
    finally:
        os.close(lock)


def private_folder(path: Path) -> Path:
    """The folder, made where it is missing, for its owner alone: it holds keys and what users uploaded."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def services(request: Request) -> Services:
    return cast("Services", request.app.state.services)


def caller(request: Request) -> Caller:
    """Who asks. Raises ApiError (401) when the key is missing or unknown."""
    keys = services(request).keys
    return Caller() if keys is None else keys.caller(request.headers.get("authorization", ""))


ServicesDep = Annotated[Services, Depends(services)]
CallerDep = Annotated[Caller, Depends(caller)]
