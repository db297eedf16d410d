"""Attacks: whatever the code tries, it sees and changes nothing outside, and the next call finds nothing of it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from attacks import failure, in_sandbox

import rft.sandbox as sandbox_package
from rft.sandbox import CodeError, Sandbox


def test_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        error = in_sandbox(lambda sandbox: failure(sandbox, "connect", port))
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert "Network is unreachable" in error.detail


def test_protection_is_stated() -> None:
    async def story(sandbox: Sandbox) -> str:
        await sandbox.call("echo", 1)
        return sandbox.protection

    protection = in_sandbox(story)
    assert "network: none; processes: own namespace, at most 64" in protection, protection


def test_fork_bomb_is_limited_and_cleared() -> None:
    async def story(sandbox: Sandbox) -> tuple[int, int]:
        return await sandbox.call("fork_bomb"), await sandbox.call("fork_bomb")

    first, second = in_sandbox(story)
    assert 0 < first <= 64
    assert second == first, "children of the first call were left"


def test_daemons_end_with_their_call() -> None:
    async def story(sandbox: Sandbox) -> list[str]:
        await sandbox.call("leave_a_daemon", "/tmp/alive")
        for _ in range(50):  # a daemon that lived on would write its file again, and again after each cleaning
            await sandbox.call("echo", 1)
        listing: list[str] = await sandbox.call("wait_and_list", 0.2)
        return listing

    assert in_sandbox(story) == []


def test_scratch_folder_is_emptied_and_removed() -> None:
    async def story(sandbox: Sandbox) -> tuple[list[str], str]:
        await sandbox.call("litter")
        await sandbox.call("nest")
        (worker,) = sandbox._live
        return await sandbox.call("listing"), worker.scratch.name

    listing, folder = in_sandbox(story)
    assert listing == []
    assert not os.path.exists(folder)


def test_environment_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "hunter2")
    environment = in_sandbox(lambda sandbox: sandbox.call("environment"))
    assert "hunter2" not in environment.values()
    assert set(environment) <= {
        *("PATH", "LANG", "HOME", "TMPDIR", "LC_CTYPE", "OPENBLAS_CORETYPE", "LD_LIBRARY_PATH"),
        *("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"),
    }


def test_files_of_the_user_are_not_there(tmp_path: Path) -> None:
    """Not to read, not to list, not to write; nor what rft itself is made of."""
    secret = tmp_path / "secret"
    secret.write_text("hunter2")
    for path in (secret, Path.home() / ".bashrc", Path("/etc/passwd"), Path(__file__)):
        assert "FileNotFoundError" in in_sandbox(lambda sandbox, path=path: failure(sandbox, "read", str(path))).detail
    assert "No such file" in in_sandbox(lambda sandbox: failure(sandbox, "write_file", str(tmp_path / "new"))).detail
    assert secret.read_text() == "hunter2"


@pytest.mark.parametrize(
    "path", ["/owned", "/usr/owned", f"{sys.prefix}/owned", f"{os.path.dirname(os.__file__)}/owned"]
)
def test_the_system_is_read_only(path: str) -> None:
    error = in_sandbox(lambda sandbox: failure(sandbox, "write_file", path))
    assert "Read-only file system" in error.detail
    assert not os.path.exists(path)


IN_TMP = sorted({Path(path).parts[2] for path in (sys.prefix, sys.base_prefix) if path.startswith("/tmp/")})
"""What the sandbox shows below /tmp, read-only, because this Python lives there; then nothing else can be written."""


@pytest.mark.parametrize(
    "path",
    [
        "here",
        pytest.param("/tmp/there", marks=pytest.mark.skipif(bool(IN_TMP), reason="this Python lives below /tmp")),
        "/dev/shm/everywhere",
    ],
)
def test_what_is_written_is_gone_with_its_call(path: str) -> None:
    async def story(sandbox: Sandbox) -> list[list[str]]:
        await sandbox.call("write_in", path)
        return [await sandbox.call("listing"), await sandbox.call("listing", "/tmp")]

    assert in_sandbox(story) == [[], IN_TMP]


def test_the_disk_is_limited_in_all() -> None:
    error = in_sandbox(lambda sandbox: failure(sandbox, "fill_many", 64), disk_bytes=16 << 20)
    assert "No space left on device" in error.detail


def test_the_number_of_files_is_limited() -> None:
    assert "No space left" in in_sandbox(lambda sandbox: failure(sandbox, "make_files", 30_000)).detail


def test_memory_is_limited_while_the_source_loads() -> None:
    source = (
        "import os, time\nblock = bytearray(os.urandom(1024)) * (400 << 10)\ntime.sleep(20)\ndef grade():\n    return 1"
    )

    async def story(sandbox: Sandbox) -> CodeError:
        with pytest.raises(CodeError) as caught:
            await sandbox.call()
        return caught.value

    assert "ended its process while it was loaded" in in_sandbox(story, source, memory_bytes=256 << 20).detail


def test_memory_is_limited_in_all_processes_together() -> None:
    error = in_sandbox(lambda sandbox: failure(sandbox, "allocate_in_many", 8, 64 << 20), memory_bytes=256 << 20)
    assert "used too much together" in error.detail


def test_processes_that_hide_are_counted() -> None:
    error = in_sandbox(lambda sandbox: failure(sandbox, "allocate_in_many", 8, 64 << 20, True), memory_bytes=256 << 20)
    assert "used too much together" in error.detail


def test_forks_that_share_memory_are_not_counted_twice() -> None:
    assert in_sandbox(lambda sandbox: sandbox.call("share_memory", 64 << 20), memory_bytes=256 << 20) == 1


def test_the_parent_cannot_be_killed_traced_or_seen() -> None:
    async def story(sandbox: Sandbox) -> dict[str, str]:
        outcome: dict[str, str] = await sandbox.call("attack_parent")
        assert await sandbox.call("echo", 7) == 7
        return outcome

    outcome = in_sandbox(story)
    assert outcome["kill"] == "sent", "process 1 of a namespace gets no signal from inside"
    assert "PermissionError" in outcome["memory"]
    assert "PermissionError" in outcome["environment"]
    assert outcome["pids"] == "1 2"


ORDINARY_USER = """
import json, os, socket, struct, subprocess, sys
ours, theirs = socket.socketpair()
worker = subprocess.Popen([sys.executable, "-I", "worker.py", str(theirs.fileno()), str(os.getpid())],
                          cwd=sys.argv[1], pass_fds=[theirs.fileno()])
