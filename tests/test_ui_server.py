"""The page of `rft serve`: keys and projects, jobs that really run, graders by the server's rules, and no secret."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from fakes import ScriptedServer, verdict
from fastapi import FastAPI
from job_server import GRADER, Api, an_api, reinforcement, row
from page import Answer, ask, assert_guarded, post
from run_folders import a_run
from serving import rft_serve, serving
from workers import PLAIN, server_config

from rft.server.app import build_app
from rft.server.keys import DEFAULT_PROJECT
from rft.server.serve import create_key
from rft.server.services import Services
from rft.server.settings import ServerConfig
from rft.store import RunStore

MINE, THEIRS = "proj_mine", "proj_theirs"
SECRET = "hide-this-value"
JUDGE_KEY = "sk-of-the-judge"
EXACT = {**GRADER, "reference": "{{ item.answer }}"}
SCORE = {"type": "score_model", "name": "s", "input": [{"role": "user", "content": "Grade."}]}
NAMES = ["none", "ftjob-none", "..", "../runs", "..%2f..%2findex.sqlite", "%2e%2e", "ftjob-%00", "x" * 5000]


@dataclass
class Place:
    """A running server of two projects, each with a job that ran and one that waits."""

    address: str
    services: Services
    keys: dict[str, str]
    jobs: dict[str, list[str]] = field(default_factory=dict)

    def get(self, path: str, project: str = MINE) -> Answer:
        return ask(self.address, path, authorization=f"Bearer {self.keys[project]}")

    def post(self, path: str, body: Any = None, project: str = MINE) -> Answer:
        return post(self.address, path, body, authorization=f"Bearer {self.keys[project]}")

    def grade(self, grader: Any, project: str = MINE) -> Any:
        path = f"/ui/api/runs/{self.jobs[project][0]}/grade"
        answer = self.post(path, {"grader": grader, "num_rollouts": 2}, project)
        assert answer.status == 200, answer
        return answer.json


class Inference:
    """Local models that always say the same."""

    async def chat(self, target: Any, body: dict[str, Any]) -> dict[str, Any]:
        return verdict({"result": 0.75, "steps": []})[1]


def a_job(services: Services, project: str, *, has_run: bool) -> str:
    """A job as /v1 makes it, its secrets where they belong: in the object for its client, and in its run's config."""
    tools = [{"name": "search", "server_url": "http://127.0.0.1:9/", "headers": {"authorization": f"Bearer {SECRET}"}}]
    endpoint = {"type": "endpoint", "name": "e", "url": "http://127.0.0.1:9/", "headers": {"x-key": SECRET}}
    body: dict[str, Any] = {"model": "m", "user_provided_suffix": None, "result_files": [], "fine_tuned_model": None}
    section = {"grader": endpoint, "tools": tools}
    body |= {"error": None, "metadata": None, "method": {"type": "reinforcement", "reinforcement": section}}
    job_id: str = services.jobs.add(body, project)["id"]
    folder = services.jobs.folder(job_id)
    (folder / "job_config.yaml").write_text(yaml.safe_dump({"grader": endpoint, "environment": {"tools": tools}}))
    if has_run:
        store = a_run(services.jobs.runs, job_id=job_id, steps=1, num_items=1)
        config = store.config() | {"grader": endpoint, "environment": {"type": "http", "tools": tools}}
        (store.path / "config.json").write_text(json.dumps(config))
        for status in ("queued", "running", "succeeded"):
            services.jobs.update(job_id, status=status)
    return job_id


@pytest.fixture(scope="module")
def judge() -> Iterator[ScriptedServer]:
    with ScriptedServer(lambda number, body: verdict({"result": 0.25, "steps": []})) as server:
        yield server


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, judge: ScriptedServer) -> Iterator[Place]:
    folder, found = tmp_path_factory.mktemp("server"), list[Services]()
    models = {
        "m": {"path": folder / "m"},
        "judge": {"url": f"{judge.base_url}/v1", "api_key_env": "RFT_TEST_JUDGE_KEY"},
    }
    tree = {"data_dir": folder / "data", "models": models, "outgoing": {"deny": ["denied.example"]}}
    config = ServerConfig.model_validate(tree)
    jobs: dict[str, list[str]] = {}

    def prepare(services: Services) -> None:
        services.inference = Inference()  # type: ignore[assignment]
        found.append(services)
        for project in (MINE, THEIRS):
            jobs[project] = [a_job(services, project, has_run=has_run) for has_run in (True, False)]

    with pytest.MonkeyPatch.context() as patch, serving(config, has_auth=True, prepare=prepare) as url:
        patch.setenv("RFT_TEST_JUDGE_KEY", JUDGE_KEY)
        keys = {project: create_key(config, project) for project in (MINE, THEIRS)}
        yield Place(url.removesuffix("/v1"), found[0], keys, jobs)


