"""What a session with an MCP server is opened with: its configuration, and the private folder of a rollout.

Guarantees: a wrong command or folder is named before anything is started; `RolloutFolder.remove` leaves nothing, also
when the copy it waits for failed or its waiter was cancelled. Does not start anything.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from rft.envs.http import check_headers, is_absolute
from rft.errors import ToolError

FOLDER = "{rollout_dir}"


class McpServerConfig(BaseModel):
    """One server: a `command` that speaks over its standard input and output, or a `url` (streamable HTTP).

    A command is looked for beside rft's own Python, then on PATH; it sees PATH, HOME and the like of our environment
    and `env`. `{rollout_dir}` in `args`, `env` and `cwd` becomes the private folder of the rollout. `tools`: the names
    that are served, null for all; `prefix` is put before them. Values of `env` and `headers` are never shown.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    command: str | None = Field(default=None, min_length=1)
    args: tuple[str, ...] = ()
    env: dict[str, SecretStr] = Field(default_factory=dict)
    cwd: str | None = None
    url: str | None = None
    headers: dict[str, SecretStr] = Field(default_factory=dict)
    state: Literal["per_rollout", "shared"] = "per_rollout"
    tools: tuple[str, ...] | None = None
    prefix: str = ""
    timeout_s: float = Field(default=600.0, gt=0, description="per call")
    start_timeout_s: float = Field(default=60.0, gt=0)

    _sendable = field_validator("headers")(check_headers)

    @model_validator(mode="after")
    def _coherent(self) -> McpServerConfig:
        if (self.command is None) == (self.url is None):
            raise ValueError("either command or url is needed, and not both")
        if self.url is not None and not is_absolute(self.url):
            raise ValueError("url must start with http:// or https://")
        if self.url is not None and (self.args or self.env or self.cwd):
            raise ValueError("args, env and cwd belong to a command, not to a url")
        if self.command is not None and self.headers:
            raise ValueError("headers belong to a url, not to a command; use env")
        if self.state == "shared" and self.wants_folder:
            raise ValueError(f"{FOLDER} belongs to one rollout; use state: per_rollout")
        return self

    @property
    def wants_folder(self) -> bool:
        texts = [*self.args, *(value.get_secret_value() for value in self.env.values()), self.cwd or ""]
        return any(FOLDER in text for text in texts)

    @property
    def is_private_process(self) -> bool:
        return self.command is not None and self.state == "per_rollout"


@dataclass(frozen=True, slots=True)
class Process:
    """A server to start: its environment is PATH, HOME and the like of ours, and `env`. `folder`: see supervised."""

    command: list[str]
    env: dict[str, str] = field(repr=False)
    cwd: Path | None
    folder: Path


@dataclass(frozen=True, slots=True)
class Remote:
    """A server that is there already."""

    url: str = field(repr=False)
    headers: dict[str, str] = field(repr=False)


class RolloutFolder:
    """A fresh folder, made when first asked for, empty or a copy of `template`; `remove` leaves nothing of it."""

    def __init__(self, template: Path | None) -> None:
        self._template = template
        self._making: asyncio.Task[Path] | None = None
        self._path: Path | None = None

    async def path(self) -> Path:
        """Raises OSError when the template cannot be copied."""
        if self._making is None:
            self._path = _make_folder()
            self._making = asyncio.create_task(asyncio.to_thread(self._fill, self._path))
        return await asyncio.shield(self._making)  # whoever waits may be cancelled; `remove` waits for the copy's end

    async def remove(self) -> None:
        if self._making is not None and self._path is not None:
            await asyncio.wait({self._making})
            await asyncio.to_thread(shutil.rmtree, self._path, ignore_errors=True)

    def _fill(self, path: Path) -> Path:
        if self._template is not None:
            shutil.copytree(self._template, path, symlinks=True, dirs_exist_ok=True)
        return path


def _make_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="rft-mcp-")).resolve()


async def target(name: str, server: McpServerConfig, folder: RolloutFolder) -> Process | Remote:
    """What to open, with the rollout's folder filled in. Raises ToolError with a cure."""
    if server.url is not None:
        return Remote(server.url, {key: value.get_secret_value() for key, value in server.headers.items()})
    try:
        path = await folder.path()
    except (OSError, shutil.Error) as error:
        problem = f"MCP server {name}: the folder of a rollout cannot be made: {error}"
        raise ToolError(problem, cure="check environment.template_dir and the space in the temporary folder") from None
    env = {key: value.get_secret_value().replace(FOLDER, str(path)) for key, value in server.env.items()}
    cwd = Path(server.cwd.replace(FOLDER, str(path))) if server.cwd is not None else None
    if cwd is not None and not cwd.is_dir():
        raise ToolError(f"MCP server {name}: there is no folder {cwd}", cure="create it, or correct its cwd")
    command = _executable(name, str(server.command), env.get("PATH"))
    return Process([command, *(arg.replace(FOLDER, str(path)) for arg in server.args)], env, cwd, path)


def _executable(name: str, command: str, path: str | None) -> str:
    beside = os.path.dirname(sys.executable)
    found = shutil.which(command, path=os.pathsep.join([beside, path or os.environ.get("PATH", os.defpath)]))
    if found is None:
        raise ToolError(
            f"MCP server {name}: there is no command {command}",
            cure="install it, or give the path of the program in `command` (its arguments go into `args`)",
        )
    return os.path.abspath(found)
