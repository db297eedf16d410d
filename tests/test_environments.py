"""What holds for every adapter: discovery, calls right and wrong, state per rollout, a whole rollout."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fakes import FaultyToolServer
from pydantic import TypeAdapter
from test_rollout import RecordingGrader, a_workshop

from rft.envs import Environment, EnvironmentConfig, build_environment
from rft.rollout import Attempt, run_rollout
from rft.types import Item, Message, StopReason, ToolCall

COUNTER = str(Path(__file__).parent / "mcp_counter.py")


@dataclass(frozen=True, slots=True)
class Adapter:
    """One adapter on a world of its own: a tool, arguments it takes, and some it does not (None: it cannot know)."""

    config: dict[str, Any]
    tool: str
    arguments: dict[str, Any]
    wrong: dict[str, Any] | None
    has_state: bool = False


ADAPTERS = {
    "functions": Adapter(
        {"type": "functions", "functions": ["world:CounterTools"]}, "count", {"by": 2}, {"by": "x"}, has_state=True
    ),
    "gymnasium": Adapter({"type": "gymnasium", "env": "FrozenLake-v1"}, "step", {"action": 1}, {"action": 9}, True),
    "http": Adapter({"type": "http", "tools": []}, "count", {"by": 2}, None),
    "mcp": Adapter(
        {
            **{"type": "mcp", "max_processes": 4},
            "servers": {"counter": {"command": sys.executable, "args": [COUNTER], "tools": ["count"]}},
        },
        *("count", {"by": 2}, {"by": "x"}, True),
    ),
    "python": Adapter({"type": "python", "task": "world:TASK"}, "count", {"by": 2}, {"by": "x"}),
    "retrieval": Adapter({"type": "retrieval", "documents": ""}, "search", {"query": "apple"}, {"query": 3}),
    "shell": Adapter({"type": "shell", "root": ""}, "shell", {"command": "echo a >> f; cat f"}, {"cmd": "ls"}, True),
    "trl": Adapter({"type": "trl", "factory": "world:Counter"}, "count", {"by": 2}, {"by": "x"}, True),
}


PARAMS = [pytest.param(name, marks=pytest.mark.slow) if name == "mcp" else name for name in ADAPTERS]  # it is a program


@pytest.fixture(params=PARAMS)
def adapter(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Adapter]:
    found = ADAPTERS[request.param]
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "apple.txt").write_text("An apple is red.")
    places = {"documents": str(tmp_path / "docs"), "root": str(tmp_path / "docs")}
    config = {key: places.get(key, value) for key, value in found.config.items()}
    with FaultyToolServer({"count": "ok"}) as server:
        if config["type"] == "http":
            config["tools"] = [{"name": "count", "server_url": server.base_url}]
        yield Adapter(config, found.tool, found.arguments, found.wrong, found.has_state)


def use(adapter: Adapter, story: Callable[[Environment, Item], Awaitable[Any]]) -> Any:
    """Tell a story with the adapter's environment and an item that has its tools."""

    async def tell() -> Any:
        config: Any = TypeAdapter(EnvironmentConfig).validate_python(adapter.config)
        environment = build_environment(config)
        try:
            specs = await environment.discover()
            await environment.check()
            spec = specs[adapter.tool] or {"type": "function", "function": {"name": adapter.tool, "parameters": {}}}
            item = Item(id="x-1", row={}, messages=[Message(role="user", content="Count")], tools=[spec])
            return await story(environment, item)
        finally:
            await environment.close()

    return asyncio.run(asyncio.wait_for(tell(), 60))


def call(adapter: Adapter, arguments: dict[str, Any] | None = None, name: str = "") -> ToolCall:
    text = json.dumps(adapter.arguments if arguments is None else arguments)
    return ToolCall(id="fc_1", call_id="call_1", name=name or adapter.tool, arguments=text)


def test_what_is_discovered_is_what_a_row_would_say(adapter: Adapter) -> None:
    async def discover(environment: Environment, item: Item) -> Any:
        return await environment.discover()

    for name, spec in use(adapter, discover).items():
        if spec is not None:
            assert spec["type"] == "function" and spec["function"]["name"] == name
            assert spec["function"]["parameters"]["type"] == "object" and spec["function"]["description"]


def test_a_call_is_answered_and_a_wrong_one_is_the_models_to_repair(adapter: Adapter) -> None:
    async def story(environment: Environment, item: Item) -> None:
        session = await environment.open(item, "trace_1")
        result = await session.call(call(adapter))
        assert result.call_id == "call_1" and not result.is_error and result.output
        unknown = await session.call(call(adapter, name="no_such_tool"))
        assert unknown.is_error and "no_such_tool" in unknown.output and adapter.tool in unknown.output
        if adapter.wrong is not None:
            wrong = await session.call(call(adapter, adapter.wrong))
            assert wrong.is_error and wrong.call_id == "call_1" and wrong.output
        json.dumps(session.outcome())
        await session.close()

    use(adapter, story)


def test_rollouts_share_no_state(adapter: Adapter) -> None:
    """Twice the same call in each of six sessions, all at once: each sees its own history only."""

    async def twice(environment: Environment, item: Item, index: int) -> list[str]:
        session = await environment.open(item, f"trace_{index}")
        try:
            return [(await session.call(call(adapter))).output for _ in range(2)]
        finally:
            await session.close()

    async def story(environment: Environment, item: Item) -> list[list[str]]:
        return list(await asyncio.gather(*(twice(environment, item, index) for index in range(6))))

    seen = use(adapter, story)
    if adapter.config["type"] == "gymnasium":  # a slippery lake: what it says depends on the rollout's own chance
        assert all(len(answers) == 2 for answers in seen)
        return
    assert all(answers == seen[0] for answers in seen)
    assert (seen[0][0] != seen[0][1]) == adapter.has_state


def test_a_whole_rollout(adapter: Adapter) -> None:
    async def story(environment: Environment, item: Item) -> Any:
        text = f'<tool_call>{{"name": "{adapter.tool}", "arguments": {json.dumps(adapter.arguments)}}}</tool_call>'
        grader = RecordingGrader(right="done")
        workshop = a_workshop(lambda prompt, rollout_id, turn: "done" if turn else text, environment=environment)
        attempt = Attempt("trace_" + "0" * 32, item, "train", 1, 0, seed=0)
        return await run_rollout(attempt, dataclasses.replace(workshop, grader=grader))

    rollout = use(adapter, story)
    assert rollout.stop_reason in (StopReason.ANSWERED, StopReason.EPISODE_OVER), rollout.error
    assert rollout.grade is not None and rollout.has_valid_call
