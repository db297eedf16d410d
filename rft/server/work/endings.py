"""How the process of a job ended: what it said, or why it could not say anything.

A run that says how it ended is believed; one that ends without a word has crashed and may be started again. A disk
that refuses is a pause: a person must free it, and nothing is lost. Error texts are the run's own, without secrets.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from rft.errors import GraderError, GraderFailuresError, StorageError, ToolError, ToolsDownError

REDACTED = "[redacted]"
_GRADER, _TOOLS = "method.reinforcement.grader", "method.reinforcement.tools"
_CODES: dict[str, tuple[str, str | None]] = {
    GraderFailuresError.__name__: ("grader_failure_rate_exceeded", _GRADER),
    GraderError.__name__: ("training_failed", _GRADER),
    ToolsDownError.__name__: ("tool_endpoint_unreachable", _TOOLS),
    ToolError.__name__: ("tool_endpoint_unreachable", _TOOLS),
}
_SECRET_KEYS = ("headers", "env", "api_key")
_MIN_SECRET = 4  # characters; shorter ones would blacken ordinary words


@dataclass(frozen=True, slots=True)
class Ending:
    """The end of one process. `message` says why, for all but a success."""

    kind: Literal["succeeded", "paused", "cancelled", "failed", "crashed"]
    message: str = ""
    code: str = "training_failed"
    param: str | None = None


def judge(told: dict[str, Any] | None, state: dict[str, Any], *, is_done: bool, last_lines: list[str]) -> Ending:
    """told: what the command wrote about its error, None when nothing. state: of this process, {} without one."""
    if state.get("status") == "succeeded" and is_done:
        return Ending("succeeded")
    if state.get("status") == "paused":
        return Ending("paused")
    if told is None:
        return Ending("crashed", state.get("error") or "\n".join(last_lines) or "it was killed before it said anything")
    message = str(told.get("error", ""))
    if told.get("kind") == StorageError.__name__:
        return Ending("paused", message)
    if str(told.get("where", "")).startswith("environment."):
        return Ending("failed", message, "tool_endpoint_unreachable", _TOOLS)
    code, param = _CODES.get(str(told.get("kind")), ("training_failed", None))
    return Ending("failed", message, code, param)


def blackened(text: str, config: Path) -> str:
    """The text with every header, key and environment value of a run's config blackened, where one got into it."""
    try:
        tree = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return text
    for secret in sorted(_secrets(tree, is_secret=False), key=len, reverse=True):
        text = text.replace(secret, REDACTED)
    return text


def _secrets(value: Any, *, is_secret: bool) -> set[str]:
    if isinstance(value, dict):
        parts = (_secrets(entry, is_secret=is_secret or key in _SECRET_KEYS) for key, entry in value.items())
        return set().union(*parts)
    if isinstance(value, list):
        return set().union(*(_secrets(entry, is_secret=is_secret) for entry in value))
    if not is_secret or not isinstance(value, str):
        return set()
    words = {value, value.rpartition(" ")[2]}  # "Bearer KEY": the key alone as well
    return {word for word in words if len(word) >= _MIN_SECRET}
