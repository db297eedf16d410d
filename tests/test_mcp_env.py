"""Tools of MCP servers: real servers over both transports, good ones, sloppy ones and foreign ones."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from rft.config import load_config, validate_config
from rft.envs import ToolSpecs, discover_tools
from rft.envs.mcp import McpEnvironment, McpEnvironmentConfig, McpSession
from rft.errors import ConfigError, NoProgressError, ToolError, UserError
from rft.supervise import supervised
from rft.types import Item, Message, ToolCall, ToolResult
from rft.wire import MAX_BODY_BYTES

pytestmark = pytest.mark.slow  # processes and other libraries; tests/test_environments.py has the quick look


ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
SECRET = "sk-hunter2-0123456789"
FILESYSTEM = ROOT / "data/mcp/node_modules/@modelcontextprotocol/server-filesystem/dist/index.js"
COUNTER = {"command": "python", "args": [str(TESTS / "mcp_counter.py")], "env": {"API_KEY": SECRET}}


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another program leaves in the system's folder is none of ours."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))


def sloppy(behaviour: str, **more: Any) -> dict[str, Any]:
    return {"command": "python", "args": [str(TESTS / "mcp_sloppy.py"), behaviour], **more}


def config(servers: dict[str, Any], **more: Any) -> McpEnvironmentConfig:
    return McpEnvironmentConfig.model_validate({"servers": servers, **more})


async def call(session: McpSession, name: str, **arguments: Any) -> ToolResult:
    return await session.call(ToolCall(id="fc_1", call_id="call_1", name=name, arguments=json.dumps(arguments)))


def item_with(specs: ToolSpecs) -> Item:
    tools = [spec for spec in specs.values() if spec is not None]
    return Item(id="i", row={}, messages=[Message(role="user", content="x")], tools=tools)


@asynccontextmanager
async def world(servers: dict[str, Any], **more: Any) -> AsyncIterator[Callable[[str], Awaitable[McpSession]]]:
    """An environment after its check; what it yields opens the session of a rollout. Nothing is left afterwards."""
    tasks = asyncio.all_tasks()
    before = leftovers()
    environment = McpEnvironment(config(servers, **more))
    try:
        specs = await environment.discover()
        yield lambda rollout_id: environment.open(item_with(specs), rollout_id)
    finally:
        await environment.close()
    assert leftovers() - before == set()
    assert asyncio.all_tasks() == tasks


def leftovers() -> set[str]:
    """What we started or made: processes below this one, sockets and pipes of ours, folders of rollouts."""
    folders = {str(path) for path in Path(tempfile.gettempdir()).glob("rft-mcp-*")}
    pids = {f"pid {pid}" for pid in descendants(os.getpid())}
    fds = [
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.islink(f"/proc/self/fd/{fd}")
    ]
    return folders | pids | {fd for fd in fds if fd.startswith(("socket:", "pipe:"))}


def descendants(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(word) for word in task.read_text().split()]
        except (FileNotFoundError, ProcessLookupError):
            continue
        found += children + [below for child in children for below in descendants(child)]
    return found


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition: Callable[[], bool], timeout_s: float = 20) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)  # polling: what we wait for happens in another process
    return condition()


@contextmanager
def counter_over_http(port: int = 0, **env: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The counter behind a URL, in a process that dies with us; `port` 0 lets the system choose."""
    command = supervised([sys.executable, str(TESTS / "mcp_counter.py"), "--http"], Path("/nonexistent"), "parent", 1)
    environment = {**os.environ, "COUNTER_PORT": str(port), **env}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        try:
            number = int(process.stdout.readline())
            yield f"http://127.0.0.1:{number}/mcp", process
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def counter_url() -> Iterator[str]:
    with counter_over_http() as (url, _):
        yield url


@pytest.fixture(params=["stdio", "http"])
def counter(request: pytest.FixtureRequest, counter_url: str) -> dict[str, Any]:
    """The stateful server, over either transport."""
    return COUNTER if request.param == "stdio" else {"url": counter_url}


# What the model gets.


