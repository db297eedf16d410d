"""The process that runs untrusted Python for rft.sandbox. It is started by path: standard library only.

It isolates itself (isolation.py), loads the source once, and then runs every call in a fork of itself: no call can
change what a later one sees, and what a call leaves behind is killed and removed.
Frames on its one socket are a 4-byte length and JSON; the code it runs holds only a pipe to this process.
"""

from __future__ import annotations

import gc
import json
import linecache
import os
import resource
import select
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from rft.sandbox.isolation import PR_SET_DUMPABLE, PR_SET_PDEATHSIG, Protection, isolate
    from rft.sandbox.scratch import empty
    from rft.sandbox.tree import LIBC
else:
    sys.path.append(os.path.dirname(os.path.abspath(__file__)))  # -I leaves it out; last, so that it hides nothing
    from isolation import PR_SET_DUMPABLE, PR_SET_PDEATHSIG, Protection, isolate
    from scratch import empty
    from tree import LIBC

MAX_REPLY_BYTES = 1 << 20
MAX_DETAIL_CHARS = 2000
POLL_S = 0.1  # how often a running call's memory is measured, and its end noticed when a process it left holds its pipe


@dataclass(frozen=True)
class Limits:
    """Of one call; `memory_bytes` is for all its processes together, None where they cannot be told from others.

    keeps_files: what a call writes is there for the next one, and is no part of its memory.
    """

    wall_s: float
    cpu_s: int
    memory_bytes: int | None
    keeps_files: bool = False


# --- one call --------------------------------------------------------------------------------------------------------


def load(source: str, function: str) -> Callable[..., Any]:
    """Execute the module text and return the function it defines."""
    name = "<source>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)  # tracebacks show lines
    module: dict[str, Any] = {"__name__": "source", "__file__": name}
    exec(compile(source, name, "exec"), module)
    loaded: Callable[..., Any] = module[function]
    return loaded


def describe(error: BaseException) -> str:
    """A short traceback: only frames of the source, the last ones, bounded."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    lines = traceback.format_list(frames[-5:]) + traceback.format_exception_only(type(error), error)
    return "".join(lines)[-MAX_DETAIL_CHARS:]


def plain(value: Any) -> Any:
    """JSON for numpy scalars, which graders return; anything else has no JSON form."""
    if type(value).__module__ == "numpy" and hasattr(value, "item"):
        return value.item()
    raise TypeError(f"a value of type {type(value).__name__} has no JSON form")


def run_call(function: Callable[..., Any], args: list[Any], reply_fd: int, cpu_s: int) -> NoReturn:
    """In the fork: call, write the reply, end without Python's exit machinery."""
    try:
        LIBC.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)  # so that the worker can measure it
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))
        try:
            reply = json.dumps({"value": function(*args)}, default=plain)
        except BaseException as error:  # also SystemExit and KeyboardInterrupt: the code must not end the fork's way
            reply = json.dumps({"error": "exception", "detail": describe(error)})
        write_frame(reply_fd, reply.encode())
    finally:
        os._exit(0)


def write_frame(fd: int, data: bytes) -> None:
    view = memoryview(struct.pack("!I", len(data)) + data)
    while view:
        view = view[os.write(fd, view) :]


def collect(pid: int, reply_fd: int, owner: socket.socket, limits: Limits) -> dict[str, Any]:
    """The reply of the fork, or how it ended without one."""
    poll = select.poll()
    poll.register(reply_fd, select.POLLIN)
    poll.register(owner, select.POLLIN)
    now = time.monotonic()
    deadline, measured, data, ended = now + limits.wall_s, now, b"", None
    while (now := time.monotonic()) < deadline:
        if limits.memory_bytes is not None and now - measured > POLL_S:
            measured = now
            if memory_in_use(with_files=not limits.keeps_files) > limits.memory_bytes:
                return {"error": "exception", "detail": "MemoryError: the processes of the call used too much together"}
        ready = {fd for fd, _ in poll.poll(0 if ended else POLL_S * 1000)}
        if owner.fileno() in ready:  # nobody speaks during a call: rft closed the socket or died
            os._exit(0)
        chunk = os.read(reply_fd, 1 << 16) if reply_fd in ready else b""
        data += chunk
        if is_complete(data):
            return parse(data)
        if chunk:
            continue
        if ended is not None:  # and it was found dead before its pipe was found empty
            return died(ended)
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)  # reaped later, by `sweep`
        if ended is None and reply_fd in ready:  # closed by the code itself, which goes on
            poll.unregister(reply_fd)
    return {"error": "timeout", "detail": f"TimeoutError: the call took longer than {limits.wall_s:g} s"}


