"""POST runs/{run}/pause, resume, cancel: asked for at once, done when the run has obeyed."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request

from rft.ui.run_lines import run_line
from rft.ui.runs import Page, Runs
from rft.ui.schema import Action, Done, RunLine

router = APIRouter()


@router.post("/runs/{run}/pause")
async def pause(run: str, request: Request) -> Done:
    return await _act(run, request, "pause")


@router.post("/runs/{run}/resume")
async def resume(run: str, request: Request) -> Done:
    return await _act(run, request, "resume")


@router.post("/runs/{run}/cancel")
async def cancel(run: str, request: Request) -> Done:
    return await _act(run, request, "cancel")


async def _act(run: str, request: Request, action: Action) -> Done:
    """A server's jobs belong to its event loop, so `act` is called here and not in a thread; it only asks."""
    page: Page = request.app.state.page
    runs = page.runs_of(request)
    runs.act(await asyncio.to_thread(runs.get, run), action)
    return Done(run=await asyncio.to_thread(_line, runs, run))


def _line(runs: Runs, run: str) -> RunLine:
    known = runs.get(run)
    return run_line(known, runs.actions(known))
