"""The page's reading routes as an application of their own, over a folder of runs; `serving` runs it for real."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from rft.errors import RftError, UserError
from rft.ui.errors import Missing
from rft.ui.folder import FolderRuns
from rft.ui.routes import READING
from rft.ui.runs import Page


def page_app(runs: Path) -> FastAPI:
    app = FastAPI()
    folder = FolderRuns(runs)
    app.state.page = Page(mode="folder", needs_key=False, runs_of=lambda _: folder)
    for router in READING:
        app.include_router(router, prefix="/ui/api")
    app.add_exception_handler(RftError, _answer)  # type: ignore[arg-type]
    return app


async def _answer(request: Request, error: RftError) -> JSONResponse:
    status = 404 if isinstance(error, Missing) else 400 if isinstance(error, UserError) else 503
    return JSONResponse({"error": {"message": str(error)}}, status_code=status)


if __name__ == "__main__":
    import uvicorn

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        print(f"serving {listening.getsockname()[1]}", flush=True)
        server = uvicorn.Server(uvicorn.Config(page_app(Path(sys.argv[1])), log_level="warning"))
        server.run(sockets=[listening])
