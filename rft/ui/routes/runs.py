"""GET runs: the list."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request

from rft.ui.run_lines import run_line
from rft.ui.runs import Page, Runs
from rft.ui.schema import RunList

router = APIRouter()


@router.get("/runs")
async def list_runs(request: Request) -> RunList:
    page: Page = request.app.state.page
    return await asyncio.to_thread(_all, page.runs_of(request))


def _all(runs: Runs) -> RunList:
    return RunList(runs=[run_line(known, runs.actions(known)) for known in runs.all()])
