"""Gymnasium environments behind one tool: real ones, and one of our own for what goes wrong."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import gymnasium
import numpy as np
import pytest
from bridging import a_call, an_environment, an_item, calls, specs_of, with_session
from gymnasium import spaces

from rft.envs import Session
from rft.envs.bridges.spaces import action_of, schema_of
from rft.envs.tasks import ArgumentError
from rft.errors import ToolError, UserError

HERE = __name__
RIGHT, DOWN, LEFT = 2, 1, 0
released = threading.Event()


class Counter(gymnasium.Env[Any, Any]):
    """Counts its steps; notices when two run at once, and where."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,))
    action_space = spaces.Text(8, min_length=1)
    num_open = 0

    def __init__(self, limit: int = 100, space: Any = None) -> None:
        self.limit, self.total, self._entered = limit, 0, threading.Lock()
        self.action_space = space or self.action_space
        type(self).num_open += 1

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        said = {} if options is None else {"options": options}
        return np.array([seed, 0.5]), {"lock": self._entered, "seed": np.int64(seed or 0), **said}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self._entered.acquire(blocking=False), "two steps at once"
        try:
            return self._step(action)
        finally:
            self._entered.release()

    def _step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert threading.current_thread() is not threading.main_thread()
        self.total += 1
        if action == "explode":
            raise KeyError("row 7")
        if action == "hang":
            released.wait(10)
        reward = float("nan") if action == "nan" else np.float32(0.5)
        return np.array([self.total, np.nan]), reward, False, self.total >= self.limit, {"half": "\ud83d"}  # type: ignore[return-value]

    def close(self) -> None:
        type(self).num_open -= 1


def make_counter(**kwargs: Any) -> Counter:
    return Counter(**kwargs)


def make_without_java() -> Counter:
    raise UserError("there is no java", where="games", cure="install it")


def make_unsupported() -> Counter:
    return Counter(space=spaces.Sequence(spaces.Discrete(2)))


LAKE = {"type": "gymnasium", "env": "FrozenLake-v1", "kwargs": {"is_slippery": False, "render_mode": "ansi"}}
OWN = {"type": "gymnasium", "env": f"{HERE}:make_counter"}


def test_a_walk_over_the_frozen_lake() -> None:
    async def body(session: Session) -> tuple[list[str], bool, dict[str, Any]]:
        steps = [DOWN, DOWN, RIGHT, RIGHT, DOWN, RIGHT]
        results = await calls(session, "step", *({"action": step} for step in steps))
        assert not any(result.is_error for result in results)
        return [session.opening, results[0].output], session.is_over, session.outcome()

    (opening, first), is_over, outcome = with_session(body, LAKE)
    assert opening == "\n[S]FFF\nFHFH\nFFFH\nHFFG\n"  # the player is where the terminal shows colour
    assert first == "  (Down)\nSFFF\n[F]HFH\nFFFH\nHFFG\n"
    assert is_over
    assert outcome["reward"] == 1.0 and outcome["num_steps"] == 6
    assert (outcome["terminated"], outcome["truncated"]) == (True, False)
    assert specs_of(**LAKE)["step"]["function"]["parameters"] == {  # type: ignore[index]
        "type": "object",
        "properties": {"action": {"type": "integer", "minimum": 0, "maximum": 3}},
        "required": ["action"],
    }


def test_after_the_end_nothing_happens() -> None:
    async def body(session: Session) -> None:
        await calls(session, "step", {"action": RIGHT}, {"action": DOWN})  # into the hole
        assert session.is_over
        before = session.outcome()
        (late,) = await calls(session, "step", {"action": LEFT})
        assert late.is_error and late.output == "the episode is over"
        assert session.outcome() == before

    with_session(body, LAKE)


def test_blackjack_as_json_with_seeds() -> None:
    async def body(session: Session) -> tuple[Any, dict[str, Any]]:
        (result,) = await calls(session, "step", {"action": 0})
        answer = json.loads(result.output)
        assert session.is_over and answer["terminated"] and answer["reward"] == session.outcome()["reward"]
        return json.loads(session.opening), answer

    config = {"type": "gymnasium", "env": "Blackjack-v1", "render": "json"}
    games = [with_session(body, config, {"seed": seed}) for seed in (1, 1, 2, 3, 4)]
    assert games[0] == games[1]
    assert len({str(opening) for opening, _ in games}) > 1
    assert set(games[0][0]) == {"observation", "reward", "terminated", "truncated"}


