"""Several hosts on this machine: network namespaces with addresses of their own, cables, and a switch between them.

Every host has one end of a veth pair, the switch (cable.py, in a namespace of its own) the other ends. A cable can be
cut without a word, slowed down and made to lose packets, in a way that needs nothing of the kernel but veth pairs and
packet sockets; a link can be taken down. Works as root and, where the kernel allows it, in a user namespace. All
processes end with the block that made them, and with us.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rft.supervise import supervised

DEADLINE_S = 60.0
PROGRAMS = ("ip", "ss", "unshare", "nsenter", "mount")
_CABLE = Path(__file__).with_name("cable.py")


def why_not() -> str:
    """Why there can be no such network here; "" when there can."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if missing:
        return f"no network of namespaces here: {', '.join(missing)} missing (apt-get install iproute2 util-linux)"
    command = [*_unshare(), "--net", "ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth1"]
    tried = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, env=_env(), check=False)
    return f"no network of namespaces here: {tried.stderr.strip()}" if tried.returncode else ""


class Host:
    """One host: its address, and processes in its namespace."""

    def __init__(self, name: str, address: str, holder: subprocess.Popen[bytes]) -> None:
        self.name, self.address, self._holder = name, address, holder

    def command(self, *command: str, hidden: Path | None = None) -> list[str]:
        """What runs `command` on this host. hidden: a folder that is empty here, as if it were not shared."""
        found = [*_nsenter(self._holder.pid), *command]
        if hidden is None:
            return found
        script = 'mount -t tmpfs -o size=64m none "$0" && exec "$@"'
        return [*_nsenter(self._holder.pid), "unshare", "--mount", "sh", "-c", script, str(hidden), *command]

    def run(self, *command: str) -> str:
        """The output of a short command on this host, which must succeed."""
        done = subprocess.run(
            self.command(*command), capture_output=True, text=True, timeout=DEADLINE_S, env=_env(), check=False
        )
        assert done.returncode == 0, f"{self.name}: {command}: {done.stderr}"
        return done.stdout

    @contextmanager
    def running(self, log: Path, *command: str, hidden: Path | None = None) -> Iterator[Process]:
        """A process on this host, and all that it starts, for as long as the block lasts; its words go to `log`."""
        inner = supervised(self.command(*command, hidden=hidden), log.parent / f".{log.name}.scratch", grace_s=10.0)
        with log.open("ab") as words:
            started = subprocess.Popen(inner, stdin=subprocess.PIPE, stdout=words, stderr=words, env=_env())
        process = Process(started, log)
        try:
            yield process
        finally:
            process.end()

    def link(self, state: str) -> None:
        """`down` takes this host's own end of its cable out; `up` plugs it in again."""
        self.run("ip", "link", "set", "eth0", state)


@dataclass(frozen=True, slots=True)
class Process:
    """A running command."""

    started: subprocess.Popen[bytes]
    log: Path

    @property
    def is_alive(self) -> bool:
        return self.started.poll() is None

    @property
    def words(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self, deadline_s: float) -> int:
        """Its exit code, once it has ended by itself."""
        return self.started.wait(timeout=deadline_s)

    def end(self) -> None:
        assert self.started.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.started.stdin.close()
        self.started.wait(timeout=DEADLINE_S)


class Network:
    """The hosts by name, and what can be done to their cables."""

    def __init__(self, hosts: dict[str, Host], switch: subprocess.Popen[str]) -> None:
        self.hosts, self._switch = hosts, switch

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def cut(self, name: str) -> None:
        """From now on nothing gets through the host's cable, and neither side is told."""
        self._tell(f"cut {name}")

    def mend(self, name: str) -> None:
        """The cable is as it was at first."""
        self._tell(f"mend {name}")

    def worsen(self, name: str, delay_s: float, loss: float) -> None:
        """Every packet through the host's cable takes longer, and a share of them is lost."""
        self._tell(f"worsen {name} {delay_s} {loss}")

    def num_lost(self) -> int:
        """Packets that were lost or cut off so far."""
        return int(self._tell("lost"))

    def _tell(self, line: str) -> str:
        assert self._switch.stdin is not None and self._switch.stdout is not None
        self._switch.stdin.write(line + "\n")
        self._switch.stdin.flush()
        answer = self._switch.stdout.readline()
        assert answer.startswith("ok"), f"the switch said {answer!r} to {line!r}"
        return answer.removeprefix("ok").strip()


@contextmanager
def network(*names: str) -> Iterator[Network]:
    """Hosts of these names, which reach each other."""
    with contextlib.ExitStack() as stack:
        hub = stack.enter_context(_holding([*_unshare(), "--net"]))
        hosts = {}
        for index, name in enumerate(names, start=1):
            holder = stack.enter_context(_holding([*_nsenter(hub.pid), "unshare", "--net"]))
            host = hosts[name] = Host(name, f"10.77.0.{index}", holder)
            host.run("ip", "link", "add", "eth0", "type", "veth", "peer", "name", name, "netns", str(hub.pid))
            host.run("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                host.run("ip", "link", "set", device, "up")
        switch = subprocess.Popen(
            [*_nsenter(hub.pid), sys.executable, str(_CABLE), *names],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=_env(),
        )
        stack.callback(_close, switch)
        found = Network(hosts, switch)
        found._tell("lost")  # it is there
        yield found


def until(is_so: object, what: str, *alive: Process, deadline_s: float = 600.0) -> None:
    """Wait for something that other processes do. Fails when one of `alive` ends first."""
    assert callable(is_so)
    deadline = time.monotonic() + deadline_s
    while not is_so():
        for process in alive:
            assert process.is_alive, f"{what}: a process ended first:\n{process.words[-3000:]}"
        assert time.monotonic() < deadline, f"{what}: not within {deadline_s:.0f} s\n" + "\n".join(
            process.words[-3000:] for process in alive
        )
        time.sleep(0.05)


@contextmanager
def _holding(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that keeps a namespace until its standard input ends, as it does when we die."""
    holder = subprocess.Popen([*command, "cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=_env())
    try:
        until(lambda: Path(f"/proc/{holder.pid}/comm").read_text() == "cat\n", "a namespace", deadline_s=DEADLINE_S)
        yield holder
    finally:
        _close(holder)


def _close(process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.close()
    process.wait(timeout=DEADLINE_S)


def _unshare() -> list[str]:
    return ["unshare", *([] if os.getuid() == 0 else ["--user", "--map-root-user"])]


def _nsenter(pid: int) -> list[str]:
    user = [] if os.getuid() == 0 else ["--user", "--preserve-credentials"]
    return ["nsenter", "--target", str(pid), *user, "--net"]


def _path() -> str:
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


def _env() -> dict[str, str]:
    python = os.pathsep.join(path for path in sys.path if path)
    return os.environ | {"PATH": _path(), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": python}
