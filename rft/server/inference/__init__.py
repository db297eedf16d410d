"""Inference: models that answer over chat completions and responses, each local one in a process of its own."""

from __future__ import annotations

from rft.server.inference.service import Inference

__all__ = ["Inference"]
