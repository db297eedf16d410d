"""A server process that belongs to this one: started with its log, watched, ended with everything it started.

Guarantees: nothing of the process tree outlives `close` or our own death, however we die (see rft/supervise.py). Knows
nothing of what the process serves.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from pathlib import Path

from rft.supervise import GRACE_S, supervised

_CLOSE_MARGIN_S = 4.0  # on top of what the supervisor gives the command, twice
_TAIL_BYTES = 65536
_MAX_SOCKET_PATH = 90  # bytes; the system's limit is 107


class ServerProcess:
    """One running command. `scratch` is a private folder for its sockets and temporary files, removed at its end."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        scratch: Path,
        log_path: Path,
        log_offset: int = 0,
        grace_s: float = GRACE_S,
    ) -> None:
        self._process, self.scratch, self.log_path, self._grace_s = process, scratch, log_path, grace_s
        self._log_offset = log_offset  # where this process's part of the log begins

    @property
    def is_alive(self) -> bool:
        return self._process.returncode is None

    @property
    def exit_code(self) -> int:
        """Of a process that has ended; 128 and the signal for one that was killed."""
        code = self._process.returncode
        assert code is not None, "it has ended"
        return code

    async def has_ended(self, timeout_s: float) -> bool:
        """Wait at most `timeout_s` for the process to end by itself."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._process.wait()
        except TimeoutError:
            return False
        return True

    def log_tail(self, num_lines: int) -> list[str]:
        """The last lines of this process that are not empty, each without its line end."""
        with self.log_path.open("rb") as log:
            log.seek(max(self._log_offset, self.log_path.stat().st_size - _TAIL_BYTES))
            lines = log.read().decode("utf-8", errors="replace").splitlines()
        return [line.rstrip() for line in lines if line.strip()][-num_lines:]

    async def close(self) -> None:
        """End the process and all it started; returns when they are gone."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        if not await self.has_ended(2 * self._grace_s + _CLOSE_MARGIN_S):
            self._process.kill()
            await self._process.wait()


def make_scratch() -> Path:
    """A new private folder whose path is short enough to hold Unix sockets."""
    scratch = tempfile.mkdtemp(prefix="rft-")
    if len(os.fsencode(scratch)) > _MAX_SOCKET_PATH - 40:
        os.rmdir(scratch)
        scratch = tempfile.mkdtemp(prefix="rft-", dir="/tmp")
    return Path(scratch)


async def launch(
    command: list[str], env: dict[str, str], scratch: Path, log_path: Path, grace_s: float = GRACE_S
) -> ServerProcess:
    """Start `command` with `env` on top of our environment, its output appended to `log_path`.

    grace_s: what it may take to end after SIGTERM.
    """
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("ab") as log:
        log_offset = log.tell()
        process = await asyncio.create_subprocess_exec(
            *supervised(command, scratch, grace_s=grace_s),
            stdin=asyncio.subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=os.environ | {"TMPDIR": str(scratch)} | env,
            start_new_session=True,  # a Ctrl-C in the terminal is ours to handle, not the server's
        )
    return ServerProcess(process, scratch, log_path, log_offset, grace_s)
