"""Where only loopback exists: what is tried is written down, whoever tries it, and a training is judged by it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from loopback import without_network
from test_job import a_tree

from rft.offline.checking import is_elsewhere

ROOT = Path(__file__).resolve().parent.parent
CONFINED, HOOK = ROOT / "rft/offline/confined.py", ROOT / "rft/offline/hook"
FAR = "192.0.2.1"  # an address that belongs to nobody
CONNECT = (
    'import socket\ntry: socket.create_connection(("{host}", {port}), 5)\nexcept OSError as error: print(error.errno)'
)


def confined(log: Path, *command: str) -> list[dict[str, object]]:
    """What is written down of a command, without the first row, which says what can be seen."""
    without_network(["true"])  # skips, with the reason, where namespaces are refused
    environment = os.environ | {"PYTHONPATH": str(HOOK), "RFT_REACHED": str(log)}
    shut_in = [sys.executable, "-I", str(CONFINED), str(log), *command]
    result = subprocess.run(shut_in, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    if {"sees": "all"} not in rows:
        pytest.skip("the kernel lets nobody watch system calls with seccomp")
    return [row for row in rows if "host" in row]


@pytest.mark.parametrize(
    ("host", "elsewhere"),
    [
        ("127.0.0.1", False),
        ("127.8.9.10", False),
        ("::1", False),
        ("::ffff:127.0.0.1", False),
        ("0.0.0.0", False),
        ("localhost", False),
        ("", False),
        ("10.0.0.1", True),
        ("192.0.2.1", True),
        ("fe80::1%eth0", True),
        ("::ffff:192.0.2.1", True),
        ("example.invalid", True),
        ("(an address that could not be read)", True),
    ],
)
def test_what_is_elsewhere(host: str, elsewhere: bool) -> None:
    assert is_elsewhere(host) is elsewhere


def test_a_python_that_reads_no_environment_is_seen(tmp_path: Path) -> None:
    code = CONNECT.format(host=FAR, port=81)
    (row,) = confined(tmp_path / "log", sys.executable, "-I", "-c", code)
    assert (row["host"], row["port"], row["what"]) == (FAR, 81, "connect")
    assert "create_connection" in str(row["by"])


def test_a_program_that_is_not_python_is_seen(tmp_path: Path) -> None:
    if shutil.which("bash") is None:
        pytest.skip("there is no bash")
    (row,) = confined(
        tmp_path / "log", "bash", "-c", f"(exec 3<>/dev/tcp/{FAR}/82) 2>&1; (exec 3<>/dev/udp/::1/9); true"
    )[:1]
    assert (row["host"], row["port"]) == (FAR, 82)


def test_a_datagram_is_seen_and_what_has_no_address_is_not(tmp_path: Path) -> None:
    code = (
        "import socket\n"
        f"try: socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('{FAR}', 53))\n"
        "except OSError: pass\n"
        "one, two = socket.socketpair()\n"
        "one.sendall(b'x'); print(two.recv(1))"
    )
    (row,) = confined(tmp_path / "log", sys.executable, "-I", "-c", code)
    assert (row["host"], row["port"], row["what"]) == (FAR, 53, "sendto")


def test_a_child_and_an_ipv6_address_are_seen_and_loopback_works(tmp_path: Path) -> None:
    code = (
        "import socket, subprocess, sys\n"
        "server = socket.create_server(('127.0.0.1', 0))\n"
        "socket.create_connection(server.getsockname()).close()\n"
        f"subprocess.run([sys.executable, '-I', '-c', {CONNECT.format(host='2001:db8::1', port=83)!r}])"
    )
    rows = confined(tmp_path / "log", sys.executable, "-I", "-c", code)
    assert [row["host"] for row in rows] == ["127.0.0.1", "2001:db8::1"]
    assert rows[0]["pid"] != rows[1]["pid"]


def test_a_name_that_is_looked_up_is_written_down(tmp_path: Path) -> None:
    code = "import socket\ntry: socket.getaddrinfo('example.invalid', 443)\nexcept OSError: pass"
    rows = confined(tmp_path / "log", sys.executable, "-c", code)
    (named,) = [row for row in rows if row["host"] == "example.invalid"]
    assert (named["port"], named["what"]) == (443, "socket.getaddrinfo")


def test_the_hook_hides_no_other_sitecustomize(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.is_mine = True\n")
    environment = os.environ | {"PYTHONPATH": f"{HOOK}:{tmp_path}", "RFT_REACHED": str(tmp_path / "log")}
    command = [sys.executable, "-c", "import sys; print(sys.is_mine)"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.stdout.strip() == "True", result.stderr


def check_offline(path: Path, *arguments: str, first: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [*first, sys.executable, "-m", "rft", "check-offline", str(path), *arguments]
    environment = os.environ | {"COLUMNS": "300", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=3000, env=environment, cwd=ROOT)


def written(tmp_path: Path, **sections: object) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(a_tree(tmp_path, **sections)))
    return path


def test_a_wrong_config_is_told_before_anything_starts(tmp_path: Path) -> None:
    result = check_offline(written(tmp_path), "training.stepz=2")
    assert result.returncode == 2
    assert "training.stepz: unknown key" in result.stderr


def test_without_namespaces_it_says_what_to_do(tmp_path: Path) -> None:
    refusing = ("unshare", "-Ur", "sh", "-c", 'echo 0 > /proc/sys/user/max_net_namespaces && exec "$@"', "sh")
    if shutil.which("unshare") is None or subprocess.run([*refusing, "true"], capture_output=True).returncode != 0:
        pytest.skip("needs a user namespace in which network namespaces can be forbidden")
    result = check_offline(written(tmp_path), first=refusing)
    assert result.returncode == 1
    assert "lets us make no network namespace" in result.stderr and "max_user_namespaces" in result.stderr


@pytest.mark.slow
def test_a_training_that_stays_here_passes(tmp_path: Path) -> None:
    without_network(["true"])
    result = check_offline(written(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "offline: the training ended well and nothing else was tried; watched: every process" in result.stdout
    assert not (tmp_path / "runs").exists(), "its run is nobody's result"


@pytest.mark.slow
def test_a_training_with_a_grader_elsewhere_fails_and_names_it(tmp_path: Path) -> None:
    without_network(["true"])
    grader = {"type": "endpoint", "name": "far", "url": f"http://{FAR}:84/grade"}
    result = check_offline(written(tmp_path, grader=grader), "--limit-s", "500")
    assert result.returncode == 1
    assert f"tried to reach {FAR}:84  by " in result.stdout
    assert "not offline: " in result.stdout
