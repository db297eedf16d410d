"""Plain functions and classes as tools: their schemas, their deadlines, and that rollouts share no state."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from rft.config import validate_config
from rft.envs import build_environment, discover_tools
from rft.envs.functions import FunctionsEnvironment, FunctionsEnvironmentConfig
from rft.envs.tasks import ArgumentError, Tool
from rft.errors import ConfigError, ToolError, UserError
from rft.types import Item, Message, ToolCall, ToolResult

released = threading.Event()


def google(query: str, limit: int = 3, copy: bool = False) -> list[str]:
    """Find pages.

    Only English ones.

    Args:
        query: what to
            look for
        limit (int): how many

    Returns:
        the pages
    """
    return [query] * limit


def numpy_style(query: str) -> str:
    """Find pages.

    Parameters
    ----------
    query : str
        what to look for
    """
    return query


def rest(query: str) -> str:
    """Find pages.

    :param query: what to look for
    """
    return query


async def both_arrived() -> str:
    """Wait for another call."""
    await barrier.wait()
    return "met"


barrier = asyncio.Barrier(2)


async def never() -> str:
    """Hang."""
    await asyncio.Event().wait()
    return ""


def stuck() -> str:
    """Hang in a thread."""
    released.wait(20)
    return ""


def times_out() -> str:
    """Raise what a deadline raises."""
    raise TimeoutError("the database")


def refuses() -> str:
    """Tell the model."""
    raise ArgumentError("no such page: search first")


def nothing() -> None:
    """Return nothing."""


def no_json() -> object:
    """Return what has no text."""
    return object()


def untyped(query) -> str:  # type: ignore[no-untyped-def]
    return str(query)


def starred(*queries: str) -> str:
    return ""


def badly_typed(query: threading.Event) -> str:
    return ""


class Basket:
    """One rollout's basket."""

    made: list[Basket] = []  # noqa: RUF012 - what the test looks at

    def __init__(self, item: dict[str, Any]) -> None:
        self.item, self.goods, self.is_closed, self.num_inside = item, list[str](), False, 0
        self.made.append(self)

    def add(self, what: str) -> list[str]:
        """Add something.

        Args:
            what: its name
        """
        self.num_inside += 1
        assert self.num_inside == 1, "calls of one rollout must not meet inside its instance"
        time.sleep(0.01)  # a window in which another call could come
        self.num_inside -= 1
        self.goods.append(what)
        self.item["seen"] = self.goods
        return self.goods

    async def owner(self) -> str:
        """Say whose it is."""
        return str(self.item["owner"])

    @property
    def secret(self) -> str:
        return "not a tool"

    @staticmethod
    def helper() -> str:
        return "not a tool"

    def _private(self) -> str:
        return "not a tool"

    async def aclose(self) -> None:
        self.is_closed = True


class Broken:
    def __init__(self) -> None:
        raise OSError("no disk")

    def use(self) -> str:
        return ""


class BadlyClosed:
    def use(self) -> str:
        return "used"

    def close(self) -> None:
        raise RuntimeError("stuck")


def an_item(**row: Any) -> Item:
    return Item(id="i", row=row, messages=[Message(role="user", content="x")])


def a_call(name: str, arguments: str = "{}") -> ToolCall:
    return ToolCall(id="fc", call_id="call", name=name, arguments=arguments)


def environment(*names: str, **options: Any) -> FunctionsEnvironment:
    return FunctionsEnvironment(
        FunctionsEnvironmentConfig(functions=tuple(f"{__name__}:{name}" for name in names), **options)
    )


def call(name: str, arguments: str = "{}", **options: Any) -> ToolResult:
    async def body() -> ToolResult:
        session = await environment(name, **options).open(an_item(), "trace")
        try:
            return await session.call(a_call(name, arguments))
        finally:
            await session.close()

    return asyncio.run(body())


def in_loop(story: Callable[[], Awaitable[Any]]) -> Any:
    async def tell() -> Any:
        async with asyncio.timeout(20):
            return await story()

    return asyncio.run(tell())


def test_the_spec_has_hints_and_google_docstring() -> None:
    function = Tool(google).spec()["function"]
    assert function["description"] == "Find pages. Only English ones."
    assert function["parameters"]["properties"] == {
        "query": {"type": "string", "description": "what to look for"},
        "limit": {"type": "integer", "default": 3, "description": "how many"},
        "copy": {"type": "boolean", "default": False},
    }


@pytest.mark.parametrize("function", [numpy_style, rest])
def test_other_docstring_styles(function: Callable[..., str]) -> None:
    spec = Tool(function).spec()["function"]
    assert spec["description"] == "Find pages."
    assert spec["parameters"]["properties"]["query"]["description"] == "what to look for"


def test_discovery_gives_specs_for_rows_without_tools() -> None:
    config = FunctionsEnvironmentConfig(functions=(f"{__name__}:google", f"{__name__}:Basket"))
    specs = asyncio.run(discover_tools(config))
    assert list(specs) == ["google", "add", "owner"]
    assert specs["add"] is not None and specs["add"]["function"]["parameters"]["required"] == ["what"]
    assert isinstance(build_environment(config), FunctionsEnvironment)


def test_a_module_gives_its_public_functions() -> None:
    names = FunctionsEnvironment(FunctionsEnvironmentConfig(module="rft.envs.tasks.icd10"))._tools
    assert [tool.name for tool in names] == ["search_codes", "lookup_code"]


