"""The process that runs untrusted Python for rft.sandbox. It is started by path: standard library only.

It isolates itself (namespaces, unprivileged user, resource limits), loads the source once, and then runs every call
in a fork of itself: no call can change what a later one sees, and what a call leaves behind is killed and removed.
Frames on its one socket are a 4-byte length and JSON; the code it runs holds only a pipe to this process.
"""

from __future__ import annotations

import ctypes
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
from typing import Any, NoReturn

MAX_REPLY_BYTES = 1 << 20
MAX_DETAIL_CHARS = 2000
MAX_PROCESSES = 64
MAX_OPEN_FILES = 256
FIRST_USER_ID, NUM_USER_IDS = 1_500_000_000, 500_000_000  # far above the ids that accounts and containers use
POLL_S = 0.1  # how soon the end of a call is noticed when a process it left behind holds its pipe open
NEW_USER, NEW_PID, NEW_NET, NEW_IPC = 0x10000000, 0x20000000, 0x40000000, 0x08000000
PR_SET_PDEATHSIG, PR_SET_KEEPCAPS, PR_SET_NO_NEW_PRIVS = 1, 8, 38
CAP_DAC_READ_SEARCH = 1 << 2
CAPABILITY_VERSION_3 = 0x20080522
LIBC = ctypes.CDLL(None, use_errno=True)


# --- isolation -------------------------------------------------------------------------------------------------------


def isolate(settings: dict[str, Any]) -> tuple[str, bool]:
    """Enter namespaces, drop privileges, set limits; (in words what protects, is this process 1 of a namespace)."""
    has_namespaces, has_user_namespace = unshare()
    if has_namespaces:
        become_init()
    is_dropped = os.geteuid() == 0 and drop_user()
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # after the change of user, which clears it
    LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    is_limited = is_dropped or (has_user_namespace and os.geteuid() != 0)  # root is exempt from the limit
    set_limits(settings, is_limited)
    return describe_protection(settings, has_namespaces, is_dropped, is_limited), has_namespaces


def describe_protection(settings: dict[str, Any], has_namespaces: bool, is_dropped: bool, is_limited: bool) -> str:
    network = "none" if has_namespaces else "NOT isolated (the kernel refuses namespaces)"
    processes = "own namespace" if has_namespaces else "NOT isolated"
    count = f"at most {MAX_PROCESSES}" if is_limited else "number NOT limited"
    user = "an unprivileged one of its own" if is_dropped else "the one who runs rft"
    written = "written only where everyone may" if is_dropped else "written as rft's user (NOT isolated)"
    memory_gib, disk_gib = settings["memory_bytes"] / 2**30, settings["disk_bytes"] / 2**30
    return (
        f"network: {network}; processes: {processes}, {count}; user: {user}; memory: {memory_gib:.3g} GiB a process; "
        f"disk: {disk_gib:.3g} GiB a file; files: read as rft's user (NOT isolated), {written}"
    )


def unshare() -> tuple[bool, bool]:
    """(own network, process and IPC namespaces, own user namespace), as far as the kernel permits."""
    namespaces = NEW_NET | NEW_IPC | NEW_PID
    if os.geteuid() == 0 and LIBC.unshare(namespaces) == 0:
        return True, False
    uid, gid = os.geteuid(), os.getegid()
    if LIBC.unshare(namespaces | NEW_USER) != 0:
        return False, False
    for name, text in [("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")]:
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    set_capabilities(0)  # what the user namespace gave (mounts, interfaces) is not for the code we run
    return True, True


def become_init() -> None:
    """Continue in a fork that is process 1 of the new namespace; the original waits and ends as it ends."""
    pid = os.fork()
    if pid == 0:
        return
    os.closerange(3, MAX_OPEN_FILES)  # the socket must close when the worker dies
    status = os.waitpid(pid, 0)[1]
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def drop_user() -> bool:
    """From root to a user id nobody else has, who may read (Python may live in root's home) and write nothing."""
    if not capabilities() & CAP_DAC_READ_SEARCH:
        return False
    uid = FIRST_USER_ID + struct.unpack("!I", os.urandom(4))[0] % NUM_USER_IDS
    os.chown(".", uid, uid)
    LIBC.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    set_capabilities(CAP_DAC_READ_SEARCH)
    return True


