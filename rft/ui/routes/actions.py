"""POST runs/{run}/pause, resume, cancel: asked for at once, done when the run has obeyed."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter

from rft.ui.routes.answers import RunsDep, ViewsDep
from rft.ui.routes.runs import line_of
from rft.ui.runs import Runs
from rft.ui.schema import Action, Done
from rft.ui.views import Views

router = APIRouter()


@router.post("/runs/{run}/pause")
async def pause(run: str, runs: RunsDep, views: ViewsDep) -> Done:
    return await _act(run, runs, views, "pause")


@router.post("/runs/{run}/resume")
async def resume(run: str, runs: RunsDep, views: ViewsDep) -> Done:
    return await _act(run, runs, views, "resume")


@router.post("/runs/{run}/cancel")
async def cancel(run: str, runs: RunsDep, views: ViewsDep) -> Done:
    return await _act(run, runs, views, "cancel")


async def _act(run: str, runs: Runs, views: Views, action: Action) -> Done:
    """A server's jobs belong to its event loop, so `act` is called here and not in a thread; it only asks."""
    runs.act(await asyncio.to_thread(runs.get, run), action)
    return Done(run=await asyncio.to_thread(lambda: line_of(runs, runs.get(run), views)))
