"""API keys: made once, shown once, stored as a hash; each belongs to a project.

A key is 43 characters of randomness, so one SHA-256 protects it; admin keys may also give other projects access.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from dataclasses import dataclass

from rft.server.errors import ApiError
from rft.server.ids import new_id
from rft.server.index import Index

DEFAULT_PROJECT = "proj_default"
_KIND = "api_key"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: the default is everybody of a server without keys."""

    project: str = DEFAULT_PROJECT
    is_admin: bool = True


class Keys:
    """The keys of a data folder."""

    def __init__(self, index: Index) -> None:
        self._index = index

    def create(self, project: str, *, is_admin: bool = False) -> str:
        """A new key; it cannot be read again."""
        key = "sk-rft-" + secrets.token_urlsafe(32)
        body = {"id": _digest(key), "name": new_id("key_"), "is_admin": is_admin, "created_at": int(time.time())}
        self._index.put(_KIND, body, project=project)
        return key

    def caller(self, authorization: str) -> Caller:
        """Whose key the header `Authorization: Bearer KEY` holds. Raises ApiError (401)."""
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise ApiError(
                "You didn't provide an API key. Send it in the header Authorization: Bearer KEY;"
                " `rft serve --create-key` makes one.",
                status=401,
                code="missing_api_key",
            )
        digest = _digest(key.strip())
        found, project = self._index.get(_KIND, digest), self._index.project_of(_KIND, digest)
        if found is None or project is None:
            raise ApiError("Incorrect API key provided.", status=401, code="invalid_api_key")
        return Caller(project, bool(found["is_admin"]))


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()
