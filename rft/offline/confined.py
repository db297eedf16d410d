"""Runs a command where nothing but loopback exists, and writes down what it connects to: `confined.py LOG COMMAND...`

Started by path, standard library only. A network namespace keeps everything in; a seccomp filter reports `connect` and
`sendto` of every process in there, of any language, to this one, which looks at the address and lets the call go on.
Not seen: datagrams sent by `sendmsg` without `connect`, and io_uring. Both stay in the namespace all the same.
"""

from __future__ import annotations

import array
import ctypes
import errno
import fcntl
import json
import os
import platform
import select
import signal
import socket
import struct
import sys
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from rft.sandbox.isolation import NEW_NET, unshare
    from rft.sandbox.tree import LIBC
else:
    sys.path.append(os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "sandbox"))
    from isolation import NEW_NET, unshare
    from tree import LIBC

NO_NAMESPACE = 97  # our exit codes, where no command was started
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1
PR_SET_NO_NEW_PRIVS = 38
MACHINES = {  # audit architecture, numbers of seccomp, connect, sendto
    "x86_64": (0xC000003E, 317, 42, 44),
    "aarch64": (0xC00000B7, 277, 203, 206),
}
SET_MODE_FILTER, NEW_LISTENER = 1, 8
LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06  # of the packet filter's language
ALLOW, NOTIFY = 0x7FFF0000, 0x7FC00000
RECEIVE, ANSWER, STILL_THERE = 0xC0502100, 0xC0182101, 0x40082102
NOTICE, REPLY = "=QIIiIQ6Q", "=QqiI"  # struct seccomp_notif, struct seccomp_notif_resp
GO_ON = 1
MAX_ADDRESS = 128


def raise_loopback() -> None:
    """A new network namespace has loopback, and it is down."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = struct.pack("16sH22x", b"lo", 0)
        (flags,) = struct.unpack_from("16xH", fcntl.ioctl(control, SIOCGIFFLAGS, request))
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", flags | IFF_UP))


# --- the filter ------------------------------------------------------------------------------------------------------


def program(architecture: int, connect: int, sendto: int) -> bytes:
    """Report `connect`, and `sendto` with an address; let everything else pass."""
    nr, arch, low, high = 0, 4, 16 + 8 * 4, 16 + 8 * 4 + 4  # offsets in struct seccomp_data; the fifth argument
    lines = [
        (LOAD, 0, 0, arch),
        (JUMP_IF_EQUAL, 0, 8, architecture),  # else to ALLOW
        (LOAD, 0, 0, nr),
        (JUMP_IF_EQUAL, 5, 0, connect),  # to NOTIFY
        (JUMP_IF_EQUAL, 0, 5, sendto),
        (LOAD, 0, 0, low),
        (JUMP_IF_EQUAL, 0, 2, 0),
        (LOAD, 0, 0, high),
        (JUMP_IF_EQUAL, 1, 0, 0),
        (RETURN, 0, 0, NOTIFY),
        (RETURN, 0, 0, ALLOW),
    ]
    return b"".join(struct.pack("=HBBI", *line) for line in lines)


def install_filter() -> int | None:
    """For this process and all it starts; returns the descriptor that reports, None where the kernel refuses."""
    known = MACHINES.get(platform.machine())
    if known is None:
        return None
    architecture, number, connect, sendto = known
    code = ctypes.create_string_buffer(program(architecture, connect, sendto))
    header = ctypes.create_string_buffer(struct.pack("@HP", (len(code) - 1) // 8, ctypes.addressof(code)))
    if os.geteuid() != 0:
        LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    found: int = LIBC.syscall(number, SET_MODE_FILTER, NEW_LISTENER, header)
    return found if found >= 0 else None


# --- the watcher -----------------------------------------------------------------------------------------------------


def watch(reports: int, child: int, log: int) -> int:
    """Answer reports until the child has ended; returns its exit status. What it left behind is our owner's to end."""
    ended = os.pidfd_open(child)
    while True:
        ready = select.select([reports, ended], [], [])[0]
        if ended in ready:  # first: without anybody to report on, the other is always ready
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        take(reports, log)


def take(reports: int, log: int) -> None:
    """One report: write the address down, and let the call go on."""
    notice = array.array("B", bytes(struct.calcsize(NOTICE)))
    try:
        fcntl.ioctl(reports, RECEIVE, notice)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EINTR):  # whoever called was killed meanwhile
            return
        raise
    number, pid, _, call, _, _, *arguments = struct.unpack(NOTICE, notice)
    is_connect = call == MACHINES[platform.machine()][2]
    place, size = arguments[1:3] if is_connect else arguments[4:6]
    row = address(pid, place, min(size, MAX_ADDRESS)) | {"pid": pid, "what": "connect" if is_connect else "sendto"}
    try:
        row["by"] = command_of(pid)
        fcntl.ioctl(reports, STILL_THERE, struct.pack("=Q", number))  # else what we read was another process's
        if row.get("family") not in (socket.AF_UNIX, socket.AF_NETLINK, socket.AF_UNSPEC):
            os.write(log, (json.dumps(row) + "\n").encode())
        fcntl.ioctl(reports, ANSWER, struct.pack(REPLY, number, 0, 0, GO_ON))
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise


def address(pid: int, place: int, size: int) -> dict[str, Any]:
    """Family, host and port of a sockaddr in another process's memory."""
    try:
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
            memory.seek(place)
            data = memory.read(size)
        return parsed(data)
    except (OSError, ValueError, OverflowError, struct.error):
        return {"host": "(an address that could not be read)", "port": None}


def parsed(data: bytes) -> dict[str, Any]:
    """A sockaddr in words."""
    (family,) = struct.unpack_from("=H", data)
    if family == socket.AF_INET:
        port, host = struct.unpack_from("!H4s", data, 2)
        return {"family": family, "host": socket.inet_ntop(family, host), "port": port}
    if family == socket.AF_INET6:
        port, _, host = struct.unpack_from("!HI16s", data, 2)
        return {"family": family, "host": socket.inet_ntop(family, host), "port": port}
    return {"family": family, "host": f"(address family {family})", "port": None}


def command_of(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read(300).replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return "?"


# --- the command -----------------------------------------------------------------------------------------------------


def start(command: list[str]) -> tuple[int, int | None]:
    """Fork; the child shuts itself in and becomes `command`. Returns its id and the descriptor that reports."""
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        become(command, theirs)
    theirs.close()
    _, fds, _, _ = socket.recv_fds(ours, 1, 1)
    return child, fds[0] if fds else None


def become(command: list[str], told: socket.socket) -> NoReturn:
    reports = install_filter()
    try:
        socket.send_fds(told, [b"x"], [] if reports is None else [reports])
        if reports is not None:
            os.close(reports)
        told.close()
        os.execvp(command[0], command)
    except OSError as error:
        print(f"{command[0]}: {error}", file=sys.stderr)
    os._exit(127)


def main(log_path: str, command: list[str]) -> int:
    has_namespace, _ = unshare(NEW_NET)
    if not has_namespace:
        return NO_NAMESPACE
    raise_loopback()
    log = os.open(log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    child, reports = start(command)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # the command ends by them, and we with it
    os.write(log, (json.dumps({"sees": "all" if reports is not None else "python"}) + "\n").encode())
    if reports is None:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return watch(reports, child, log)


if __name__ == "__main__":
    status = main(sys.argv[1], sys.argv[2:])
    sys.exit(status if status >= 0 else 128 - status)
