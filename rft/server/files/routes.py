"""/files: upload, look, read, list, delete."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse
from pydantic import BaseModel, ConfigDict, ValidationError

from rft.server.errors import ApiError
from rft.server.files.multipart import Form, read_form
from rft.server.files.store import PURPOSES, ExpiresAfter, Wanted
from rft.server.services import CallerDep, ServicesDep

router = APIRouter(tags=["Files"])
_FORM = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string", "enum": list(PURPOSES)},
        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
        "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2_592_000},
    },
}
_FRAMING_BYTES = 2**20  # of boundaries, headers and fields around a file
_BODY = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}}


class ListQuery(BaseModel):
    """What part of the list."""

    model_config = ConfigDict(extra="allow")

    after: str | None = None
    limit: int = Query(10_000, ge=1, le=10_000)
    order: Literal["asc", "desc"] = "desc"
    purpose: str | None = None


@router.post("/files", openapi_extra=_BODY)
async def create_file(request: Request, services: ServicesDep, caller: CallerDep) -> dict[str, Any]:
    """Upload a file; it is processed when the answer arrives."""
    limits = services.config.limits
    services.quota.count_upload(caller.project)
    refuse_larger(request, limits.max_upload_bytes)
    with services.files.incoming(caller.project, limits.max_upload_bytes) as incoming:
        form = await read_form(request, "file", incoming.take)
        wanted = Wanted.checked(form.filename or "", form.required("purpose"), _expiry(form))
        if not incoming.num_bytes:
            raise ApiError("The file is empty.", code="empty_file", param="file")
        return await services.files.keep(incoming, wanted, caller.project)


@router.get("/files")
async def list_files(query: Annotated[ListQuery, Query()], services: ServicesDep, caller: CallerDep) -> dict[str, Any]:
    """Files of the project, newest first."""
    page = services.files.page(
        caller.project, limit=query.limit, after=query.after, order=query.order, purpose=query.purpose
    )
    return page.body()


@router.get("/files/{file_id}")
async def retrieve_file(file_id: str, services: ServicesDep, caller: CallerDep) -> dict[str, Any]:
    """What is known of a file."""
    return services.files.get(file_id, caller.project)


@router.get("/files/{file_id}/content", response_class=FileResponse)
async def file_content(file_id: str, services: ServicesDep, caller: CallerDep) -> FileResponse:
    """The bytes as they were uploaded."""
    path = services.files.path(file_id, caller.project)
    name = services.files.get(file_id, caller.project)["filename"]
    return FileResponse(path, media_type="application/octet-stream", filename=name)


@router.delete("/files/{file_id}")
async def delete_file(file_id: str, services: ServicesDep, caller: CallerDep) -> dict[str, Any]:
    """Jobs that use it have a copy."""
    services.files.delete(file_id, caller.project)
    return {"id": file_id, "object": "file", "deleted": True}


def refuse_larger(request: Request, max_bytes: int) -> None:
    """By what a request says of itself, before anything is read. Raises ApiError (413)."""
    said = request.headers.get("content-length", "")
    if said.isdigit() and int(said) > max_bytes + _FRAMING_BYTES:
        message = f"The file is larger than {max_bytes:,} bytes."
        raise ApiError(message, status=413, code="file_too_large", param="file")


def _expiry(form: Form) -> ExpiresAfter | None:
    given = {
        name: form.fields[f"expires_after[{name}]"]
        for name in ("anchor", "seconds")
        if f"expires_after[{name}]" in form.fields
    }
    if not given:
        return None
    try:
        return ExpiresAfter.model_validate(given)
    except ValidationError as error:
        problem = error.errors()[0]
        param = f"expires_after[{problem['loc'][0]}]"
        raise ApiError(f"Invalid value for '{param}': {problem['msg']}.", code="invalid_value", param=param) from None
