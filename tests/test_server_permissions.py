"""Checkpoint permissions: an admin key lets another project use a tuned model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from job_server import Api, a_config, an_api
from openai import NotFoundError, PermissionDeniedError

from rft import checkpoints
from rft.server.errors import ApiError
from rft.server.models import checkpoint_name
from rft.server.serve import create_key

NAME = checkpoint_name("ft:m:rft::abcdefgh", 3)


@pytest.fixture
def place(tmp_path: Path) -> Any:
    config = a_config(tmp_path)
    keys = {
        "admin": create_key(config, "p1", is_admin=True),
        "member": create_key(config, "p1"),
        "stranger": create_key(config, "p2", is_admin=True),
    }
    with an_api(tmp_path, config, key=keys["admin"]) as api:
        job = api.create()
        folder = api.folder(job) / "checkpoints" / checkpoints.name_of(3)
        folder.mkdir(parents=True)
        (folder / checkpoints.MANIFEST).write_text("x")
        api.services.models.add_tuned(api.services.jobs.get(job.id), NAME, step=3, project="p1")
        yield api, keys


def can_use(api: Api, project: str) -> bool:
    try:
        return api.services.models.target(NAME, project).checkpoint is not None
    except ApiError:
        return False


def test_row_16_permissions_are_created_listed_and_deleted(place: Any) -> None:
    api, _ = place
    permissions = api.client.fine_tuning.checkpoints.permissions
    assert can_use(api, "p1") and not can_use(api, "p2")
    made = permissions.create(NAME, project_ids=["p2", "p3", "p2"]).data
    assert [found.project_id for found in made] == ["p2", "p3"]
    assert all(found.id.startswith("cp_") and found.object == "checkpoint.permission" for found in made)
    assert can_use(api, "p2") and can_use(api, "p3") and not can_use(api, "p4")
    assert [found.id for found in permissions.create(NAME, project_ids=["p2"]).data] == [made[0].id]
    assert [found.project_id for found in permissions.list(NAME, limit=1)] == ["p3", "p2"]
    assert [found.project_id for found in permissions.list(NAME, order="ascending")] == ["p2", "p3"]
    assert [found.project_id for found in permissions.list(NAME, project_id="p2")] == ["p2"]
    with pytest.warns(DeprecationWarning):
        kept = permissions.retrieve(NAME)
    assert kept.first_id == made[1].id and not kept.has_more
    gone = permissions.delete(made[0].id, fine_tuned_model_checkpoint=NAME)
    assert (gone.id, gone.deleted, gone.object) == (made[0].id, True, "checkpoint.permission")
    assert not can_use(api, "p2") and can_use(api, "p3")
    with pytest.raises(NotFoundError):
        permissions.delete(made[0].id, fine_tuned_model_checkpoint=NAME)
    with pytest.raises(NotFoundError):
        permissions.delete(made[1].id, fine_tuned_model_checkpoint=checkpoint_name(NAME, 4))


def test_only_admins_of_the_project_may(place: Any) -> None:
    api, keys = place
    member = api.client.with_options(api_key=keys["member"]).fine_tuning.checkpoints.permissions
    stranger = api.client.with_options(api_key=keys["stranger"]).fine_tuning.checkpoints.permissions
    for act in (lambda p: p.create(NAME, project_ids=["p2"]), lambda p: list(p.list(NAME))):
        with pytest.raises(PermissionDeniedError, match="admin key"):
            act(member)
        with pytest.raises(NotFoundError):
            act(stranger)
    assert not can_use(api, "p2")
