"""The sandboxed shell: what a model may do with it, and that whatever it tries stays inside and ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from attacks import is_alive
from pydantic import ValidationError

from rft.envs import build_environment
from rft.envs.shell import ShellEnvironment, ShellEnvironmentConfig, ShellSession, folder_of
from rft.errors import ToolError, UserError
from rft.sandbox.commands import Clip
from rft.types import Item, Message, ToolCall, ToolResult

OTHER_USER = 1234
Say = Callable[..., Awaitable[ToolResult]]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root, with: odd name"
    (folder / "docs").mkdir(parents=True)
    (folder / "a.txt").write_text("alpha\nbeta\ngamma\n")
    (folder / "docs" / "private").write_text("for the owner\n")
    (folder / "docs" / "private").chmod(0o600)
    return folder


def snapshot(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(f.relative_to(folder)): (f.stat().st_mode, f.stat().st_uid, f.read_bytes()) for f in files}


def an_item(**row: Any) -> Item:
    return Item(id="i", row=row, messages=[Message(role="user", content="x")])


def a_call(name: str, **arguments: Any) -> ToolCall:
    return ToolCall(id="fc", call_id="call", name=name, arguments=json.dumps(arguments))


@contextlib.asynccontextmanager
async def a_session(root: Path | str, **options: Any) -> AsyncIterator[ShellSession]:
    environment = ShellEnvironment(ShellEnvironmentConfig(root=str(root), **{"timeout_s": 20, **options}))
    session = await environment.open(an_item(), "trace")
    try:
        yield session
    finally:
        await session.close()


def told(root: Path, *commands: str, **options: Any) -> list[ToolResult]:
    """The results of the commands, one after the other in one session."""

    async def story() -> list[ToolResult]:
        async with asyncio.timeout(60), a_session(root, **options) as session:
            return [await session.call(a_call("shell", command=command)) for command in commands]

    return asyncio.run(story())


def shown(root: Path, **arguments: Any) -> ToolResult:
    async def story() -> ToolResult:
        async with asyncio.timeout(60), a_session(root, output_bytes=100) as session:
            return await session.call(a_call("read_file", **arguments))

    return asyncio.run(story())


# --- what it is for --------------------------------------------------------------------------------------------------


def test_commands_answer(root: Path) -> None:
    fine, failed, silent, both = told(root, "cat a.txt | wc -l", "ls nowhere; exit 3", "true", "echo e >&2; echo o")
    assert (fine.output, fine.is_error) == ("3\n", False)
    assert "No such file" in failed.output and failed.output.endswith("[exit code 3]") and not failed.is_error
    assert silent.output == "(no output)"
    assert both.output == "e\no\n"


def test_files_and_folder_are_kept_and_processes_are_not(root: Path) -> None:
    first, second, third, last = told(
        root,
        "cd docs && echo new > made && export X=1 && sleep 1000 & echo $! ; cd docs; echo new > made",
        "pwd; cat made; echo [$X]; ls /proc | grep -c '^[0-9]'",
        "rm -rf ../docs",
        "pwd",
    )
    assert first.output.strip().isdigit() and not first.is_error
    assert second.output.splitlines()[:3] == ["/tree/docs", "new", "[]"]
    assert int(second.output.splitlines()[3]) <= 5, "process 1, its fork, the shell, ls, grep: no sleep"
    assert not third.is_error
    assert last.output == "[the current folder is gone; this ran in /tree]\n/tree\n"


def test_changes_stay_in_the_session(root: Path) -> None:
    before = snapshot(root)
    change = "echo more >> a.txt; rm docs/private; mv docs papers; ln -s /etc/passwd link; chmod 777 a.txt; ls"
    (mine,) = told(root, change)
    assert mine.output.split() == ["a.txt", "link", "papers"]
    assert snapshot(root) == before and sorted(os.listdir(root)) == ["a.txt", "docs"]
    (other,) = told(root, "cat a.txt docs/private")
    assert other.output == "alpha\nbeta\ngamma\nfor the owner\n"


def test_read_only(root: Path) -> None:
    before = snapshot(root)
    attempts = told(
        root,
        "cat docs/private",
        "echo x > a.txt",
        "echo x > new; rm -rf docs; mkdir d; chmod 777 a.txt",
        "mount -o remount,rw /tree || echo refused",
        "echo kept > /tmp/note",
        "cat /tmp/note",
        writable=False,
    )
    assert attempts[0].output == "for the owner\n"
    assert "Read-only file system" in attempts[1].output
    assert "refused" in attempts[3].output
    assert attempts[5].output == "kept\n"
    assert snapshot(root) == before


def test_reading_files(root: Path) -> None:
    assert shown(root, path="a.txt").output == "alpha\nbeta\ngamma\n"
    assert shown(root, path="/tree/a.txt", start_line=2, end_line=2).output == "beta\n"
    (root / "long").write_bytes(b"x" * 200 + "ü\n".encode())
    assert "bytes left out ...\n" in shown(root, path="long").output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"path": "nowhere"}, "No such file"),
        ({"path": "docs"}, "not a regular file"),
        ({"path": "/dev/zero"}, "not a regular file"),
        ({"path": "a\0b"}, "embedded null"),
        ({"path": "a.txt", "start_line": 9}, "has 3 lines, none after 8"),
        ({"path": "a.txt", "start_line": 0}, "greater than or equal to 1"),
        ({"path": "leak"}, "No such file"),
        ({}, "arguments.path: field required"),
    ],
)
def test_what_cannot_be_read_is_said(root: Path, arguments: dict[str, Any], words: str) -> None:
    (root / "leak").symlink_to(Path(__file__))
    result = shown(root, **arguments)
    assert result.is_error and words in result.output, result.output


def test_the_calls_of_a_turn_run_in_their_order(root: Path) -> None:
    async def story() -> list[ToolResult]:
        async with asyncio.timeout(60), a_session(root) as session:
            calls = [session.call(a_call("shell", command=f"echo {n} >> log; cat log")) for n in range(4)]
            return list(await asyncio.gather(*calls))

    assert [result.output.split() for result in asyncio.run(story())][-1] == ["0", "1", "2", "3"]


def test_every_row_has_its_folder(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "code").mkdir(parents=True)
        (tmp_path / name / "code" / "name").write_text(name)

    async def story(row: dict[str, Any]) -> str:
        environment = ShellEnvironment(ShellEnvironmentConfig(root=f"{tmp_path}/{{item.meta.repo}}/code"))
        await environment.check()
        session = await environment.open(an_item(**row), "trace")
        try:
            return (await session.call(a_call("shell", command="cat name; ls /tree"))).output
        finally:
            await session.close()

    assert asyncio.run(story({"meta": {"repo": "two"}})) == "twoname\n"


@pytest.mark.parametrize("value", ["../x", "/etc", "", None, "a\0b", ["a"], True, "missing"])
def test_rows_that_lead_astray_are_refused(tmp_path: Path, value: Any) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(ToolError):
        folder_of(f"{tmp_path}/rows/{{item.repo}}", {"repo": value})


def test_wrong_configurations_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"only \{item\.FIELD\}"):
        ShellEnvironmentConfig(root="/x/{repo}")
    for root in (tmp_path / "missing", f"{tmp_path}/missing/{{item.x}}"):
        with pytest.raises(UserError, match="there is no folder"):
            asyncio.run(ShellEnvironment(ShellEnvironmentConfig(root=str(root))).check())


def test_tools_are_discovered_and_only_offered_ones_answer(root: Path) -> None:
    environment = build_environment(ShellEnvironmentConfig(root=str(root)))
    specs = asyncio.run(environment.discover())
    assert list(specs) == ["shell", "read_file"] and all(specs.values())

    async def story() -> ToolResult:
        item = an_item().model_copy(update={"tools": [specs["read_file"]]})
        session = await environment.open(item, "trace")
        try:
            return await session.call(a_call("shell", command="echo hello"))
        finally:
            await session.close()

    result = asyncio.run(story())
    assert result.is_error and result.output == "there is no tool shell; the tools are: read_file"


# --- attacks ---------------------------------------------------------------------------------------------------------


def survives(root: Path, attack: str, **options: Any) -> ToolResult:
    """The answer to the attack; the same session, its files and the folder must be whole afterwards."""
    before = snapshot(root)
    _, result, after = told(root, "echo kept > /tmp/kept", attack, "cat /tmp/kept; echo alive", **options)
    assert after.output == "kept\nalive\n", after.output
    assert snapshot(root) == before
    return result


@pytest.mark.slow
def test_a_fork_bomb(root: Path) -> None:
    started = time.monotonic()
    result = survives(root, "bomb() { bomb | bomb & }; bomb; sleep 60", timeout_s=2)
    assert result.is_error and "did not end within 2 s" in result.output
    assert time.monotonic() - started < 20


@pytest.mark.slow
def test_many_processes_are_refused(root: Path) -> None:
    result = survives(root, "for n in $(seq 200); do sleep 30 & done; echo all", timeout_s=3)
    assert "fork" in result.output and "all" not in result.output.split()


@pytest.mark.slow
def test_removing_everything(root: Path) -> None:
    """As far as it comes: the system's folders are refused one file at a time, and our copy goes."""
    before = snapshot(root)
    attack = "rm -rf --no-preserve-root /tree /scratch / > /dev/null 2>&1"
    _, after = told(root, attack, "ls /tree; ls /usr/bin/env; pwd", timeout_s=3)
    assert after.output == "/usr/bin/env\n/tree\n"
    assert snapshot(root) == before