# --- keys and projects ---


def paths_of(place: Place, job_id: str) -> list[tuple[str, str]]:
    """Every route of the page that is below a run, as it is registered, and the others."""
    routes = [
        (method, route.path.replace("{run}", job_id).replace("{rollout}", "trace_x").replace("{id}", "trace_x"))
        for route in place_app(place).routes
        for method in getattr(route, "methods", None) or ()
        if route.path.startswith("/ui/api/") and route.path != "/ui/api/about"
    ]
    assert ("POST", f"/ui/api/runs/{job_id}/grade") in routes
    return [(method, path.replace("{", "").replace("}", "")) for method, path in routes]


def place_app(place: Place) -> FastAPI:
    return build_app(place.services.config)


def test_files_and_about_need_no_key(place: Place) -> None:
    about = ask(place.address, "/ui/api/about")
    assert about.status == 200 and about.json["mode"] == "server" and about.json["needs_key"] is True
    assert ask(place.address, "/").headers["location"] == "/ui/"
    assert ask(place.address, "/ui/static/app.js").status != 401
    for path in ("/", "/ui/", "/ui/api/about", "/ui/static/none.js", "/ui/api/runs"):
        assert_guarded(ask(place.address, path))


def test_everything_else_needs_one(place: Place) -> None:
    for method, path in paths_of(place, place.jobs[MINE][0]):
        body = {} if method == "POST" else None
        for headers in ({}, {"authorization": "Bearer sk-rft-guessed"}, {"authorization": place.keys[MINE]}):
            answer = ask(place.address, path, method=method, body=body, content_type="application/json", **headers)
            assert answer.status == 401, (method, path, answer)
            assert answer.json["error"]["type"] == "authentication_error"
            assert answer.headers["x-request-id"].startswith("req_")
            assert_guarded(answer)


def test_a_project_sees_its_jobs_newest_first_also_those_that_wait(place: Place) -> None:
    for project in (MINE, THEIRS):
        runs = place.get("/ui/api/runs", project).json["runs"]
        assert [run["id"] for run in runs] == place.jobs[project][::-1]
        assert [run["status"] for run in runs] == ["validating_files", "succeeded"]
        assert runs[0]["job"]["model"] == "m" and runs[0]["actions"] == ["cancel"] and runs[1]["actions"] == []


def test_another_projects_job_is_as_if_it_did_not_exist(place: Place) -> None:
    theirs = place.jobs[THEIRS][0]
    for method, path in paths_of(place, theirs):
        if "/runs/" not in path:
            continue
        call = place.post if method == "POST" else place.get
        answer, unknown = call(path), call(path.replace(theirs, "ftjob-none"))
        assert answer.status == unknown.status == 404, (path, answer)
        assert answer.message.replace(theirs, "") == unknown.message.replace("ftjob-none", "")


@pytest.mark.parametrize("name", NAMES)
def test_no_id_leads_to_another_folder(place: Place, name: str) -> None:
    for action in ("pause", "grade"):
        answer = place.post(f"/ui/api/runs/{name}/{action}", {"grader": EXACT})
        assert answer.status in (404, 405), (name, answer)


def test_no_secret_of_a_job_is_in_any_answer(place: Place) -> None:
    for job_id in place.jobs[MINE]:
        for method, path in paths_of(place, job_id):
            if not path.endswith(("pause", "resume", "cancel")):
                answer = place.get(path) if method == "GET" else place.post(path, {"grader": EXACT, "text": ""})
                assert SECRET.encode() not in answer.body, path
    stored = RunStore.open(place.services.jobs.folder(place.jobs[MINE][0])).config()["grader"]
    assert SECRET in json.dumps(stored), "it is there to be found"