def capabilities() -> int:
    """The permitted capabilities of this process, as a bit set."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1], 16) for line in file if line.startswith("CapPrm:"))


def set_capabilities(bits: int) -> None:
    header, sets = struct.pack("II", CAPABILITY_VERSION_3, 0), struct.pack("6I", bits, bits, 0, 0, 0, 0)
    if LIBC.capset(header, sets) != 0:
        raise OSError(ctypes.get_errno(), "capset failed")


def set_limits(settings: dict[str, Any], is_limited: bool) -> None:
    limits = [
        (resource.RLIMIT_AS, settings["memory_bytes"]),
        (resource.RLIMIT_FSIZE, settings["disk_bytes"]),
        (resource.RLIMIT_NOFILE, MAX_OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    ]
    if is_limited:
        limits.append((resource.RLIMIT_NPROC, MAX_PROCESSES))
    for kind, limit in limits:
        hard = resource.getrlimit(kind)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (limit, limit))


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


def collect(pid: int, reply_fd: int, owner: socket.socket, wall_s: float) -> dict[str, Any]:
    """The reply of the fork, or how it ended without one."""
    poll = select.poll()
    poll.register(reply_fd, select.POLLIN)
    poll.register(owner, select.POLLIN)
    deadline, data, ended = time.monotonic() + wall_s, b"", None
    while time.monotonic() < deadline:
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
    return {"error": "timeout", "detail": f"TimeoutError: the call took longer than {wall_s:g} s"}


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


def sweep(is_init: bool, pid: int) -> None:
    """End everything a call left behind and empty the scratch folder."""
    os.kill(-1 if is_init and os.getpid() == 1 else pid, signal.SIGKILL)  # -1: all of this namespace but its process 1
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            break
    empty(".")


def empty(folder: str) -> None:
    """Remove what is in `folder`, without recursion and without long paths: a call may nest folders without end."""
    os.chmod(folder, 0o700)
    inside: list[str] = []
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    while True:
        child = remove_files(fd)
        if child is not None:
            os.chmod(child, 0o700, dir_fd=fd)
            inside.append(child)
        elif not inside:
            return os.close(fd)
        after = os.open(child or "..", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
        os.close(fd)
        fd = after
        if child is None:
            os.rmdir(inside.pop(), dir_fd=fd)


def remove_files(folder_fd: int) -> str | None:
    """Unlink until a folder is met, and return its name; None when nothing is left."""
    with os.scandir(folder_fd) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                return entry.name
            os.unlink(entry.name, dir_fd=folder_fd)
    return None


def serve(owner: socket.socket, function: Callable[..., Any], settings: dict[str, Any], is_init: bool) -> None:
    """Answer one request after the other until the socket closes."""
    gc.freeze()  # the forks share what is loaded
    while (request := receive(owner)) is not None:
        reply_fd, write_fd = os.pipe()
        pid = os.fork()
        if pid == 0:
            owner.close()
            os.close(reply_fd)
            run_call(function, request["args"], write_fd, settings["cpu_s"])
        os.close(write_fd)
        reply = collect(pid, reply_fd, owner, settings["wall_s"])
        os.close(reply_fd)
        sweep(is_init, pid)
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
    protection, is_init = isolate(settings)
    send(owner, {"protection": protection})
    try:
        function = load(settings["source"], settings["function"])
    except BaseException as error:  # whatever the source raises is its answer to every call
        send(owner, {"error": "exception", "detail": describe(error)})
        return
    send(owner, {"loaded": True})
    serve(owner, function, settings, is_init)


if __name__ == "__main__":
    main()