def test_tools_are_discovered_as_rows_carry_them(counter: dict[str, Any]) -> None:
    before = leftovers()
    specs = asyncio.run(discover_tools(config({"c": counter | {"tools": ["count"], "prefix": "c_"}})))
    properties = {"by": {"default": 1, "type": "integer"}}
    function = {
        "name": "c_count",
        "description": "Count up and say where the counter stands.",
        "parameters": {"type": "object", "properties": properties},
    }
    assert specs == {"c_count": {"type": "function", "function": function}}
    assert leftovers() == before


def test_answers_errors_and_blocks(counter: dict[str, Any]) -> None:
    async def body() -> None:
        async with world({"c": counter}) as open_session:
            session = await open_session("r")
            result = await call(session, "count", by=2)
            assert (result.output, result.is_error, result.call_id, result.num_attempts) == ("2", False, "call_1", 1)
            assert result.latency_s > 0
            assert (await call(session, "fail", text="no such page")).output.endswith("no such page")
            assert (await call(session, "fail", text="x")).is_error
            refusal = await call(session, "refuse")
            assert (refusal.output, refusal.is_error) == ("by must be a colour", True)
            wrong = await call(session, "count", by="red")
            assert wrong.is_error and "by" in wrong.output
            picture = await call(session, "picture")
            assert picture.output == "a dot\n[a block of type image was left out: only text can be shown]"
            assert json.loads((await call(session, "numbers")).output) == {"one": 1}
            unknown = await call(session, "shout")
            assert unknown.is_error and unknown.output.startswith("there is no tool shout; the tools are: count, slow")
            assert (await call(session, "count")).output == "3", "the session lives on"
            await session.close()

    asyncio.run(body())


def test_answers_above_the_cap_are_a_413(counter: dict[str, Any]) -> None:
    async def body() -> None:
        async with world({"c": counter}) as open_session:
            session = await open_session("r")
            assert len((await call(session, "huge", size=MAX_BODY_BYTES)).output) == MAX_BODY_BYTES
            result = await call(session, "huge", size=MAX_BODY_BYTES + 1)
            assert result.is_error and result.output == "413: the answer of huge is larger than 1,000,000 bytes"
            request = await call(session, "fail", text="x" * MAX_BODY_BYTES)
            assert request.is_error and request.output.startswith("413: the request of fail")
            await session.close()

    asyncio.run(body())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ('{"by": 1', "arguments: not valid JSON"),
        ("[1]", "arguments: must be a JSON object"),
        ('{"by": NaN}', "arguments: not valid JSON"),
        ('{"by": ' + "[" * 300 + "]" * 300 + "}", "arguments: nested too deeply"),
        ('{"by": ' + "[" * 100_000 + "]" * 100_000 + "}", "arguments: not valid JSON"),
    ],
)
def test_arguments_that_cannot_be_sent_are_explained(arguments: str, words: str, counter_url: str) -> None:
    async def body() -> None:
        async with world({"c": {"url": counter_url}}) as open_session:
            session = await open_session("r")
            result = await session.call(ToolCall(id="f", call_id="c", name="count", arguments=arguments))
            assert result.is_error and result.output.startswith(words)
            await session.close()

    asyncio.run(body())


def test_half_a_surrogate_pair_from_the_model_is_replaced(counter: dict[str, Any]) -> None:
    async def body() -> None:
        async with world({"c": counter}) as open_session:
            session = await open_session("r")
            assert (await call(session, "fail", text="half \ud83d")).output.endswith("half ?")
            await session.close()

    asyncio.run(body())


def test_a_row_may_offer_fewer_tools(counter_url: str) -> None:
    async def body() -> None:
        async with world({"c": {"url": counter_url}}) as open_session:
            session = await open_session("r")
            session._item = session._item.model_copy(update={"tools": session._item.tools[:1]})
            result = await call(session, "fail", text="x")
            assert result.is_error and result.output == "there is no tool fail; the tools are: count"
            await session.close()

    asyncio.run(body())


# State.


