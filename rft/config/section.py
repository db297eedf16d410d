"""What every section of a configuration is."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """A section of the configuration: immutable, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)
