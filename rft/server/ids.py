"""Ids of what the server makes: a prefix that says what it is, and letters and digits that nobody can guess."""

from __future__ import annotations

import secrets
import string

_ALPHABET = string.ascii_letters + string.digits


def new_id(prefix: str, length: int = 24) -> str:
    """For example `new_id("ftjob-")`."""
    return prefix + "".join(secrets.choice(_ALPHABET) for _ in range(length))