def test_rollouts_share_no_state(counter: dict[str, Any]) -> None:
    async def body() -> list[str]:
        async with world({"c": counter}) as open_session:
            one, two = await open_session("one"), await open_session("two")
            turns = [(one, 1), (two, 10), (one, 1), (two, 10)]
            outputs = [(await call(session, "count", by=by)).output for session, by in turns]
            await one.close()
            three = await open_session("three")
            outputs.append((await call(three, "count")).output)
            await two.close()
            await three.close()
            return outputs

    assert asyncio.run(body()) == ["1", "10", "2", "20", "1"]


def test_a_shared_server_has_one_session_for_all(counter: dict[str, Any]) -> None:
    async def body() -> list[str]:
        async with world({"c": counter | {"state": "shared"}}) as open_session:
            sessions = [await open_session(str(index)) for index in range(8)]
            results = await asyncio.gather(*(call(session, "count") for session in sessions))
            await asyncio.gather(*(session.close() for session in sessions))
            return [result.output for result in results]

    assert sorted(asyncio.run(body()), key=int) == [str(number) for number in range(1, 9)]


def test_the_calls_of_a_turn_run_at_once(counter: dict[str, Any]) -> None:
    async def body() -> float:
        async with world({"c": counter}) as open_session:
            session = await open_session("r")
            assert (await call(session, "count")).output == "1"
            started = time.monotonic()
            results = await asyncio.gather(*(call(session, "slow", seconds=0.5) for _ in range(20)))
            assert {result.output for result in results} == {"rested"}
            await session.close()
            return time.monotonic() - started

    assert asyncio.run(body()) < 8  # one after the other they would take 10 s


async def burst(servers: dict[str, Any], num_rollouts: int) -> None:
    """Every rollout calls twice at once, sees its own counter, and closes."""

    async def one(open_session: Callable[[str], Awaitable[McpSession]], index: int) -> list[str]:
        session = await open_session(str(index))
        try:
            first, second = await asyncio.gather(call(session, "count", by=index), call(session, "count", by=index))
            return sorted([first.output, second.output], key=int)
        finally:
            await session.close()

    async with world(servers) as open_session:
        outputs = await asyncio.gather(*(one(open_session, index) for index in range(1, num_rollouts + 1)))
        assert outputs == [[str(index), str(2 * index)] for index in range(1, num_rollouts + 1)]


def test_64_rollouts_over_http(counter_url: str) -> None:
    asyncio.run(asyncio.wait_for(burst({"c": {"url": counter_url}}, 64), 60))


@pytest.mark.slow  # 64 Python processes: most of a minute on two cores
def test_64_rollouts_over_stdio() -> None:
    asyncio.run(asyncio.wait_for(burst({"c": COUNTER}, 64), 300))


def test_rollouts_wait_for_a_place_and_never_for_each_other() -> None:
    """Each of three rollouts needs two processes, and only two may exist."""

    async def body() -> int:
        most, before = 0, len(descendants(os.getpid()))

        async def one(open_session: Callable[[str], Awaitable[McpSession]], name: str) -> None:
            nonlocal most
            session = await open_session(name)
            await asyncio.gather(call(session, "a_speak"), call(session, "b_speak"))
            most = max(most, len(descendants(os.getpid())) - before)
            await session.close()

        servers = {name: sloppy("noise", prefix=f"{name}_") for name in "ab"}
        async with world(servers, max_processes=2) as open_session:
            await asyncio.wait_for(asyncio.gather(*(one(open_session, name) for name in "123")), 60)
        return most

    assert asyncio.run(body()) == 4  # two servers, each with its supervisor


def test_a_rollout_that_calls_nothing_starts_nothing() -> None:
    async def body() -> None:
        async with world({"c": sloppy("noise")}) as open_session:
            before = leftovers()
            session = await open_session("r")
            assert leftovers() == before
            await session.close()

    asyncio.run(body())


# Folders and environments.


