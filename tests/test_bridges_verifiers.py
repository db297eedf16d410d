"""verifiers environments: what its own loop, stop conditions and rubrics make of rft's turns."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bridging import a_call, an_environment, specs_of

from rft.data import load_items
from rft.envs import Session
from rft.envs.bridges.verifiers import export_rows, load
from rft.errors import ToolError, UserError
from rft.rollout import Attempt, run_rollout
from rft.types import Item, Message, StopReason

pytestmark = pytest.mark.slow  # another library and its imports


vf = pytest.importorskip("verifiers", reason="verifiers is not installed: constraints/dev.txt names the version")
datasets = pytest.importorskip("datasets", reason="datasets is not installed")
HERE = __name__
cleaned: list[str] = []


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: the first
        b: the second
    """
    return a + b


async def exact(completion: list[Any], answer: str) -> float:
    return float(completion[-1].content == answer)


def spoken(completion: list[Any], state: dict[str, Any]) -> float:
    """How much the model said, as verifiers sees it."""
    return float(sum(len(message.content or "") for message in completion if message.role == "assistant"))


def dataset(num: int = 2) -> Any:
    return datasets.Dataset.from_list([{"question": f"{n}+1", "answer": str(n + 1)} for n in range(1, num + 1)])


def rubric() -> Any:
    scores = vf.Rubric(funcs=[exact], weights=[2.0])
    scores.add_metric(spoken)
    return scores


def calculator(**kwargs: Any) -> Any:
    return vf.ToolEnv(tools=[add], dataset=dataset(), rubric=rubric(), system_prompt="Calculate.", **kwargs)


def single() -> Any:
    return vf.SingleTurnEnv(dataset=dataset(), rubric=rubric())


def game(trouble: str = "") -> Any:
    class Countdown(vf.MultiTurnEnv):  # type: ignore[misc]
        async def setup_state(self, state: Any) -> None:
            state["left"] = 3
            if trouble == "prompt":
                state["prompt"] = [vf.types.UserMessage(content="Another task.")]
            if trouble == "setup":
                raise RuntimeError("row 7")

        async def get_prompt_messages(self, state: Any) -> Any:
            messages = await super().get_prompt_messages(state)
            return messages[:1] if trouble == "rewrite" else messages

        async def env_response(self, messages: Any, state: Any, **kwargs: Any) -> Any:
            if trouble == "answer":
                raise RuntimeError("row 7")
            if trouble == "infra":
                raise vf.InfraError("the sandbox is gone")
            if trouble == "picture":
                return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]
            state["left"] -= int(messages[-1].content)
            if state["left"] <= 0:
                state["final_env_response"] = [{"role": "user", "content": "done"}]
                return state["final_env_response"]
            return [{"role": "user", "content": f"{state['left']} left"}]

        @vf.cleanup  # type: ignore[untyped-decorator]
        async def note(self, state: Any) -> None:
            cleaned.append(str(state["left"]))

    async def left(state: Any) -> float:
        return float(state["left"])

    return Countdown(dataset=dataset(), rubric=vf.Rubric(funcs=[left]), max_turns=5)


def compared() -> Any:
    def best(completions: list[Any]) -> list[float]:
        return [1.0 for _ in completions]

    return vf.SingleTurnEnv(dataset=dataset(), rubric=vf.Rubric(funcs=[best]))


def config(name: str, **env_args: Any) -> dict[str, Any]:
    return {"type": "verifiers", "env_id": f"{HERE}:{name}", "env_args": env_args, "timeout_s": 10}


def item_of(name: str, index: int = 0, **env_args: Any) -> Item:
    row = export_rows(load(f"{HERE}:{name}", env_args))[index]
    messages = [Message.model_validate(message) for message in row["messages"]]
    return Item(id=f"i{index}", row=row, messages=messages, tools=row["tools"])


async def speak(session: Session, text: str, *arguments: str) -> list[str]:
    """One turn as a rollout makes it."""
    calls = [a_call("add", each, number) for number, each in enumerate(arguments, 1)]
    message = Message(role="assistant", content=text, tool_calls=calls)
    session.hear(message)
    if not calls:
        return [reply.content for reply in await session.reply(message)]
    return [result.output for result in await asyncio.gather(*(session.call(call) for call in calls))]


def play(
    name: str, *turns: tuple[str, ...], index: int = 0, unheard: str = "", **env_args: Any
) -> tuple[list[Any], dict[str, Any], bool]:
    """What the environment said to each turn, the outcome, and whether it ended the episode."""

    async def body() -> tuple[list[Any], dict[str, Any], bool]:
        environment = an_environment(**config(name, **env_args))
        try:
            await environment.discover()
            session = await environment.open(item_of(name, index, **env_args), "trace_1")
            try:
                said = [await speak(session, *turn) for turn in turns]
                if unheard:
                    session.hear(Message(role="assistant", content=unheard))
                await session.finish()
                return said, session.outcome(), session.is_over
            finally:
                await session.close()
        finally:
            await environment.close()

    return asyncio.run(body())


def test_tools_and_rows_come_from_the_environment() -> None:
    specs = specs_of(**config("calculator"))
    assert list(specs) == ["add"]
    parameters = specs["add"]["function"]["parameters"]  # type: ignore[index]
    assert parameters["required"] == ["a", "b"]
    (row, _) = export_rows(load(f"{HERE}:calculator", {}))
    assert json.loads(json.dumps(row)) == {
        "question": "1+1",
        "answer": "2",
        "example_id": 0,
        "messages": [{"role": "system", "content": "Calculate."}, {"role": "user", "content": "1+1"}],
        "tools": [specs["add"]],
    }


