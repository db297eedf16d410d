"""The routes of checkpoint permissions: an admin key lets other projects use a tuned model of its own project.

rft/server/models.py looks a permission up by `{model}|{project}`; the wire's object, with its `cp_` id, lies beside it.
"""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query

from rft.server.errors import ApiError, not_found
from rft.server.ids import new_id
from rft.server.index import Page
from rft.server.jobs.bodies import PermissionBody
from rft.server.keys import Caller
from rft.server.models import TUNED
from rft.server.services import CallerDep, Services, ServicesDep

router = APIRouter(prefix="/fine_tuning/checkpoints/{checkpoint}/permissions", tags=["Fine-tuning"])
GRANT, PERMISSION = "permission", "checkpoint_permission"  # kinds in the index
Order = Literal["ascending", "descending"]


@router.post("")
async def create(checkpoint: str, body: PermissionBody, services: ServicesDep, caller: CallerDep) -> dict[str, Any]:
    """One permission per project; a project that has it already keeps it."""
    _check(services, caller, checkpoint)
    granted = [_grant(services, caller, checkpoint, project) for project in dict.fromkeys(body.project_ids)]
    return Page(granted, False).body()


@router.get("")
async def list_permissions(
    checkpoint: str,
    services: ServicesDep,
    caller: CallerDep,
    limit: Annotated[int, Query(ge=1, le=1000)] = 10,
    after: Annotated[str | None, Query(max_length=256)] = None,
    order: Order = "descending",
    project_id: Annotated[str | None, Query(max_length=128)] = None,
) -> dict[str, Any]:
    _check(services, caller, checkpoint)
    direction: Literal["asc", "desc"] = "asc" if order == "ascending" else "desc"
    where = {"$.project_id": project_id} if project_id is not None else None
    page = services.index.page(PERMISSION, parent=checkpoint, limit=limit, after=after, order=direction, where=where)
    return page.body()


@router.delete("/{permission_id}")
async def delete(checkpoint: str, permission_id: str, services: ServicesDep, caller: CallerDep) -> dict[str, Any]:
    """From then on that project does not have the model any more."""
    _check(services, caller, checkpoint)
    found = services.index.get(PERMISSION, permission_id)
    grant = _grant_id(checkpoint, found["project_id"]) if found is not None else ""
    if (services.index.get(GRANT, grant) or {}).get("permission_id") != permission_id:
        raise not_found("checkpoint permission", permission_id, param="permission_id")
    with services.index.transaction():
        services.index.delete(GRANT, grant)
        services.index.delete(PERMISSION, permission_id)
    return {"id": permission_id, "object": "checkpoint.permission", "deleted": True}


def _grant(services: Services, caller: Caller, checkpoint: str, project: str) -> dict[str, Any]:
    index, grant = services.index, _grant_id(checkpoint, project)
    known = index.get(GRANT, grant)
    if known is not None and (found := index.get(PERMISSION, known["permission_id"])) is not None:
        return found
    permission = {"object": "checkpoint.permission", "id": new_id("cp_"), "created_at": int(time.time())}
    permission["project_id"] = project
    with index.transaction():
        index.put(PERMISSION, permission, project=caller.project, parent=checkpoint)
        index.put(GRANT, {"id": grant, "permission_id": permission["id"]}, project=caller.project)
    return permission


def _grant_id(checkpoint: str, project: str) -> str:
    return f"{checkpoint}|{project}"


def _check(services: Services, caller: Caller, checkpoint: str) -> None:
    """Raises ApiError: 403 without an admin key, 404 for a model that the caller's project did not make."""
    if not caller.is_admin:
        message = "Permissions of checkpoints need an admin key (rft serve --create-key --admin)."
        raise ApiError(message, status=403, code="insufficient_permissions")
    if services.index.get(TUNED, checkpoint, project=caller.project) is None:
        raise not_found("checkpoint", checkpoint, param="fine_tuned_model_checkpoint", code="model_not_found")
