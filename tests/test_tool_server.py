"""The tool server: the wire contract, bursts, and child processes that never outlive their parent."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from starlette.testclient import TestClient

from rft.envs.http import HttpEnvironment, HttpEnvironmentConfig
from rft.envs.serve import ToolServer, bind, create_app, main
from rft.envs.tasks import Task, Tool
from rft.errors import UserError, WorldError
from rft.types import Item, Message, ToolCall
from rft.wire import MAX_BODY_BYTES

ROOT = Path(__file__).resolve().parent.parent
TASK_NAME = "tests.test_tool_server:TASK"


def echo(text: str) -> str:
    """Say it again."""
    return text


def doze(seconds: float) -> str:
    """Take a while."""
    time.sleep(seconds)
    return "rested"


def explode() -> str:
    """Fail."""
    raise RuntimeError("secret detail")


def flood() -> str:
    """Answer too much."""
    return "x" * (MAX_BODY_BYTES + 1)


def refuse_to_load() -> None:
    raise RuntimeError("the disk is missing")


TASK = Task(name="sample", tools=(Tool(echo), Tool(doze), Tool(explode), Tool(flood)))
BROKEN = Task(name="broken", tools=(Tool(echo),), prepare=refuse_to_load)


def body(name: str, arguments: str = "{}") -> dict[str, Any]:
    return {"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": name, "arguments": arguments}


def post(path: str, **request: Any) -> Any:
    with TestClient(create_app(TASK), raise_server_exceptions=False) as client:
        return client.post(path, **request)


def test_async_tools_and_results_that_are_no_text_are_served() -> None:
    async def weigh(text: str) -> dict[str, int]:
        """Count."""
        return {"characters": len(text)}

    with TestClient(create_app(Task(name="other", tools=(Tool(weigh),)))) as client:
        response = client.post("/weigh", json=body("weigh", '{"text": "four"}'))
    assert json.loads(response.json()["output"]) == {"characters": 4}


@pytest.mark.parametrize("path", ["/echo", "/"])
def test_a_call_is_answered_as_the_contract_says(path: str) -> None:
    response = post(path, json=body("echo", '{"text": "hé"}'))
    assert response.status_code == 200
    assert response.json() == {"type": "function_call_output", "id": "fc_1", "call_id": "call_1", "output": "hé"}


@pytest.mark.parametrize(
    ("path", "request_", "status", "words"),
    [
        ("/echo", {"content": b"{"}, 400, "the body is not JSON"),
        ("/echo", {"content": b"[]"}, 400, "the body must be an object"),
        ("/echo", {"json": {"name": "echo", "arguments": {"text": "x"}}}, 400, '"arguments", a JSON string'),
        ("/echo", {"json": body("echo")}, 400, "arguments.text: field required"),
        ("/shout", {"json": body("shout")}, 404, "there is no tool shout; the tools are: doze, echo"),
        ("/", {"json": body("shout")}, 404, "there is no tool shout"),
        ("/echo", {"content": b" " * (MAX_BODY_BYTES + 1)}, 413, "larger than 1,000,000 bytes"),
        ("/flood", {"json": body("flood")}, 413, "the answer of flood is larger"),
        ("/explode", {"json": body("explode")}, 500, "RuntimeError in tool explode"),
    ],
)
def test_a_bad_call_is_refused(path: str, request_: dict[str, Any], status: int, words: str) -> None:
    response = post(path, **request_)
    assert response.status_code == status and words in response.json()["error"]


def test_health_names_the_tools() -> None:
    with TestClient(create_app(TASK)) as client:
        assert client.get("/health").json()["tools"] == ["doze", "echo", "explode", "flood"]


def test_a_hundred_calls_at_once_through_a_child_server() -> None:
    async def burst(base_url: str) -> list[str]:
        environment = HttpEnvironment(HttpEnvironmentConfig(serve=TASK_NAME), base_url=base_url)
        await environment.check()
        tools = [tool.spec() for tool in TASK.tools]
        item = Item(id="i", row={}, messages=[Message(role="user", content="x")], tools=tools)
        session = await environment.open(item, "trace_1")

        async def one(index: int) -> str:
            arguments = json.dumps({"text": str(index)})
            return (await session.call(ToolCall(id="f", call_id=str(index), name="echo", arguments=arguments))).output

        try:
            return await asyncio.wait_for(asyncio.gather(*(one(index) for index in range(100))), 20)
        finally:
            await environment.close()

    with ToolServer(TASK_NAME) as server:
        assert asyncio.run(burst(server.base_url)) == [str(index) for index in range(100)]
        pid = server.pid
    assert pid is not None and not is_alive(pid)


def test_slow_tools_do_not_hold_up_others() -> None:
    async def use() -> None:
        transport = httpx.ASGITransport(app=create_app(TASK))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            started = time.monotonic()
            calls = [client.post("/doze", json=body("doze", '{"seconds": 0.3}')) for _ in range(20)]
            responses = await asyncio.gather(*calls)
            assert all(response.status_code == 200 for response in responses)
            assert time.monotonic() - started < 4  # one after the other they would take 6 s

    anyio.run(use)


def test_the_server_ends_when_its_parent_is_killed() -> None:
    code = (
        "import sys, time\n"
        "from rft.envs.serve import ToolServer\n"
        f"server = ToolServer({TASK_NAME!r}); server.start()\n"
        "print(server.pid, flush=True); time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment, cwd=ROOT)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert is_alive(child)
    parent.send_signal(signal.SIGKILL)
    parent.wait(10)
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.02)  # polling: the process is not ours to wait for
    assert not is_alive(child)


def test_a_taken_port_is_a_user_error_with_a_cure(capsys: pytest.CaptureFixture[str]) -> None:
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(UserError, match=rf"127\.0\.0\.1:{port}.*\n.*--port"):
            bind("127.0.0.1", port)
        assert main([TASK_NAME, "--port", str(port)]) == 2
        assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err


def test_a_task_that_cannot_load_ends_the_start_with_its_words() -> None:
    with pytest.raises(WorldError, match="the disk is missing"):
        ToolServer("tests.test_tool_server:BROKEN").start()


def test_an_unknown_task_ends_the_start_with_its_words() -> None:
    with pytest.raises(WorldError, match="there is no task nothing"):
        ToolServer("nothing").start()


def is_alive(pid: int) -> bool:
    """False for a process that is gone or only waits to be collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
