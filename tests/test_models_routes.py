"""Models that jobs have made: listed, found by their names with colons, shared with nobody, deleted."""

from __future__ import annotations

from pathlib import Path

import openai
import pytest
from openai import OpenAI
from serving import serving

from rft import checkpoints
from rft.server.index import Index
from rft.server.jobs.store import Jobs
from rft.server.models import Models, checkpoint_name, tuned_name
from rft.server.serve import create_key
from rft.server.settings import ServerConfig


def test_tuned_models_are_listed_found_and_deleted_by_their_project(tmp_path: Path) -> None:
    data = tmp_path / "data"
    config = ServerConfig.model_validate({"data_dir": data, "models": {"m": {"path": tmp_path / "m"}}})
    ours, theirs = create_key(config, "ours"), create_key(config, "theirs")
    name = a_tuned_model(config, project="ours")
    step = checkpoint_name(name, 3)
    with serving(config, has_auth=True) as base_url:
        client = OpenAI(base_url=base_url, api_key=ours, max_retries=0)
        assert {model.id for model in client.models.list()} == {"m", name, step}
        assert client.models.retrieve(step).owned_by == "rft"
        other = OpenAI(base_url=base_url, api_key=theirs, max_retries=0)
        assert [model.id for model in other.models.list()] == ["m"]
        for call in (other.models.retrieve, other.models.delete):
            with pytest.raises(openai.NotFoundError):
                call(name)
        with pytest.raises(openai.NotFoundError):
            other.responses.create(model=name, input="x")
        with pytest.raises(openai.NotFoundError):
            other.chat.completions.create(model=name, messages=[{"role": "user", "content": "x"}])
        deleted = client.models.delete(step)
        assert (deleted.id, deleted.object, deleted.deleted) == (step, "model", True)
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve(step)
        assert client.models.retrieve(name).id == name


def a_tuned_model(config: ServerConfig, project: str) -> str:
    """The name of a model with a checkpoint of step 3; both have names."""
    index = Index(config.data_dir / "index.sqlite")
    jobs = Jobs(index, config.data_dir / "runs")
    job = jobs.add({"model": "m", "user_provided_suffix": "s"}, project)
    folder = jobs.folder(job["id"]) / "checkpoints" / checkpoints.name_of(3)
    folder.mkdir(parents=True)
    (folder / checkpoints.MANIFEST).write_text("")
    models, name = Models(config, index, jobs), tuned_name(job, config.organization)
    models.add_tuned(job, name, step=None, project=project)
    models.add_tuned(job, checkpoint_name(name, 3), step=3, project=project)
    index.close()
    return name
