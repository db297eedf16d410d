"""Serves the tools of a task over HTTP, under the contract of hosted Agent RFT, in this process or in a child.

POST /{tool} (or / with the tool's name in the body) answers `function_call_output`; what the model got wrong is a 400
whose payload it is shown, an exception inside a tool is a 500. A child server ends with the process that started it.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO, Any

import anyio
import anyio.to_thread
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

import rft
from rft.envs.tasks import ArgumentError, Task, load_task
from rft.envs.toolbox import text_of
from rft.errors import UserError, WorldError
from rft.wire import MAX_BODY_BYTES

_BACKLOG = 1024
_MAX_THREADS = 256  # calls of tools at once; the default of 40 would make a burst wait for slow ones
_logger = logging.getLogger(__name__)


def create_app(task: Task, on_ready: Callable[[], None] | None = None) -> Starlette:
    """The tools of `task`; `on_ready` is called once they are loaded."""

    threads = anyio.CapacityLimiter(_MAX_THREADS)

    async def call(request: Request) -> JSONResponse:
        return await _answer(task, request, threads)

    async def health(_: Request) -> JSONResponse:
        return JSONResponse({"status": "ok", "task": task.name, "tools": sorted(task.tool_names)})

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await anyio.to_thread.run_sync(task.prepare)
        if on_ready:
            on_ready()
        yield

    routes = [
        Route("/health", health, methods=["GET"]),
        Route("/", call, methods=["POST"]),
        Route("/{tool_name}", call, methods=["POST"]),
    ]
    return Starlette(routes=routes, lifespan=lifespan)


async def _answer(task: Task, request: Request, threads: anyio.CapacityLimiter) -> JSONResponse:
    raw = await _read_body(request)
    if raw is None:
        return _refusal(413, f"the request is larger than {MAX_BODY_BYTES:,} bytes")
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        return _refusal(400, f"the body is not JSON: {error}")
    if not isinstance(body, dict) or not isinstance(body.get("arguments"), str):
        return _refusal(400, 'the body must be an object with "arguments", a JSON string')
    name = request.path_params.get("tool_name") or body.get("name")
    tool = task.tool(str(name))
    if tool is None:
        return _refusal(404, f"there is no tool {name}; the tools are: {', '.join(sorted(task.tool_names))}")
    try:
        output = text_of(await anyio.to_thread.run_sync(tool.run, body["arguments"], limiter=threads))
    except ArgumentError as error:
        return _refusal(400, str(error))
    except Exception as error:  # a tool is code from outside: its failure is one call's, not the server's
        _logger.exception("tool %s failed", tool.name)
        return _refusal(500, f"{type(error).__name__} in tool {tool.name}")
    if len(output.encode("utf-8", errors="replace")) > MAX_BODY_BYTES:
        return _refusal(413, f"the answer of {tool.name} is larger than {MAX_BODY_BYTES:,} bytes")
    reply = {"type": "function_call_output", "call_id": body.get("call_id"), "id": body.get("id"), "output": output}
    return JSONResponse(reply)


async def _read_body(request: Request) -> bytes | None:
    """The body, or None as soon as it exceeds the cap."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            return None
    return bytes(body)


def _refusal(status: int, text: str) -> JSONResponse:
    return JSONResponse({"error": text}, status_code=status)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises UserError naming the port and the cure when it is taken."""
    try:
        listener = socket.create_server((host, port), backlog=_BACKLOG)
    except OSError as error:
        cure = "end the program that uses it, or choose another with --port"
        raise UserError(f"cannot listen on {host}:{port}: {error.strerror}", where="--port", cure=cure) from None
    listener.setblocking(False)
    return listener


def serve(task: Task, host: str, port: int, on_ready: Callable[[int], None] | None = None) -> None:
    """Serve until interrupted; `on_ready` gets the port once the tools are loaded. Port 0: the system chooses."""
    listener = bind(host, port)
    actual_port: int = listener.getsockname()[1]
    app = create_app(task, (lambda: on_ready(actual_port)) if on_ready else None)
    config = uvicorn.Config(app, log_level="warning", access_log=False, backlog=_BACKLOG)
    server = uvicorn.Server(config)
    server.run(sockets=[listener])
    if not server.started:
        raise WorldError(f"the tools of {task.name} could not be loaded; the log above says why")


class ToolServer:
    """A tool server as a child process: `with ToolServer("icd10") as server: server.base_url`.

    The child reads a pipe that only this process holds open and exits when it closes, however this process ends.
    (A parent-death signal would also fire when just the thread ends that started the child.)
    """

    def __init__(self, task_name: str, start_timeout_s: float = 60.0) -> None:
        self.task_name, self.start_timeout_s = task_name, start_timeout_s
        self.base_url = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def __enter__(self) -> ToolServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Return once the tools are loaded and the port is known; raises WorldError with the child's last words."""
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by stop
        self._process = subprocess.Popen(
            [sys.executable, "-m", "rft.envs.serve", self.task_name, "--port", "0", "--child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=_child_environment(),
            start_new_session=True,  # a Ctrl-C at the terminal is for the run, which ends this server itself
        )
        try:
            self.base_url = f"http://127.0.0.1:{self._read_port()}"
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the child; safe to call twice."""
        process, self._process = self._process, None
        if process is not None:
            process.terminate()
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(timeout=5)
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()
        if self._log is not None:
            self._log.close()
            self._log = None

    def _read_port(self) -> int:
        assert self._process is not None and self._process.stdout is not None
        pipe, line = self._process.stdout, b""
        deadline = time.monotonic() + self.start_timeout_s
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise self._failure(f"was not ready within {self.start_timeout_s:g} s")
            chunk = os.read(pipe.fileno(), 4096)
            if not chunk:
                self._process.wait(timeout=5)
                raise self._failure(f"ended with exit code {self._process.returncode}")
            line += chunk
        return int(json.loads(line)["port"])

    def _failure(self, what: str) -> WorldError:
        assert self._log is not None
        self._log.seek(0)
        words = self._log.read().decode(errors="replace").strip()[-2000:]
        return WorldError(f"the tool server of {self.task_name} {what}:\n{words}")


def _child_environment() -> dict[str, str]:
    """Ours, with the folder of this package on the path: the child must run the same code."""
    root = str(Path(rft.__file__).parent.parent)
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def _exit_with_parent() -> None:
    """End this process when its standard input closes."""

    def watch() -> None:
        while os.read(0, 1024):
            pass
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


def _announce(port: int) -> None:
    sys.stdout.write(json.dumps({"port": port}) + "\n")
    sys.stdout.flush()


def main(arguments: list[str] | None = None) -> int:
    """`python -m rft.envs.serve TASK --port 0`: prints the port as one line of JSON when ready."""
    parser = argparse.ArgumentParser(prog="python -m rft.envs.serve", description="Serve the tools of a task.")
    parser.add_argument("task", help="icd10, or package.module:NAME")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--child", action="store_true", help="end when standard input closes")
    options: Any = parser.parse_args(arguments)
    if options.child:
        _exit_with_parent()
    try:
        serve(load_task(options.task), options.host, options.port, _announce)
    except (UserError, WorldError) as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
