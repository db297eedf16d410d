"""Tasks written as Python functions, and the environment that runs them in this process."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from typing import Annotated

import pytest
from pydantic import Field

from rft.envs.python import PythonEnvironment, PythonEnvironmentConfig
from rft.envs.tasks import ArgumentError, Task, Tool, load_task
from rft.errors import ToolError, UserError
from rft.types import Item, Message, ToolCall, ToolResult
from rft.wire import MAX_BODY_BYTES


def repeat(text: Annotated[str, Field(description="what to say")], times: Annotated[int, Field(ge=1)] = 2) -> str:
    """Say a text
    several times."""
    return " ".join([text] * times)


def explode() -> str:
    """Fail."""
    raise KeyError("row 7")


def flood() -> str:
    """Answer too much."""
    return "x" * (MAX_BODY_BYTES + 1)


def wait(seconds: float) -> str:
    """Block the thread."""
    released.wait(seconds)
    return "waited"


released = threading.Event()
TASK = Task(name="sample", tools=(Tool(repeat), Tool(explode), Tool(flood), Tool(wait)))
NOT_A_TASK = "x"


def call(name: str, arguments: str = "{}", timeout_s: float = 600.0) -> ToolResult:
    async def body() -> ToolResult:
        environment = PythonEnvironment(PythonEnvironmentConfig(task=f"{__name__}:TASK", timeout_s=timeout_s))
        await environment.check()
        item = Item(id="i", row={}, messages=[Message(role="user", content="x")])
        session = await environment.open(item, "trace_1")
        try:
            return await session.call(ToolCall(id="fc_1", call_id="call_1", name=name, arguments=arguments))
        finally:
            await session.close()
            await environment.close()

    return asyncio.run(body())


def test_a_spec_follows_hints_and_docstring() -> None:
    assert Tool(repeat).spec() == {
        "type": "function",
        "function": {
            "name": "repeat",
            "description": "Say a text several times.",
            "parameters": {
                "type": "object",
                "properties": {
                    "text": {"type": "string", "description": "what to say"},
                    "times": {"type": "integer", "minimum": 1, "default": 2},
                },
                "required": ["text"],
                "additionalProperties": False,
            },
            "strict": True,
        },
    }


def test_a_parameter_may_be_called_title() -> None:
    def book(title: str) -> str:
        """Find a book."""
        return title

    assert list(Tool(book).spec()["function"]["parameters"]["properties"]) == ["title"]
    assert Tool(book).run('{"title": "Emma"}') == "Emma"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("{}", "arguments.text: field required"),
        ('{"text": "a", "times": 0}', "arguments.times: input should be greater than or equal to 1"),
        ('{"text": "a", "loud": true}', "arguments.loud: unknown argument"),
        ("{", "arguments: not valid JSON"),
        ('"a"', "arguments: must be a JSON object"),
    ],
)
def test_wrong_arguments_are_explained_to_the_model(arguments: str, words: str) -> None:
    with pytest.raises(ArgumentError, match=words.split(":")[0]) as caught:
        Tool(repeat).run(arguments)
    assert words in str(caught.value)
    result = call("repeat", arguments)
    assert result.is_error and words in result.output


def test_a_call_returns_the_output() -> None:
    result = call("repeat", json.dumps({"text": "ja"}))
    assert (result.output, result.is_error, result.call_id, result.num_attempts) == ("ja ja", False, "call_1", 1)


def test_half_a_surrogate_pair_is_replaced() -> None:
    assert call("repeat", '{"text": "\\ud83d", "times": 1}').output == "?"


def test_an_unknown_tool_is_an_error_for_the_model() -> None:
    result = call("shout")
    assert result.is_error and "there is no tool shout; the tools are: explode, flood, repeat, wait" in result.output


def test_an_exception_in_a_tool_is_the_worlds_failure() -> None:
    with pytest.raises(ToolError, match="tool explode raised KeyError: 'row 7'"):
        call("explode")


def test_an_answer_above_the_cap_is_a_413() -> None:
    result = call("flood")
    assert result.is_error and result.output.startswith("413: the answer of flood")


def test_a_tool_that_outlives_its_deadline_discards_the_rollout() -> None:
    released.clear()
    try:
        with pytest.raises(ToolError, match=r"tool wait: no answer within 0\.1 s"):
            _call_and_release("wait", '{"seconds": 5}')
    finally:
        released.set()


def _call_and_release(name: str, arguments: str) -> None:
    """Time out, then free the thread: the event loop waits for its threads when it closes."""
    threading.Timer(0.5, released.set).start()
    call(name, arguments, timeout_s=0.1)


def test_the_event_loop_never_blocks() -> None:
    async def body() -> float:
        environment = PythonEnvironment(PythonEnvironmentConfig(task=f"{__name__}:TASK"))
        session = await environment.open(Item(id="i", row={}, messages=[Message(role="user", content="x")]), "trace_1")
        released.clear()
        waiting = asyncio.create_task(
            session.call(ToolCall(id="fc", call_id="call", name="wait", arguments='{"seconds": 5}'))
        )
        started = time.monotonic()
        await asyncio.sleep(0.01)
        delay = time.monotonic() - started
        released.set()
        assert (await waiting).output == "waited"
        return delay

    assert asyncio.run(body()) < 2


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nothing", "there is no task nothing"),
        ("no.such.module:TASK", "cannot be loaded: No module named"),
        (f"{__name__}:MISSING", "cannot be loaded"),
        (f"{__name__}:NOT_A_TASK", "NOT_A_TASK is a str, not a Task"),
    ],
)
def test_a_task_that_cannot_be_loaded_is_a_user_error(name: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        load_task(name)
    assert words in str(caught.value) and "cure: " in str(caught.value)
