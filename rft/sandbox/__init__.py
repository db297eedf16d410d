"""Runs untrusted Python in warm, isolated worker processes (worker.py, isolation.py).

Guarantees: every call ends within its wall time, sees nothing of other calls, and cannot end or block rft; workers
die with rft. `Sandbox.protection` says what isolation the kernel permitted: with namespaces, no network, no file of
the user's, no process but its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import signal
import socket
import struct
import sys
import tempfile
from asyncio.subprocess import DEVNULL, Process
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rft.errors import RftError, WorldError
from rft.sandbox.scratch import empty

WORKER = Path(__file__).with_name("worker.py")
START_S = 60.0  # for a worker to come up and isolate itself
GRACE_S = 5.0  # beyond the wall time, for the worker to report a timeout before it is killed itself
MAX_ARGS_BYTES = 64 * 2**20
KEPT_ENV = ("OPENBLAS_CORETYPE", "LD_LIBRARY_PATH")  # Python or numpy may not start without them


class CodeError(RftError):
    """The untrusted code failed: it raised, timed out, ended its process, or returned no JSON value."""

    def __init__(self, kind: Literal["exception", "timeout", "exit"], detail: str) -> None:
        self.kind, self.detail = kind, detail
        super().__init__(detail)


class SandboxError(WorldError):
    """The sandbox itself failed: a worker did not start, or was killed from outside."""


class KilledError(SandboxError):
    """A call was killed, by the system for memory or by its own code; the worker lives."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one call may use. `cpu_s` follows from the wall time and two cores."""

    wall_s: float = 120.0
    memory_bytes: int = 2 * 2**30
    disk_bytes: int = 2**30

    @property
    def cpu_s(self) -> int:
        return math.ceil(2 * self.wall_s) + 1


@dataclass(slots=True, eq=False)
class _Worker:
    """A live worker process and the stream to it. `load_error` is what its source raised when it was loaded."""

    process: Process
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    scratch: tempfile.TemporaryDirectory[str]
    protection: str = ""
    load_error: CodeError | None = None
    num_calls: int = 0


class Sandbox:
    """`await call(*args)` runs `function` of the module text `source`; arguments and result are JSON values."""

    def __init__(
        self,
        source: str,
        *,
        function: str = "grade",
        num_workers: int = 2,
        wall_s: float = 120.0,
        memory_bytes: int = 2 * 2**30,
        disk_bytes: int = 2**30,
    ) -> None:
        self.protection = "unknown until the first call"
        self._source, self._function = source, function
        self._limits = Limits(wall_s, memory_bytes, disk_bytes)
        self._slots = asyncio.Semaphore(num_workers)
        self._idle: list[_Worker] = []
        self._live: set[_Worker] = set()
        self._is_closed = False

    async def call(self, *args: Any) -> Any:
        """The function's value. Raises CodeError when the code failed, SandboxError when the sandbox did."""
        async with self._slots:
            if self._is_closed:
                raise SandboxError("the sandbox is closed")
            worker = self._idle.pop() if self._idle else await self._start()
            reply: dict[str, Any] | None = None
            try:
                if worker.load_error is not None:
                    raise worker.load_error
                reply = await self._ask(worker, args)
            finally:  # also on cancellation: a worker in the middle of a call is of no use
                await self._put_back(worker, is_usable=reply is not None or worker.load_error is not None)
        return _value_of(reply)

    async def start(self) -> None:
        """Have one worker ready, so that `protection` is known and a source that does not load is found out.

        Raises CodeError when loading the source failed, SandboxError when the sandbox did.
        """
        async with self._slots:
            worker = await self._start()
            self._idle.append(worker)
            if worker.load_error is not None:
                raise worker.load_error

    async def close(self) -> None:
        """End all workers. Calls in flight end with SandboxError."""
        self._is_closed = True
        self._idle.clear()
        while self._live:
            await _stop(self._live.pop())

    async def _put_back(self, worker: _Worker, is_usable: bool) -> None:
        if is_usable and not self._is_closed:
            self._idle.append(worker)
        else:
            self._live.discard(worker)
            await asyncio.shield(_stop(worker))

    async def _ask(self, worker: _Worker, args: tuple[Any, ...]) -> dict[str, Any]:
        worker.num_calls += 1
        try:
            async with asyncio.timeout(self._limits.wall_s + GRACE_S):
                await _send(worker.writer, {"id": worker.num_calls, "args": args})
                reply = await _receive(worker.reader)
        except TimeoutError:
            raise SandboxError("a sandbox worker stopped answering and was replaced", retryable=True) from None
        except (OSError, asyncio.IncompleteReadError):
            raise SandboxError("a sandbox worker died and was replaced", retryable=True) from None
        if reply.get("id") != worker.num_calls:
            raise CodeError("exception", "the code wrote to the sandbox's own socket")
        return reply

    async def _start(self) -> _Worker:
        worker = await _spawn()
        self._live.add(worker)
        try:
            hello = await self._hello(worker)
            if "error" in hello:
                raise SandboxError(f"a sandbox worker cannot shut itself in: {hello['error']}")
            self.protection = worker.protection = hello["protection"]
            if hello["has_own_files"]:  # its files are in memory: only the place where they were mounted is left
                worker.scratch.cleanup()
            worker.load_error = await self._load_error(worker)
        except BaseException:  # also cancellation: no process may be left
            await self._put_back(worker, is_usable=False)
            raise
        return worker

    def _settings(self) -> dict[str, Any]:
        """What a worker is told before anything else."""
        limits = self._limits
        return {
            "source": self._source,
            "function": self._function,
            "wall_s": limits.wall_s,
            "cpu_s": limits.cpu_s,
            "memory_bytes": limits.memory_bytes,
            "disk_bytes": limits.disk_bytes,
        }

    async def _hello(self, worker: _Worker) -> dict[str, Any]:
        """The first frame. What fails before it is the sandbox's failure, what fails after it the source's."""
        try:
            async with asyncio.timeout(START_S):
                await _send(worker.writer, self._settings())
                return await _receive(worker.reader)
        except (OSError, asyncio.IncompleteReadError, TimeoutError) as error:
            cure = f"run `{sys.executable} -I {WORKER.name}` to see why, or raise memory_bytes"
            raise SandboxError(f"a sandbox worker did not start: {type(error).__name__}", cure=cure) from None

    async def _load_error(self, worker: _Worker) -> CodeError | None:
        try:
            async with asyncio.timeout(self._limits.wall_s + GRACE_S):
                loaded = await _receive(worker.reader)
        except TimeoutError:
            return CodeError("timeout", f"TimeoutError: loading the source took longer than {self._limits.wall_s:g} s")
        except (OSError, asyncio.IncompleteReadError):
            return CodeError("exit", "SystemExit: the source ended its process while it was loaded")
        return CodeError("exception", str(loaded.get("detail"))) if "error" in loaded else None


