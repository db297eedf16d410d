"""The proof that a training reaches nothing but this machine: a short one, confined, and all it tried to reach."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import shutil
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rft.config import load_config
from rft.errors import WorldError
from rft.files import rows
from rft.supervise import supervised

SHORT = [  # a step in miniature; what the user overrides comes after it and wins
    "training.steps=1",
    "training.items_per_step=2",
    "training.base_rollouts=2",
    "training.compute_multiplier=1",
    "evaluation.validation_items=2",
    "evaluation.test_items=2",
    "evaluation.rollouts_per_item=1",
]
_TAIL_LINES = 15
_CONFINED, _HOOK = Path(__file__).with_name("confined.py"), Path(__file__).with_name("hook")
_NO_NAMESPACE = 97  # what confined.py ends with when it may not make one


@dataclass(frozen=True, slots=True)
class Attempt:
    """Something that is not this machine: `host` is an address or a name, `by` a command line."""

    host: str
    port: str
    by: str
    what: str

    def in_words(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.what} {host}{self.port and ':'}{self.port}  by {self.by}"


@dataclass(frozen=True, slots=True)
class Proof:
    """What came of it. attempts: with how often; sees_all: system calls of every process, not only Python's."""

    exit_code: int
    attempts: Counter[Attempt]
    sees_all: bool
    tail: list[str]
    folder: Path


def check(config: Path, overrides: list[str], limit_s: float, say: Callable[[str], None]) -> Proof:
    """Train a step where only loopback exists. Raises UserError, and WorldError where nothing can be shown."""
    words = [*SHORT, *overrides]
    load_config(config, words)  # what is wrong with it is told before anything starts
    folder = Path(tempfile.mkdtemp(prefix="rft-offline-"))
    command = [sys.executable, "-m", "rft", "train", str(config), *words, f"runs_dir={folder}/runs"]
    say(f"training one short step with nothing but loopback; its words are in {folder}/training.log")
    exit_code = asyncio.run(_confined(command, folder, limit_s))
    if exit_code == _NO_NAMESPACE:
        shutil.rmtree(folder)
        raise _no_namespaces()
    proof = _proof(folder, exit_code)
    if exit_code == 0:
        shutil.rmtree(folder)
    return proof


async def _confined(command: list[str], folder: Path, limit_s: float) -> int:
    """Run it to its end; returns its exit code. Raises WorldError after limit_s."""
    paths = os.pathsep.join(filter(None, [str(_HOOK), os.environ.get("PYTHONPATH", "")]))
    shut_in = [sys.executable, "-I", str(_CONFINED), str(folder / "reached.jsonl"), *command]
    with (folder / "training.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *supervised(shut_in, folder / "scratch", "parent"),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ | {"PYTHONPATH": paths, "RFT_REACHED": str(folder / "reached.jsonl")},
        )
    try:
        async with asyncio.timeout(limit_s):
            return await process.wait()
    except TimeoutError:
        cure = f"read {folder}/training.log; --limit-s gives it longer"
        raise WorldError(f"the short training took longer than {limit_s:.0f} s", cure=cure) from None
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()


def _proof(folder: Path, exit_code: int) -> Proof:
    found = list(rows(folder / "reached.jsonl"))
    attempts = Counter(_attempt(row) for row in found if "host" in row and is_elsewhere(row["host"]))
    lines = (folder / "training.log").read_text(encoding="utf-8", errors="replace").splitlines()
    tail = [line.rstrip() for line in lines if line.strip()][-_TAIL_LINES:]
    return Proof(exit_code, attempts, any(row.get("sees") == "all" for row in found), tail, folder)


def _attempt(row: dict[str, Any]) -> Attempt:
    what = "looked up" if row["what"].startswith("socket.get") else "tried to reach"
    return Attempt(row["host"], str(row["port"] or ""), row["by"], what)


def is_elsewhere(host: str) -> bool:
    """Whether an address, or a name that is looked up, means another machine than this one."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host not in ("", "localhost", socket.gethostname())  # if that is looked up at a server, that is seen
    mapped = getattr(address, "ipv4_mapped", None) or address
    return not (mapped.is_loopback or mapped.is_unspecified)


def _no_namespaces() -> WorldError:
    cure = (
        "as root: sysctl -w user.max_user_namespaces=10000 kernel.unprivileged_userns_clone=1 (and on Ubuntu "
        "kernel.apparmor_restrict_unprivileged_userns=0); in a container: give it CAP_SYS_ADMIN; or run it as root"
    )
    return WorldError("this kernel lets us make no network namespace, so nothing can be shown", cure=cure)
