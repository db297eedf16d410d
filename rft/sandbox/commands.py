"""Runs inside a sandbox worker, as the source of its calls: one shell command, or one look into a file.

Standard library only, in one file: it is sent as text. Everything here is bounded in time and memory; what the command
leaves behind, the worker ends. The command may forge this reply: it speaks only for itself.
"""

from __future__ import annotations

import os
import select
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any, BinaryIO

SHELL = "/bin/bash" if os.path.exists("/bin/bash") else "/bin/sh"
CHUNK = 1 << 16
MAX_LAST_CHUNKS = 16  # read after the shell ended: what the pipe held then, whoever still writes into it


class Clip:
    """The first and the last bytes of a stream, half of `size` each, and how many were between them."""

    def __init__(self, size: int) -> None:
        self.half = max(1, size // 2)
        self.head, self.tail, self.left_out = bytearray(), bytearray(), 0

    def add(self, data: bytes) -> None:
        room = self.half - len(self.head)
        self.head += data[:room] if room > 0 else b""
        self.tail += data[max(0, room) :]
        if (excess := len(self.tail) - self.half) > 0:
            del self.tail[:excess]
            self.left_out += excess

    def text(self) -> str:
        between = f"\n... {self.left_out:,} bytes left out ...\n".encode() if self.left_out else b""
        return bytes(self.head + between + self.tail).decode("utf-8", errors="replace")


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The reply to a request: its fields are the arguments of `run` or of `read`."""
    home = request.pop("home")
    notes = []
    try:
        os.chdir(request.pop("cwd"))
    except OSError:
        os.chdir(home)
        notes = [f"the current folder is gone; this ran in {home}"]
    return {"notes": notes, **(run(**request) if "command" in request else read(**request))}


# --- a command -------------------------------------------------------------------------------------------------------


def run(command: str, timeout_s: float, output_bytes: int) -> dict[str, Any]:
    """Run it until the shell ends or time is up; what it started in the background does not count.

    Result: output (both streams, clipped), exit_code (None: time was up), cwd (None: unknown).
    """
    output_fd, output_end = os.pipe()
    cwd_fd, cwd_end = os.pipe()
    os.set_blocking(cwd_fd, False)
    script = f"trap 'pwd -P >&{cwd_end}' EXIT; {command}"
    process = subprocess.Popen(
        [SHELL.encode(), b"-c", script.encode("utf-8", errors="replace")],
        stdin=subprocess.DEVNULL,
        stdout=output_end,
        stderr=subprocess.STDOUT,
        env=environment(),
        pass_fds=(cwd_end,),
        start_new_session=True,
    )
    os.close(output_end)
    clip = Clip(output_bytes)
    has_ended = collect(output_fd, os.pidfd_open(process.pid), clip, time.monotonic() + timeout_s)
    exit_code = process.wait() if has_ended else None
    return {"output": clip.text(), "exit_code": exit_code, "cwd": folder_in(cwd_fd)}


def environment() -> dict[str, str]:
    scratch = os.environ["TMPDIR"]
    path = f"/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin:{sys.base_prefix}/bin"
    return {"PATH": path, "HOME": scratch, "TMPDIR": scratch, "LANG": "C.UTF-8", "TERM": "dumb", "PAGER": "cat"}


def collect(output_fd: int, process_fd: int, clip: Clip, deadline: float) -> bool:
    """Read until the process ended, and then what is there already; False when time is up."""
    waiting = [output_fd, process_fd]
    while (left_s := deadline - time.monotonic()) > 0:
        ready = select.select(waiting, [], [], left_s)[0]
        if process_fd in ready:
            for _ in range(MAX_LAST_CHUNKS):
                if not select.select([output_fd], [], [], 0)[0] or not (data := os.read(output_fd, CHUNK)):
                    break
                clip.add(data)
            return True
        if output_fd in ready:
            data = os.read(output_fd, CHUNK)
            clip.add(data)
            if not data:  # closed by the command itself, which goes on
                waiting.remove(output_fd)
    return False


def folder_in(fd: int) -> str | None:
    """What the shell said at its end."""
    try:
        return os.fsdecode(os.read(fd, CHUNK)).removesuffix("\n") or None
    except BlockingIOError:
        return None


# --- a file ----------------------------------------------------------------------------------------------------------


def read(path: str, start_line: int, end_line: int | None, output_bytes: int) -> dict[str, Any]:
    """Result: output (the lines, clipped), or error (why not)."""
    try:
        fd = os.open(path.encode("utf-8", errors="replace"), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        return {"error": f"{path}: {error.strerror if isinstance(error, OSError) else error}"}
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        return {"error": f"{path}: not a regular file"}
    with open(fd, "rb") as file:
        clip, num_lines = Clip(output_bytes), 0
        for number, piece in pieces(file):
            if end_line is not None and number > end_line:
                break
            num_lines = number
            if number >= start_line:
                clip.add(piece)
        if start_line > max(1, num_lines):
            return {"error": f"{path} has {num_lines} lines, none after {start_line - 1}"}
        return {"output": clip.text()}


def pieces(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """(number of the line from 1, a part of it): a line may be longer than memory."""
    number = 1
    while piece := file.readline(CHUNK):
        yield number, piece
        number += piece.endswith(b"\n")
