"""Why a run does not learn, fell or is slow."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import Response

from rft.doctor import diagnose
from rft.ui.routes.answers import StoreDep, answered
from rft.ui.schema import Diagnosis

router = APIRouter()


@router.get("/runs/{run}/doctor", response_model=Diagnosis)
async def show_diagnosis(store: StoreDep) -> Response:
    return await answered(lambda: diagnose(store))
