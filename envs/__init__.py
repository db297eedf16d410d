"""Environments: the world a rollout acts in. One file per adapter, `build_environment` picks it.

An Environment is opened once per rollout; the Session it returns belongs to that rollout alone and is closed
with it, also on cancellation.
"""

from __future__ import annotations

if __name__ != "rft.envs":
    raise ImportError("this folder is the package rft.envs: `import rft.envs`, not `import envs`")

from typing import Annotated

from pydantic import Field

from rft.envs.base import Environment, Session, ToolSpecs
from rft.envs.bridges.gymnasium import GymnasiumEnvironmentConfig
from rft.envs.bridges.openenv import OpenEnvEnvironmentConfig
from rft.envs.bridges.trl import TrlEnvironmentConfig
from rft.envs.bridges.verifiers import VerifiersEnvironmentConfig
from rft.envs.functions import FunctionsEnvironmentConfig
from rft.envs.http import HttpEnvironmentConfig
from rft.envs.python import PythonEnvironmentConfig
from rft.envs.retrieval import RetrievalEnvironmentConfig
from rft.envs.shell import ShellEnvironmentConfig

__all__ = ["Environment", "EnvironmentConfig", "Session", "ToolSpecs", "build_environment", "discover_tools"]

EnvironmentConfig = Annotated[
    FunctionsEnvironmentConfig
    | GymnasiumEnvironmentConfig
    | HttpEnvironmentConfig
    | OpenEnvEnvironmentConfig
    | PythonEnvironmentConfig
    | RetrievalEnvironmentConfig
    | ShellEnvironmentConfig
    | TrlEnvironmentConfig
    | VerifiersEnvironmentConfig,
    Field(discriminator="type"),
]


def build_environment(config: EnvironmentConfig) -> Environment:
    """The adapter that `config.type` names, imported when used."""
    if isinstance(config, HttpEnvironmentConfig):
        from rft.envs.http import HttpEnvironment

        return HttpEnvironment(config)
    if isinstance(config, FunctionsEnvironmentConfig):
        from rft.envs.functions import FunctionsEnvironment

        return FunctionsEnvironment(config)
    if isinstance(config, RetrievalEnvironmentConfig):
        from rft.envs.retrieval import RetrievalEnvironment

        return RetrievalEnvironment(config)
    if isinstance(config, ShellEnvironmentConfig):
        from rft.envs.shell import ShellEnvironment

        return ShellEnvironment(config)
    if isinstance(config, TrlEnvironmentConfig):
        from rft.envs.bridges.trl import TrlEnvironment

        return TrlEnvironment(config)
    if isinstance(config, GymnasiumEnvironmentConfig):
        from rft.envs.bridges.gymnasium import GymnasiumEnvironment

        return GymnasiumEnvironment(config)
    if isinstance(config, OpenEnvEnvironmentConfig):
        from rft.envs.bridges.openenv import OpenEnvEnvironment

        return OpenEnvEnvironment(config)
    if isinstance(config, VerifiersEnvironmentConfig):
        from rft.envs.bridges.verifiers import VerifiersEnvironment

        return VerifiersEnvironment(config)
    from rft.envs.python import PythonEnvironment

    return PythonEnvironment(config)


async def discover_tools(config: EnvironmentConfig | None) -> ToolSpecs:
    """The tools that rows may name, and their specs where the environment knows them. Raises UserError."""
    if config is None:
        return {}
    environment = build_environment(config)
    try:
        return await environment.discover()
    finally:
        await environment.close()
