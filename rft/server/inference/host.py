"""The host process of one local model: `python -m rft.server.inference.host CONFIG_AS_JSON`.

Speaks chat completions on its Unix socket, which appears when the model is ready. Ends, with all it started, on
SIGTERM and when its engine dies. A request whose client goes away is cancelled.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from contextlib import aclosing
from pathlib import Path
from typing import Any

from aiohttp import web

from rft.errors import RftError
from rft.server.errors import ApiError
from rft.server.inference import sse
from rft.server.inference.model import ChatModel, HostConfig, loaded

logger = logging.getLogger("rft.server.inference")
_MODEL: web.AppKey[ChatModel] = web.AppKey("model", ChatModel)
_MAX_BODY_BYTES = 64_000_000
_STOP_TIMEOUT_S = 1.0  # what requests in flight get at the end


def main(text: str) -> int:
    """Serve until told to stop; returns the exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        asyncio.run(_serve(HostConfig.model_validate_json(text)))
    except RftError as error:
        print(f"Error: {error}", file=sys.stderr)  # the server quotes the end of this log
        return error.exit_code
    return 0


async def _serve(config: HostConfig) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    loading, stopping = asyncio.create_task(loaded(config)), asyncio.create_task(stop.wait())
    await asyncio.wait([loading, stopping], return_when=asyncio.FIRST_COMPLETED)
    if not loading.done():
        loading.cancel()
        await asyncio.wait([loading])
        return
    model = loading.result()
    runner = web.AppRunner(build_app(model), handler_cancellation=True, access_log=None)
    try:
        await runner.setup()
        await web.UnixSite(runner, str(config.socket), shutdown_timeout=_STOP_TIMEOUT_S).start()
        dying = asyncio.create_task(model.sampler.died())
        await asyncio.wait([stopping, dying], return_when=asyncio.FIRST_COMPLETED)
        dying.cancel()
    finally:
        await runner.cleanup()
        await model.sampler.close()


def build_app(model: ChatModel) -> web.Application:
    app = web.Application(client_max_size=_MAX_BODY_BYTES)
    app[_MODEL] = model
    app.router.add_get("/health", _health)
    app.router.add_post("/v1/chat/completions", _chat)
    app.router.add_put("/adapters/{name}", _add_adapter)
    app.router.add_post("/adapters/{name}/v1/chat/completions", _chat)
    return app


async def _health(request: web.Request) -> web.Response:
    return web.json_response({"status": "ok"})


async def _add_adapter(request: web.Request) -> web.Response:
    body = await request.json()
    try:
        await request.app[_MODEL].add_adapter(request.match_info["name"], Path(body["path"]))
    except RftError as error:
        return web.json_response(_failure(error).body(), status=503)
    return web.json_response({"status": "ok"})


async def _chat(request: web.Request) -> web.StreamResponse:
    try:
        body = await request.json()
        if isinstance(body, dict) and body.get("stream"):
            return await _streamed(request, body)
        return web.json_response(await request.app[_MODEL].complete(body, request.match_info.get("name")))
    except ApiError as error:
        return web.json_response(error.body(), status=error.status)
    except RftError as error:
        return web.json_response(_failure(error).body(), status=503)


async def _streamed(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    """Errors before the first chunk are the caller's to answer, later ones end the stream."""
    response = web.StreamResponse(headers={"content-type": "text/event-stream", "cache-control": "no-store"})
    async with aclosing(request.app[_MODEL].stream(body, request.match_info.get("name"))) as chunks:
        try:
            async for chunk in chunks:
                if not response.prepared:
                    await response.prepare(request)
                await response.write(sse.event(chunk))
        except RftError as error:
            if not response.prepared:
                raise
            await response.write(sse.event(_failure(error).body()))
        else:
            await response.write(sse.DONE)
    await response.write_eof()
    return response


def _failure(error: RftError) -> ApiError:
    logger.error("%s", error)
    return ApiError(str(error), status=503, code="server_error")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
