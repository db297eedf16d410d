"""TRL's environment classes: the same tools, texts and rewards as TRL's own trainer reads from them."""

from __future__ import annotations

import asyncio
import inspect
import threading
from pathlib import Path
from typing import Any

import pytest
from bridging import a_call, an_environment, an_item, calls, specs_of, with_session

from rft.envs import Session
from rft.errors import ToolError, UserError
from rft.rollout import Attempt, run_rollout
from rft.types import StopReason
from rft.wire import MAX_BODY_BYTES

HERE = __name__
closed: list[str] = []
threads: set[str] = set()
released = threading.Event()
ended = threading.Event()


class Guess:
    """Guess a number; every method says in which thread it runs."""

    def __init__(self) -> None:
        self.guesses: list[int] = []
        self.reward = 0.0
        self.done = False
        self._secret = 7
        self.handle = threading.Lock()  # state that is no JSON

    def reset(self, secret: int = 7, **row: Any) -> str | None:
        threads.add(threading.current_thread().name)
        self.columns = sorted(row)
        self._secret = secret
        return "A number from 1 to 9." if secret else None

    def guess(self, number: int) -> str:
        """
        Say a number.

        Args:
            number: The number.
        """
        threads.add(threading.current_thread().name)
        if self.done:
            raise ValueError("The game is over.")
        self.guesses.append(number)
        self.done = number == self._secret
        self.reward = float(self.done)
        return "right" if self.done else "wrong"

    async def history(self) -> list[int]:
        """Tell what was said."""
        await asyncio.sleep(0)
        return self.guesses

    def nothing(self) -> None:
        """Return nothing."""

    def half(self) -> str:
        """Return half of a surrogate pair."""
        return "\ud83d"

    def flood(self) -> str:
        """Return too much."""
        return "x" * (MAX_BODY_BYTES + 1)

    def blocks(self, kind: str) -> list[dict[str, Any]]:
        """
        Return content blocks.

        Args:
            kind: Of the second.
        """
        return [{"type": "text", "text": "a"}, {"type": kind, "text": "b"}]

    def hang(self) -> str:
        """Block the thread."""
        released.wait(10)
        return "late"

    def close(self) -> None:
        closed.append(f"{self._secret}")
        ended.set()

    def _helper(self) -> None: ...


class Scored(Guess):
    """Owns its reward."""

    num_asked = 0

    async def get_reward(self) -> float:
        type(self).num_asked += 1
        return 10.0 * len(self.guesses)


class Broken(Guess):
    def reset(self, **row: Any) -> str:
        raise KeyError("row 7")


class Named(Guess):
    def reset(self, prompt: Any, answer: str) -> str:  # type: ignore[override]
        return f"{prompt[0]['content']} {answer}"


class NoReset:
    def act(self) -> str:
        """Act."""
        return ""


class Untyped(Guess):
    def act(self, direction) -> str:  # type: ignore[no-untyped-def]
        """Act."""
        return str(direction)


def make() -> Guess:
    return Guess()


FACTORIES = {"guess": Guess}


def config(name: str = "Guess", **changes: Any) -> dict[str, Any]:
    return {"type": "trl", "factory": f"{HERE}:{name}", **changes}


def test_the_tools_are_those_that_trl_finds() -> None:
    """By trl's own expression (GRPOTrainer.__init__), less `close`, which ends the instance here."""
    members = inspect.getmembers(Guess, predicate=inspect.isfunction)
    of_trl = {name for name, _ in members if name not in ("reset", "get_reward") and not name.startswith("_")}
    specs = specs_of(**config())
    assert set(specs) == of_trl - {"close"}
    from transformers.utils.chat_template_utils import get_json_schema

    assert specs["guess"] == get_json_schema(Guess().guess)
    assert specs_of(**config("make")) == specs


def test_the_row_is_reset_with_and_answers_first() -> None:
    async def body(session: Session) -> tuple[str, dict[str, Any]]:
        await session.finish()
        return session.opening, session.outcome()

    opening, outcome = with_session(body, config(), {"secret": 3, "level": 1, "tools": []})
    assert opening == "A number from 1 to 9."
    assert outcome["columns"] == ["level", "prompt"]  # trl's name for messages; tools are rft's own
    opening, _ = with_session(body, config(), {"secret": 0})
    assert opening == ""
    opening, _ = with_session(body, config("Named"), {"answer": "a", "more": 1})
    assert opening == "Begin. a"


def test_methods_are_called_and_their_values_shown_as_trl_shows_them() -> None:
    async def body(session: Session) -> list[tuple[str, bool]]:
        results = await calls(session, "guess", {"number": 1}, {"number": 7}, {"number": 2}, {"count": 2}, "{")
        results += [await session.call(a_call(name)) for name in ("history", "nothing", "half", "flood", "fly")]
        results += [await session.call(a_call("blocks", {"kind": "text"}))]
        return [(result.output, result.is_error) for result in results]

    assert with_session(body, config()) == [
        ("wrong", False),
        ("right", False),
        ("{'error': 'The game is over.'}", True),
        ("{'error': \"arguments: missing a required argument: 'number'\"}", True),
        (
            "{'error': 'arguments: not valid JSON: Expecting property name enclosed in double quotes: line 1 column 2 "
            "(char 1)'}",
            True,
        ),
        ("[1, 7]", False),
        ("None", False),
        ("?", False),
        ("413: the answer of flood is larger than 1,000,000 bytes", True),
        (
            "{'error': 'there is no tool fly; the tools are: blocks, flood, guess, half, hang, history, nothing'}",
            True,
        ),
        ("ab", False),
    ]


