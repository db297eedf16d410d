"""The page's own files: index.html, everything in static/, and plotly's script out of its Python package.

Guarantees: nothing outside these is ever served; every file has an ETag, so that a browser asks again and gets 304.
"""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, RedirectResponse, Response
from fastapi.staticfiles import StaticFiles

from rft.ui.security import refusal

STATIC = Path(__file__).with_name("static")
_PLOTLY = Path("package_data") / "plotly.min.js"


@dataclass(frozen=True, slots=True)
class Script:
    """A file that never changes while we run, compressed once. The ETag is weak: it stands for both forms."""

    path: Path
    compressed: bytes
    etag: str


def mount_assets(app: FastAPI, static: Path = STATIC) -> None:
    """GET /ui/ and what it loads; `/` and `/ui` lead there. No keys: there are no secrets in it."""

    files = StaticFiles(directory=static, check_dir=False)

    async def index(request: Request) -> Response:
        return await files.get_response("index.html", request.scope)

    async def to_index() -> RedirectResponse:
        return RedirectResponse("/ui/")

    app.add_api_route("/", to_index, include_in_schema=False)
    app.add_api_route("/ui", to_index, include_in_schema=False)
    app.add_api_route("/ui/", index, include_in_schema=False)
    app.add_api_route("/ui/static/plotly.min.js", _plotly, include_in_schema=False)
    app.mount("/ui/static", files)


async def _plotly(request: Request) -> Response:
    script = await run_in_threadpool(plotly_script)
    if script is None:
        message = "The charts need the Python package plotly, which is not installed: pip install plotly."
        return refusal(404, message, "plotly_missing")
    headers = {"etag": script.etag, "vary": "accept-encoding"}
    if request.headers.get("if-none-match", "") == script.etag:
        return Response(status_code=304, headers=headers)
    media_type = "text/javascript; charset=utf-8"
    if "gzip" not in request.headers.get("accept-encoding", ""):
        return FileResponse(script.path, media_type=media_type, headers=headers)
    return Response(script.compressed, media_type=media_type, headers={**headers, "content-encoding": "gzip"})


@cache
def plotly_script() -> Script | None:
    """The script of the installed package, found without importing it; None where there is none."""
    found = find_spec("plotly")
    path = Path(found.origin).parent / _PLOTLY if found is not None and found.origin else None
    if path is None or not path.is_file():
        return None
    data = path.read_bytes()
    return Script(path, gzip.compress(data, mtime=0), f'W/"{hashlib.sha256(data).hexdigest()[:32]}"')