def memory_in_use(with_files: bool) -> int:
    """Bytes that the processes of the current call and the files they wrote occupy; shared pages count once."""
    disk = os.statvfs(".")
    used = (disk.f_blocks - disk.f_bfree) * disk.f_frsize if with_files else 0
    for pid in os.listdir("/proc"):
        if pid.isdigit() and pid != "1":
            try:
                used += proportional_memory(pid)
            except (OSError, ProcessLookupError):
                continue  # it ended meanwhile
    return used


def proportional_memory(pid: str) -> int:
    """Resident bytes of a process with shared pages divided among their users, or undivided where it hides that."""
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("Pss:"))
    except PermissionError:  # the code may make itself unreadable
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()


def is_complete(data: bytes) -> bool:
    """True when the frame is whole, or too large to wait for."""
    size = struct.unpack("!I", data[:4])[0] if len(data) >= 4 else 0
    return len(data) >= 4 and (size > MAX_REPLY_BYTES or len(data) >= 4 + size)


def parse(data: bytes) -> dict[str, Any]:
    """The reply as a dict; the code could have written anything into its pipe."""
    if struct.unpack("!I", data[:4])[0] > MAX_REPLY_BYTES:
        return {"error": "exception", "detail": f"ValueError: the result is larger than {MAX_REPLY_BYTES} bytes"}
    try:
        reply = json.loads(data[4:])
    except ValueError:
        reply = None
    if isinstance(reply, dict) and ("value" in reply or "error" in reply):
        return reply
    return {"error": "exception", "detail": "the code wrote into the pipe of its own reply"}


def died(ended: os.waitid_result) -> dict[str, Any]:
    """How a call ended that returned nothing: `killed` when someone else killed it, `exit` when its code did."""
    if ended.si_code == os.CLD_EXITED:
        detail = f"SystemExit: the process ended with exit code {ended.si_status} before the call returned"
        return {"error": "exit", "detail": detail}
    name = signal.Signals(ended.si_status).name
    kind = "killed" if ended.si_status == signal.SIGKILL else "exit"
    return {"error": kind, "detail": f"the process was ended by {name}"}


# --- the worker ------------------------------------------------------------------------------------------------------


def sweep(is_init: bool, pid: int, folder: str | None) -> None:
    """End everything a call left behind and empty the scratch folder, where one is given."""
    os.kill(-1 if is_init and os.getpid() == 1 else pid, signal.SIGKILL)  # -1: all of this namespace but its process 1
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            break
    if folder is not None:
        empty(folder)


def serve(owner: socket.socket, function: Callable[..., Any], limits: Limits, is_init: bool) -> None:
    """Answer one request after the other until the socket closes."""
    gc.freeze()  # the forks share what is loaded
    folder = os.getcwd()  # by name: a call may take away the right to look up "."
    while (request := receive(owner)) is not None:
        reply_fd, write_fd = os.pipe()
        pid = os.fork()
        if pid == 0:
            owner.close()
            os.close(reply_fd)
            run_call(function, request["args"], write_fd, limits.cpu_s)
        os.close(write_fd)
        reply = collect(pid, reply_fd, owner, limits)
        os.close(reply_fd)
        sweep(is_init, pid, None if limits.keeps_files else folder)
        send(owner, {"id": request["id"], **reply})


def receive(owner: socket.socket) -> Any:
    """The next frame, or None when the socket closed."""
    header = read_exactly(owner, 4)
    data = read_exactly(owner, struct.unpack("!I", header)[0]) if header else b""
    return json.loads(data) if data else None


def read_exactly(owner: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        chunk = owner.recv(min(size - len(data), 1 << 20))
        if not chunk:
            return b""
        data += chunk
    return bytes(data)


def send(owner: socket.socket, value: dict[str, Any]) -> None:
    write_frame(owner.fileno(), json.dumps(value).encode())


def main() -> None:
    owner = socket.socket(fileno=int(sys.argv[1]))
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(sys.argv[2]):  # rft died before the line above
        return
    settings = receive(owner)
    try:
        protection = isolate(settings)
    except OSError as error:
        send(owner, {"error": str(error)})
        return
    send(owner, {"protection": protection.in_words(settings), "has_own_files": protection.has_own_files})
    try:
        function = load(settings["source"], settings["function"])
    except BaseException as error:  # whatever the source raises is its answer to every call
        send(owner, {"error": "exception", "detail": describe(error)})
        return
    send(owner, {"loaded": True})
    serve(owner, function, limits_of(settings, protection), protection.is_init)


def limits_of(settings: dict[str, Any], protection: Protection) -> Limits:
    memory_bytes = settings["memory_bytes"] if protection.has_own_files else None  # the tree's /proc shows our own only
    return Limits(settings["wall_s"], settings["cpu_s"], memory_bytes, keeps_files=bool(settings.get("tree")))


if __name__ == "__main__":
    main()
