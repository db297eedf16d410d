"""The table of rollouts, and what its filters can be set to."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.responses import Response

from rft.ui.catalog import Filters
from rft.ui.routes.answers import StoreDep, ViewsDep, answered
from rft.ui.schema import Choices, RolloutPage

router = APIRouter()


@router.get("/runs/{run}/rollouts", response_model=RolloutPage)
async def list_rollouts(store: StoreDep, views: ViewsDep, filters: Annotated[Filters, Query()]) -> Response:
    """Who sees the table opens a trace next."""
    return await answered(lambda: views.catalog(store).page(filters), then=lambda: views.warm(store))


@router.get("/runs/{run}/choices", response_model=Choices)
async def show_choices(store: StoreDep, views: ViewsDep) -> Response:
    return await answered(lambda: views.catalog(store).choices())
