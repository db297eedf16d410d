"""Why a run does not learn, fell or is slow."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import Response
from pydantic import BaseModel

from rft.store import RunStore
from rft.ui.routes.answers import StoreDep, answered
from rft.ui.schema import Diagnosis

router = APIRouter()


@router.get("/runs/{run}/doctor", response_model=Diagnosis)
async def show_diagnosis(store: StoreDep) -> Response:
    return await answered(lambda: _diagnosis(store))


def _diagnosis(store: RunStore) -> BaseModel:
    from rft import doctor

    found: Diagnosis = doctor.diagnose(store)  # type: ignore[attr-defined, unused-ignore]
    return found
