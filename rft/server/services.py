"""What the routes work with: one object per responsibility, made once when the server starts.

`services` and `caller` are what route functions ask for. What a project owns is read with its caller's project.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, cast

from fastapi import Depends, Request

from rft.errors import UserError
from rft.server.index import Index
from rft.server.inference import Inference
from rft.server.inference.stored import StoredResponses
from rft.server.jobs import Jobs
from rft.server.keys import Caller, Keys
from rft.server.models import Models
from rft.server.settings import ServerConfig

INDEX = "index.sqlite"


@dataclass(slots=True)
class Services:
    """Of one running server."""

    config: ServerConfig
    index: Index
    keys: Keys | None  # None: whoever reaches the server may use it
    jobs: Jobs
    models: Models
    inference: Inference
    responses: StoredResponses

    @classmethod
    @asynccontextmanager
    async def started(cls, config: ServerConfig, *, has_auth: bool) -> AsyncIterator[Services]:
        """All of them, on a data folder that is ours alone until the end. Raises UserError when it is taken."""
        async with AsyncExitStack() as stack:
            index = stack.enter_context(open_index(config.data_dir))
            jobs = Jobs(index, config.data_dir / "runs")
            inference = Inference(config.inference, config.data_dir / "logs")
            stack.push_async_callback(inference.close)
            yield cls(
                config=config,
                index=index,
                keys=Keys(index) if has_auth else None,
                jobs=jobs,
                models=Models(config, index, jobs),
                inference=inference,
                responses=StoredResponses(index, config.inference.keep_responses_days),
            )


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
