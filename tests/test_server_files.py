"""Files and uploads, through the real SDK: what is kept, what is refused, and that nothing half done is ever seen."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import openai
import pytest
from serving import serving

from rft.server.errors import ApiError
from rft.server.files.quota import Quota
from rft.server.files.store import PURPOSES, Files, Wanted, safe_name
from rft.server.index import Index
from rft.server.serve import create_key
from rft.server.settings import LimitsConfig, ServerConfig
from rft.supervise import supervised

ROW = b'{"messages": [{"role": "user", "content": "2+2"}]}\n'
CUT = b'--b\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\nhalf of it'  # no closing boundary
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def configured(tmp_path: Path) -> Callable[..., ServerConfig]:
    def make(**limits: int) -> ServerConfig:
        models = {"m": {"path": tmp_path / "m"}}
        return ServerConfig.model_validate({"data_dir": tmp_path / "data", "models": models, "limits": limits})

    return make


@pytest.fixture
def client(configured: Callable[..., ServerConfig]) -> Iterator[openai.OpenAI]:
    with serving(configured()) as url:
        yield sdk(url)


def sdk(url: str, key: str = "none") -> openai.OpenAI:
    """As users make it, retries and all."""
    return openai.OpenAI(base_url=url, api_key=key, timeout=30)


def names_below(data: Path) -> list[str]:
    return [path.name for name in ("files", "uploads") for path in (data / name).iterdir()]


def test_row_01_and_02_a_file_is_uploaded_read_listed_and_deleted(client: openai.OpenAI, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(ROW * 12)
    with (tmp_path / "train.jsonl").open("rb") as opened:
        file = client.files.create(file=opened, purpose="fine-tune")
    assert (file.object, file.bytes, file.filename, file.purpose) == ("file", 12 * len(ROW), "train.jsonl", "fine-tune")
    assert file.status == "processed" and file.id.startswith("file-") and file.expires_at is None
    assert abs(file.created_at - time.time()) < 60
    assert client.files.wait_for_processing(file.id, poll_interval=0.01) == client.files.retrieve(file.id) == file
    assert client.files.content(file.id).read() == ROW * 12
    assert list(client.files.list()) == [file]
    deleted = client.files.delete(file.id)
    assert (deleted.id, deleted.object, deleted.deleted) == (file.id, "file", True)
    assert list(client.files.list()) == [] and names_below(tmp_path / "data") == []
    for gone in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError) as caught:
            gone(file.id)
        assert (caught.value.code, caught.value.param) == ("file_not_found", "file_id")


def test_lists_are_paged_ordered_and_filtered(client: openai.OpenAI) -> None:
    ids = [client.files.create(file=(f"{n}.txt", b"x"), purpose="user_data").id for n in range(5)]
    one = client.files.create(file=("e.jsonl", ROW), purpose="evals").id
    assert [file.id for file in client.files.list(limit=2)] == [one, *reversed(ids)]
    assert [file.id for file in client.files.list(limit=4, order="asc", after=ids[1])] == [*ids[2:], one]
    assert [file.id for file in client.files.list(purpose="evals")] == [one]
    assert client.files.list(limit=10_000).has_more is False
    for wrong in ({"limit": 0}, {"limit": 10_001}, {"order": "up"}):
        with pytest.raises(openai.BadRequestError) as caught:
            client.files.list(**wrong)  # type: ignore[arg-type]
        assert (caught.value.code, caught.value.param) == ("invalid_value", next(iter(wrong)))


def test_every_purpose_that_users_may_give(client: openai.OpenAI) -> None:
    for purpose in PURPOSES:
        file = client.files.create(file=("a.jsonl", ROW), purpose=purpose)  # type: ignore[arg-type]
        assert file.purpose == purpose and (file.expires_at is not None) == (purpose == "batch")


def test_expiry_is_counted_from_creation(client: openai.OpenAI) -> None:
    file = client.files.create(
        file=("a.jsonl", ROW), purpose="evals", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert file.expires_at == file.created_at + 3600
    for seconds in (3599, 2_592_001):
        with pytest.raises(openai.BadRequestError) as caught:
            client.files.create(
                file=("a.jsonl", ROW), purpose="evals", expires_after={"anchor": "created_at", "seconds": seconds}
            )
        assert caught.value.param == "expires_after[seconds]"


def test_expired_files_vanish(tmp_path: Path) -> None:
    index = Index(tmp_path / "i.sqlite")
    files = Files(index, tmp_path / "files", Quota(LimitsConfig()))

    async def upload(life_s: int) -> None:
        with files.incoming("p", 10) as incoming:
            incoming.take(b"x")
            await files.keep(incoming, Wanted("a", "evals", life_s), "p")

    for life_s in (0, 1000):
        asyncio.run(upload(life_s))
    (left,) = files.page("p", limit=10, after=None, order="asc", purpose=None).data
    assert left["expires_at"] == left["created_at"] + 1000
    assert [path.name for path in (tmp_path / "files").iterdir()] == [left["id"]]
    index.put("file", left | {"expires_at": int(time.time()) - 1}, project="p")  # expired while no server ran
    again = Files(index, tmp_path / "files", Quota(LimitsConfig()))
    assert again.page("p", limit=10, after=None, order="asc", purpose=None).data == []


@pytest.mark.parametrize(
    ("file", "purpose", "code", "text"),
    [
        (("a.json", ROW), "fine-tune", "invalid_file_format", "Must be .jsonl"),
        (ROW, "fine-tune", "invalid_file_format", "Must be .jsonl"),
        (("a.jsonl", ROW), "fun", "invalid_value", "'fun' is not one of"),
        (("a.jsonl", b""), "fine-tune", "empty_file", "empty"),
        (("a.jsonl", ROW), "fine-tune-results", "invalid_value", "not one of"),
    ],
)
def test_what_cannot_be_used_is_refused(
    client: openai.OpenAI, tmp_path: Path, file: Any, purpose: Any, code: str, text: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=text) as caught:
        client.files.create(file=file, purpose=purpose)
    assert caught.value.code == code and caught.value.request_id
    assert names_below(tmp_path / "data") == []


@pytest.mark.parametrize(
    ("request_", "code", "param"),
    [
        ({"files": {"file": ("a.jsonl", ROW)}}, "missing_required_parameter", "purpose"),
        ({"data": {"purpose": "evals"}, "files": {"other": ("a", ROW)}}, "invalid_multipart", "other"),
        ({"json": {"purpose": "evals"}}, "invalid_content_type", None),
        (
            {"content": b"--b\r\nnonsense", "headers": {"content-type": "multipart/form-data; boundary=b"}},
            "upload_incomplete",
            None,
        ),
        ({"content": CUT, "headers": {"content-type": "multipart/form-data; boundary=b"}}, "upload_incomplete", None),
        ({"data": {"purpose": "x" * 70_000}, "files": {"file": ("a", ROW)}}, "invalid_multipart", "purpose"),
        ({"data": {f"f{n}": "" for n in range(40)}, "files": {"file": ("a", ROW)}}, "invalid_multipart", None),
    ],
)
def test_bodies_of_other_clients(client: openai.OpenAI, request_: Any, code: str, param: str | None) -> None:
    reply = httpx2.post(f"{client.base_url}files", **request_)
    error = reply.json()["error"]
    assert reply.status_code == 400 and error["param"] == param
    assert error["code"] == code
    assert list(client.files.list()) == []


@pytest.mark.parametrize(
    ("filename", "kept"),
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\data\\rows.jsonl", "rows.jsonl"),
        ("a\x1b[2Jb\u202e.jsonl", "a\\x1b[2Jb\\u202e.jsonl"),
        ("..", "upload"),
        ("", "upload"),
        ("n" * 300, "n" * 254 + "…"),
        ("half \ud83d.txt", "half \\ud83d.txt"),
    ],
)
def test_names_are_only_names(filename: str, kept: str) -> None:
    assert safe_name(filename) == kept
    json.dumps(safe_name(filename)).encode()


def test_a_hostile_name_goes_nowhere(client: openai.OpenAI, tmp_path: Path) -> None:
    file = client.files.create(file=("../../../escaped.jsonl", ROW), purpose="evals")
    assert file.filename == "escaped.jsonl" and client.files.content(file.id).read() == ROW
    assert names_below(tmp_path / "data") == [file.id]
    for path in ("..%2f..%2findex.sqlite", "%2e%2e"):
        assert httpx2.get(f"{client.base_url}files/{path}/content").status_code == 404


def test_projects_do_not_see_each_other(configured: Callable[..., ServerConfig]) -> None:
    config = configured()
    keys = create_key(config, "proj_a"), create_key(config, "proj_b")
    with serving(config, has_auth=True) as url:
        ours, theirs = (sdk(url, key) for key in keys)
        file = ours.files.create(file=("a.jsonl", ROW), purpose="evals")
        upload = ours.uploads.create(bytes=3, filename="a", mime_type="text/plain", purpose="evals")
        assert list(theirs.files.list()) == []
        for refused in (theirs.files.retrieve, theirs.files.content, theirs.files.delete):
            with pytest.raises(openai.NotFoundError):
                refused(file.id)
        with pytest.raises(openai.NotFoundError):
            theirs.uploads.parts.create(upload.id, data=b"x")
        with pytest.raises(openai.NotFoundError):
            theirs.uploads.cancel(upload.id)
        assert ours.files.retrieve(file.id) == file
        with pytest.raises(openai.AuthenticationError):
            sdk(url, "sk-rft-wrong").files.create(file=("a.jsonl", ROW * 100_000), purpose="evals")


def test_sizes_are_limited_while_bytes_arrive(configured: Callable[..., ServerConfig], tmp_path: Path) -> None:
    with serving(configured(max_upload_bytes=100_000)) as url:
        for size in (100_001, 20_000_000):
            with pytest.raises(openai.APIStatusError) as caught:
                sdk(url).files.create(file=("a.bin", b"x" * size), purpose="user_data")
            assert (caught.value.status_code, caught.value.code) == (413, "file_too_large")
        head = b'--b\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n'
        headers = {"content-type": "multipart/form-data; boundary=b"}
        pieces = (head if n == 0 else b"x" * 50_000 for n in range(200))  # says nothing of its length
        reply = httpx2.post(f"{url}/files", content=pieces, headers=headers)
        assert reply.status_code == 413 and reply.headers["x-should-retry"] == "false"
        assert names_below(tmp_path / "data") == []
        assert sdk(url).files.create(file=("a.bin", b"x" * 100_000), purpose="user_data").bytes == 100_000


def test_a_project_has_a_total(configured: Callable[..., ServerConfig]) -> None:
    config = configured(max_project_bytes=1000)
    with serving(config) as url:
        first = sdk(url).files.create(file=("a", b"x" * 600), purpose="user_data")
    with serving(config) as url:  # counted again at the start
        client = sdk(url)
        with pytest.raises(openai.BadRequestError) as caught:
            client.files.create(file=("b", b"x" * 600), purpose="user_data")
        assert caught.value.code == "storage_limit_exceeded"
        client.files.delete(first.id)
        client.files.create(file=("b", b"x" * 600), purpose="user_data")


def test_uploads_are_limited_per_minute(configured: Callable[..., ServerConfig]) -> None:
    config = configured(uploads_per_minute=2)
    keys = create_key(config, "proj_a"), create_key(config, "proj_b")
    with serving(config, has_auth=True) as url:
        client = sdk(url, keys[0]).with_options(max_retries=0)
        for _ in range(2):
            client.files.create(file=("a", b"x"), purpose="user_data")
        with pytest.raises(openai.RateLimitError) as caught:
            client.files.create(file=("a", b"x"), purpose="user_data")
        assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
        sdk(url, keys[1]).files.create(file=("a", b"x"), purpose="user_data")


@contextmanager
def begun_upload(url: str, data: Path) -> Iterator[None]:
    """Three of five megabytes have been sent, and some of them have reached the disk; then the connection ends."""
    parts = urlsplit(url)
    with socket.create_connection((str(parts.hostname), parts.port or 0)) as connection:
        head = b"POST /v1/files HTTP/1.1\r\nhost: localhost\r\ncontent-length: 5000000\r\n"
        connection.sendall(head + b"content-type: multipart/form-data; boundary=b\r\n\r\n")
        begin = b'--b\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n'
        connection.sendall(begin + b"x" * 3 * 2**20)
        deadline = time.monotonic() + 10
        while not list((data / "files").glob(".new-*")) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert list((data / "files").glob(".new-*")), "nothing arrived"
        yield


def test_an_upload_that_is_cut_off_leaves_nothing(configured: Callable[..., ServerConfig], tmp_path: Path) -> None:
    with serving(configured()) as url:
        with begun_upload(url, tmp_path / "data"):
            assert list(sdk(url).files.list()) == []
        file = sdk(url).files.create(file=("données 中.jsonl", ROW), purpose="evals")
        assert file.filename == "données 中.jsonl"
    assert names_below(tmp_path / "data") == [file.id]  # the server has ended: whatever it was doing is over


def test_what_a_crash_left_is_removed_and_a_lost_index_made_again(
    configured: Callable[..., ServerConfig], tmp_path: Path
) -> None:
    config, data = configured(), tmp_path / "data"
    with serving(config) as url:
        file = sdk(url).files.create(file=("a.jsonl", ROW), purpose="fine-tune")
        missing = sdk(url).files.create(file=("b.jsonl", ROW), purpose="fine-tune")
    (data / "files" / ".new-file-half").mkdir()
    (data / "files" / ".new-file-half" / "content").write_bytes(b"half")
    (data / "uploads" / "upload_of_nobody").mkdir()
    shutil.rmtree(data / "files" / missing.id)
    for path in data.glob("index.sqlite*"):
        path.unlink()
    with serving(config) as url:
        assert list(sdk(url).files.list()) == [file]
        assert sdk(url).files.content(file.id).read() == ROW
    shutil.rmtree(data / "files" / file.id)
    with serving(config) as url:  # the index knows it, the disk does not
        assert list(sdk(url).files.list()) == []
    assert names_below(data) == []


def test_parts_become_a_file(client: openai.OpenAI, tmp_path: Path) -> None:
    data = ROW * 5000
    digest = hashlib.md5(data).hexdigest()
    done = client.uploads.upload_file_chunked(
        file=data, filename="t.jsonl", bytes=len(data), mime_type="x", purpose="fine-tune", part_size=99_999, md5=digest
    )
    assert done.status == "completed" and done.file is not None and done.expires_at == done.created_at + 3600
    assert client.files.retrieve(done.file.id) == done.file
    assert client.files.content(done.file.id).read() == data
    assert names_below(tmp_path / "data") == [done.file.id]


def test_parts_have_the_order_that_is_asked_for(configured: Callable[..., ServerConfig], tmp_path: Path) -> None:
    config = configured()
    with serving(config) as url:
        upload = sdk(url).uploads.create(bytes=6, filename="t.txt", mime_type="text/plain", purpose="evals")
        second = sdk(url).uploads.parts.create(upload.id, data=b"two")
    with serving(config) as url:  # parts outlive a restart
        client = sdk(url)
        first = client.uploads.parts.create(upload.id, data=b"one")
        assert (first.object, first.upload_id) == ("upload.part", upload.id)
        for part_ids, md5, code in (
            ([first.id], None, "size_mismatch"),
            ([first.id, "part_x"], None, "invalid_part"),
            ([first.id, first.id], None, "invalid_part"),
            ([first.id, second.id], "0" * 32, "md5_mismatch"),
        ):
            with pytest.raises(openai.BadRequestError) as caught:
                client.uploads.complete(upload.id, part_ids=part_ids, md5=md5 or openai.omit)
            assert caught.value.code == code
        done = client.uploads.complete(upload.id, part_ids=[first.id, second.id])
        assert done.file is not None and client.files.content(done.file.id).read() == b"onetwo"
        for late in (
            lambda: client.uploads.complete(upload.id, part_ids=[first.id, second.id]),
            lambda: client.uploads.parts.create(upload.id, data=b"x"),
            lambda: client.uploads.cancel(upload.id),
        ):
            with pytest.raises(openai.BadRequestError, match="is completed; only a pending one"):
                late()


@pytest.mark.slow
def test_uploads_are_cancelled_refused_and_expire(configured: Callable[..., ServerConfig], tmp_path: Path) -> None:
    config = configured(max_parts_bytes=1000)
    with serving(config) as url:
        client = sdk(url)
        upload = client.uploads.create(bytes=6, filename="t", mime_type="x", purpose="evals")
        client.uploads.parts.create(upload.id, data=b"x")
        assert client.uploads.cancel(upload.id).status == "cancelled"
        assert names_below(tmp_path / "data") == []
        with pytest.raises(openai.APIStatusError) as caught:
            client.uploads.create(bytes=1001, filename="t", mime_type="x", purpose="evals")
        assert (caught.value.status_code, caught.value.param) == (413, "bytes")
        with pytest.raises(openai.BadRequestError, match=r"Must be \.jsonl"):
            client.uploads.create(bytes=1, filename="t", mime_type="x", purpose="fine-tune")
        upload = client.uploads.create(bytes=6, filename="t", mime_type="x", purpose="evals")
    index = Index(tmp_path / "data" / "index.sqlite")
    index.put("upload", {**(index.get("upload", upload.id) or {}), "expires_at": 1})
    index.close()
    with serving(config) as url, pytest.raises(openai.BadRequestError, match="is expired"):
        sdk(url).uploads.parts.create(upload.id, data=b"x")
    assert names_below(tmp_path / "data") == []


def test_only_uploads_may_have_large_bodies(configured: Callable[..., ServerConfig]) -> None:
    with serving(configured(max_body_bytes=2000)) as url:
        body = {"bytes": 1, "filename": "x" * 3000, "mime_type": "x", "purpose": "evals"}
        assert httpx2.post(f"{url}/uploads", json=body).status_code == 413


@pytest.mark.parametrize("size", [1, 2**20 - 150, 2**20, 2**20 + 1, 3 * 2**20 + 17])
def test_every_byte_arrives_wherever_blocks_end(client: openai.OpenAI, size: int) -> None:
    chance = random.Random(size)
    pieces = [b"\r\n--", b"--\r\n", b"\r", b"\n", b"\0", b"x" * 1000, chance.randbytes(777)]
    data = b"".join(chance.choice(pieces) for _ in range(size // 100 + 9))[:size].ljust(size, b"-")
    file = client.files.create(file=("a.bin", data), purpose="user_data")
    assert file.bytes == size and client.files.content(file.id).read() == data


def test_an_upload_is_completed_once(client: openai.OpenAI, tmp_path: Path) -> None:
    """However many ask for it at the same time, and whatever else arrives meanwhile."""
    data = ROW * 20_000
    upload = client.uploads.create(bytes=len(data), filename="t.jsonl", mime_type="x", purpose="fine-tune")
    part = client.uploads.parts.create(upload.id, data=data)

    def attempt(number: int) -> str:
        try:
            if number % 3 == 2:
                return client.uploads.parts.create(upload.id, data=b"late").object
            return client.uploads.complete(upload.id, part_ids=[part.id]).status
        except openai.BadRequestError as error:
            return str(error.code)

    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(attempt, range(8)))
    assert outcomes.count("completed") == 1
    assert set(outcomes) <= {"completed", "upload_not_pending", "upload.part"}
    (file,) = client.files.list()
    assert names_below(tmp_path / "data") == [file.id] and client.files.content(file.id).read() == data


def test_files_of_our_own_and_paths_by_purpose(tmp_path: Path) -> None:
    """What the other parts of the server use."""
    files = Files(Index(tmp_path / "i.sqlite"), tmp_path / "files", Quota(LimitsConfig(max_project_bytes=1)))
    body = files.add(b"step,reward\n", "results.csv", "fine-tune-results", "p")
    assert body["purpose"] == "fine-tune-results" and body["status"] == "processed" and body["bytes"] == 12
    assert files.path(body["id"], "p").read_bytes() == b"step,reward\n"
    with pytest.raises(ApiError) as caught:
        files.path(body["id"], "p", purpose="fine-tune", param="training_file")
    assert (caught.value.status, caught.value.code) == (400, "invalid_file_purpose")
    assert caught.value.param == "training_file"
    for file_id, project in (("file-x", "p"), (body["id"], "q"), ("../i.sqlite", "p")):
        with pytest.raises(ApiError) as caught:
            files.path(file_id, project, param="training_file")
        assert (caught.value.status, caught.value.code) == (404, "file_not_found")


@contextmanager
def own_process(tmp_path: Path, before: list[str] | None = None) -> Iterator[tuple[openai.OpenAI, int]]:
    """`rft serve` in a process of its own, through the command `before`; a client, and the server's process id."""
    (tmp_path / "data").mkdir(exist_ok=True)
    (tmp_path / "server.yaml").write_text(json.dumps({"models": {}, "data_dir": str(tmp_path / "data"), "port": 0}))
    command = [*(before or []), sys.executable, "-m", "rft", "serve", str(tmp_path / "server.yaml"), "--no-auth"]
    supervisor = subprocess.Popen(
        supervised(command, Path("/nonexistent"), "parent", 1), cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert supervisor.stdout is not None
        client = sdk(supervisor.stdout.readline().split()[-1])
        (server,) = Path(f"/proc/{supervisor.pid}/task/{supervisor.pid}/children").read_text().split()
        yield client, int(server)
    finally:
        supervisor.terminate()
        supervisor.wait(20)


def test_a_full_disk_is_said_once_and_nothing_is_left(tmp_path: Path) -> None:
    """A real server whose data folder is a small disk of its own, in a mount namespace."""
    isolated = ["unshare", "--user", "--map-root-user", "--mount"]
    probe = subprocess.run([*isolated, "mount", "-t", "tmpfs", "t", "/mnt"], capture_output=True, text=True, timeout=20)
    if probe.returncode:
        pytest.skip(f"no disk of our own can be mounted here: {probe.stderr.strip()}")
    mount = f'mount -t tmpfs -o size=3m t {tmp_path / "data"} && exec "$@"'
    with own_process(tmp_path, [*isolated, "sh", "-c", mount, "sh"]) as (client, _):
        kept = client.files.create(file=("a", b"x" * 1_000_000), purpose="user_data")
        with pytest.raises(openai.InternalServerError) as caught:
            client.files.create(file=("b", b"x" * 5_000_000), purpose="user_data")
        assert (caught.value.status_code, caught.value.code) == (503, "storage_full")
        assert caught.value.response.headers["x-should-retry"] == "false"
        assert list(client.files.list()) == [kept]
        client.files.create(file=("c", b"x" * 1_000_000), purpose="user_data")  # there is room for it again


@pytest.mark.slow
def test_a_server_killed_while_files_arrive_keeps_the_whole_ones(tmp_path: Path) -> None:
    with own_process(tmp_path) as (client, server):
        kept = client.files.create(file=("a.jsonl", ROW), purpose="fine-tune")
        upload = client.uploads.create(bytes=2 * len(ROW), filename="b.jsonl", mime_type="x", purpose="fine-tune")
        part = client.uploads.parts.create(upload.id, data=ROW)
        with begun_upload(str(client.base_url), tmp_path / "data"):
            os.kill(server, signal.SIGKILL)
    with own_process(tmp_path) as (client, _):
        assert list(client.files.list()) == [kept] and client.files.content(kept.id).read() == ROW
        assert sorted(names_below(tmp_path / "data")) == sorted([kept.id, upload.id])
        second = client.uploads.parts.create(upload.id, data=ROW)
        done = client.uploads.complete(upload.id, part_ids=[part.id, second.id])
        assert done.file is not None and client.files.content(done.file.id).read() == ROW * 2
