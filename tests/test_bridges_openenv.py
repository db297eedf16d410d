"""OpenEnv servers: their protocol, their errors, one session per rollout."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from bridging import a_call, a_config, an_environment, an_item, calls, specs_of, with_session
from openenv_server import EchoWorld, OpenEnvServer, ToolWorld
from pydantic import ValidationError

from rft.envs import Session
from rft.errors import NoProgressError, ToolError, UserError


def config(server: OpenEnvServer, **changes: Any) -> dict[str, Any]:
    return {"type": "openenv", "url": server.url, **changes}


def test_the_tool_is_the_servers_action() -> None:
    with OpenEnvServer() as server:
        specs = specs_of(**config(server, description="Say it."))
    assert specs == {
        "step": {
            "type": "function",
            "function": {
                "name": "step",
                "description": "Say it.",
                "parameters": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "text": {"description": "What to say", "minLength": 1, "title": "Text", "type": "string"},
                        "times": {"default": 1, "title": "Times", "type": "integer"},
                    },
                    "required": ["text"],
                },
            },
        }
    }


def test_an_episode() -> None:
    async def body(session: Session) -> tuple[str, list[str], dict[str, Any]]:
        results = await calls(session, "step", {"text": "a"}, {"text": "b", "times": 2}, {"text": "c"})
        assert session.is_over
        (late,) = await calls(session, "step", {"text": "d"})
        assert late.is_error and late.output == "the episode is over"
        await session.finish()
        return session.opening, [result.output for result in results], session.outcome()

    with OpenEnvServer() as server:
        shown = config(server, observation_key="text", reset={"name": "Ann"}, reset_columns=["level"])
        opening, outputs, outcome = with_session(body, shown, {"seed": 5, "level": 2, "other": 1})
        assert server.wait_until_empty()
    assert opening == "Say something, Ann."
    assert outputs == ["a", "b b", "c"]
    assert outcome == {
        "reward": 1.5,
        "last_reward": 0.5,
        "num_steps": 3,
        "done": True,
        "state": {"episode_id": "trace_1", "step_count": 3, "heard": ["a", "b", "c"]},
    }
    (world,) = server.worlds
    assert world.reset_with == {"seed": 5, "episode_id": "trace_1", "name": "Ann", "level": 2}


def test_whole_observations_are_json() -> None:
    async def body(session: Session) -> list[str]:
        (result,) = await calls(session, "step", {"text": "\ud83d"})
        return [session.opening, result.output]

    with OpenEnvServer() as server:
        outputs = with_session(body, config(server))
    assert outputs == ['{"text": "Say something, you."}', '{"text": "?", "num": 1}']


def test_a_wrong_action_is_explained_and_the_session_goes_on() -> None:
    async def body(session: Session) -> list[str]:
        results = await calls(session, "step", {}, {"text": "a", "loud": True}, "[]")
        results.append(await session.call(a_call("jump")))
        assert all(result.is_error for result in results)
        (good,) = await calls(session, "step", {"text": "a"})
        assert not good.is_error
        return [result.output for result in results]

    with OpenEnvServer() as server:
        outputs = with_session(body, config(server))
    assert outputs == [
        "arguments.text: Field required",
        "arguments.loud: Extra inputs are not permitted",
        "arguments: must be a JSON object",
        "there is no tool jump; the tools are: step",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("explode", r"step failed: 'row 7' \(EXECUTION_ERROR\)"),
        ("nan", "the reward 'much' is not a finite number"),
        ("vanish", "the server closed the session"),
        ("hang", r"no answer to step within 0\.2 s"),
    ],
)
def test_the_servers_failures_discard(text: str, words: str) -> None:
    async def body(session: Session) -> None:
        await calls(session, "step", {"text": text})

    with OpenEnvServer() as server, pytest.raises(ToolError, match=words):
        with_session(body, config(server, timeout_s=0.2))


def test_after_a_missed_answer_the_session_is_lost() -> None:
    """A late answer must not be taken for the answer to the next call."""

    async def body(session: Session) -> None:
        with pytest.raises(ToolError):
            await calls(session, "step", {"text": "hang"})
        with pytest.raises(ToolError, match="the session is lost"):
            await calls(session, "step", {"text": "a"})
        await session.finish()
        assert session.outcome()["state"] == {}

    with OpenEnvServer() as server:
        with_session(body, config(server, timeout_s=0.2))


def test_mcp_tools_are_tools() -> None:
    async def body(session: Session) -> tuple[list[tuple[str, bool]], dict[str, Any]]:
        results = await calls(session, "shout", {"text": "a"}, {}, {"text": "bad"}, {"text": "c"})
        assert session.is_over
        return [(result.output, result.is_error) for result in results], session.outcome()

    with OpenEnvServer(ToolWorld) as server:
        specs = specs_of(**config(server))
        assert list(specs) == ["shout"]
        assert specs["shout"]["function"]["parameters"]["required"] == ["text"]  # type: ignore[index]
        results, outcome = with_session(body, config(server))
        assert server.wait_until_empty()
    assert results == [("A", False), ("text: Field required", True), ("BAD", True), ("C", False)]
    assert (outcome["reward"], outcome["last_reward"]) == (7.0, 3.0)  # 1, 1, 2, 3


def test_an_mcp_tool_that_timed_out_discards() -> None:
    async def body(session: Session) -> None:
        await calls(session, "shout", {"text": "slow"})

    with OpenEnvServer(ToolWorld) as server, pytest.raises(ToolError, match=r"timed out after 30\.0 seconds"):
        with_session(body, config(server))


def test_two_rollouts_share_nothing() -> None:
    async def body(server: OpenEnvServer) -> list[dict[str, Any]]:
        environment = an_environment(**config(server))
        item = an_item(await environment.discover())
        first, second = await asyncio.gather(environment.open(item, "a"), environment.open(item, "b"))
        await asyncio.gather(
            *(session.call(a_call("step", {"text": text})) for session in (first, second) for text in ("x", "y"))
        )
        await second.call(a_call("step", {"text": "z"}))
        for session in (first, second):
            await session.finish()
            await session.close()
        await environment.close()
        return [first.outcome(), second.outcome()]

    with OpenEnvServer() as server:
        first, second = asyncio.run(body(server))
        assert server.max_open == 2 and server.wait_until_empty()
    assert first["state"] == {"episode_id": "a", "step_count": 2, "heard": ["x", "y"]}
    assert second["state"] == {"episode_id": "b", "step_count": 3, "heard": ["x", "y", "z"]}


def test_a_full_server_says_so_and_max_sessions_waits() -> None:
    async def body(server: OpenEnvServer, **changes: Any) -> list[Any]:
        environment = an_environment(**config(server, **changes))
        item = an_item(await environment.discover())

        async def rollout(number: int) -> str:
            session = await environment.open(item, f"trace_{number}")
            try:
                return (await session.call(a_call("step", {"text": "a"}))).output
            finally:
                await session.close()

        try:
            return await asyncio.gather(*(rollout(number) for number in range(4)), return_exceptions=True)
        finally:
            await environment.close()

    with OpenEnvServer(max_sessions=1) as server:
        outcomes = asyncio.run(body(server, max_sessions=1))
        assert all(isinstance(outcome, str) for outcome in outcomes), outcomes
        outcomes = asyncio.run(body(server))
    refused = [outcome for outcome in outcomes if isinstance(outcome, ToolError)]
    assert refused and "(CAPACITY_REACHED)" in str(refused[0]) and "environment.max_sessions" in str(refused[0])


def test_a_refused_reset_discards_and_closes() -> None:
    with OpenEnvServer() as server:
        with pytest.raises(ToolError, match=r"reset failed: no such level \(EXECUTION_ERROR\)"):
            with_session(_nothing, config(server, reset={"refuse": True}))
        assert server.wait_until_empty()


async def _nothing(session: Session) -> None: ...


def test_headers_are_sent_and_never_shown() -> None:
    with OpenEnvServer() as server:
        secret = config(server, headers={"authorization": "Bearer hunter2"}, timeout_s=0.2)
        with pytest.raises(ToolError) as caught:
            with_session(lambda session: calls(session, "step", {"text": "explode"}), secret)
    assert set(server.headers) == {"Bearer hunter2"}
    assert "hunter2" not in str(caught.value) + repr(a_config(**secret))


def test_an_own_schema_needs_no_server_to_discover() -> None:
    schema = {"type": "object", "properties": {"text": {"type": "string"}}}
    specs = specs_of(type="openenv", url="http://127.0.0.1:1", action_schema=schema)
    assert specs["step"]["function"]["parameters"] == schema  # type: ignore[index]


def test_a_server_that_stays_away_ends_the_run() -> None:
    async def body() -> None:
        schema = {"type": "object", "properties": {}}
        environment = an_environment(type="openenv", url="http://127.0.0.1:1", action_schema=schema, outage_limit_s=0.1)
        environment.outages.on_change = lambda text: None
        try:
            await environment.open(an_item(await environment.discover()), "trace_1")
        finally:
            await environment.close()

    with pytest.raises(NoProgressError, match=r"127\.0\.0\.1:1 was down"):
        asyncio.run(body())


def test_a_missing_server_or_schema_is_a_user_error() -> None:
    with pytest.raises(UserError, match="cure: start the OpenEnv server"):
        specs_of(type="openenv", url="http://127.0.0.1:1")
    with OpenEnvServer(has_schema=False) as server, pytest.raises(UserError, match=r"schema \(HTTP 404\)"):
        specs_of(**config(server))
    with pytest.raises(ValidationError, match="must start with http"):
        a_config(type="openenv", url="localhost:8000")


def test_an_observation_without_the_key_names_those_it_has() -> None:
    with OpenEnvServer() as server, pytest.raises(ToolError, match="observation_key to one of: metadata, text"):
        with_session(_nothing, config(server, observation_key="prompt"))
    assert EchoWorld.action_class.__name__ == "EchoAction"