def test_every_rollout_has_its_own_folder(tmp_path: Path) -> None:
    template = tmp_path / "template"
    (template / "sub").mkdir(parents=True)
    (template / "sub/note.txt").write_text("hello")
    server = COUNTER | {"cwd": "{rollout_dir}", "env": {"PLACE": "{rollout_dir}/sub", "API_KEY": SECRET}}

    async def body() -> None:
        async with world({"c": server}, template_dir=template) as open_session:
            one, two = await open_session("one"), await open_session("two")
            folders = [Path((await call(session, "surroundings")).output.split()[0]) for session in (one, two)]
            assert folders[0] != folders[1]
            (folders[0] / "sub/note.txt").write_text("changed")
            assert (folders[1] / "sub/note.txt").read_text() == "hello"
            await one.close()
            assert not folders[0].exists() and folders[1].exists()
            await two.close()
            assert not folders[1].exists()

    asyncio.run(body())
    assert (template / "sub/note.txt").read_text() == "hello"


def test_servers_see_little_of_our_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)

    async def body() -> list[str]:
        async with world({"c": COUNTER}) as open_session:
            session = await open_session("r")
            output = (await call(session, "surroundings")).output
            await session.close()
            return output.split()[1:]

    assert set(asyncio.run(body())) <= {"API_KEY", "HOME", "LC_CTYPE", "LOGNAME", "PATH", "SHELL", "TERM", "USER"}


# Failures of servers.


def fails(server: dict[str, Any], tool: str, **arguments: Any) -> str:
    """The error of a call in a rollout; afterwards nothing is left."""

    async def body() -> str:
        async with world({"c": server}) as open_session:
            session = await open_session("r")
            with pytest.raises(ToolError) as caught:
                await asyncio.wait_for(call(session, tool, **arguments), 30)
            await session.close()
            return str(caught.value)

    return asyncio.run(body())


def test_a_crash_discards_the_rollout_and_quotes_last_words_without_secrets() -> None:
    text = fails(COUNTER, "crash")
    assert text.startswith("MCP server c: tool crash: ended before it answered; it last said:")
    assert text.endswith("line 999\n    out of ideas, key ***") and "line 990" not in text


def test_a_failure_by_protocol_discards_the_rollout_without_secrets() -> None:
    assert fails(COUNTER, "break_down") == "MCP server c: the database of *** is gone"


def test_headers_are_sent_and_never_shown() -> None:
    """The server quotes the key it was started with, which is the one it gets in a header."""
    with counter_over_http(API_KEY=SECRET) as (url, _):
        text = fails({"url": url, "headers": {"authorization": f"Bearer {SECRET}"}}, "break_down")
    assert text == f"MCP server c at {url}: the database of *** is gone"


def test_a_call_has_a_deadline(counter: dict[str, Any]) -> None:
    assert "no answer within 0.2 s" in fails(counter | {"timeout_s": 0.2}, "slow", seconds=30)


def test_a_mute_server_has_a_deadline() -> None:
    assert "no answer within 0.2 s" in fails(sloppy("mute", timeout_s=0.2), "speak")


def test_an_answer_that_is_no_unicode_discards_the_rollout_at_once() -> None:
    assert "half a surrogate pair" in fails(sloppy("half"), "speak")


def test_a_server_that_dies_over_http_discards_the_rollout() -> None:
    with counter_over_http() as (url, _):
        assert "tool crash" in fails({"url": url}, "crash")


def test_a_session_that_is_over_stays_over() -> None:
    async def body() -> None:
        async with world({"c": COUNTER}) as open_session:
            session = await open_session("r")
            for tool in ("crash", "count"):
                with pytest.raises(ToolError):
                    await call(session, tool)
            await session.close()

    asyncio.run(body())


def test_a_shared_server_that_died_is_started_again() -> None:
    async def body() -> list[str]:
        async with world({"c": COUNTER | {"state": "shared"}}) as open_session:
            session = await open_session("r")
            outputs = [(await call(session, "count", by=5)).output]
            with pytest.raises(ToolError):
                await call(session, "crash")
            outputs.append((await call(session, "count")).output)
            await session.close()
            return outputs

    assert asyncio.run(body()) == ["5", "1"]


def test_noise_between_messages_is_no_failure() -> None:
    async def body() -> None:
        async with world({"c": sloppy("noise")}) as open_session:
            session = await open_session("r")
            assert (await call(session, "speak")).output == ""
            await session.close()

    asyncio.run(body())


