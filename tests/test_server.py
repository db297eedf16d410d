"""The frame of the server: keys, errors, request ids, limits, the lock on its data folder."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from rft.errors import ConfigError, UserError
from rft.server.app import build_app
from rft.server.index import Index
from rft.server.serve import create_key, is_loopback, serve
from rft.server.settings import ServerConfig, load_server_config


@pytest.fixture
def config(tmp_path: Path) -> ServerConfig:
    return ServerConfig.model_validate({"data_dir": tmp_path / "data", "models": {"m": {"path": tmp_path / "m"}}})


@pytest.fixture
def client(config: ServerConfig) -> Iterator[TestClient]:
    with TestClient(build_app(config, has_auth=False), base_url="http://127.0.0.1") as client:
        yield client


def test_every_answer_has_a_request_id(client: TestClient) -> None:
    assert client.get("/health").headers["x-request-id"].startswith("req_")
    assert client.get("/health", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"


def test_unknown_urls_get_the_wire_error(client: TestClient) -> None:
    answer = client.get("/v1/nothing")
    assert answer.status_code == 404
    assert answer.json()["error"] == {
        "message": "Invalid URL (GET /v1/nothing)",
        "type": "not_found_error",
        "param": None,
        "code": "unknown_url",
    }
    assert answer.headers["x-should-retry"] == "false"


def test_the_openapi_document_names_what_is_served(client: TestClient) -> None:
    document = client.get("/v1/openapi.json").json()
    paths = "files uploads fine_tuning/jobs fine_tuning/alpha/graders/run models responses chat/completions evals"
    assert {f"/v1/{path}" for path in paths.split()} <= document["paths"].keys()


def test_nothing_is_served_without_a_key(config: ServerConfig) -> None:
    with TestClient(build_app(config)) as client:
        served = client.app.openapi()["paths"]  # type: ignore[attr-defined]
        asked = [(method, re.sub(r"{.*?}", "x", path)) for path, methods in served.items() for method in methods]
        assert {client.request(*each).status_code for each in [*asked, ("get", "/v1/openapi.json")]} == {401}
        assert client.get("/v1/models").json()["error"]["code"] == "missing_api_key"
        key = {"authorization": f"Bearer {create_key(config)}"}
        assert client.get("/v1/models", headers=key).status_code == 200
        assert client.get("/v1/models", headers={"authorization": "Bearer sk-rft-x"}).status_code == 401


def test_two_servers_on_one_data_folder_are_refused(config: ServerConfig, client: TestClient) -> None:
    with pytest.raises(UserError, match="another rft serve uses this data folder"), TestClient(build_app(config)):
        pass


def test_without_keys_only_loopback_is_served(config: ServerConfig) -> None:
    with pytest.raises(UserError, match="everybody who reaches"):
        serve(config.model_copy(update={"host": "0.0.0.0"}), has_auth=False, on_ready=print)
    assert is_loopback("::1") and is_loopback("localhost") and not is_loopback("example.com")


def test_keys_are_stored_as_hashes_with_private_files(config: ServerConfig) -> None:
    key = create_key(config)
    assert key.startswith("sk-rft-")
    stored = b"".join(path.read_bytes() for path in config.data_dir.iterdir())
    assert key.encode() not in stored
    assert config.data_dir.stat().st_mode & 0o077 == 0


def test_model_names_lead_somewhere(tmp_path: Path) -> None:
    path = tmp_path / "server.yaml"
    path.write_text(json.dumps({"models": {"a": {"alias": "b"}, "b": {"alias": "a"}}}))
    with pytest.raises(ConfigError, match="a leads to a, which is a circle"):
        load_server_config(path)
    path.write_text(json.dumps({"models": {"a": {"path": "x", "nonsense": 1}}}))
    with pytest.raises(ConfigError, match=r"models\.a\.nonsense: unknown key"):
        load_server_config(path)


def test_what_a_model_trains_with_is_looked_at_when_the_server_starts(tmp_path: Path) -> None:
    run = {"training": {"learning_rate": "1e-6"}, "model": {"lora": {"rank": 4}}, "warmup": {"epochs": 2}}
    model = {"path": "m", "run": run}
    config = ServerConfig.model_validate({"models": {"m": model}})
    assert config.models["m"].run == run | {"training": {"learning_rate": 1e-6}}  # type: ignore[union-attr]
    path = tmp_path / "server.yaml"
    path.write_text(json.dumps({"models": {"m": {"path": "m", "run": {"training": {"learning_rat": 1}}}}}))
    with pytest.raises(ConfigError, match=r"models\.m\.run: training\.learning_rat: unknown key"):
        load_server_config(path)


@pytest.mark.parametrize("name", ["server", "seed_cookbook"])
def test_the_shipped_configs_are_valid(name: str) -> None:
    config = load_server_config(Path("configs") / f"{name}.yaml")
    assert config.model("o4-mini-2025-04-16") == config.model("smollm2-135m-instruct") is not None
    assert config.model("unheard-of") is None


def test_pages_follow_each_other_in_order_of_making(tmp_path: Path) -> None:
    index = Index(tmp_path / "i.sqlite")
    for number in range(7):
        index.put("job", {"id": f"j{number}", "metadata": {"k": str(number % 2)}}, project="p", parent="q")
    index.put("job", {"id": "j2", "is_new": True})  # replaced in place
    first = index.page("job", limit=3, project="p")
    assert [job["id"] for job in first.data] == ["j6", "j5", "j4"] and first.has_more
    rest = index.page("job", limit=5, project="p", after="j4")
    assert [job["id"] for job in rest.data] == ["j3", "j2", "j1", "j0"] and not rest.has_more
    assert index.get("job", "j2") == {"id": "j2", "is_new": True}
    even = index.page("job", limit=9, where={"$.metadata.k": "0"}, order="asc")
    assert [job["id"] for job in even.data] == ["j0", "j4", "j6"]
    assert index.page("job", limit=9, project="other").data == []
    assert index.get("job", "j1", project="other") is None
    assert index.page("job", limit=1, after="gone").data == []


def test_a_transaction_happens_whole_or_not_at_all(tmp_path: Path) -> None:
    index = Index(tmp_path / "i.sqlite")
    with pytest.raises(KeyError), index.transaction():
        index.put("event", {"id": "e1"})
        raise KeyError
    assert index.get("event", "e1") is None
