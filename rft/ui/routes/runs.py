"""The list of runs, one of them, and whether it has changed."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import Response

from rft.ui.overview import revision, run_line, run_view
from rft.ui.routes.answers import KnownDep, RunsDep, ViewsDep, answered
from rft.ui.runs import Known, Runs
from rft.ui.schema import Revision, RunLine, RunList, RunView
from rft.ui.views import Views

router = APIRouter()


@router.get("/runs", response_model=RunList)
async def list_runs(runs: RunsDep, views: ViewsDep) -> Response:
    return await answered(lambda: RunList(runs=[line_of(runs, known, views) for known in runs.all()]))


@router.get("/runs/{run}", response_model=RunView)
async def show_run(runs: RunsDep, known: KnownDep, views: ViewsDep) -> Response:
    def found() -> RunView:
        line = line_of(runs, known, views)
        if known.store is None:
            return run_view(line, None, None, {})
        return run_view(line, known.store, views.columns(known.store), views.catalog(known.store).unreadable())

    return await answered(found)


@router.get("/runs/{run}/revision", response_model=Revision)
async def show_revision(known: KnownDep) -> Response:
    return await answered(lambda: revision(known))


def line_of(runs: Runs, known: Known, views: Views) -> RunLine:
    return run_line(runs, known, views.grades(known.store) if known.store is not None else None)
