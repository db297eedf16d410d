"""The application: its routes, what happens around every request, and its start and end.

Every answer carries `x-request-id`; every failure has the wire's error body. What a route does is in its own module.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

import rft
from rft.errors import RftError, UserError
from rft.server.errors import ApiError, of_user_error
from rft.server.evals import routes as eval_routes
from rft.server.evals import run_routes as eval_run_routes
from rft.server.files import routes as file_routes
from rft.server.files import upload_routes
from rft.server.files.multipart import Drained
from rft.server.grading import routes as alpha
from rft.server.inference import response_routes
from rft.server.inference import routes as inference_routes
from rft.server.jobs import permissions
from rft.server.jobs import routes as fine_tuning
from rft.server.page import mount_page
from rft.server.requests import Limits, RequestIds
from rft.server.services import Services, caller
from rft.server.settings import ServerConfig
from rft.ui.app import guard, unmount

logger = logging.getLogger("rft.server")

# Every router is served below /v1 and asks for a key; the page at /ui has its own.
ROUTERS: tuple[APIRouter, ...] = (
    file_routes.router,
    upload_routes.router,
    fine_tuning.router,
    permissions.router,
    alpha.router,
    inference_routes.router,
    response_routes.router,
    eval_routes.router,
    eval_run_routes.router,
)
# Codes that the bodies of requests give to their own errors.
_FIELD_CODES = frozenset({"invalid_hyperparameter", "unsupported_method"})


def build_app(config: ServerConfig, *, has_auth: bool = True) -> FastAPI:
    """The server as an ASGI application. Its data folder is locked from its start to its end."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with Services.started(config, has_auth=has_auth) as app.state.services:
            yield
        unmount(app)

    app = FastAPI(
        title="rft", version=rft.__version__, lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None
    )
    for router in ROUTERS:
        app.include_router(router, prefix="/v1", dependencies=[Depends(caller)])
    app.add_api_route("/v1/openapi.json", _openapi, dependencies=[Depends(caller)], include_in_schema=False)
    app.add_api_route("/health", _health, include_in_schema=False)
    mount_page(app, needs_key=has_auth)
    app.add_exception_handler(ApiError, _api_error)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, _invalid_request)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, _http_error)  # type: ignore[arg-type]
    app.add_exception_handler(RftError, _rft_error)  # type: ignore[arg-type]
    app.add_exception_handler(Exception, _bug)
    app.add_middleware(Limits, max_body_bytes=config.limits.max_body_bytes)
    app.add_middleware(Drained)
    guard(app, needs_key=has_auth)
    app.add_middleware(RequestIds)
    return app


async def _health() -> dict[str, str]:
    return {"status": "ok"}


async def _openapi(request: Request) -> dict[str, Any]:
    """The OpenAPI document of all of this."""
    document: dict[str, Any] = request.app.openapi()
    return document


def _answer(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)


async def _api_error(request: Request, error: ApiError) -> JSONResponse:
    return _answer(error)


async def _invalid_request(request: Request, error: RequestValidationError) -> JSONResponse:
    """The first thing that is wrong with a request, by the path of its field."""
    problem = error.errors()[0]
    path = ".".join(str(part) for part in problem["loc"] if part not in ("body", "query", "path"))
    if problem["type"] == "json_invalid":
        return _answer(ApiError("We could not parse the JSON body of your request.", code="invalid_json"))
    if problem["type"] == "missing":
        message = f"Missing required parameter: '{path}'." if path else "The request has no body."
        return _answer(ApiError(message, code="missing_required_parameter", param=path or None))
    if problem["type"] == "extra_forbidden":
        return _answer(ApiError(f"Unknown parameter: '{path}'.", code="unknown_parameter", param=path))
    place = f"Invalid value for '{path}'" if path else "Invalid request"
    code = problem["type"] if problem["type"] in _FIELD_CODES else "invalid_value"
    message = f"{place}: {problem['msg'].removeprefix('Value error, ')}."
    return _answer(ApiError(message, code=code, param=path or None))


async def _http_error(request: Request, error: HTTPException) -> JSONResponse:
    """What the framework itself refuses: unknown paths, wrong methods."""
    place = f"{request.method} {request.url.path}"
    message = f"Invalid URL ({place})" if error.status_code in (404, 405) else str(error.detail)
    return _answer(ApiError(message, status=error.status_code, code="unknown_url"))


async def _rft_error(request: Request, error: RftError) -> JSONResponse:
    if isinstance(error, UserError):
        return _answer(of_user_error(error, code="invalid_value"))
    logger.error("%s %s: %s", request.method, request.url.path, error)
    return _answer(ApiError(str(error), status=503, code="server_error"))


async def _bug(request: Request, error: Exception) -> JSONResponse:
    """A bug: its traceback is in the log (the framework raises it again), its text may hold anything."""
    return _answer(ApiError("The server had an error while processing your request.", status=500))
