"""What somebody gave us and nobody may read back: values of headers and of environment variables, parts of URLs."""

from __future__ import annotations

from typing import Any

from rft.wire import safe_url

REDACTED = "[redacted]"
_VALUES = ("headers", "env")  # objects whose keys may be read and whose values may not


def redacted(value: Any) -> Any:
    """The JSON value with every value in a `headers` or `env` object replaced, wherever that is."""
    if isinstance(value, list):
        return [redacted(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    return {
        key: dict.fromkeys(entry, REDACTED) if key in _VALUES and isinstance(entry, dict) else redacted(entry)
        for key, entry in value.items()
    }


def shareable(value: Any) -> Any:
    """The same for a reader outside: URLs also lose user, password, query and fragment."""
    if isinstance(value, list):
        return [shareable(entry) for entry in value]
    if isinstance(value, dict):
        return {key: shareable(entry) for key, entry in redacted(value).items()}
    return safe_url(value) if isinstance(value, str) and value.startswith(("http://", "https://")) else value