@pytest.mark.parametrize(("source", "num_starts"), [("item", 2), ("rollout", 4)])
def test_rollouts_of_an_item_begin_alike(source: str, num_starts: int) -> None:
    async def body() -> set[str]:
        environment = an_environment(**OWN, seed=source)
        openings = set()
        for item_id in ("a", "b"):
            for number in range(2):
                session = await environment.open(an_item({}, item_id), f"trace_{item_id}{number}")
                openings.add(session.opening)
                await session.close()
        return openings

    assert len(asyncio.run(body())) == num_starts


def test_wrong_actions_are_explained() -> None:
    async def body(session: Session) -> list[str]:
        wrong = [{"action": 9}, {"action": "up"}, {"action": True}, {"action": None}, {}, {"action": 1, "x": 2}, "[]"]
        results = await calls(session, "step", *wrong)
        results.append(await session.call(a_call("jump", {"action": 1})))
        assert all(result.is_error for result in results)
        assert session.outcome()["num_steps"] == 0
        return [result.output for result in results]

    outputs = with_session(body, LAKE)
    assert outputs[0] == "arguments.action: not a possible action; an action is a whole number from 0 to 3"
    assert outputs[0] == outputs[1] == outputs[2] == outputs[3]
    assert outputs[4] == outputs[5] == "arguments: exactly one is expected, action"
    assert outputs[6:] == ["arguments: must be a JSON object", "there is no tool jump; the tools are: step"]


def test_an_own_environment_is_summed_and_truncated() -> None:
    async def body(session: Session) -> tuple[str, list[str], dict[str, Any]]:
        results = await calls(session, "step", {"action": "go"}, {"action": "go"})
        assert session.is_over
        return session.opening, [result.output for result in results], session.outcome()

    opening, outputs, outcome = with_session(body, OWN | {"kwargs": {"limit": 2}}, {"seed": 5})
    assert opening == "[5.0, 0.5]"
    assert outputs == ["[1.0, null]", "[2.0, null]"]
    assert outcome == {"reward": 1.0, "num_steps": 2, "terminated": False, "truncated": True, "info": {"half": "?"}}
    assert Counter.num_open == 0


def test_calls_of_one_turn_wait_for_each_other() -> None:
    async def body(session: Session) -> dict[str, Any]:
        await asyncio.gather(*(session.call(a_call("step", {"action": "go"}, number)) for number in range(20)))
        return session.outcome()

    assert with_session(body, OWN)["num_steps"] == 20


@pytest.mark.parametrize(
    ("action", "words"),
    [
        ("explode", "make_counter: step raised KeyError: 'row 7'"),
        ("nan", "raised ValueError: the reward is nan"),
        ("hang", r"step: no answer within 0\.2 s"),
    ],
)
def test_a_failing_environment_discards_and_is_closed(action: str, words: str) -> None:
    released.clear()

    async def body(session: Session) -> None:
        await calls(session, "step", {"action": action})

    try:
        with pytest.raises(ToolError, match=words):
            with_session(body, OWN | {"timeout_s": 0.2})
    finally:
        released.set()


def test_two_rollouts_share_nothing() -> None:
    async def body() -> list[dict[str, Any]]:
        environment = an_environment(**LAKE)
        item = an_item(await environment.discover())
        first, second = await asyncio.gather(environment.open(item, "a"), environment.open(item, "b"))
        await asyncio.gather(calls(first, "step", {"action": RIGHT}), calls(second, "step", {"action": DOWN}))
        (ours,), (theirs,) = await asyncio.gather(
            calls(first, "step", {"action": DOWN}), calls(second, "step", {"action": DOWN})
        )
        assert first.is_over and not second.is_over
        assert "[H]" in ours.output and "[F]" in theirs.output
        await asyncio.gather(first.close(), second.close())
        return [first.outcome(), second.outcome()]

    first, second = asyncio.run(body())
    assert first["terminated"] and not second["terminated"]