def test_a_server_that_will_not_end_is_killed() -> None:
    async def body() -> float:
        async with world({"c": sloppy("stubborn")}) as open_session:
            session = await open_session("r")
            await call(session, "speak")
            started = time.monotonic()
            await session.close()
            return time.monotonic() - started

    assert asyncio.run(body()) < 10


def test_sampling_waits_for_a_server_that_is_down() -> None:
    """While a URL is down a new session waits; what it would have done is done when the server is back."""

    async def body() -> tuple[list[str], str]:
        notes: list[str] = []
        with counter_over_http() as (url, process):
            environment = McpEnvironment(config({"c": {"url": url}}))
            environment.outages.on_change = notes.append
            specs = await environment.discover()
            process.terminate()
            process.wait(10)
        session = await environment.open(item_with(specs), "r")
        waiting = asyncio.create_task(call(session, "count"))
        assert await asyncio.to_thread(wait_for, lambda: bool(notes))
        with counter_over_http(int(url.split(":")[2].split("/")[0])):
            result = await asyncio.wait_for(waiting, 30)
            await session.close()
            await environment.close()
        return notes, result.output

    notes, output = asyncio.run(body())
    assert output == "1"
    assert "is down: sampling pauses" in notes[0] and "is back after" in notes[1]


def test_a_server_that_stays_down_ends_the_run(counter_url: str) -> None:
    async def body() -> None:
        environment = McpEnvironment(config({"c": {"url": counter_url}}, outage_limit_s=0.3))
        specs = await environment.discover()
        with free_port() as port:
            dead = config({"c": {"url": f"http://127.0.0.1:{port}/mcp"}}, outage_limit_s=0.3)
            environment.config = dead
            session = await environment.open(item_with(specs), "r")
            with pytest.raises(NoProgressError, match=r"was down for 0 s(.|\n)*--resume"):
                await asyncio.wait_for(call(session, "count"), 30)
            await session.close()
        await environment.close()

    asyncio.run(body())


@contextmanager
def free_port() -> Iterator[int]:
    """A port where nothing listens while the block lasts."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        yield listener.getsockname()[1]


# Cancellation and death.


@pytest.mark.parametrize("transport", ["stdio", "http"])
def test_cancelling_a_rollout_in_a_call_leaves_nothing(transport: str, counter_url: str, tmp_path: Path) -> None:
    async def body() -> None:
        server = COUNTER if transport == "stdio" else {"url": counter_url}
        async with world({"c": server}) as open_session:
            before, tasks = leftovers(), asyncio.all_tasks()

            async def rollout() -> None:
                session = await open_session("r")
                try:
                    await call(session, "slow", seconds=600, mark=str(tmp_path / "mark"))
                finally:
                    await session.close()

            running = asyncio.create_task(rollout())
            assert await asyncio.to_thread(wait_for, (tmp_path / "mark").exists)  # the call has arrived
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asyncio.wait_for(running, 15)
            assert leftovers() - before == set()
            assert asyncio.all_tasks() == tasks

    asyncio.run(body())


def test_cancelling_while_a_server_starts_leaves_nothing() -> None:
    async def body() -> None:
        async with world({"c": COUNTER}) as open_session:
            before = leftovers()
            session = await open_session("r")
            calling = asyncio.create_task(call(session, "count"))
            assert await asyncio.to_thread(wait_for, lambda: leftovers() - before != set())
            calling.cancel()
            with pytest.raises(asyncio.CancelledError):
                await calling
            await session.close()
            assert leftovers() - before == set()

    asyncio.run(body())


def test_a_close_that_is_interrupted_goes_on() -> None:
    """`world` looks for what is left once the environment is closed."""

    async def body() -> None:
        async with world({"c": sloppy("stubborn")}) as open_session:
            session = await open_session("r")
            await call(session, "speak")
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await session.close()

    asyncio.run(body())


PARENT = """
import asyncio, sys
from tests.test_mcp_env import call, config, descendants, item_with
from rft.envs.mcp import McpEnvironment
import os

