"""A sandboxed shell over a folder: every rollout works in a view of its own, and none can change the folder.

Guarantees: no network, no file of the user's but the folder, limits on time, memory, disk and processes; what a
rollout wrote and started is gone when it ends, also when rft is killed. Linux with namespaces only: where the kernel
refuses them, `check` says so and nothing runs. See rft/sandbox for how.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import tempfile
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from rft.envs.base import Session, ToolSpecs
from rft.envs.outage import Outages
from rft.envs.tasks import ArgumentError, Tool
from rft.envs.toolbox import Toolbox
from rft.errors import ToolError, UserError
from rft.sandbox import Limits, SandboxError
from rft.sandbox.shell import MAX_OUTPUT_BYTES, Outcome, Shell, Tree
from rft.types import Item, ToolCall, ToolResult

logger = logging.getLogger(__name__)

_PLACEHOLDER = re.compile(r"\{item\.([A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*)\}")
_WHERE = "environment.root"


class ShellEnvironmentConfig(BaseModel):
    """`root` may contain `{item.field}`: then every row has a folder of its own. Memory holds what a rollout writes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["shell"] = "shell"
    root: str = Field(min_length=1)
    writable: bool = Field(default=True, description="true: copy-on-write; false: only /tmp can be written")
    timeout_s: float = Field(default=60.0, gt=0, description="per command")
    output_bytes: int = Field(default=20_000, ge=100, le=MAX_OUTPUT_BYTES, description="of an answer; its middle goes")
    memory_bytes: int = Field(default=2**30, ge=2**26, description="of a command's processes together")
    disk_bytes: int = Field(default=2**28, ge=2**20, description="of what one rollout writes")
    max_processes: int = Field(default=64, ge=8)

    @field_validator("root")
    @classmethod
    def _placeholders_are_known(cls, root: str) -> str:
        if re.search(r"[{}]", _PLACEHOLDER.sub("", root)):
            raise ValueError("only {item.FIELD} may stand in braces")
        return root


class ShellEnvironment:
    """Opens a shell for every rollout."""

    def __init__(self, config: ShellEnvironmentConfig) -> None:
        self.config = config
        self.outages = Outages()  # of which this machine has none
        self._starts = asyncio.Semaphore(2 * (os.cpu_count() or 1))  # more at once would only be slower, each of them

    async def discover(self) -> ToolSpecs:
        return {name: Tool(method).spec() for name, method in _methods(ShellSession).items()}

    async def check(self) -> None:
        """Open a shell on the folder, or on an empty one where the rows name theirs. Raises UserError."""
        folder = fixed_folder(self.config.root)
        with tempfile.TemporaryDirectory(prefix="rft-shell-") as empty:
            shell = self._shell(Path(empty) if _PLACEHOLDER.search(self.config.root) else folder)
            try:
                await shell.start()
            except SandboxError as error:
                cure = "run on Linux where namespaces are permitted (in a container: --privileged), and see rft/sandbox"
                raise UserError(f"no sandboxed shell can be opened here: {error}", where=_WHERE, cure=cure) from None
            finally:
                await shell.close()
        logger.info("shell: %s", shell.protection)

    async def open(self, item: Item, rollout_id: str) -> ShellSession:
        """Raises ToolError when the row names no folder, or the shell does not start."""
        shell = self._shell(folder_of(self.config.root, item.row))
        try:
            async with self._starts:
                await shell.start()
        except SandboxError as error:
            await shell.close()
            raise ToolError(f"no shell: {error}") from None
        except BaseException:  # also cancellation: no process may be left
            await shell.close()
            raise
        return ShellSession(shell, item)

    async def close(self) -> None:
        """Nothing to release: shells end with their sessions."""

    def _shell(self, folder: Path) -> Shell:
        limits = Limits(self.config.timeout_s, self.config.memory_bytes, self.config.disk_bytes)
        tree = Tree(folder, self.config.writable, self.config.max_processes)
        return Shell(tree, limits, self.config.output_bytes)


class ShellSession(Session):
    """The shell of one rollout; the calls of a turn are executed one after the other, in their order."""

    def __init__(self, shell: Shell, item: Item) -> None:
        self._shell, self._item = shell, item
        methods = [getattr(self, name) for name in _methods(type(self))]
        self._toolbox = Toolbox([Tool(method) for method in methods], timeout_s=None)  # the shell keeps its deadline

    async def call(self, call: ToolCall) -> ToolResult:
        """What the command printed. A command that fails is an answer; one that had to be ended is an error."""
        return await self._toolbox.call(call, self._item)

    async def close(self) -> None:
        await self._shell.close()

    async def shell(self, command: str) -> str:
        """Run a shell command. Files and the current folder are kept between calls; processes are not."""
        outcome = await self._shell.run(command)
        text = _text(outcome)
        if outcome.exit_code:
            return f"{text}{'' if text.endswith(chr(10)) or not text else chr(10)}[exit code {outcome.exit_code}]"
        return text or "(no output)"

    async def read_file(
        self,
        path: str,
        start_line: Annotated[int, Field(ge=1)] = 1,
        end_line: Annotated[int | None, Field(ge=1)] = None,
    ) -> str:
        """Read a file, or some of its lines.

        Args:
            start_line: the first is 1
            end_line: included
        """
        return _text(await self._shell.read(path, start_line, end_line))


def _methods(session: type[ShellSession]) -> dict[str, Any]:
    """The tools by name, without `self`."""
    unbound = object.__new__(session)
    return {name: getattr(unbound, name) for name in ("shell", "read_file")}


def _text(outcome: Outcome) -> str:
    """What the model reads. Raises ArgumentError with it when the command had to be ended, or there is no such file."""
    parts = [*(f"[{note}]" for note in outcome.notes), outcome.output]
    if outcome.problem:
        raise ArgumentError("\n".join(part for part in (*parts, f"[{outcome.problem}]") if part))
    return "\n".join(part for part in parts if part)


def fixed_folder(root: str) -> Path:
    """The part of it that is the same for all rows. Raises UserError when there is no such folder."""
    fixed, *placeholders = _PLACEHOLDER.split(root)
    folder = Path(os.path.dirname(fixed) or "." if placeholders else fixed)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}", where=_WHERE, cure="check the path")
    return folder


def folder_of(root: str, row: dict[str, Any]) -> Path:
    """The folder of a row. Raises ToolError when there is none, or the row's values lead out of where they stand."""
    folder = Path(_PLACEHOLDER.sub(lambda found: _value(row, found[1]), root))
    if not folder.is_dir():
        raise ToolError(f"there is no folder {folder}", cure=f"make it, or correct the row's field in {_WHERE}")
    return folder


def _value(row: dict[str, Any], field: str) -> str:
    value: Any = row
    for key in field.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    text = str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""
    path = PurePosixPath(text)
    if not text or path.is_absolute() or ".." in path.parts or "\0" in text:
        raise ToolError(f"the row's {field} cannot be a part of {_WHERE}: it must be text without .. or a leading /")
    return text
