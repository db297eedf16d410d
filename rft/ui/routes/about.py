"""GET about: what this application is; needs no key."""

from __future__ import annotations

from fastapi import APIRouter, Request

import rft
from rft.ui.runs import Page
from rft.ui.schema import About

router = APIRouter()


@router.get("/about")
async def about(request: Request) -> About:
    page: Page = request.app.state.page
    return About(mode=page.mode, needs_key=page.needs_key, version=rft.__version__)