async def main():
    servers = {name: {"command": "python", "args": [sys.argv[1], "stubborn"], "prefix": name, "cwd": "{rollout_dir}"}
               for name in "ab"}
    environment = McpEnvironment(config(servers))
    specs = await environment.discover()
    session = await environment.open(item_with(specs), "r")
    await asyncio.gather(call(session, "aspeak"), call(session, "bspeak"))
    print(await session._folder.path(), *descendants(os.getpid()), flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


def test_nothing_survives_sigkill_of_the_parent() -> None:
    """Two servers that ignore the end of their input and SIGTERM, their supervisors, and the rollout's folder."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PARENT, str(TESTS / "mcp_sloppy.py")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        folder, *pids = parent.stdout.readline().split()
        assert Path(folder).is_dir() and len(pids) == 4 and all(is_running(int(pid)) for pid in pids)
        parent.send_signal(signal.SIGKILL)
    assert wait_for(lambda: not any(is_running(int(pid)) for pid in pids))
    assert wait_for(lambda: not Path(folder).exists())


# The user's mistakes.


@pytest.mark.parametrize(
    ("server", "words"),
    [
        ({"command": "no-such-program"}, "there is no command no-such-program"),
        ({"command": "python", "cwd": "/no/such/folder"}, "there is no folder /no/such/folder"),
        (sloppy("gone"), "ended before it answered; it last said:\n    cannot find my database"),
        (sloppy("deaf", start_timeout_s=0.5), "did not start within 0.5 s"),
        (sloppy("pages"), "its list of tools has more than 100 pages"),
        (sloppy("twins"), "the server lists speak twice"),
        (sloppy("noise", tools=["sing", "speak"]), "the server has no sing\n  cure: its tools are: speak"),
    ],
)
def test_a_server_that_cannot_be_used_is_a_user_error(server: dict[str, Any], words: str) -> None:
    before = leftovers()
    with pytest.raises(UserError) as caught:
        asyncio.run(asyncio.wait_for(discover_tools(config({"c": server})), 60))
    text = str(caught.value)
    assert text.startswith("environment.servers.c") and words in text and "\n  cure: " in text
    assert leftovers() == before


def test_a_url_that_is_not_there_is_a_user_error() -> None:
    with free_port() as port:
        url = f"http://user:{SECRET}@127.0.0.1:{port}/mcp?key={SECRET}"
        server = {"url": url, "headers": {"authorization": f"Bearer {SECRET}"}}
        with pytest.raises(UserError, match=rf"127\.0\.0\.1:{port}/mcp: cannot be reached\n  cure: ") as caught:
            asyncio.run(discover_tools(config({"c": server})))
    assert SECRET not in str(caught.value)


def test_a_url_that_is_no_mcp_server_is_a_user_error(counter_url: str) -> None:
    wrong = counter_url.removesuffix("/mcp") + "/elsewhere"
    with pytest.raises(UserError, match=r"elsewhere: Not Found \(HTTP 404\)\n  cure: "):
        asyncio.run(discover_tools(config({"c": {"url": wrong}})))


def test_two_servers_with_one_tool_name_clash() -> None:
    servers = {"first": sloppy("noise"), "second": sloppy("noise")}
    with pytest.raises(UserError) as caught:
        asyncio.run(discover_tools(config(servers)))
    text = str(caught.value)
    assert "the servers first and second both have a tool speak" in text
    assert "set environment.servers.second.prefix, e.g. second_" in text
    servers["second"]["prefix"] = "second_"
    assert list(asyncio.run(discover_tools(config(servers)))) == ["speak", "second_speak"]


@pytest.mark.parametrize(
    ("server", "words"),
    [
        ({}, "either command or url is needed"),
        ({"command": "x", "url": "http://x"}, "either command or url is needed"),
        ({"url": "ftp://x"}, "url must start with http:// or https://"),
        ({"url": "http://x", "args": ["y"]}, "args, env and cwd belong to a command"),
        ({"command": "x", "headers": {"a": SECRET}}, "headers belong to a url"),
        ({"url": "http://x", "headers": {"a": f"{SECRET}\n"}}, "characters that HTTP cannot send"),
        ({"command": "x", "cwd": "{rollout_dir}", "state": "shared"}, "{rollout_dir} belongs to one rollout"),
        ({"command": "x", "comand": SECRET}, "unknown key"),
    ],
)
def test_a_wrong_config_is_explained_without_secrets(server: dict[str, Any], words: str) -> None:
    tree = {
        "model": {"path": "m"},
        "data": {"train": "t"},
        "grader": {"type": "string_check", "name": "g", "input": "a", "reference": "b", "operation": "eq"},
        "training": {"steps": 1},
        "environment": {"type": "mcp", "servers": {"c": server}},
    }
    with pytest.raises(ConfigError) as caught:
        validate_config(tree, where="x.yaml")
    assert "x.yaml: environment.servers.c" in str(caught.value) and words in str(caught.value)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"max_processes": 1}, "one rollout may need 2 processes"),
        ({"template_dir": "x"}, "no server uses {rollout_dir}"),
    ],
)
def test_an_environment_that_cannot_work_is_refused(more: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        config({"a": {"command": "x"}, "b": {"command": "y"}}, **more)
    assert words in str(caught.value)


def test_secrets_are_not_written_with_the_config() -> None:
    server = COUNTER | {"args": []}
    text = config({"c": server, "d": {"url": "http://x", "headers": {"a": SECRET}}}).model_dump_json()
    assert SECRET not in text


# Foreign servers.


def git(folder: Path, *words: str) -> None:
    settings = ["-c", "user.name=Ada", "-c", "user.email=ada@example.org", "-c", "init.defaultBranch=main"]
    subprocess.run(["git", *settings, *words], cwd=folder, check=True, capture_output=True, timeout=30)


@pytest.fixture
def template(tmp_path: Path) -> Path:
    """A repository with one commit."""
    folder = tmp_path / "template"
    folder.mkdir()
    (folder / "apple.txt").write_text("The apple is red.\n")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "Plant the apple tree")
    return folder


GIT = {"command": "python", "args": ["-m", "mcp_server_git", "--repository", "{rollout_dir}"], "cwd": "{rollout_dir}"}


def test_the_git_server(template: Path) -> None:
    async def body() -> None:
        async with world({"git": GIT}, template_dir=template) as open_session:
            session = await open_session("r")
            assert "Plant the apple tree" in (await call(session, "git_log", repo_path=".")).output
            assert (await call(session, "git_create_branch", repo_path=".", branch_name="side")).is_error is False
            assert (await call(session, "git_log", repo_path="/")).is_error, "another folder than its own"
            assert (await call(session, "git_log")).is_error, "without its argument"
            await session.close()

    asyncio.run(body())
    assert not (template / ".git/refs/heads/side").exists()


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
@pytest.mark.skipif(not FILESYSTEM.is_file(), reason="needs the filesystem server: run scripts/prepare_mcp")
def test_the_filesystem_server(template: Path) -> None:
    server = {"command": "node", "args": [str(FILESYSTEM), "{rollout_dir}"], "cwd": "{rollout_dir}"}

    async def body() -> None:
        async with world({"files": server}, template_dir=template) as open_session:
            one, two = await open_session("one"), await open_session("two")
            assert (await call(one, "read_text_file", path="apple.txt")).output == "The apple is red.\n"
            assert (await call(one, "write_file", path="apple.txt", content="green")).is_error is False
            assert (await call(one, "read_text_file", path="apple.txt")).output == "green"
            assert (await call(two, "read_text_file", path="apple.txt")).output == "The apple is red.\n"
            assert (await call(one, "read_text_file", path="/etc/passwd")).is_error
            assert (await call(one, "read_text_file")).is_error
            await one.close()
            await two.close()

    asyncio.run(body())


def test_the_config_that_ships_can_be_loaded() -> None:
    environment = load_config(ROOT / "configs/mcp.yaml").environment
    assert isinstance(environment, McpEnvironmentConfig) and set(environment.servers) == {"git", "files"}
