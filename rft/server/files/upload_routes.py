"""/uploads: files that arrive in parts."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from rft.server.errors import ApiError
from rft.server.files.multipart import read_form
from rft.server.files.routes import refuse_larger
from rft.server.files.store import ExpiresAfter, Wanted
from rft.server.files.uploads import PART_BYTES
from rft.server.services import CallerDep, ServicesDep

router = APIRouter(tags=["Uploads"])
_FORM = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string", "format": "binary"}}}
_BODY = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}}


class CreateUpload(BaseModel):
    """The file that will be there when all parts are."""

    model_config = ConfigDict(extra="allow")

    bytes: int = Field(ge=1)
    filename: str
    mime_type: str
    purpose: str
    expires_after: ExpiresAfter | None = None


class CompleteUpload(BaseModel):
    """The parts in their order."""

    model_config = ConfigDict(extra="allow")

    part_ids: list[str] = Field(min_length=1, max_length=10_000)
    md5: str | None = None


@router.post("/uploads")
async def create_upload(body: CreateUpload, services: ServicesDep, caller: CallerDep) -> dict[str, Any]:
    """Announce a file; its parts may come for an hour."""
    services.quota.count_upload(caller.project)
    most = services.config.limits.max_parts_bytes
    if body.bytes > most:
        message = f"The file is larger than {most:,} bytes."
        raise ApiError(message, status=413, code="file_too_large", param="bytes")
    wanted = Wanted.checked(body.filename, body.purpose, body.expires_after)
    return services.uploads.create(body.bytes, wanted, caller.project)


@router.post("/uploads/{upload_id}/parts", openapi_extra=_BODY)
async def add_upload_part(upload_id: str, request: Request, services: ServicesDep, caller: CallerDep) -> dict[str, Any]:
    """Up to 64 MiB of the file; in any order, several at once."""
    services.quota.count_upload(caller.project)
    refuse_larger(request, PART_BYTES)
    with services.uploads.incoming(upload_id, caller.project) as incoming:
        await read_form(request, "data", incoming.take)
        return await services.uploads.keep_part(incoming, upload_id, caller.project)


@router.post("/uploads/{upload_id}/complete")
async def complete_upload(
    upload_id: str, body: CompleteUpload, services: ServicesDep, caller: CallerDep
) -> dict[str, Any]:
    """The parts become a file."""
    return await services.uploads.complete(upload_id, caller.project, body.part_ids, body.md5)


@router.post("/uploads/{upload_id}/cancel")
async def cancel_upload(upload_id: str, services: ServicesDep, caller: CallerDep) -> dict[str, Any]:
    """Drop the parts."""
    return services.uploads.cancel(upload_id, caller.project)
