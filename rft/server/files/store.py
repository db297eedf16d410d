"""Files: what users upload and what jobs leave for them, one folder each (`content`, `file.json`) below `<data>/files`.

Guarantees: a file is listed only when all of it is on disk; a project sees its own files alone; a file whose time has
come is gone. A lost index is made again from the folders. Paths come from our ids, never from what users write.
"""

from __future__ import annotations

import asyncio
import heapq
import json
import logging
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field

from rft.errors import StorageError
from rft.files import read_json
from rft.plain import plain
from rft.server.errors import ApiError, not_found
from rft.server.files.disk import HIDDEN, Incoming, remove, storing
from rft.server.files.quota import Quota
from rft.server.ids import new_id
from rft.server.index import Index, Order, Page

PURPOSES = ("fine-tune", "evals", "user_data", "assistants", "batch", "vision")  # that users may give
FILE = "file"  # kind in the index
_MAX_NAME_CHARS = 255
_BATCH_EXPIRES_S = 2_592_000
_log = logging.getLogger("rft.server")


class ExpiresAfter(BaseModel):
    """When a file goes by itself."""

    anchor: Literal["created_at"]
    seconds: int = Field(ge=3600, le=2_592_000)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a file is to be called and used for."""

    filename: str
    purpose: str
    expires_after_s: int | None = None

    @classmethod
    def checked(cls, filename: str, purpose: str, expires_after: ExpiresAfter | None) -> Wanted:
        """From what a user wrote. Raises ApiError (400)."""
        if purpose not in PURPOSES:
            message = f"'{plain(purpose, max_chars=40)}' is not one of {list(PURPOSES)} - 'purpose'"
            raise ApiError(message, code="invalid_value", param="purpose")
        if purpose == "fine-tune" and not filename.lower().endswith(".jsonl"):
            message = (
                f"Invalid file format for Fine-Tuning API. Must be .jsonl, and the name of this file is"
                f" '{safe_name(filename)}'."
            )
            raise ApiError(message, code="invalid_file_format", param="file")
        seconds = expires_after.seconds if expires_after else _BATCH_EXPIRES_S if purpose == "batch" else None
        return cls(safe_name(filename), purpose, seconds)


def safe_name(filename: str) -> str:
    """The last part of a path, short, without characters that have no glyph: what a browser may show or save."""
    name = plain(re.split(r"[/\\]", filename)[-1].strip(), max_chars=_MAX_NAME_CHARS)
    return name if name.strip(".") else "upload"


class Files:
    """The files of a data folder. One thread, but for the bytes of an `Incoming`."""

    def __init__(self, index: Index, folder: Path, quota: Quota) -> None:
        """Takes in what is there; what a crash left half done is removed."""
        self._index, self._folder, self._quota = index, folder, quota
        self._expiring: list[tuple[int, str]] = []  # a heap
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._clean()
        for body in index.every(FILE):
            self._count(body, index.project_of(FILE, body["id"]) or "")

    def get(self, file_id: str, project: str, *, param: str = "file_id") -> dict[str, Any]:
        """The wire's object. Raises ApiError (404)."""
        self._expire()
        body = self._index.get(FILE, file_id, project=project)
        if body is None:
            raise not_found("File object", file_id, param=param, code="file_not_found")
        return body

    def path(self, file_id: str, project: str, *, purpose: str | None = None, param: str = "file_id") -> Path:
        """Where the content lies. Raises ApiError: 404, or 400 when the file has another purpose."""
        body = self.get(file_id, project, param=param)
        if purpose not in (None, body["purpose"]):
            message = f"File {file_id} has the purpose '{body['purpose']}'; '{purpose}' is needed here."
            raise ApiError(message, code="invalid_file_purpose", param=param)
        path: Path = self._folder / body["id"] / "content"
        if not path.is_file():  # removed behind our back
            raise not_found("File object", file_id, param=param, code="file_not_found")
        return path

    def page(self, project: str, *, limit: int, after: str | None, order: Order, purpose: str | None) -> Page:
        self._expire()
        where = None if purpose is None else {"$.purpose": purpose}
        return self._index.page(FILE, project=project, limit=limit, after=after, order=order, where=where)

    def delete(self, file_id: str, project: str) -> None:
        """Jobs have copies of what they need. Raises ApiError (404)."""
        self._remove(self.get(file_id, project), project)

    def incoming(self, project: str, max_bytes: int | None) -> Incoming:
        """Where the bytes of a new file go; see `keep`. max_bytes None: our own, never refused."""
        return Incoming(self._folder / new_id("file-"), self._quota, project, max_bytes)

    async def keep(self, incoming: Incoming, wanted: Wanted, project: str) -> dict[str, Any]:
        """The file whose bytes are all there, from now on listed; its wire object. Raises ApiError or StorageError."""
        body = _describe(incoming, wanted)
        await asyncio.to_thread(incoming.settle, file=_stored(body, project))
        return self._list(incoming, body, project)

    def add(self, data: bytes, filename: str, purpose: str, project: str) -> dict[str, Any]:
        """A small file of our own, such as a job's results; not refused for the project's total. Its wire object."""
        with self.incoming(project, None) as incoming:
            incoming.take(data)
            body = _describe(incoming, Wanted(filename, purpose))
            incoming.settle(file=_stored(body, project))
            return self._list(incoming, body, project)

    def _list(self, incoming: Incoming, body: dict[str, Any], project: str) -> dict[str, Any]:
        with storing():
            self._index.put(FILE, body, project=project)
        incoming.is_kept = True
        self._note_expiry(body)
        return body

    def _clean(self) -> None:
        """Remove what is hidden, adopt what the index does not know, forget what has no content."""
        found: list[dict[str, Any]] = []
        for path in self._folder.iterdir():
            if path.name.startswith(HIDDEN):
                shutil.rmtree(path, ignore_errors=True)
            elif self._index.get(FILE, path.name) is None:
                found += _read(path)
        for each in sorted(found, key=lambda each: each["file"]["created_at"]):
            self._index.put(FILE, each["file"], project=each["project"])
        for body in self._index.every(FILE):
            if not (self._folder / body["id"] / "content").is_file():
                _log.warning("the content of %s is gone; so is the file", body["id"])
                self._index.delete(FILE, body["id"])

    def _count(self, body: dict[str, Any], project: str) -> None:
        self._quota.add(project, body["bytes"])
        self._note_expiry(body)

    def _note_expiry(self, body: dict[str, Any]) -> None:
        if body.get("expires_at") is not None:
            heapq.heappush(self._expiring, (body["expires_at"], body["id"]))

    def _expire(self) -> None:
        while self._expiring and self._expiring[0][0] <= time.time():
            _, file_id = heapq.heappop(self._expiring)
            body = self._index.get(FILE, file_id)
            if body is not None:
                self._remove(body, self._index.project_of(FILE, file_id) or "")

    def _remove(self, body: dict[str, Any], project: str) -> None:
        remove(self._folder / body["id"])
        if self._index.delete(FILE, body["id"]):
            self._quota.add(project, -body["bytes"])


def _describe(incoming: Incoming, wanted: Wanted) -> dict[str, Any]:
    created_at, after_s = int(time.time()), wanted.expires_after_s
    return {
        "id": incoming.name,
        "object": "file",
        "bytes": incoming.num_bytes,
        "created_at": created_at,
        "expires_at": None if after_s is None else created_at + after_s,
        "filename": wanted.filename,
        "purpose": wanted.purpose,
        "status": "processed",
        "status_details": None,
    }


def _stored(body: dict[str, Any], project: str) -> str:
    return json.dumps({"project": project, "file": body})


def _read(path: Path) -> list[dict[str, Any]]:
    """What `_stored` wrote into the folder of a file, if it did."""
    try:
        found = read_json(path / "file.json")
        is_ours = found["file"]["id"] == path.name and isinstance(found["project"], str)
    except (StorageError, KeyError, TypeError):
        is_ours = False
    if is_ours:
        return [found]
    _log.warning("%s is not a file that was uploaded; it is left alone", path)
    return []
