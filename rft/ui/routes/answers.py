"""From a request to a run, and from what is found to an answer: both beside the event loop."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Annotated, cast

from fastapi import Depends, Request
from fastapi.responses import Response
from pydantic import BaseModel
from pydantic_core import PydanticSerializationError
from starlette.background import BackgroundTask

from rft.files import finite
from rft.store import RunStore
from rft.ui.errors import Missing
from rft.ui.runs import Known, Page, Runs
from rft.ui.views import Views, views_of


async def page_of(request: Request) -> Page:
    return cast(Page, request.app.state.page)


async def runs_of(request: Request) -> Runs:
    """The runs that the caller may see; raises what the application answers to others."""
    return (await page_of(request)).runs_of(request)


async def known_of(run: str, runs: RunsDep) -> Known:
    """The run of the path. Raises Missing."""
    return await asyncio.to_thread(runs.get, run)


async def store_of(known: KnownDep) -> RunStore:
    """Its folder. Raises Missing while it has none."""
    if known.store is None:
        raise Missing("the job has not run yet", where=known.id, cure="wait until it runs")
    return known.store


async def _views(request: Request) -> Views:
    return views_of(request)


PageDep = Annotated[Page, Depends(page_of)]
RunsDep = Annotated[Runs, Depends(runs_of)]
KnownDep = Annotated[Known, Depends(known_of)]
StoreDep = Annotated[RunStore, Depends(store_of)]
ViewsDep = Annotated[Views, Depends(_views)]


async def answered(work: Callable[[], BaseModel], then: Callable[[], None] | None = None) -> Response:
    """What `work` finds, as JSON; both made in a thread. `then` is called in one when the answer is sent."""
    background = BackgroundTask(then) if then is not None else None
    body = await asyncio.to_thread(lambda: as_json(work()))
    return Response(body, media_type="application/json", background=background)


def as_json(found: BaseModel) -> str:
    try:
        return found.model_dump_json()
    except (PydanticSerializationError, UnicodeEncodeError):  # half a surrogate pair, which only escapes can hold
        return json.dumps(finite(found.model_dump()), allow_nan=False)
