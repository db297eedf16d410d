"""What this application is; asks for no key."""

from __future__ import annotations

from fastapi import APIRouter

import rft
from rft.ui.routes.answers import PageDep
from rft.ui.schema import About

router = APIRouter()


@router.get("/about")
async def about(page: PageDep) -> About:
    return About(mode=page.mode, needs_key=page.needs_key, version=rft.__version__)
