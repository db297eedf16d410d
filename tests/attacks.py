"""Code that attacks a sandbox, and how the tests run it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from rft.sandbox import CodeError, Sandbox

SOURCE = """
import os, sys, time

calls = 0

def grade(attack, *args):
    global calls
    calls += 1
    return globals()[attack](*args)

def count(): return calls
def echo(value): return value
def loop():
    while True: pass
def allocate(): return len(bytearray(8 << 30))
def leave(code): os._exit(code)
def leave_politely(): sys.exit(0)
def kill_itself(signal): os.kill(os.getpid(), signal)
def kill_everybody():
    try: os.kill(-1, 9)
    except OSError: pass
    os.kill(os.getpid(), 9)
def recurse(): return recurse()
def overflow_c_stack():
    import ctypes
    ctypes.string_at(0)
def shout():
    for _ in range(100): sys.stdout.write("x" * (1 << 20))
    sys.stderr.write("x" * (1 << 20))
    return 1
def write_everywhere():
    for fd in range(256):
        try: os.write(fd, b"\\xff\\xff\\xff\\xff forged")
        except OSError: pass
    return 1
def close_everything():
    os.closerange(0, 256)
    while True: pass
def connect(port):
    import socket
    socket.create_connection(("127.0.0.1", port), timeout=2)
def fork_bomb():
    children = 0
    try:
        while children < 5000:
            if os.fork() == 0:
                time.sleep(100)
            children += 1
    except OSError:
        return children
    return children
def leave_a_daemon(path):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            while True:
                with open(path, "a") as file: file.write("x")
                time.sleep(0.01)
        os._exit(0)
    return 1
def fill(size):
    with open("big", "wb") as file:
        file.truncate(size)
        file.seek(size)
        file.write(b"x")
def litter():
    os.makedirs("a/b"); open("a/b/c", "w").close(); os.chmod("a", 0); os.chmod(".", 0)
    return 1
def nest():
    for _ in range(1200):
        os.mkdir("d"); os.chdir("d")
    return 1
def listing(path="."): return os.listdir(path)
def wait_and_list(seconds):
    time.sleep(seconds)
    return os.listdir(".")
def read(path):
    with open(path) as file: return file.read()
def write_in(path):
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    write_file(path)
    return 1
def fill_many(count):
    for number in range(count):
        with open(str(number), "wb") as file: file.write(b"x" * (1 << 20))
def make_files(count):
    for number in range(count): open(str(number), "w").close()
def allocate_in_many(count, size, hides=False):
    import ctypes
    for _ in range(count):
        if os.fork() == 0:
            if hides: ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)
            block = bytearray(os.urandom(1024)) * (size // 1024)
            time.sleep(100)
    time.sleep(5)
    return "unnoticed"
def share_memory(size):
    block = bytearray(os.urandom(1024)) * (size // 1024)
    for _ in range(8):
        if os.fork() == 0: time.sleep(100)
    time.sleep(0.5)
    return 1
def attempt(action):
    try: return str(action())
    except OSError as error: return type(error).__name__
def attack_parent():
    parent = os.getppid()
    def kill():
        os.kill(parent, 9)
        return "sent"
    return {
        "kill": attempt(kill),
        "memory": attempt(lambda: open(f"/proc/{parent}/mem", "r+b")),
        "environment": attempt(lambda: read(f"/proc/{parent}/environ")),
        "pids": " ".join(sorted(name for name in os.listdir("/proc") if name.isdigit())),
    }
def escalate():
    import ctypes, ctypes.util
    libc = ctypes.CDLL(None, use_errno=True)
    return {
        "user": attempt(lambda: os.setuid(0)),
        "chroot": attempt(lambda: os.chroot("/scratch")),
        "device": attempt(lambda: os.mknod("d", 0o20666, os.makedev(1, 1))),
        "mount": "PermissionError" if libc.mount(b"x", b"/scratch", b"tmpfs", 0, None) else "done",
        "old tree": "PermissionError" if libc.umount2(b"/scratch", 2) else "done",
    }
def environment(): return dict(os.environ)
def large(): return "x" * (2 << 20)
def no_json(): return {1, 2}
def loaded(name): return name in sys.modules
def write_file(path):
    with open(path, "w") as file: file.write("x")
"""


def in_sandbox(story: Callable[[Sandbox], Awaitable[Any]], source: str = SOURCE, **options: Any) -> Any:
    async def tell() -> Any:
        sandbox = Sandbox(source, **{"num_workers": 1, "wall_s": 10.0, **options})
        try:
            async with asyncio.timeout(30):
                return await story(sandbox)
        finally:
            await sandbox.close()

    return asyncio.run(tell())


async def failure(sandbox: Sandbox, *args: Any) -> CodeError:
    with pytest.raises(CodeError) as caught:
        await sandbox.call(*args)
    assert await sandbox.call("echo", 7) == 7, "the sandbox must work after an attack"
    return caught.value


def is_alive(pid: int) -> bool:
    """False for a zombie too: it runs nothing."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return False
