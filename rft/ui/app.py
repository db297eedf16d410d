"""The application: the page's API below /ui/api, its files below /ui, and what happens around every request.

`mount` puts them into any application (`rft serve` does), `build_ui` makes one of a folder of runs. Failures answer
`{"error": {"message", "code", "param"}}`, where param is the field that is wrong; a bug answers 500 without its text.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

import rft
from rft.errors import RftError, UserError
from rft.ui.assets import STATIC, mount_assets
from rft.ui.errors import Missing
from rft.ui.folder import FolderRuns
from rft.ui.judging import FolderJudging, Judging
from rft.ui.playground import Playground
from rft.ui.refusals import Refusal
from rft.ui.routes import READING, actions, tries
from rft.ui.runs import Page
from rft.ui.security import LoopbackOnly, OwnPagesOnly, SecurityHeaders, refusal
from rft.ui.views import Views

logger = logging.getLogger("rft.ui")
ROUTERS: tuple[APIRouter, ...] = (*READING, actions.router, tries.router)
_ABOUT = "/ui/api/about"


def mount(app: FastAPI, page: Page, judging: Judging, static: Path = STATIC) -> None:
    """The page in an application. All but `about` and the files asks `page.runs_of` first, which refuses strangers.

    The application's end is to call `unmount`.
    """
    app.state.page, app.state.playground, app.state.views = page, Playground(judging), Views()
    for router in ROUTERS:
        app.include_router(router, prefix="/ui/api", dependencies=[Depends(_known)], include_in_schema=False)
    mount_assets(app, static)
    app.add_exception_handler(Missing, _user_error)  # type: ignore[arg-type]
    app.add_exception_handler(Refusal, _user_error)  # type: ignore[arg-type]


def unmount(app: FastAPI) -> None:
    """Let the threads end that look through rollouts."""
    app.state.views.close()


def guard(app: FastAPI, *, needs_key: bool) -> None:
    """What stands around the page's requests; without keys around all of the application's."""
    app.add_middleware(OwnPagesOnly, everywhere=not needs_key)
    if not needs_key:
        app.add_middleware(LoopbackOnly)
    app.add_middleware(SecurityHeaders)


def build_ui(path: Path, *, static: Path = STATIC) -> FastAPI:
    """The page alone, of a folder of runs or of one run. Raises UserError when it is not there."""
    if not path.is_dir():
        raise UserError("there is no such folder", where=str(path), cure="give a folder of runs, e.g. runs/")
    found = FolderRuns(path)
    app = FastAPI(
        title="rft ui", version=rft.__version__, lifespan=_lifespan, openapi_url=None, docs_url=None, redoc_url=None
    )
    mount(app, Page("folder", needs_key=False, runs_of=lambda request: found), FolderJudging(), static)
    app.add_exception_handler(RequestValidationError, _invalid_request)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, _http_error)  # type: ignore[arg-type]
    app.add_exception_handler(UserError, _user_error)  # type: ignore[arg-type]
    app.add_exception_handler(RftError, _rft_error)  # type: ignore[arg-type]
    guard(app, needs_key=False)
    return app


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    yield
    unmount(app)


def _known(request: Request) -> None:
    """Raises what the application answers to a caller without a key, for all but `about`."""
    if request.url.path != _ABOUT:
        request.app.state.page.runs_of(request)


async def _user_error(request: Request, error: UserError) -> JSONResponse:
    text, param = error.problem + (f" ({error.cure})" if error.cure else ""), error.where or None
    if isinstance(error, Missing):
        return refusal(404, text, "not_found", param)
    if isinstance(error, Refusal):
        return refusal(error.status, text, error.code, param)
    return refusal(400, text, "invalid_value", param)


async def _rft_error(request: Request, error: RftError) -> JSONResponse:
    logger.error("%s %s: %s", request.method, request.url.path, error)
    return refusal(503, str(error), "server_error")


async def _http_error(request: Request, error: HTTPException) -> JSONResponse:
    """What the framework itself refuses: unknown paths, wrong methods."""
    return refusal(error.status_code, str(error.detail), "unknown_url")


async def _invalid_request(request: Request, error: RequestValidationError) -> JSONResponse:
    """The first thing that is wrong with a request, by the path of its field."""
    problem = error.errors()[0]
    path = ".".join(str(part) for part in problem["loc"] if part not in ("body", "query", "path"))
    return refusal(400, str(problem["msg"]), "invalid_value", path or None)
