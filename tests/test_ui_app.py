"""The page's application over real HTTP: its files, its headers, who may ask, what a failure says."""

from __future__ import annotations

import gzip
import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from page import INDEX, a_static_folder, ask, assert_guarded, post, rft_ui
from run_folders import a_run
from serving import ROOT, served
from typer.testing import CliRunner

from rft.cli import app as cli
from rft.errors import UserError
from rft.ui import assets
from rft.ui.app import build_ui
from rft.ui.serve import serve

SECRET = "never-to-be-seen"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page") / "runs"
    a_run(folder, job_id="first", steps=1, num_items=1)
    a_run(folder, job_id="second", steps=1, num_items=1)
    (folder.parent / "outside").mkdir()
    (folder.parent / "outside" / "config.json").write_text(f'{{"name": "{SECRET}"}}')
    (folder.parent / "outside.txt").write_text(SECRET)
    return folder


@pytest.fixture(scope="module")
def page(runs: Path) -> Iterator[str]:
    with served(build_ui(runs, static=a_static_folder(runs.parent / "static"))) as address:
        yield address


# --- what is served ---


def test_the_page_and_what_it_loads(page: str) -> None:
    for path in ("/", "/ui"):
        answer = ask(page, path)
        assert answer.status == 307 and answer.headers["location"] == "/ui/"
    answer = ask(page, "/ui/")
    assert answer.status == 200 and answer.body.decode() == INDEX
    assert answer.headers["content-type"].startswith("text/html")
    for name, kind in (("app.js", "javascript"), ("app.css", "text/css")):
        answer = ask(page, f"/ui/static/{name}")
        assert answer.status == 200 and kind in answer.headers["content-type"]


@pytest.mark.parametrize("path", ["/ui/", "/ui/static/app.js"])
def test_files_are_asked_for_again_and_not_sent_again(page: str, path: str) -> None:
    first = ask(page, path)
    assert first.headers["cache-control"] == "no-cache"
    again = ask(page, path, if_none_match=first.headers["etag"])
    assert again.status == 304 and again.body == b""
    assert_guarded(again)


def test_plotly_comes_out_of_its_package(page: str) -> None:
    if importlib.util.find_spec("plotly") is None:
        pytest.skip("plotly is not installed")
    plain = ask(page, "/ui/static/plotly.min.js")
    small = ask(page, "/ui/static/plotly.min.js", accept_encoding="gzip")
    assert plain.status == small.status == 200 and "javascript" in small.headers["content-type"]
    assert small.headers["content-encoding"] == "gzip" and len(small.body) < len(plain.body) / 2
    assert gzip.decompress(small.body) == plain.body and b"plotly" in plain.body[:500]
    again = ask(page, "/ui/static/plotly.min.js", accept_encoding="gzip", if_none_match=small.headers["etag"])
    assert again.status == 304 and again.body == b""
    assert "plotly" not in sys.modules


def test_without_plotly_the_page_says_which_package_is_missing(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assets.plotly_script.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(assets, "find_spec", lambda name: None)
        answer = ask(page, "/ui/static/plotly.min.js")
    assets.plotly_script.cache_clear()
    assert answer.status == 404 and answer.code == "plotly_missing" and "pip install plotly" in answer.message
    assert_guarded(answer)


def test_about_and_the_runs(page: str) -> None:
    assert ask(page, "/ui/api/about").json["mode"] == "folder"
    assert ask(page, "/ui/api/about").json["needs_key"] is False
    assert {run["id"] for run in ask(page, "/ui/api/runs").json["runs"]} == {"first", "second"}


def test_one_run_is_shown_alone(runs: Path) -> None:
    with served(build_ui(runs / "first")) as address:
        assert [run["id"] for run in ask(address, "/ui/api/runs").json["runs"]] == ["first"]
        assert post(address, "/ui/api/runs/second/pause").status == 404


# --- what guards it ---

EVERY_KIND = ["/", "/ui", "/ui/", "/ui/static/app.js", "/ui/static/none.js", "/ui/api/about", "/ui/api/none", "/ui/x"]


@pytest.mark.parametrize("path", EVERY_KIND)
def test_every_answer_has_the_security_headers(page: str, path: str) -> None:
    answer = ask(page, path)
    assert_guarded(answer)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe-eval" not in policy
    assert answer.headers["cache-control"] == ("no-store" if "/api/" in path else "no-cache")
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("host", ["localhost", "localhost:80", "127.0.0.1", "127.0.0.1:8001", "[::1]", "[::1]:8001"])
def test_loopback_names_are_answered(page: str, host: str) -> None:
    assert ask(page, "/ui/api/about", host=host).status == 200


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "evil.example:8001", "localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.1"),
        *("0.0.0.0", "", "localhost@evil.example", "127.0.0.1:x", "evil.example/localhost", "[::2]", "[::1"),
        "localhost.",
    ],
)
def test_a_foreign_name_that_leads_here_is_refused(page: str, host: str) -> None:
    for path in ("/ui/", "/ui/api/runs", "/ui/static/app.js"):
        answer = ask(page, path, host=host)
        assert answer.status in (400, 403), answer
        assert b"first" not in answer.body


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:1"},
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "same-site", "origin": "http://localhost:3000"},
    ],
)
def test_other_sites_pages_change_nothing(page: str, headers: dict[str, str]) -> None:
    answer = post(page, "/ui/api/runs/first/pause", **headers)
    assert answer.status == 403 and answer.code == "cross_site_request"
    assert_guarded(answer)


