"""Environments: the world a rollout acts in. One file per adapter, `build_environment` picks it.

An Environment is opened once per rollout; the Session it returns belongs to that rollout alone and is closed
with it, also on cancellation.
"""

from __future__ import annotations

if __name__ != "rft.envs":
    raise ImportError("this folder is the package rft.envs: `import rft.envs`, not `import envs`")

from importlib import import_module
from typing import Annotated

from pydantic import Field

from rft.envs.base import Environment, Session, ToolSpecs
from rft.envs.bridges.gymnasium import GymnasiumEnvironmentConfig
from rft.envs.bridges.openenv import OpenEnvEnvironmentConfig
from rft.envs.bridges.trl import TrlEnvironmentConfig
from rft.envs.bridges.verifiers import VerifiersEnvironmentConfig
from rft.envs.functions import FunctionsEnvironmentConfig
from rft.envs.http import HttpEnvironmentConfig
from rft.envs.mcp import McpEnvironmentConfig
from rft.envs.python import PythonEnvironmentConfig
from rft.envs.retrieval import RetrievalEnvironmentConfig
from rft.envs.shell import ShellEnvironmentConfig

__all__ = ["Environment", "EnvironmentConfig", "Session", "ToolSpecs", "build_environment", "discover_tools"]

EnvironmentConfig = Annotated[
    FunctionsEnvironmentConfig
    | GymnasiumEnvironmentConfig
    | HttpEnvironmentConfig
    | McpEnvironmentConfig
    | OpenEnvEnvironmentConfig
    | PythonEnvironmentConfig
    | RetrievalEnvironmentConfig
    | ShellEnvironmentConfig
    | TrlEnvironmentConfig
    | VerifiersEnvironmentConfig,
    Field(discriminator="type"),
]


def build_environment(config: EnvironmentConfig) -> Environment:
    """The adapter of a config: `XEnvironment` for `XEnvironmentConfig`, in the same module."""
    name = type(config).__name__.removesuffix("Config")
    environment: Environment = getattr(import_module(type(config).__module__), name)(config)
    return environment


async def discover_tools(config: EnvironmentConfig | None) -> ToolSpecs:
    """The tools that rows may name, and their specs where the environment knows them. Raises UserError."""
    if config is None:
        return {}
    environment = build_environment(config)
    try:
        return await environment.discover()
    finally:
        await environment.close()
