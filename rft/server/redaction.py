"""What a client gave us and may not read back: the header values of graders and tools."""

from __future__ import annotations

from typing import Any

REDACTED = "[redacted]"


def redacted(value: Any) -> Any:
    """The JSON value with every header value replaced, wherever a `headers` object is."""
    if isinstance(value, list):
        return [redacted(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    return {
        key: dict.fromkeys(entry, REDACTED) if key == "headers" and isinstance(entry, dict) else redacted(entry)
        for key, entry in value.items()
    }