theirs.close()
def send(value):
    data = json.dumps(value).encode()
    ours.sendall(struct.pack("!I", len(data)) + data)
def receive():
    (size,) = struct.unpack("!I", ours.recv(4, socket.MSG_WAITALL))
    return json.loads(ours.recv(size, socket.MSG_WAITALL))
look = "[os.getuid(), os.path.exists(path), sorted(os.listdir('/proc'))[:2]]"
source = "import os\\ndef grade(path):\\n    return " + look
limits = {"wall_s": 10.0, "cpu_s": 21, "memory_bytes": 1 << 28, "disk_bytes": 1 << 24}
send({"source": source, "function": "grade", **limits})
print(json.dumps([receive()["protection"], receive(), (send({"id": 1, "args": [sys.argv[1]]}), receive())[1]["value"]]))
worker.kill()
"""


def test_an_ordinary_user_is_protected_as_well(tmp_path: Path) -> None:
    """In a user namespace, without any right of root's."""
    setpriv, python = shutil.which("setpriv"), "/usr/bin/python3"
    if os.geteuid() != 0 or setpriv is None or not os.path.exists(python):
        pytest.skip("needs root, setpriv and a system Python to become another user")
    folder = tempfile.mkdtemp(dir="/tmp")
    try:
        for name in ("worker.py", "isolation.py", "scratch.py", "tree.py"):
            shutil.copy(Path(sandbox_package.__file__).parent / name, folder)
        os.chmod(folder, 0o777)
        user = [setpriv, "--reuid", "1234", "--regid", "1234", "--clear-groups"]
        command = [*user, python, "-c", ORDINARY_USER, folder]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
        if "NOT isolated" in result.stdout:
            pytest.skip("this kernel refuses user namespaces to ordinary users")
        protection, loaded, value = json.loads(result.stdout)
    finally:
        shutil.rmtree(folder)
    assert "network: none" in protection, result.stderr
    assert "own tree, nothing of the user's in it" in protection
    assert loaded == {"loaded": True}
    assert value == [1234, False, ["1", "2"]]


def test_capabilities_and_ways_to_more_are_gone() -> None:
    outcome = in_sandbox(lambda sandbox: sandbox.call("escalate"))
    assert set(outcome.values()) == {"PermissionError"}, outcome