def test_the_script_writes_rows_that_load(tmp_path: Path) -> None:
    out, root = tmp_path / "rows.jsonl", Path(__file__).resolve().parent.parent
    command = [sys.executable, str(root / "scripts/prepare_verifiers"), f"{HERE}:calculator", str(out), "--limit", "1"]
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'tests'}"}
    subprocess.run(command, env=environment, check=True, timeout=120)
    (item,) = load_items(out, specs_of(**config("calculator")))
    assert (item.tool_names, item.messages[-1].content, item.row["answer"]) == (["add"], "1+1", "2")


def test_tool_calls_and_the_rubric() -> None:
    said, outcome, _ = play("calculator", ("Let me see.", '{"a": 1, "b": 1}', '{"a": 2, "b": 3}', "{"), ("2",))
    assert said[0][:2] == ["2", "5"]
    assert "Expecting property name" in said[0][2]  # verifiers' own words for the model
    assert said[1] == []
    assert outcome["reward"] == 2.0
    assert outcome["metrics"] == {
        "exact": 1.0,
        "spoken": 12.0,
        "num_turns": 2.0,
        "total_tool_calls": 3.0,
        "add_calls": 3.0,
    }
    assert (outcome["stop_condition"], outcome["is_truncated"]) == ("no_tools_called", False)


@pytest.mark.parametrize(("text", "reward"), [("3", 2.0), ("4", 0.0)])
def test_a_single_turn(text: str, reward: float) -> None:
    said, outcome, _ = play("single", (text,), index=1)
    assert said == [[]] and outcome["reward"] == reward


def test_the_environment_replies_until_it_ends() -> None:
    cleaned.clear()
    said, outcome, _ = play("game", ("1",), ("1",), ("1",))
    assert said == [["2 left"], ["1 left"], []]
    assert (outcome["reward"], outcome["stop_condition"]) == (0.0, "has_final_env_response")
    assert cleaned == ["0"]


def test_a_rollout_that_we_cut_short_is_scored_as_truncated() -> None:
    _, outcome, _ = play("game", ("1",))
    assert (outcome["reward"], outcome["stop_condition"], outcome["is_truncated"]) == (2.0, "prompt_too_long", True)
    _, outcome, _ = play("calculator", ("a", '{"a": 1, "b": 1}'), unheard="2")  # a last turn that met its limit
    assert outcome["metrics"]["spoken"] == 2.0 and outcome["reward"] == 2.0


def test_the_environments_own_limit_ends_the_episode() -> None:
    said, outcome, is_over = play("calculator", ("", '{"a": 1, "b": 1}'), max_turns=1)
    assert said == [["the episode is over"]] and is_over
    assert outcome["stop_condition"] == "max_turns_reached"


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        ("setup", "the first prompt: RuntimeError: row 7"),
        ("answer", "its answer: RuntimeError: row 7"),
        ("infra", "the sandbox is gone"),
        ("picture", "only text can be shown to the model"),
        ("prompt", "does not begin with the row's messages"),
        ("rewrite", "rewrites what was said before"),
    ],
)
def test_the_environments_failures_discard(trouble: str, words: str) -> None:
    with pytest.raises(ToolError, match=words):
        play("game", ("1",), trouble=trouble)


def test_two_rollouts_share_nothing() -> None:
    async def body() -> list[Any]:
        environment = an_environment(**config("game"))
        item = item_of("game")
        sessions = await asyncio.gather(*(environment.open(item, f"trace_{number}") for number in range(3)))
        said = await asyncio.gather(*(speak(session, str(number)) for number, session in enumerate(sessions)))
        for session in sessions:
            await session.finish()
            await session.close()
        await environment.close()
        return [*said, *(session.outcome()["reward"] for session in sessions)]

    assert asyncio.run(body()) == [["3 left"], ["2 left"], ["1 left"], 3.0, 2.0, 1.0]


def test_a_cancelled_rollout_is_cleaned_up() -> None:
    cleaned.clear()

    async def body() -> None:
        environment = an_environment(**config("game"))
        session = await environment.open(item_of("game"), "trace_1")
        await session.close()
        await environment.close()

    asyncio.run(body())
    assert cleaned == ["3"]


def test_a_whole_rollout(tmp_path: Path) -> None:
    from test_rollout import a_workshop, say

    from rft.graders import build_grader
    from rft.graders.run import validate

    call = 'So: <tool_call>{"name": "add", "arguments": {"a": 1, "b": 1}}</tool_call>'
    grader = build_grader(validate({"type": "environment", "key": "metrics.add_calls"}))
    workshop = a_workshop(say(call, "2"), environment=an_environment(**config("calculator")), grader=grader)
    attempt = Attempt("trace_1", item_of("calculator"), "train", 1, 0, seed=0)
    rollout = asyncio.run(run_rollout(attempt, workshop))
    assert rollout.stop_reason is StopReason.ANSWERED, rollout.error
    assert rollout.environment["reward"] == 2.0
    assert rollout.environment["metrics"]["spoken"] > len("2")  # what stood beside the call was heard too
    assert rollout.grade is not None and rollout.grade.score == 1.0


def test_the_process_keeps_its_signal_handlers() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    load(f"{HERE}:single", {})
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize(
    ("env_id", "words"),
    [
        ("no-such-environment", "Could not import"),
        (f"{HERE}:missing", "cannot be loaded"),
        (f"{HERE}:compared", "group"),
    ],
)
def test_an_environment_that_cannot_be_used_is_a_user_error(env_id: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        specs_of(type="verifiers", env_id=env_id)
    assert words in str(caught.value) and "cure: " in str(caught.value)