@pytest.mark.parametrize(
    ("space", "schema", "good", "bad"),
    [
        (
            spaces.Discrete(3, start=-1),
            {"type": "integer", "minimum": -1, "maximum": 1},
            [-1, 1],
            [2, 0.0, "0", True, 10**30],
        ),
        (
            spaces.MultiDiscrete([2, 3]),
            {
                "type": "array",
                "items": {"type": "integer", "minimum": 0, "maximum": 2},
                "minItems": 2,
                "maxItems": 2,
            },
            [[1, 2]],
            [[2, 0], [1], [[1, 2]], 1, [1, 10**30], [1, None]],
        ),
        (
            spaces.MultiBinary(2),
            {
                "type": "array",
                "items": {"type": "integer", "minimum": 0, "maximum": 1},
                "minItems": 2,
                "maxItems": 2,
            },
            [[0, 1]],
            [[0, 2], [0.0, 1], [0, 257], [-1, 0]],
        ),
        (
            spaces.Box(-1.0, 1.0, (2, 1)),
            {
                "type": "array",
                "items": {
                    "type": "array",
                    "items": {"type": "number", "minimum": -1.0, "maximum": 1.0},
                    "minItems": 1,
                    "maxItems": 1,
                },
                "minItems": 2,
                "maxItems": 2,
            },
            [[[0.5], [1]]],
            [[[1.5], [0]], [0.5, 1], [[0.5], [1, 1]], [[float("nan")], [0]], "x"],
        ),
        (spaces.Box(-np.inf, np.inf, ()), {"type": "number"}, [0.1, -7], [[0.1], float("inf"), None]),
        (
            spaces.Text(3, charset="ab"),
            {
                "type": "string",
                "minLength": 1,
                "maxLength": 3,
                "description": "made of these characters: ab",
            },
            ["ab"],
            ["", "abab", "c", 1],
        ),
        (
            spaces.Dict({"move": spaces.Discrete(2), "say": spaces.Tuple([spaces.Text(3, charset="a")])}),
            {
                "type": "object",
                "properties": {
                    "move": {"type": "integer", "minimum": 0, "maximum": 1},
                    "say": {
                        "type": "array",
                        "prefixItems": [
                            {
                                "type": "string",
                                "minLength": 1,
                                "maxLength": 3,
                                "description": "made of these characters: a",
                            }
                        ],
                        "minItems": 1,
                        "maxItems": 1,
                    },
                },
                "required": ["move", "say"],
                "additionalProperties": False,
            },
            [{"move": 1, "say": ["a"]}],
            [{"move": 1}, {"move": 1, "say": "a"}, {"move": 1, "say": []}, {"move": 2, "say": ["a"]}, []],
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, spaces.Space) else "",
)
def test_spaces(space: spaces.Space[Any], schema: dict[str, Any], good: list[Any], bad: list[Any]) -> None:
    assert schema_of(space) == schema
    for value in good:
        assert space.contains(action_of(value, space))
    for value in bad:
        with pytest.raises(ArgumentError):
            action_of(value, space)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"env": "NoSuchLake-v1"}, "NoSuchLake"),
        ({"env": "FrozenLake-v1", "kwargs": {"map_name": "9x9"}}, "raised KeyError"),
        ({"env": f"{HERE}:missing"}, "cannot be loaded"),
        ({"env": f"{HERE}:make_unsupported"}, "the action space Sequence cannot be written as a tool's argument"),
    ],
)
def test_an_environment_that_cannot_be_used_is_a_user_error(config: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        specs_of(type="gymnasium", **config)
    assert words in str(caught.value) and "cure: " in str(caught.value)


def test_a_rows_options_go_to_reset() -> None:
    async def body(session: Session) -> dict[str, Any]:
        return session.outcome()["info"]

    assert with_session(body, OWN, {"options": {"level": [1, 2]}})["options"] == {"level": [1, 2]}
    assert "options" not in with_session(body, OWN)


def test_a_users_error_of_an_environment_is_one_message() -> None:
    with pytest.raises(UserError) as caught:
        specs_of(type="gymnasium", env=f"{HERE}:make_without_java")
    assert str(caught.value) == "games: there is no java\n  cure: install it"