def test_its_own_page_may(page: str) -> None:
    for headers in ({"origin": page}, {"sec_fetch_site": "same-origin", "origin": page}, {"sec_fetch_site": "none"}):
        assert post(page, "/ui/api/runs/first/pause", **headers).code == "invalid_value"  # it has ended


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"])
def test_what_a_form_can_send_is_refused(page: str, kind: str) -> None:
    answer = post(page, "/ui/api/runs/first/pause", content_type=kind)
    assert answer.status == 415 and answer.code == "not_json"


TRAVERSALS = [
    "../outside",
    "..%2foutside",
    "%2e%2e%2foutside",
    "..%5coutside",
    ".",
    "..",
    "%00",
    "first%00",
    "first/..%2f..",
]


@pytest.mark.parametrize("name", TRAVERSALS)
def test_no_id_leads_out_of_the_folder(page: str, name: str) -> None:
    for path in (f"/ui/api/runs/{name}/pause", f"/ui/api/runs/{name}/grade"):
        answer = post(page, path, {"grader": {}})
        assert answer.status in (404, 405), (path, answer)
        assert SECRET.encode() not in answer.body


@pytest.mark.parametrize(
    "path",
    ["../../outside.txt", "..%2f..%2foutside.txt", "%2e%2e/%2e%2e/outside.txt", "..%5coutside.txt", "//etc/passwd"],
)
def test_no_path_leads_out_of_the_static_files(page: str, path: str) -> None:
    answer = ask(page, f"/ui/static/{path}")
    assert answer.status == 404 and SECRET.encode() not in answer.body
    assert_guarded(answer)


def test_a_bug_says_nothing_of_itself(runs: Path, tmp_path: Path) -> None:
    app = build_ui(runs, static=a_static_folder(tmp_path / "static"))

    def fails(request: object) -> None:
        raise KeyError(SECRET)

    app.add_api_route("/ui/api/fails", fails)
    with served(app) as address:
        answer = ask(address, "/ui/api/fails?request=1")
    assert answer.status == 500 and answer.code == "server_error" and SECRET not in answer.message
    assert_guarded(answer)


# --- the command ---


def test_rft_ui_serves_until_it_is_interrupted(runs: Path) -> None:
    with rft_ui(runs) as (url, process):
        assert url.startswith("http://127.0.0.1:") and url.endswith("/ui/")
        assert len(ask(url, "/ui/api/runs").json["runs"]) == 2
        status = Path(f"/proc/{process.pid}/status").read_text()
        (rss,) = [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")]
        assert rss < 150_000, "kB"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "example.com", "::"])
def test_rft_ui_is_for_this_machine_only(runs: Path, host: str) -> None:
    with pytest.raises(UserError, match="has no keys"):
        serve(runs, host, 0, on_ready=print)


def test_rft_ui_names_a_folder_that_is_not_there(tmp_path: Path) -> None:
    found = CliRunner().invoke(cli, ["ui", str(tmp_path / "none")])
    assert isinstance(found.exception, UserError) and "there is no such folder" in str(found.exception)


def test_the_page_imports_nothing_heavy() -> None:
    names = "torch transformers vllm numpy matplotlib nltk plotly"
    code = f"import sys, rft.ui.serve; print(*sorted(set('{names}'.split()) & set(sys.modules)))"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    assert found.returncode == 0 and found.stdout.split() == [], found.stderr