def test_the_public_state_is_the_outcome() -> None:
    async def body(session: Session) -> dict[str, Any]:
        await calls(session, "guess", {"number": 1}, {"number": 7})
        await session.finish()
        return session.outcome()

    expected = {"guesses": [1, 7], "reward": 1.0, "done": True, "columns": ["prompt"]}
    assert with_session(body, config()) == expected
    before = Scored.num_asked
    assert with_session(body, config("Scored")) == expected | {"reward": 20.0}
    assert Scored.num_asked == before + 1


def test_exceptions_may_discard_instead() -> None:
    async def body(session: Session) -> None:
        (wrong,) = await calls(session, "guess", {"count": 1})
        assert wrong.is_error  # what the model got wrong is shown in any case
        await calls(session, "guess", {"number": 7}, {"number": 7})

    with pytest.raises(ToolError, match=r"guess raised ValueError: The game is over\."):
        with_session(body, config(exceptions="discard"))


def test_a_reset_that_fails_discards_and_closes() -> None:
    closed.clear()
    with pytest.raises(ToolError, match="reset raised KeyError: 'row 7'"):
        with_session(_nothing, config("Broken"))
    assert closed == ["7"]


async def _nothing(session: Session) -> None: ...


def test_a_picture_cannot_be_shown() -> None:
    async def body(session: Session) -> None:
        await session.call(a_call("blocks", {"kind": "image"}))

    with pytest.raises(ToolError, match="answered with an image"):
        with_session(body, config())


def test_a_method_that_hangs_discards_and_is_left_behind() -> None:
    released.clear()
    ended.clear()
    try:
        with pytest.raises(ToolError, match=rf"{HERE}:Guess: hang: no answer within 0\.1 s"):
            with_session(_hang, config(timeout_s=0.1))
        assert not ended.is_set()
    finally:
        released.set()
    assert ended.wait(10), "what hung is closed once it ends"


async def _hang(session: Session) -> None:
    try:
        await session.call(a_call("hang"))
    finally:
        await session.finish()
        assert session.outcome() == {}


def test_two_rollouts_share_nothing_but_the_class() -> None:
    async def body() -> list[dict[str, Any]]:
        environment = an_environment(**config())
        specs = await environment.discover()
        threads.clear()
        closed.clear()
        sessions = await asyncio.gather(
            *(environment.open(an_item(specs, secret=secret), f"trace_{secret}") for secret in (3, 4))
        )
        for number in (3, 4):
            await asyncio.gather(*(session.call(a_call("guess", {"number": number})) for session in sessions))
        await asyncio.gather(*(session.finish() for session in sessions))
        await asyncio.gather(*(session.close() for session in sessions))
        return [session.outcome() for session in sessions]

    first, second = asyncio.run(body())
    assert (first["guesses"], first["done"], first["reward"]) == ([3], True, 1.0)
    assert (second["guesses"], second["done"], second["reward"]) == ([3, 4], True, 1.0)
    assert sorted(closed) == ["3", "4"]
    assert threading.main_thread().name not in threads


def test_a_cancelled_rollout_closes_its_instance() -> None:
    closed.clear()
    released.clear()

    async def body() -> None:
        environment = an_environment(**config(timeout_s=5))
        session = await environment.open(an_item(await environment.discover(), secret=5), "trace_1")
        call = asyncio.create_task(session.call(a_call("hang")))
        await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        released.set()
        await session.close()

    asyncio.run(body())
    assert closed == ["5"]


def test_a_whole_rollout_is_graded_by_what_the_environment_says(tmp_path: Path) -> None:
    from test_rollout import a_workshop, say

    from rft.graders import build_grader
    from rft.graders.run import validate

    guess = '<tool_call>{"name": "guess", "arguments": {"number": 7}}</tool_call>'
    grader = build_grader(validate({"type": "environment", "range": [0, 5]}))
    workshop = a_workshop(say(guess, "Done."), environment=an_environment(**config("Scored")), grader=grader)
    item = an_item(specs_of(**config("Scored")))
    rollout = asyncio.run(run_rollout(Attempt("trace_1", item, "train", 1, 0, seed=0), workshop))
    assert rollout.stop_reason is StopReason.ANSWERED, rollout.error
    assert rollout.environment["reward"] == 10.0
    assert rollout.grade is not None and rollout.grade.score == 5.0
    assert rollout.turns[0].results[0].output == "right"
    assert "A number from 1 to 9." in workshop.chat.tokenizer.decode(rollout.turns[0].input_ids)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Missing", "cannot be loaded"),
        ("FACTORIES", "is a dict, not callable"),
        ("NoReset", "NoReset has no method reset"),
        ("Untyped", "Untyped.act cannot be a tool: Argument direction is missing a type hint"),
    ],
)
def test_a_class_that_cannot_be_used_is_a_user_error(name: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        specs_of(**config(name))
    assert words in str(caught.value) and "cure: " in str(caught.value)
