"""Fine-tuning jobs over the wire: create, read, list, events, cancel, pause, resume."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from job_server import GRADER, Api, Queue, a_config, an_api, reinforcement, row
from openai import BadRequestError, NotFoundError, RateLimitError

from rft.server.index import Page
from rft.server.jobs.routes import page_of
from rft.server.jobs.store import JOB
from rft.server.keys import DEFAULT_PROJECT
from rft.server.serve import create_key


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with an_api(tmp_path) as found:
        yield found


def test_row_03_and_04_a_job_as_the_contract_shows_it(api: Api) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": {"type": "object"}}}
    held_out = api.uploads.add([row(100)])
    method = reinforcement(response_format=form, hyperparameters={"reasoning_effort": "medium"})
    job = api.create(validation_file=held_out, method=method, suffix="s-1", seed=42, metadata={"k": "v"})
    assert job.status == "validating_files" and job.object == "fine_tuning.job" and job.id.startswith("ftjob-")
    assert job.error is None and job.finished_at is None and job.result_files == [] and job.integrations == []
    assert job.model == "m" and job.seed == 42 and job.metadata == {"k": "v"} and job.user_provided_suffix == "s-1"
    assert job.validation_file == held_out and job.estimated_finish is None and job.trained_tokens is None
    assert job.method.reinforcement.response_format == form
    section = job.method.reinforcement
    assert section.hyperparameters.n_epochs == "auto" and section.hyperparameters.reasoning_effort == "medium"
    assert section.grader.type == "string_check" and section.grader.name == "exact"
    assert job.hyperparameters.batch_size == "auto"
    extras = job.model_extra
    assert extras["eval_id"].startswith("eval_") and extras["shared_with_openai"] is False
    assert extras["usage_metrics"] is None and job.organization_id == "rft"
    assert api.client.fine_tuning.jobs.retrieve(job.id).id == job.id


def test_row_06_and_07_auto_becomes_numbers_when_the_files_are_valid(api: Api) -> None:
    held_out = api.uploads.add([row(1000)])
    job = api.wait(api.create([row(number) for number in range(160)], validation_file=held_out))
    assert job.status == "queued"
    numbers = job.method.reinforcement.hyperparameters.model_dump()
    expected = {"n_epochs": 1, "batch_size": 10, "eval_interval": 3, "eval_samples": 1}
    assert expected.items() <= numbers.items() and "auto" not in numbers.values()
    assert numbers["reasoning_effort"] == "medium"
    assert job.hyperparameters.n_epochs == 1
    assert api.messages(job) == [
        f"Created fine-tuning job: {job.id}",
        f"Validating training file: {job.training_file} and validation file: {held_out}",
        "Files validated, moving job to queued state",
    ]
    config = api.config_of(job)
    assert (config.training.steps, config.training.items_per_step, config.evaluation.every) == (16, 10, 3)
    assert isinstance(api.services.worker, Queue) and api.services.worker.num_wakes == 1


def test_a_seed_is_drawn_and_metadata_is_null(api: Api) -> None:
    first, second = api.create(), api.create()
    assert 0 <= first.seed <= 2147483647 and first.seed != second.seed
    assert first.metadata is None and first.validation_file is None
    assert api.messages(api.wait(first))[1] == f"Validating training file: {first.training_file}"


def test_row_09_a_job_that_has_ended_is_refused_once(api: Api) -> None:
    job = api.wait(api.create())
    assert api.client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    for act in ("cancel", "pause", "resume"):
        with pytest.raises(BadRequestError) as caught:
            getattr(api.client.fine_tuning.jobs, act)(job.id)
        assert caught.value.code == "job_already_terminal"
        assert caught.value.response.headers["x-should-retry"] == "false"
    assert isinstance(api.services.worker, Queue) and len(api.services.worker.asked) == 1
    assert api.client.fine_tuning.jobs.retrieve(job.id).finished_at is not None


def test_pause_and_resume(api: Api) -> None:
    jobs = api.client.fine_tuning.jobs
    job = api.wait(api.create())
    with pytest.raises(BadRequestError, match="only a paused job can be resumed"):
        jobs.resume(job.id)
    assert jobs.pause(job.id).status == "paused"
    assert jobs.pause(job.id).status == "paused"
    assert jobs.resume(job.id).status == "queued"
    assert api.messages(job)[-1] == "Fine-tuning job resumed, moving job to queued state"
    api.services.jobs.update(job.id, status="running")
    assert jobs.pause(job.id).status == "running"
    assert isinstance(api.services.worker, Queue) and api.services.worker.asked[-1] == (job.id, "pause")
    assert jobs.cancel(job.id).status == "running"


def test_row_11_lists_page_and_filter(api: Api) -> None:
    jobs = api.client.fine_tuning.jobs
    wanted = [api.create(metadata={"k": "v", "n": str(number)}).id for number in range(3)]
    other = api.create(metadata={"k": ""}).id
    plain = api.create().id
    odd = api.create(metadata={'"\\é.': "ü"}).id
    dotted = api.create(metadata={"a.b": "1"}).id
    assert [job.id for job in jobs.list(limit=1, metadata={"k": "v"})] == wanted[::-1]
    assert [job.id for job in jobs.list(metadata={"k": ""})] == [other]
    assert [job.id for job in jobs.list(metadata={"k": "v", "n": "1"})] == [wanted[1]]
    assert [job.id for job in jobs.list(metadata={'"\\é.': "ü"})] == [odd]
    assert [job.id for job in jobs.list(metadata={"a.b": "1"})] == [dotted]
    assert [job.id for job in jobs.list(extra_query={"metadata": "null"})] == [plain]
    page = jobs.list(limit=2)
    assert [job.id for job in page.data] == [dotted, odd] and page.has_more
    assert [job.id for job in jobs.list(limit=2, after=odd).data] == [plain, other]
    with pytest.raises(BadRequestError) as caught:
        jobs.list(limit=0)
    assert caught.value.param == "limit"


def test_row_12_events_newest_first_in_pages(api: Api) -> None:
    job = api.wait(api.create())
    page = api.client.fine_tuning.jobs.list_events(job.id, limit=2)
    assert page.data[0].message == "Files validated, moving job to queued state"
    assert page.has_more and len(list(page)) == 3
    first = list(page)[-1]
    assert first.data == {} and first.level == "info" and first.type == "message" and first.id.startswith("ftevent-")


def test_a_job_without_checkpoints_has_an_empty_list(api: Api) -> None:
    assert list(api.client.fine_tuning.jobs.checkpoints.list(api.create().id)) == []


def test_short_lists_page_as_the_index_does() -> None:
    objects = [{"id": f"c{number}"} for number in range(5)]
    first = page_of(objects, 2, None)
    assert first.body() | {"data": None} == {
        "object": "list",
        "data": None,
        "has_more": True,
        "first_id": "c0",
        "last_id": "c1",
    }
    assert page_of(objects, 3, "c1") == Page(objects[2:], False)
    assert page_of(objects, 2, "c4") == page_of(objects, 2, "gone") == Page([], False)


def test_jobs_of_other_projects_do_not_exist(tmp_path: Path) -> None:
    config = a_config(tmp_path)
    mine, theirs = create_key(config, "p1"), create_key(config, "p2")
    with an_api(tmp_path, config, key=mine) as api:
        job = api.create()
        stranger = api.client.with_options(api_key=theirs)
        assert list(stranger.fine_tuning.jobs.list()) == []
        jobs = stranger.fine_tuning.jobs
        for act in (jobs.retrieve, jobs.cancel, jobs.pause, jobs.resume, jobs.list_events, jobs.checkpoints.list):
            with pytest.raises(NotFoundError, match="Could not find fine tune"):
                act(job.id)


def test_a_full_queue_is_a_429(tmp_path: Path) -> None:
    with an_api(tmp_path, a_config(tmp_path, limits={"max_queued_jobs": 1})) as api:
        api.create()
        with pytest.raises(RateLimitError) as caught:
            api.client.with_options(max_retries=0).fine_tuning.jobs.create(
                model="m",
                training_file=api.uploads.add([row(1)]),
                method=reinforcement(),
            )
        assert caught.value.code == "too_many_queued_jobs"


def test_files_and_models_that_are_not_there(api: Api) -> None:
    for wanted, error, code, param in (
        ({"model": "unheard-of"}, NotFoundError, "model_not_found", "model"),
        ({"model": "far"}, BadRequestError, "model_not_available", "model"),
        ({"model": "lost"}, BadRequestError, "model_not_available", "model"),
        ({"training_file": "file-999"}, NotFoundError, "file_not_found", "training_file"),
        ({"validation_file": "file-999"}, NotFoundError, "file_not_found", "validation_file"),
        ({"training_file": api.uploads.add([], "evals")}, BadRequestError, "invalid_file_purpose", "training_file"),
    ):
        with pytest.raises(error) as caught:
            api.create(**wanted)
        assert (caught.value.code, caught.value.param) == (code, param)
    assert api.services.jobs.with_status("validating_files") == []


def test_a_page_of_ten_thousand_jobs_is_quick(api: Api) -> None:
    template = api.services.jobs.get(api.wait(api.create()).id)
    with api.services.index.transaction():
        for number in range(10_000):
            body = {**template, "id": f"ftjob-x{number:05d}", "metadata": {"n": str(number)}}
            api.services.index.put(JOB, body, project=DEFAULT_PROJECT)
    measured: dict[str, float] = {}

    def timed(name: str, **query: Any) -> list[str]:
        taken = []
        for _ in range(3):  # the machine may be busy with something else
            started = time.perf_counter()
            page = api.client.fine_tuning.jobs.list(**query)
            taken.append(1000 * (time.perf_counter() - started))
        measured[name] = min(taken)
        return [job.id for job in page.data]

    assert timed("first", limit=20)[0] == "ftjob-x09999"
    assert timed("middle", limit=20, after="ftjob-x05000")[0] == "ftjob-x04999"
    assert timed("last", limit=20, after="ftjob-x00002")[:2] == ["ftjob-x00001", "ftjob-x00000"]
    timed("hundred", limit=100)
    filtered = timed("filter", metadata={"n": "17"})
    assert filtered == ["ftjob-x00017"]
    print({name: f"{value:.1f} ms" for name, value in measured.items()})
    assert max(value for name, value in measured.items() if name not in ("filter", "hundred")) < 100
    assert measured["filter"] < 1000


def test_the_first_event_is_there_when_the_job_is(api: Api) -> None:
    api.create()
    started = time.perf_counter()
    job = api.create()
    assert api.messages(job)[0] == f"Created fine-tuning job: {job.id}"
    took_s = time.perf_counter() - started
    print(f"from create to the first event: {took_s:.3f} s")
    assert took_s < 3


def test_a_multi_grader_as_clients_write_it(api: Api) -> None:
    grader = {"type": "multi", "graders": {"a": GRADER}, "calculate_output": "a"}
    job = api.create(method=reinforcement(grader=grader))
    assert job.method.reinforcement.grader.type == "multi"
    assert job.method.reinforcement.grader.graders["a"]["operation"] == "eq"
    assert job.method.reinforcement.grader.name.startswith("grader-")