def _value_of(reply: dict[str, Any]) -> Any:
    if "value" in reply:
        return reply["value"]
    if reply["error"] == "killed":
        raise KilledError("a call was killed from outside, probably for memory", retryable=True)
    raise CodeError(reply["error"], str(reply.get("detail")))


async def _spawn() -> _Worker:
    ours, theirs = socket.socketpair()
    scratch = tempfile.TemporaryDirectory(prefix="rft-sandbox-", ignore_cleanup_errors=True)
    try:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", str(WORKER), str(theirs.fileno()), str(os.getpid())),
            stdin=DEVNULL,
            stdout=DEVNULL,
            stderr=DEVNULL,
            cwd=scratch.name,
            env=_environment(scratch.name),
            pass_fds=(theirs.fileno(),),
            start_new_session=True,
        )
    except OSError as error:
        ours.close()
        scratch.cleanup()
        raise SandboxError(f"a sandbox worker cannot be started: {error}", retryable=True) from None
    finally:
        theirs.close()
    reader, writer = await asyncio.open_connection(sock=ours)
    return _Worker(process, reader, writer, scratch)


def _environment(scratch: str) -> dict[str, str]:
    """Nothing of rft's environment (it may hold keys), and one thread per numeric library."""
    kept = {name: os.environ[name] for name in KEPT_ENV if name in os.environ}
    threads = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    return {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": scratch, "TMPDIR": scratch, **threads, **kept}


async def _stop(worker: _Worker) -> None:
    """Kill the worker's process group; its process namespace ends with it."""
    worker.writer.close()
    if worker.process.returncode is None:
        with contextlib.suppress(ProcessLookupError):  # it ended by itself
            os.killpg(worker.process.pid, signal.SIGKILL)
    await worker.process.wait()
    with contextlib.suppress(OSError):  # what cannot be removed must not end the run; `cleanup` warns of nothing either
        empty(worker.scratch.name)
    worker.scratch.cleanup()


async def _send(writer: asyncio.StreamWriter, value: dict[str, Any]) -> None:
    data = json.dumps(value).encode()
    if len(data) > MAX_ARGS_BYTES:
        raise SandboxError(f"the arguments of a sandboxed call are larger than {MAX_ARGS_BYTES} bytes")
    writer.write(struct.pack("!I", len(data)) + data)
    await writer.drain()


async def _receive(reader: asyncio.StreamReader) -> dict[str, Any]:
    (size,) = struct.unpack("!I", await reader.readexactly(4))
    reply = json.loads(await reader.readexactly(size))
    return reply if isinstance(reply, dict) else {}
