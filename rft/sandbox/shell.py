"""A shell in a sandbox of its own: one worker, one folder, commands one after the other.

Guarantees, beyond the sandbox's: without namespaces it does not start; files and the current folder last from call to
call, processes do not; a worker that was lost is not replaced by one that has forgotten everything.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rft.sandbox import CodeError, KilledError, Limits, Sandbox, SandboxError, _Worker
from rft.sandbox.tree import TREE

SOURCE = Path(__file__).with_name("commands.py").read_text(encoding="utf-8")
MAX_COMMAND_BYTES = 100_000  # the kernel's limit for one argument is 131,072
MAX_OUTPUT_BYTES = 150_000  # six times this, as JSON may write it, is still a reply
MAX_FILES = 100_000  # that a session may make; each costs about 1 kB of the kernel's memory
_SLACK_S = 5.0  # after which a command that held up its own deadline is ended by the worker


@dataclass(frozen=True, slots=True)
class Tree:
    """The folder that appears as TREE. `is_writable`: copy-on-write, the folder itself never changes."""

    folder: Path
    is_writable: bool
    max_processes: int = 64


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command, or a look into a file, showed. `problem`: why there is no, or not all, output."""

    output: str
    exit_code: int | None = None
    problem: str = ""
    notes: tuple[str, ...] = ()


class Shell(Sandbox):
    """Starts with its first command. Commands wait for each other."""

    def __init__(self, tree: Tree, limits: Limits, output_bytes: int) -> None:
        super().__init__(
            SOURCE,
            function="answer",
            num_workers=1,
            wall_s=limits.wall_s + _SLACK_S,
            memory_bytes=limits.memory_bytes,
            disk_bytes=limits.disk_bytes,
        )
        self._tree, self._output_bytes, self._timeout_s = tree, output_bytes, limits.wall_s
        self._cwd, self._was_started = TREE, False

    async def run(self, command: str) -> Outcome:
        """Run a command in the current folder, which is the one the last command ended in. Raises SandboxError."""
        size = len(command.encode("utf-8", errors="replace"))
        if "\0" in command or size > MAX_COMMAND_BYTES:
            return Outcome("", problem=f"a command has at most {MAX_COMMAND_BYTES:,} bytes, none of them zero")
        outcome, reply = await self._request(command=command, timeout_s=self._timeout_s)
        if isinstance(cwd := reply.get("cwd"), str):
            self._cwd = cwd
        return outcome

    async def read(self, path: str, start_line: int = 1, end_line: int | None = None) -> Outcome:
        """Lines of a file, the first is 1, the last one included. Raises SandboxError."""
        return (await self._request(path=path, start_line=start_line, end_line=end_line))[0]

    async def _request(self, **request: Any) -> tuple[Outcome, dict[str, Any]]:
        try:
            reply = await self.call({"home": TREE, "cwd": self._cwd, "output_bytes": self._output_bytes, **request})
        except KilledError:
            return Outcome("", problem="all processes of the command were killed, by itself or for want of memory"), {}
        except CodeError as error:
            return Outcome("", problem=self._problem_of(error)), {}
        reply = reply if isinstance(reply, dict) else {}
        problem = str(reply.get("error") or "")
        if "command" in request and reply.get("exit_code") is None:
            problem = f"the command did not end within {self._timeout_s:g} s and was ended"
        exit_code = reply.get("exit_code")
        notes = tuple(map(str, reply["notes"])) if isinstance(reply.get("notes"), list) else ()
        output = str(reply.get("output") or "")[: 2 * MAX_OUTPUT_BYTES]
        return Outcome(output, exit_code if isinstance(exit_code, int) else None, problem, notes), reply

    def _problem_of(self, error: CodeError) -> str:
        if error.kind == "timeout":
            return f"the command did not end within {self._timeout_s:g} s and was ended"
        if "MemoryError" in error.detail:
            return f"the command used more than {self._limits.memory_bytes:,} bytes of memory and was ended"
        return f"the command was ended: {error.detail.splitlines()[-1][:200] if error.detail else error.kind}"

    def _settings(self) -> dict[str, Any]:
        tree = {"folder": str(self._tree.folder.resolve()), "is_writable": self._tree.is_writable}
        extra = {"tree": tree, "max_processes": self._tree.max_processes, "max_files": MAX_FILES}
        return super()._settings() | extra

    async def _start(self) -> _Worker:
        if self._was_started:
            raise SandboxError("the shell was lost, and with it everything that was done in it")
        self._was_started = True
        return await super()._start()
