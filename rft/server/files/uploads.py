"""Uploads: files that arrive in parts, in any order, over at most an hour, below `<data>/uploads/<upload id>`.

Guarantees: the file appears when the upload is complete and all its bytes are what the user announced; parts outlive a
restart of the server, and are gone when their upload has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rft.server.errors import ApiError, not_found
from rft.server.files.disk import HIDDEN, Incoming, remove, storing
from rft.server.files.quota import Quota
from rft.server.files.store import Files, Wanted
from rft.server.ids import new_id
from rft.server.index import Index

PART_BYTES = 67_108_864  # of one part
_UPLOAD, _PART = "upload", "upload_part"  # kinds in the index
_LIFE_S = 3600
_BLOCK_BYTES = 2**20


class Uploads:
    """The uploads of a data folder. One thread, but for the bytes of an `Incoming`."""

    def __init__(self, index: Index, folder: Path, files: Files, quota: Quota) -> None:
        """Takes up what is pending; what a crash left half done is removed."""
        self._index, self._folder, self._files, self._quota = index, folder, files, quota
        self._completing: set[str] = set()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        pending = {upload["id"]: upload for upload in self._pending()}
        for path in folder.iterdir():
            if path.name not in pending:
                shutil.rmtree(path, ignore_errors=True)
        for upload_id in pending:
            for half in (folder / upload_id).glob(f"{HIDDEN}*"):
                shutil.rmtree(half, ignore_errors=True)
            project = index.project_of(_UPLOAD, upload_id) or ""
            for part in index.every(_PART, parent=upload_id):
                quota.add(project, part["bytes"])

    def create(self, num_bytes: int, wanted: Wanted, project: str) -> dict[str, Any]:
        """A pending upload of a file of so many bytes."""
        for old in self._pending():
            self._end_if_late(old)
        now, upload_id = int(time.time()), new_id("upload_")
        upload = {
            "id": upload_id,
            "object": "upload",
            "bytes": num_bytes,
            "created_at": now,
            "expires_at": now + _LIFE_S,
            "filename": wanted.filename,
            "purpose": wanted.purpose,
            "status": "pending",
            "file": None,
            "file_expires_after_s": wanted.expires_after_s,
        }
        with storing():
            (self._folder / upload_id).mkdir(mode=0o700)
            self._index.put(_UPLOAD, upload, project=project)
        return _shown(upload)

    def incoming(self, upload_id: str, project: str) -> Incoming:
        """Where the bytes of a new part go; see `keep_part`. Raises ApiError unless the upload is pending."""
        self._pending_one(upload_id, project)
        return Incoming(self._folder / upload_id / new_id("part_"), self._quota, project, PART_BYTES)

    async def keep_part(self, incoming: Incoming, upload_id: str, project: str) -> dict[str, Any]:
        """The part whose bytes are all there. Raises ApiError when the upload has ended meanwhile."""
        try:
            await asyncio.to_thread(incoming.settle)
        finally:  # an upload that has ended meanwhile took its folder along
            self._pending_one(upload_id, project)
        part = {
            "id": incoming.name,
            "object": "upload.part",
            "created_at": int(time.time()),
            "upload_id": upload_id,
            "bytes": incoming.num_bytes,
        }
        with storing():
            self._index.put(_PART, part, project=project, parent=upload_id)
        incoming.is_kept = True
        return part

    async def complete(self, upload_id: str, project: str, part_ids: list[str], md5: str | None) -> dict[str, Any]:
        """The parts, in the order given, become a file. Raises ApiError (400); then the upload stays as it is."""
        upload = self._pending_one(upload_id, project)
        paths = self._paths(upload, part_ids)
        wanted = Wanted(upload["filename"], upload["purpose"], upload["file_expires_after_s"])
        with self._alone(upload_id), self._files.incoming(project, upload["bytes"]) as incoming:
            digest = await asyncio.to_thread(_join, paths, incoming)
            if md5 is not None and digest != md5.strip().lower():
                message = f"The md5 checksum of the uploaded bytes is {digest}, not the one given."
                raise ApiError(message, code="md5_mismatch", param="md5")
            file = await self._files.keep(incoming, wanted, project)
        return self._end(upload, "completed", project) | {"file": file}

    def cancel(self, upload_id: str, project: str) -> dict[str, Any]:
        """Raises ApiError (400) for an upload that is not pending."""
        return self._end(self._pending_one(upload_id, project), "cancelled", project)

    def _pending(self) -> list[dict[str, Any]]:
        return self._index.page(_UPLOAD, limit=2**31, order="asc", where={"$.status": "pending"}).data

    def _pending_one(self, upload_id: str, project: str) -> dict[str, Any]:
        upload = self._index.get(_UPLOAD, upload_id, project=project)
        if upload is None:
            raise not_found("Upload object", upload_id, param="upload_id", code="upload_not_found")
        if upload_id in self._completing:
            raise ApiError(f"Upload {upload_id} is being completed.", code="upload_not_pending", param="upload_id")
        upload = self._end_if_late(upload)
        if upload["status"] != "pending":
            message = f"Upload {upload_id} is {upload['status']}; only a pending one can be changed."
            raise ApiError(message, code="upload_not_pending", param="upload_id")
        return upload

    def _end_if_late(self, upload: dict[str, Any]) -> dict[str, Any]:
        is_late = upload["status"] == "pending" and upload["expires_at"] <= time.time()
        if not is_late or upload["id"] in self._completing:
            return upload
        return self._end(upload, "expired", self._index.project_of(_UPLOAD, upload["id"]) or "")

    def _end(self, upload: dict[str, Any], status: str, project: str) -> dict[str, Any]:
        ended = upload | {"status": status}
        parts = self._index.every(_PART, parent=upload["id"])
        with storing(), self._index.transaction():
            self._index.put(_UPLOAD, ended)
            for part in parts:
                self._index.delete(_PART, part["id"])
        remove(self._folder / upload["id"])
        self._quota.add(project, -sum(part["bytes"] for part in parts))
        return _shown(ended)

    def _paths(self, upload: dict[str, Any], part_ids: list[str]) -> list[Path]:
        parts = {part["id"]: part for part in self._index.every(_PART, parent=upload["id"])}
        for number, part_id in enumerate(part_ids):
            if part_id not in parts or part_id in part_ids[:number]:
                problem = f"Part {part_id} is given twice" if part_id in parts else f"No such part: {part_id}"
                raise ApiError(f"{problem}.", code="invalid_part", param=f"part_ids[{number}]")
        num_bytes = sum(parts[part_id]["bytes"] for part_id in part_ids)
        if num_bytes != upload["bytes"]:
            message = f"The parts have {num_bytes:,} bytes; the upload was created for {upload['bytes']:,}."
            raise ApiError(message, code="size_mismatch", param="part_ids")
        return [self._folder / upload["id"] / part_id / "content" for part_id in part_ids]

    @contextlib.contextmanager
    def _alone(self, upload_id: str) -> Iterator[None]:
        """Nobody else may change the upload meanwhile."""
        self._completing.add(upload_id)
        try:
            yield
        finally:
            self._completing.discard(upload_id)


def _join(paths: list[Path], incoming: Incoming) -> str:
    """Append the files; the md5 checksum of all of them."""
    digest = hashlib.md5(usedforsecurity=False)
    for path in paths:
        with storing(), path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
                incoming.take(block)
    return digest.hexdigest()


def _shown(upload: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in upload.items() if name != "file_expires_after_s"}