@pytest.mark.parametrize(
    ("name", "arguments", "output"),
    [
        ("google", '{"query": "ü", "limit": 2, "copy": true}', '["ü", "ü"]'),
        ("nothing", "{}", ""),
        ("google", '{"query": "\\ud83d", "limit": 1}', '["?"]'),
    ],
)
def test_results_become_text(name: str, arguments: str, output: str) -> None:
    result = call(name, arguments)
    assert (result.output, result.is_error) == (output, False)


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("google", "{}", "arguments.query: field required"),
        ("google", '{"query": "a", "argument_0": "b"}', "arguments.argument_0: unknown argument"),
        ("refuses", "{}", "no such page: search first"),
    ],
)
def test_the_models_mistakes_are_its_to_read(name: str, arguments: str, words: str) -> None:
    result = call(name, arguments)
    assert result.is_error and words in result.output


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("never", r"never: no answer within 0\.05 s"),
        ("stuck", r"stuck: no answer within 0\.05 s"),
        ("times_out", "times_out raised TimeoutError: the database"),
        ("no_json", "no_json raised TypeError"),
    ],
)
def test_failures_discard_the_rollout(name: str, words: str) -> None:
    with pytest.raises(ToolError, match=words):
        call(name, timeout_s=0.05 if name in ("never", "stuck") else 20)


def test_stuck_threads_hold_up_nobody() -> None:
    """More calls than any pool has threads hang, and the next one is answered."""

    async def story() -> str:
        session = await environment("stuck", "google").open(an_item(), "trace")
        waiting = [asyncio.create_task(session.call(a_call("stuck"))) for _ in range(100)]
        await asyncio.sleep(0)
        result = await session.call(a_call("google", '{"query": "a", "limit": 1}'))
        released.set()
        await asyncio.gather(*waiting)
        return result.output

    released.clear()
    assert in_loop(story) == '["a"]'


def test_functions_of_one_turn_run_at_once() -> None:
    async def story() -> list[ToolResult]:
        session = await environment("both_arrived").open(an_item(), "trace")
        return list(await asyncio.gather(*(session.call(a_call("both_arrived")) for _ in range(2))))

    assert [result.output for result in in_loop(story)] == ["met", "met"]


def test_two_rollouts_never_share_state() -> None:
    """The same row, two rollouts at once, several calls a turn: each sees its own calls, and the row stays whole."""

    async def rollout(source: FunctionsEnvironment, item: Item, name: str) -> list[str]:
        session = await source.open(item, name)
        calls = [session.call(a_call("add", f'{{"what": "{name}{n}"}}')) for n in range(3)]
        results = await asyncio.gather(*calls, session.call(a_call("owner")))
        await session.close()
        return [result.output for result in results]

    async def story() -> list[list[str]]:
        source, item = environment("Basket"), an_item(owner="ann")
        outputs = await asyncio.gather(rollout(source, item, "a"), rollout(source, item, "b"))
        assert item.row == {"owner": "ann"}
        return list(outputs)

    Basket.made.clear()
    one, other = in_loop(story)
    assert one == ['["a0"]', '["a0", "a1"]', '["a0", "a1", "a2"]', "ann"]
    assert other == ['["b0"]', '["b0", "b1"]', '["b0", "b1", "b2"]', "ann"]
    assert len(Basket.made) == 2 and all(basket.is_closed for basket in Basket.made)


def test_a_class_that_cannot_be_made_discards_the_rollout_and_closes_the_others() -> None:
    Basket.made.clear()
    with pytest.raises(ToolError, match="Broken cannot be made: OSError: no disk"):
        asyncio.run(environment("Basket", "Broken").open(an_item(owner="ann"), "trace"))
    assert [basket.is_closed for basket in Basket.made] == [True]


def test_a_failing_close_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> str:
        session = await environment("BadlyClosed").open(an_item(), "trace")
        result = await session.call(a_call("use"))
        await session.close()
        return result.output

    assert in_loop(story) == "used"
    assert "BadlyClosed.close failed: RuntimeError" in caplog.text


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["untyped"], "untyped: the parameter query has no type hint"),
        (["starred"], "starred: \\*queries"),
        (["badly_typed"], "badly_typed"),
        (["missing"], "has no missing"),
        (["released"], "neither function nor class"),
        (["google", "google"], "there are two tools google"),
        (["ArgumentError"], "the class ArgumentError has no public method"),
    ],
)
def test_what_is_no_tool_is_a_user_error(names: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        environment(*names)
    assert "environment.functions" in str(caught.value) and "cure: " in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"functions": ["nocolon"]}, "no colon"),
        ({"functions": ["no.such:thing"]}, "cannot be imported"),
        ({"module": "rft.envs.base"}, "no public function"),
    ],
)
def test_wrong_names_are_user_errors(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        FunctionsEnvironment(FunctionsEnvironmentConfig.model_validate(options))


def test_a_config_without_functions_is_refused() -> None:
    tree = {"model": {"path": "m"}, "data": {"train": "t"}, "grader": {}, "training": {"steps": 1}}
    with pytest.raises(ConfigError, match="at least one package"):
        validate_config(tree | {"environment": {"type": "functions"}}, "here")


def test_a_module_of_the_current_folder_is_found(tmp_path: Path) -> None:
    """As the `rft` command starts: without the current folder on Python's path (-P)."""
    (tmp_path / "my_tools.py").write_text('def hello(name: str) -> str:\n    """Greet."""\n    return name\n')
    (tmp_path / "broken_tools.py").write_text("1 / 0")
    program = """if True:
        from rft.envs.functions import FunctionsEnvironment, FunctionsEnvironmentConfig
        from rft.errors import UserError
        print(FunctionsEnvironment(FunctionsEnvironmentConfig(functions=("my_tools:hello",)))._tools[0].name)
        try: FunctionsEnvironment(FunctionsEnvironmentConfig(module="broken_tools"))
        except UserError as error: print(error.problem)
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-P", "-c", program]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert result.stdout.splitlines() == [
        "hello",
        "broken_tools cannot be imported: ZeroDivisionError: division by zero",
    ], result.stderr