@pytest.mark.parametrize("place", ["/tree", "/tmp"])
def test_filling_the_disk(root: Path, place: str) -> None:
    limits = {"disk_bytes": 8 << 20}
    result = survives(root, f"for n in 1 2 3; do head -c 5M /dev/zero > {place}/big$n; done", **limits)
    assert "No space left on device" in result.output


def test_a_file_above_the_limit(root: Path) -> None:
    result = survives(root, "truncate -s 1T sparse; head -c 2G /dev/zero > big; ls -s big", disk_bytes=8 << 20)
    assert "File size limit exceeded" in result.output and "No space left on device" in result.output


@pytest.mark.parametrize("path", ["/etc/passwd", "/etc/shadow", "/proc/1/environ", "/proc/1/mem", __file__])
def test_the_host_cannot_be_read(root: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "hunter2")
    result = survives(root, f"cat {path}; cat /proc/*/environ; env; ls /root /home")
    assert "hunter2" not in result.output and "root:x" not in result.output
    assert "No such file" in result.output or "Permission denied" in result.output


def test_symbolic_links_lead_nowhere(root: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("hunter2")
    (root / "up").symlink_to("../secret")
    (root / "far").symlink_to(tmp_path / "secret")
    result = survives(root, "cat up far; ln -s ../../../../.. out; cat out/tmp/secret; ls out/proc/1/root /proc/1/cwd")
    assert "hunter2" not in result.output and "secret\n" not in result.output


@pytest.mark.parametrize("attack", ["kill -9 1; kill -TERM 1; echo sent", "kill -9 $PPID; sleep 5", "kill -9 -1"])
def test_killing_the_worker(root: Path, attack: str) -> None:
    result = survives(root, attack)
    assert "sent" in result.output or ("killed" in result.output and result.is_error)


@pytest.mark.slow
def test_stopping_the_worker(root: Path) -> None:
    result = survives(root, "kill -STOP $PPID; kill -STOP -1; sleep 60", timeout_s=1)
    assert result.is_error and "was ended" in result.output


@pytest.mark.slow
def test_gigabytes_of_output_are_clipped(root: Path) -> None:
    result = survives(
        root, "echo first; head -c 1G /dev/zero | tr '\\0' x; echo; echo last", output_bytes=1000, timeout_s=60
    )
    assert result.output.startswith("first\nxxx") and result.output.endswith("xxx\nlast\n")
    assert "... 1,073,740,836 bytes left out ..." in result.output and len(result.output) < 1100


@pytest.mark.slow
@pytest.mark.parametrize("attack", ["yes & echo done", "exec >&- 2>&-; sleep 60", "(sleep 60; echo late) & echo done"])
def test_odd_uses_of_the_output(root: Path, attack: str) -> None:
    started = time.monotonic()
    result = survives(root, attack, timeout_s=2)
    assert "done" in result.output or "did not end within 2 s" in result.output
    assert time.monotonic() - started < 15


def test_output_that_is_no_text(root: Path) -> None:
    result = survives(root, "head -c 100000 /dev/urandom; printf '\\xff\\xfe\\x00\\ud83d'", output_bytes=150_000)
    assert "\ufffd" in result.output
    result.output.encode()


@pytest.mark.parametrize("command", ["echo a\0b", "x" * 200_000])
def test_commands_that_cannot_be_run(root: Path, command: str) -> None:
    result = survives(root, command)
    assert result.is_error and "at most 100,000 bytes" in result.output


def test_a_command_with_half_a_surrogate_pair(root: Path) -> None:
    assert survives(root, "echo \ud83d").output == "?\n"


@pytest.mark.parametrize("command", ["echo 'unclosed", "if true", ")", "<<EOF", "; ;"])
def test_syntax_errors_are_answers(root: Path, command: str) -> None:
    assert not survives(root, command).is_error


def test_memory(root: Path) -> None:
    attack = "python3 -c 'import os, time; x = [os.urandom(1 << 20) for _ in range(600)]; time.sleep(30)'"
    result = survives(root, attack, memory_bytes=128 << 20)
    assert "memory" in result.output.lower(), result.output


def test_memory_of_many_processes_together(root: Path) -> None:
    attack = "for n in 1 2 3 4 5 6; do (x=$(head -c 40M /dev/zero | tr '\\0' x); sleep 30) & done; wait"
    result = survives(root, attack, memory_bytes=128 << 20)
    assert result.is_error and "memory" in result.output


def test_no_network(root: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        result = survives(root, f"echo hello > /dev/tcp/127.0.0.1/{port}; ls /sys/class/net")
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert "Network is unreachable" in result.output


def test_privileges_are_gone(root: Path) -> None:
    attack = "mount -t tmpfs x /tmp; unshare -r true && echo GOT; chroot / true && echo GOT; mknod d c 1 1 && echo GOT"
    result = survives(root, f"{attack}; grep -i capeff /proc/self/status; echo 1 > /proc/sys/kernel/sysrq; id -u")
    assert "CapEff:\t0000000000000000" in result.output
    assert "chroot" in result.output and "sysrq" in result.output


# --- ends ------------------------------------------------------------------------------------------------------------


def children(pid: int) -> set[int]:
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found |= {child} | children(child)
    return found


def wait_for_processes(parent: int, before: set[int]) -> set[int]:
    """Those of a shell with a command: the worker and its fork that is process 1, the call, the shell, two sleeps."""
    deadline = time.monotonic() + 20
    while len(inside := children(parent) - before) < 6:
        assert time.monotonic() < deadline, "the shell did not start"
        time.sleep(0.01)  # another process works
    return inside


def wait_for_the_end(inside: set[int]) -> None:
    deadline = time.monotonic() + 10
    while any(map(is_alive, inside)):
        assert time.monotonic() < deadline, "a process outlived its session"
        time.sleep(0.01)  # the kernel delivers the signals in its own time


def mounts_and_folders() -> list[str]:
    temporary = tempfile.gettempdir()
    return sorted(name for name in os.listdir(temporary) if name.startswith(("rft-sandbox-", "rft-shell-")))


@pytest.mark.parametrize("is_cancelled", [False, True])
def test_nothing_is_left(root: Path, tmp_path: Path, is_cancelled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    async def story() -> set[int]:
        async with a_session(root) as session:
            call = asyncio.create_task(session.call(a_call("shell", command="echo x > made; sleep 1000 & sleep 1000")))
            inside = await asyncio.to_thread(wait_for_processes, os.getpid(), before)
            if is_cancelled:
                call.cancel()
                await asyncio.wait([call])
        with contextlib.suppress(ToolError, asyncio.CancelledError):
            await call
        return inside

    before = children(os.getpid())
    inside = asyncio.run(asyncio.wait_for(story(), 30))
    wait_for_the_end(inside)
    assert mounts_and_folders() == [] and "overlay" not in Path("/proc/self/mounts").read_text()


def test_nothing_is_left_when_we_are_killed(root: Path, tmp_path: Path) -> None:
    program = textwrap.dedent("""
        import asyncio, sys
        from rft.envs.shell import ShellEnvironment, ShellEnvironmentConfig
        from rft.types import Item, Message, ToolCall
        async def main():
            environment = ShellEnvironment(ShellEnvironmentConfig(root=sys.argv[1]))
            session = await environment.open(Item(id="i", row={}, messages=[Message(role="user")]), "trace")
            arguments = '{"command": "sleep 1000 & sleep 1000"}'
            await session.call(ToolCall(id="i", call_id="c", name="shell", arguments=arguments))
        asyncio.run(main())
    """)
    (tmp_path / "tmp").mkdir()
    environment = {**os.environ, "TMPDIR": str(tmp_path / "tmp"), "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, "-c", program, str(root)], env=environment)
    inside = wait_for_processes(parent.pid, set())
    parent.send_signal(signal.SIGKILL)
    parent.wait(10)
    wait_for_the_end(inside)
    assert os.listdir(tmp_path / "tmp") == []


def test_a_lost_shell_discards_the_rollout(root: Path) -> None:
    async def story() -> None:
        async with a_session(root) as session:
            await session.call(a_call("shell", command="echo x > made"))
            (worker,) = session._shell._live
            os.killpg(worker.process.pid, signal.SIGKILL)
            for _ in range(2):  # also the second time: no empty shell may stand in for it
                with pytest.raises(ToolError):
                    await session.call(a_call("shell", command="cat made"))

    asyncio.run(asyncio.wait_for(story(), 30))


# --- other users, other kernels --------------------------------------------------------------------------------------

STORY = """
import asyncio, json, sys
from rft.envs.shell import ShellEnvironment, ShellEnvironmentConfig
from rft.types import Item, Message, ToolCall
async def main():
    results, options = [], json.loads(sys.argv[3])
    for is_writable in (True, False):
        config = ShellEnvironmentConfig(root=sys.argv[1], writable=is_writable, **options)
        environment = ShellEnvironment(config)
        session = await environment.open(Item(id="i", row={}, messages=[Message(role="user")]), "trace")
        for command in json.loads(sys.argv[2]):
            arguments = json.dumps({"command": command})
            result = await session.call(ToolCall(id="i", call_id="c", name="shell", arguments=arguments))
            results.append(result.output)
        results.append(session._shell.protection)
        await session.close()
    print(json.dumps(results))
asyncio.run(main())
"""
COMMANDS = ["cat a.txt docs/private; id -u", "echo new > a.txt; rm -r docs; echo x > b; ls", "ls; cat a.txt"]
OF_OUR_OWN = "needs root, setpriv, unshare and a system Python that imports what rft imports"


def run_elsewhere(
    prefix: list[str], python: str, path: list[str], root: Path, **options: Any
) -> subprocess.CompletedProcess[str]:
    """The story, told by another user or under another mount table."""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(path), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [*prefix, python, "-c", STORY, str(root), json.dumps(COMMANDS), json.dumps(options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd="/")


def told_elsewhere(prefix: list[str], python: str, path: list[str], root: Path) -> list[str]:
    result = run_elsewhere(prefix, python, path, root)
    assert result.returncode == 0, result.stderr
    outputs: list[str] = json.loads(result.stdout)
    return outputs


def expect_both_kinds(outputs: list[str], how: str) -> None:
    """The story's outputs: copy-on-write first, then read-only."""
    text = "alpha\nbeta\ngamma\nfor the owner\n"
    assert outputs[0].startswith(text) and outputs[1].split() == ["a.txt", "b"] and "new" in outputs[2]
    assert how in outputs[3], outputs[3]
    assert outputs[4].startswith(text) and "Read-only file system" in outputs[5]
    assert outputs[6].split() == ["a.txt", "docs", "alpha", "beta", "gamma"] and "read-only" in outputs[7]


def test_an_ordinary_user_has_the_same(root: Path) -> None:
    """In a user namespace, without any right of root's."""
    setpriv, python = shutil.which("setpriv"), "/usr/bin/python3"
    python_path = [folder for folder in sys.path if not folder.startswith(sys.base_prefix)]
    probe = [python, "-c", "import pydantic, rft"]
    user = [str(setpriv), "--reuid", str(OTHER_USER), "--regid", str(OTHER_USER), "--clear-groups"]
    if os.geteuid() != 0 or setpriv is None or not os.path.exists(python):
        pytest.skip(OF_OUR_OWN)
    if subprocess.run(
        [*user, *probe], cwd="/", env={"PYTHONPATH": os.pathsep.join(python_path)}, timeout=60
    ).returncode:
        pytest.skip(OF_OUR_OWN)
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        place = Path(name)
        place.chmod(0o755)
        shutil.copytree(root, place / "root")
        for path in [place / "root", *(place / "root").rglob("*")]:
            os.chown(path, OTHER_USER, OTHER_USER)
        before = snapshot(place / "root")
        outputs = told_elsewhere(user, python, python_path, place / "root")
        expect_both_kinds(outputs, "copy-on-write")
        assert outputs[0].endswith(f"{OTHER_USER}\n")
        assert snapshot(place / "root") == before


def test_a_kernel_without_overlays_copies(root: Path) -> None:
    """A file system on which owners cannot be mapped and no overlay can be built: a copy, and that is said."""
    unshare = shutil.which("unshare")
    if os.geteuid() != 0 or unshare is None:
        pytest.skip(OF_OUR_OWN)
    place = root.parent / "ram"
    place.mkdir()
    script = 'mount -t ramfs ram "$1" && cp -a "$2/." "$1" && shift 2 && exec "$@"'
    prefix = [unshare, "-m", "sh", "-c", script, "sh", str(place), str(root)]
    outputs = told_elsewhere(prefix, sys.executable, sys.path, place)
    assert "copied" in outputs[3]
    assert outputs[0].startswith("alpha\nbeta\ngamma\nfor the owner\n") and outputs[1].split() == ["a.txt", "b"]
    assert "Read-only file system" in outputs[5]
    (root / "large").write_bytes(b"x" * (3 << 20))
    refused = run_elsewhere(prefix, sys.executable, sys.path, place, disk_bytes=2 << 20)
    assert "must be copied, and has 3,145,759 bytes: more than the 2,097,152 of disk_bytes" in refused.stderr, (
        refused.stderr
    )


# --- how fast --------------------------------------------------------------------------------------------------------


def test_the_clip_keeps_both_ends() -> None:
    for size in (2, 10, 100):
        for chunk in (1, 3, 1000):
            clip, data = Clip(size), bytes(range(97, 123)) * 4
            for start in range(0, len(data), chunk):
                clip.add(data[start : start + chunk])
            half = size // 2
            expected = f"{data[:half].decode()}\n... {len(data) - size:,} bytes left out ...\n{data[-half:].decode()}"
            assert clip.text() == (data.decode() if len(data) <= size else expected)


def test_grep_over_many_files(root: Path) -> None:
    for number in range(5000):
        folder = root / f"d{number % 50}"
        folder.mkdir(exist_ok=True)
        (folder / f"f{number}.py").write_text(f"def function_{number}():\n    return {number}\n" * 20)
    many, one = told(root, "grep -rn def . | wc -l", "grep -rn 'function_4321()' . | head -1", output_bytes=1000)
    assert many.output == "100000\n"
    assert "d21/f4321.py:1:def function_4321" in one.output


@pytest.mark.slow
def test_a_hundred_sessions_at_once(root: Path) -> None:
    async def rollout(environment: ShellEnvironment, number: int) -> str:
        session = await environment.open(an_item(), str(number))
        try:
            await session.call(a_call("shell", command=f"echo {number} > mine"))
            await meeting.wait()  # all are open at once
            return (await session.call(a_call("shell", command="cat mine"))).output
        finally:
            await session.close()

    async def story() -> list[str]:
        environment = ShellEnvironment(ShellEnvironmentConfig(root=str(root)))
        return list(await asyncio.gather(*(rollout(environment, number) for number in range(100))))

    meeting = asyncio.Barrier(100)
    started = time.monotonic()
    assert asyncio.run(asyncio.wait_for(story(), 120)) == [f"{number}\n" for number in range(100)]
    assert time.monotonic() - started < 60, "far above the 5 s of an idle machine"


@pytest.mark.slow
def test_rate_of_small_commands(root: Path) -> None:
    started = time.monotonic()
    told(root, *["true"] * 300)
    assert 300 / (time.monotonic() - started) > 40, "far below the 200 and more of an idle machine"