def test_the_openapi_document_is_that_of_v1(place: Place) -> None:
    paths = place.get("/v1/openapi.json").json["paths"]
    assert paths and all(path.startswith("/v1/") for path in paths)


def test_a_bug_says_nothing_of_itself(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rft.server.page.JobRuns.all", lambda self: {}[SECRET])
    answer = place.get("/ui/api/runs")
    assert answer.status == 500 and SECRET.encode() not in answer.body
    assert_guarded(answer)


def test_other_sites_pages_change_nothing(place: Place) -> None:
    path = f"/ui/api/runs/{place.jobs[MINE][1]}/cancel"
    key = f"Bearer {place.keys[MINE]}"
    for headers in ({"origin": "https://evil.example"}, {"sec_fetch_site": "cross-site"}):
        assert post(place.address, path, authorization=key, **headers).code == "cross_site_request"
    assert post(place.address, path, authorization=key, content_type="text/plain").status == 415
    behind_a_proxy = {"origin": "https://page.example", "sec_fetch_site": "same-origin"}
    assert post(place.address, "/ui/api/runs/none/pause", authorization=key, **behind_a_proxy).status == 404


# --- graders ---


def test_stored_rollouts_are_graded_by_the_servers_rules(place: Place) -> None:
    assert place.grade(EXACT)["mean_new"] == 1.0
    for grader, field_, words in (
        ({"type": "environment", "name": "e"}, "grader.type", "supported values"),
        ({**EXACT, "operation": "near"}, "grader.operation", "eq"),
        ({"type": "endpoint", "name": "e", "url": "http://denied.example/"}, "grader.url", "denied"),
        ({**SCORE, "model": "gpt-none"}, "model", "does not exist"),
        ({"type": "text_similarity", "name": "t", "evaluation_metric": "cosine"}, "grader.evaluation_metric", "cosine"),
    ):
        found = place.grade(grader)
        assert found["graded"] == [] and words in found["problem"], found
        assert found["field"] == field_


def test_the_servers_models_judge_and_their_keys_stay_in_the_server(place: Place, judge: ScriptedServer) -> None:
    for model, score in (("judge", 0.25), ("m", 0.75)):
        found = place.grade({**SCORE, "model": model})
        assert [each["grade"]["score"] for each in found["graded"]] == [score] * 2, found
    source = "import os\ndef grade(sample, item):\n    raise ValueError(str(os.environ))\n"
    assert JUDGE_KEY not in json.dumps(place.grade({"type": "python", "name": "p", "source": source}))


def test_a_judge_that_fails_is_a_problem_of_each_rollout(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fails(self: Inference, target: Any, body: dict[str, Any]) -> dict[str, Any]:
        raise KeyError(SECRET)

    monkeypatch.setattr(Inference, "chat", fails)
    for each in place.grade({**SCORE, "model": "m"})["graded"]:
        assert each["grade"] is None and each["problem"] == "the server had an error while it asked the judge"


def test_a_job_that_has_not_run_has_no_rollouts(place: Place) -> None:
    answer = place.post(f"/ui/api/runs/{place.jobs[MINE][1]}/grade", {"grader": EXACT})
    assert answer.status == 400 and "has not run yet" in answer.message


def test_a_dataset_is_looked_through(place: Place) -> None:
    text = json.dumps(row(1)) + "\n{}\n"
    found = place.post("/ui/api/datasets/validate", {"text": text}).json
    assert found["num_rows"] == 2 and [each["line"] for each in found["problems"]] == [2]


# --- actions ---


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with an_api(tmp_path) as api:
        yield api


def test_actions_do_what_v1_does(api: Api) -> None:
    address = str(api.client.base_url).removesuffix("/v1/")
    job = api.wait(api.create(), "queued")

    def act(action: str) -> Any:
        answer = post(address, f"/ui/api/runs/{job.id}/{action}")
        return answer.json["run"] if answer.status == 200 else answer.code

    assert act("resume") == "invalid_job_status"
    paused = act("pause")
    assert (paused["status"], paused["actions"]) == ("paused", ["resume", "cancel"])
    assert api.services.worker.asked == [(job.id, "pause")]  # type: ignore[attr-defined]
    resumed = act("resume")
    assert (resumed["status"], resumed["actions"]) == ("queued", ["pause", "cancel"])
    assert api.messages(job)[-1] == "Fine-tuning job resumed, moving job to queued state"
    assert act("cancel")["status"] == "cancelled"
    assert {act(action) for action in ("pause", "resume", "cancel")} == {"job_already_terminal"}
    assert api.client.fine_tuning.jobs.retrieve(job.id).status == "cancelled"


def test_without_keys_only_this_machine_is_answered(api: Api) -> None:
    address = str(api.client.base_url).removesuffix("/v1/")
    assert ask(address, "/ui/api/about").json["needs_key"] is False
    for path in ("/ui/api/runs", "/v1/fine_tuning/jobs", "/v1/models", "/health"):
        assert ask(address, path).status == ask(address, path, host="localhost").status == 200
        answer = ask(address, path, host="evil.example")
        assert answer.status == 403 and answer.code == "host_not_allowed", path
        assert answer.headers["x-request-id"]
    job = api.wait(api.create(method=reinforcement()), "queued")
    for path in (f"/v1/fine_tuning/jobs/{job.id}/cancel", f"/ui/api/runs/{job.id}/cancel"):
        answer = post(address, path, origin="https://evil.example", sec_fetch_site="cross-site")
        assert answer.status == 403 and answer.code == "cross_site_request"
    assert api.client.fine_tuning.jobs.retrieve(job.id).status == "queued"


@pytest.mark.slow
def test_a_real_job_is_paused_resumed_and_cancelled_from_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_job import a_tree  # imports torch, which the fast tests here do without

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    training = {"steps": 60, "items_per_step": 2, "base_rollouts": 2, "learning_rate": 0.001}
    tree, jobs = a_tree(tmp_path, training=training), list[str]()

    def prepare(services: Services) -> None:
        body: dict[str, Any] = {"model": "tiny", "user_provided_suffix": "s", "result_files": []}
        body |= {"method": {"type": "reinforcement", "reinforcement": {"grader": EXACT}}, "eval_id": "eval_1"}
        job_id = services.jobs.add(body | {"fine_tuned_model": None, "error": None}, DEFAULT_PROJECT)["id"]
        folder = services.jobs.folder(job_id).resolve()
        (folder / "job_config.yaml").write_text(yaml.safe_dump(tree | {"runs_dir": str(folder.parent)}))
        services.jobs.update(job_id, status="queued")
        services.worker.wake()
        jobs.append(job_id)

    with serving(server_config(tmp_path / "data", launch=PLAIN), prepare=prepare) as url:
        address = url.removesuffix("/v1")

        def until(*statuses: str, step: int = 0) -> dict[str, Any]:
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline:
                (run,) = ask(address, "/ui/api/runs").json["runs"]
                if run["status"] in statuses and (run["step"] or 0) >= step:
                    return dict(run)
                time.sleep(0.1)  # another process trains, and nothing tells us
            raise TimeoutError(f"the job is still {run}")

        until("running", step=1)
        assert post(address, f"/ui/api/runs/{jobs[0]}/pause").status == 200
        step = until("paused")["step"]
        assert 1 <= step < 60
        assert post(address, f"/ui/api/runs/{jobs[0]}/resume").json["run"]["status"] in ("queued", "running")
        until("running", step=step + 1)
        assert post(address, f"/ui/api/runs/{jobs[0]}/cancel").status == 200
        run = until("cancelled")
        assert run["actions"] == [] and run["job"]["status"] == "cancelled"
        (path,) = (tmp_path / "data" / "runs").glob("*/config.json")
        assert RunStore.open(path.parent).writer() is None


@pytest.mark.slow
def test_rft_serve_says_where_the_page_is_and_stays_small(tmp_path: Path) -> None:
    config = tmp_path / "server.yaml"
    config.write_text(yaml.safe_dump({"port": 0, "data_dir": str(tmp_path / "data"), "models": {"m": {"path": "m"}}}))
    with rft_serve(config, tmp_path / "log", "--no-auth") as (url, process):
        assert process.stdout is not None
        address = url.removesuffix("/v1")
        assert process.stdout.readline() == f"the page: {address}/ui/\n"
        text = "".join(json.dumps(row(number)) + "\n" for number in range(100_000))
        assert post(address, "/ui/api/datasets/validate", {"text": text}).json["num_rows"] == 100_000
        status = Path(f"/proc/{process.pid}/status").read_text()
        (rss,) = [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")]
        assert rss < 150_000, "kB"
