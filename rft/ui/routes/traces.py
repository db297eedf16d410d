"""One rollout: its trace, its tokens, and the rest of texts that were cut."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.responses import Response

from rft.ui.routes.answers import KnownDep, StoreDep, ViewsDep, answered
from rft.ui.schema import TextPart, Tokens, Trace

router = APIRouter(prefix="/runs/{run}/rollouts/{rollout}")

Offset = Annotated[int, Query(ge=0, le=1 << 40)]


@router.get("", response_model=Trace)
async def show_trace(known: KnownDep, store: StoreDep, views: ViewsDep, rollout: str) -> Response:
    return await answered(lambda: views.trace(known.id, store, rollout))


@router.get("/tokens", response_model=Tokens)
async def show_tokens(
    store: StoreDep,
    views: ViewsDep,
    rollout: str,
    offset: Offset = 0,
    limit: Annotated[int, Query(ge=1, le=20_000)] = 2_000,
) -> Response:
    return await answered(lambda: views.tokens(store, rollout, offset, limit))


@router.get("/texts/{ref}", response_model=TextPart)
async def show_text(store: StoreDep, views: ViewsDep, rollout: str, ref: str, offset: Offset = 0) -> Response:
    return await answered(lambda: views.text(store, rollout, ref, offset))
