"""The charts of a run."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.responses import Response

from rft.ui.routes.answers import StoreDep, ViewsDep, answered
from rft.ui.schema import Charts

router = APIRouter()


@router.get("/runs/{run}/charts", response_model=Charts)
async def show_charts(
    store: StoreDep, views: ViewsDep, points: Annotated[int, Query(ge=10, le=10_000)] = 1_000
) -> Response:
    return await answered(lambda: views.charts(store, points))
