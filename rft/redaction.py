"""What somebody gave us and may not read back: the header values of graders and tools, and any secret of a config."""

from __future__ import annotations

import re
from typing import Any

from rft.wire import safe_url

REDACTED = "[redacted]"
_HOLDERS = ("headers", "env")  # objects of which every value is a secret
# not token counts, and not names of environment variables (`api_key_env`)
_SECRET = re.compile(
    r"(?i)(^|[_-])(api[_-]?key|apikey|secret|password|passwd|credentials?|authorization|bearer|cookie|token|key)$"
)
_URL = re.compile(r"(?i)[a-z][a-z0-9+.-]*://\S+")


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


def without_any_secret(value: Any) -> Any:
    """The JSON value without headers, environments, values whose key says secret, and what URLs and arguments hold.

    For what is only read: a URL loses its user, password and query.
    """
    if isinstance(value, list):
        return _arguments(value)
    if isinstance(value, str):
        return _url(value) if _URL.fullmatch(value) else value
    if not isinstance(value, dict):
        return value
    return {key: _entry(str(key), entry) for key, entry in value.items()}


def _entry(key: str, entry: Any) -> Any:
    if key in _HOLDERS and isinstance(entry, dict):
        return dict.fromkeys(entry, REDACTED)
    if _SECRET.search(key) and isinstance(entry, str) and entry:
        return REDACTED
    return without_any_secret(entry)


def _url(url: str) -> str:
    try:
        return safe_url(url)
    except ValueError:  # no URL after all
        return REDACTED


def _arguments(values: list[Any]) -> list[Any]:
    """A command line may have `--api-key KEY` and `--api-key=KEY`."""
    found: list[Any] = []
    is_secret = False
    for value in values:
        name, equals, _ = value.partition("=") if isinstance(value, str) else ("", "", "")
        names_secret = name.startswith("-") and _SECRET.search(name) is not None
        if is_secret and isinstance(value, str) and not value.startswith("--"):
            found.append(REDACTED)
        else:
            found.append(f"{name}={REDACTED}" if names_secret and equals else without_any_secret(value))
        is_secret = names_secret and not equals
    return found
