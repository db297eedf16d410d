"""POST runs/{run}/grade and datasets/validate: what the page tries out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from rft.ui.playground import Playground, too_large
from rft.ui.refusals import Refusal
from rft.ui.runs import Page
from rft.ui.schema import DatasetResult, GraderResult, GraderTry

router = APIRouter()
SILENCE_S = 30.0  # while a body arrives
_MAX_GRADER_BYTES = 1_000_000  # a python grader's source alone may have 256 kB


@router.post("/runs/{run}/grade")
async def grade(run: str, request: Request) -> GraderResult:
    page: Page = request.app.state.page
    known = await asyncio.to_thread(page.runs_of(request).get, run)
    asked = _parsed(await _body(request))
    return await _playground(request).grade(request, known, asked)


@router.post("/datasets/validate")
async def validate(request: Request) -> DatasetResult:
    return await _playground(request).validate(request, _pieces(request))


def _playground(request: Request) -> Playground:
    playground: Playground = request.app.state.playground
    return playground


async def _pieces(request: Request) -> AsyncIterator[bytes]:
    """The body as it arrives. Raises Refusal (408) when nothing does for a while."""
    stream = aiter(request.stream())
    while True:
        try:
            async with asyncio.timeout(SILENCE_S):
                piece = await anext(stream)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise Refusal(f"no part of the body arrived within {SILENCE_S:g} s", status=408, code="timeout") from None
        yield piece


async def _body(request: Request) -> bytes:
    """Raises Refusal (413, 408)."""
    body = bytearray()
    async for piece in _pieces(request):
        body += piece
        if len(body) > _MAX_GRADER_BYTES:
            raise too_large(_MAX_GRADER_BYTES)
    return bytes(body)


def _parsed(body: bytes) -> GraderTry:
    """Raises what FastAPI raises for a body that it reads itself."""
    try:
        return GraderTry.model_validate_json(body)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False)
        raise RequestValidationError([{**each, "loc": ("body", *each["loc"])} for each in problems]) from None
