"""A real model through vLLM and the real SDK: text, streams, forced forms, a tool loop, a tuned checkpoint, a judge."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel, Field
from serving import serving
from test_hosts import an_adapter

from rft.chat import Chat
from rft.graders.judge import Judge, JudgeConfig, Place, SamplingParams
from rft.server.inference import Inference
from rft.server.models import Target
from rft.server.settings import InferenceConfig, LocalModel, ServerConfig
from rft.types import Item

MODEL = Path("models/smollm2-135m-instruct")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not MODEL.is_dir(), reason="scripts/prepare_model has not been run"),
]
WEATHER: dict[str, Any] = {
    "name": "get_weather",
    "description": "The weather in a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"]},
}
CHAT_TOOL: Any = {"type": "function", "function": WEATHER}
RESPONSES_TOOL: Any = {"type": "function", **WEATHER}
CAPITAL: Any = [{"role": "user", "content": "What is the capital of France?"}]


class Person(BaseModel):
    name: Annotated[str, Field(max_length=20)]
    age: Annotated[int, Field(ge=0, le=99)]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    model = {"path": MODEL, "dtype": "float32"}
    config = {"data_dir": tmp_path_factory.mktemp("data"), "models": {"m": model}}
    with serving(ServerConfig.model_validate(config)) as base_url:
        yield OpenAI(base_url=base_url, api_key="x", max_retries=0, timeout=300)


def test_text_and_usage(client: OpenAI) -> None:
    reply = client.chat.completions.create(model="m", messages=CAPITAL, temperature=0, max_tokens=20)
    assert "Paris" in (reply.choices[0].message.content or "")
    item = Item.model_validate({"id": "x", "row": {}, "messages": CAPITAL})
    prompt = Chat.from_folder(MODEL).first_prompt(item)
    assert reply.usage is not None and reply.usage.prompt_tokens == len(prompt)
    assert reply.usage.completion_tokens == 8  # seven and the end of turn
    assert client.responses.create(model="m", input=CAPITAL, temperature=0).output_text == (
        reply.choices[0].message.content
    )


def test_streams_come_in_pieces(client: OpenAI) -> None:
    whole = client.chat.completions.create(model="m", messages=CAPITAL, temperature=0, max_tokens=20)
    chunks = list(
        client.chat.completions.create(
            model="m",
            messages=CAPITAL,
            temperature=0,
            max_tokens=20,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    pieces = [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]
    assert len(pieces) > 3
    assert "".join(pieces) == whole.choices[0].message.content
    assert chunks[-1].usage is not None and whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    with client.responses.stream(model="m", input=CAPITAL, temperature=0) as stream:
        assert stream.get_final_response().output_text == whole.choices[0].message.content


def test_row_18_parse_gives_objects(client: OpenAI) -> None:
    response = client.responses.parse(
        model="m",
        reasoning={"effort": "low"},
        input=[{"role": "user", "content": "Invent a person."}],
        text_format=Person,
        max_output_tokens=100,
    )
    assert isinstance(response.output_parsed, Person)
    chat = client.chat.completions.parse(
        model="m", messages=[{"role": "user", "content": "Invent a person."}], response_format=Person, max_tokens=100
    )
    assert isinstance(chat.choices[0].message.parsed, Person)


def test_options_reach_the_engine(client: OpenAI) -> None:
    many = client.chat.completions.create(
        model="m",
        messages=[{"role": "user", "content": "Count from 1 to 20"}],
        n=3,
        stop=["5"],
        logprobs=True,
        top_logprobs=2,
        max_tokens=40,
        seed=7,  # without effect, and without harm
        top_p=0.9,
        frequency_penalty=0.1,
    )
    assert [choice.index for choice in many.choices] == [0, 1, 2]
    for choice in many.choices:
        assert "5" not in (choice.message.content or "")
        assert choice.logprobs is not None and choice.logprobs.content
        assert all(len(entry.top_logprobs) >= 2 for entry in choice.logprobs.content)
    cut = client.chat.completions.create(model="m", messages=CAPITAL, max_tokens=2)
    assert cut.choices[0].finish_reason == "length"
    short = client.responses.create(model="m", input=CAPITAL, max_output_tokens=2)
    assert short.status == "incomplete" and short.incomplete_details is not None
    assert short.incomplete_details.reason == "max_output_tokens"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_calls_can_be_forced(client: OpenAI, choice: Any) -> None:
    reply = client.chat.completions.create(
        model="m",
        messages=[{"role": "user", "content": "Weather in Paris?"}],
        tools=[CHAT_TOOL],
        tool_choice=choice,
        parallel_tool_calls=False,
        max_tokens=100,
    )
    assert reply.choices[0].finish_reason == "tool_calls"
    (call,) = reply.choices[0].message.tool_calls or []
    assert call.type == "function" and call.function.name == "get_weather"
    assert set(json.loads(call.function.arguments)) == {"city"}


def test_a_tool_loop_over_responses(client: OpenAI) -> None:
    """The first turn is forced, so that a small model calls; then outputs go back as they came."""
    context: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
    choices: list[Any] = ["required", "none"]
    prompts = []
    for choice in choices:
        response = client.responses.create(
            model="m",
            input=context,
            tools=[RESPONSES_TOOL],
            tool_choice=choice,
            reasoning={"effort": "low"},
            store=False,
            include=["reasoning.encrypted_content"],
            parallel_tool_calls=False,
            max_output_tokens=60,
        )
        assert response.usage is not None
        prompts.append(response.usage.input_tokens)
        context += response.output
        for item in response.output:
            if item.type == "function_call":
                assert "city" in json.loads(item.arguments)
                context.append({"type": "function_call_output", "call_id": item.call_id, "output": "sunny, 21 degrees"})
    assert len(prompts) == 2
    assert response.output_text


def test_what_is_too_long_is_refused(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="m", input="word " * 3000)
    assert caught.value.code == "context_length_exceeded"


def test_a_request_whose_client_went_away_is_cancelled(client: OpenAI) -> None:
    """A stream that is closed, and a plain request that times out, make room for others in vLLM."""
    endless: Any = {"model": "m", "messages": [{"role": "user", "content": "Count to 1000."}], "n": 16}
    stream = client.chat.completions.create(**endless, stream=True, logprobs=True)
    next(iter(stream))
    assert num_running() > 0
    stream.close()
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=1).chat.completions.create(**endless)
    deadline = threading.Event()
    for _ in range(100):
        if num_running() == 0:
            break
        deadline.wait(0.1)
    assert num_running() == 0


def num_running() -> int:
    """Requests that the vLLM servers of our hosts sample or hold."""

    async def ask(socket: Path) -> int:
        connector = aiohttp.UnixConnector(str(socket))
        async with aiohttp.ClientSession("http://vllm/", connector=connector) as http, http.get("metrics") as reply:
            text = await reply.text()
        found = [line for line in text.splitlines() if line.startswith("vllm:num_requests_")]
        return int(sum(float(line.rpartition(" ")[2]) for line in found if "running" in line or "waiting{" in line))

    return sum(asyncio.run(ask(socket)) for socket in our_engines())


def our_engines() -> list[Path]:
    """The sockets of the vLLM servers that hosts of this process started."""
    parents: dict[int, int] = {}
    found: list[tuple[int, Path]] = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            words = (path / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if "--uds" in words:
            found.append((int(path.name), Path(words[words.index("--uds") + 1])))

    def is_ours(pid: int) -> bool:
        while pid > 1 and pid != os.getpid():
            pid = parents.get(pid, 0)
        return pid == os.getpid()

    return sorted({socket for pid, socket in found if is_ours(pid)})


def test_a_tuned_checkpoint_and_a_judge(tmp_path: Path) -> None:
    """An adapter that makes the model say something else, merged or beside its base; the base judges."""
    running = our_engines()  # of the server that other tests of this module share
    adapter = an_adapter(MODEL, tmp_path / "step_000001")
    base = LocalModel(path=MODEL, dtype="float32", kv_cache_gib=0.25)
    asked = {"messages": CAPITAL, "max_tokens": 6, "temperature": 0}

    async def text(inference: Inference, target: Target) -> str:
        answer = await inference.chat(target, asked)
        assert isinstance(answer, dict)
        return str(answer["choices"][0]["message"]["content"])

    async def work(adapters: str) -> list[str]:
        inference = Inference(
            InferenceConfig.model_validate({"max_loaded": 1, "adapters": adapters}), tmp_path / "logs"
        )
        try:
            said = [await text(inference, Target("m", base))]
            async with inference.place(Target("m", base)) as place:
                await check_judge(place)
            said.append(await text(inference, Target("ft:m", base, adapter)))
            said.append(await text(inference, Target("m", base)) if adapters == "beside" else said[0])
        finally:
            await inference.close()
        assert our_engines() == running
        return said

    merged, beside = asyncio.run(work("merged")), asyncio.run(work("beside"))
    assert merged[0] != merged[1]
    assert merged == beside


async def check_judge(place: Place) -> None:
    judge = Judge("m", JudgeConfig(path=MODEL))
    judge.place = place
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    verdict = await judge.ask(CAPITAL, schema, SamplingParams(max_completions_tokens=50, seed=3))
    assert isinstance((verdict.answer or {}).get("ok"), bool)
    await judge.close()
