"""Starts pip, with a deadline, and never leaves it behind; turns what it says into one message with a cure."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path

from rft.errors import UserError, WorldError
from rft.supervise import supervised

_QUIET = ["--disable-pip-version-check", "--no-input", "--progress-bar=off", "--retries=3"]
_NO_NETWORK = ("onnection", "Temporary failure", "timed out", "SSLError", "ProxyError")


async def pip(command: str, *arguments: str, limit_s: float) -> tuple[int, str]:
    """Run `pip COMMAND ...` of this Python; returns the exit code and all it said. Raises WorldError after limit_s."""
    words = [sys.executable, "-m", "pip", command, *_QUIET, *arguments]
    with tempfile.TemporaryDirectory(prefix="rft-pip-") as scratch:
        process = await asyncio.create_subprocess_exec(
            *supervised(words, Path(scratch), "parent"),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            async with asyncio.timeout(limit_s):
                said = (await process.communicate())[0]
        except TimeoutError:
            raise WorldError(
                f"pip {command} took longer than {limit_s:.0f} s", cure="check the network, then do the same again"
            ) from None
        finally:
            if process.returncode is None:
                process.terminate()
                await process.wait()
    return process.returncode or 0, said.decode(errors="replace")


def check_pip() -> None:
    """Raises UserError where this Python has no pip."""
    from importlib.machinery import PathFinder

    if PathFinder.find_spec("pip") is None:  # importlib.util's would switch off setuptools' own distutils for good
        raise UserError("this Python has no pip", where=sys.executable, cure="run `python -m ensurepip`, then again")


def is_unreachable(said: str) -> bool:
    """Whether pip got no answer from an index."""
    retries = [line for line in said.splitlines() if line.startswith("WARNING: Retrying")]
    return any(word in line for line in retries for word in _NO_NETWORK)


def is_full(said: str) -> bool:
    """Whether pip found no room on a disk."""
    return "No space left" in said


def refusal(problem: str, said: str) -> WorldError:
    """The last error pip gave, and what helps against it."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    reason = ([line for line in lines if line.startswith("ERROR")] or lines or ["pip gave no reason"])[-1]
    if (start := "The conflict is caused by:") in lines:
        reason = "; ".join(lines[lines.index(start) + 1 :]).partition("; To fix this")[0]
    if is_full(said):
        cure = "free some disk space and do the same again: it goes on where it was"
    elif is_unreachable(said):
        cure = "pip cannot reach its index: check the network and pip's configuration, then do the same again"
    else:
        cure = "check the indexes in pip's configuration, then do the same again: it goes on where it was"
    return WorldError(f"{problem}: {reason[:600]}", cure=cure)
