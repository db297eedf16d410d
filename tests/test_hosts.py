"""Host processes: started when asked for, ended when idle or in the way, replaced when dead, never left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_model_folder

from rft.server.errors import ApiError
from rft.server.inference import Inference
from rft.server.models import Target
from rft.server.settings import InferenceConfig, LocalModel

pytestmark = pytest.mark.slow
DEADLINE_S = 60.0
GREEDY: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "temperature": 0}


@asynccontextmanager
async def inferring(tmp_path: Path, **changes: Any) -> AsyncIterator[Inference]:
    config = InferenceConfig.model_validate({"engine": "transformers", "request_timeout_s": DEADLINE_S} | changes)
    inference = Inference(config, tmp_path / "logs")
    try:
        yield inference
    finally:
        await inference.close()


def a_target(tmp_path: Path, name: str = "m", checkpoint: Path | None = None) -> Target:
    path = tmp_path / name
    if not path.is_dir():
        tiny_model_folder(path)
    return Target(name, LocalModel(path=path, dtype="float32", max_model_len=256), checkpoint)


async def answer(inference: Inference, target: Target, **fields: Any) -> dict[str, Any]:
    said = await inference.chat(target, {"model": target.name, **GREEDY, **fields})
    assert isinstance(said, dict)
    return said


def processes(mark: str) -> list[int]:
    """Ids of the processes whose command line has `mark`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark in path.read_bytes().replace(b"\0", b" ").decode(errors="replace"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110 (other processes tell nobody)
            await asyncio.sleep(0.05)


def host_id(target: Target) -> int:
    """Of the host itself, not of what watches over it."""
    mark = f'"path":"{target.local.path}"'
    return max(processes(mark))


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


def test_an_idle_host_is_ended_and_started_again(tmp_path: Path) -> None:
    async def work() -> None:
        target = a_target(tmp_path)
        async with inferring(tmp_path, idle_stop_s=0.3) as inference:
            first, second = await asyncio.gather(answer(inference, target), answer(inference, target))
            assert first["choices"][0]["message"] == second["choices"][0]["message"]
            assert len(processes(str(target.local.path))) == 2  # the host and what watches over it
            await until(lambda: not inference.hosts.loaded)
            assert processes(str(target.local.path)) == []
            again = await answer(inference, target)
            assert again["choices"] == first["choices"]
        assert processes(str(target.local.path)) == []

    run(work())


def test_a_killed_host_is_replaced(tmp_path: Path) -> None:
    async def work() -> None:
        target = a_target(tmp_path)
        async with inferring(tmp_path) as inference:
            first = await answer(inference, target)
            os.kill(host_id(target), signal.SIGKILL)
            assert (await answer(inference, target))["choices"] == first["choices"]
            events = await inference.stream(target, {"model": "m", **GREEDY, "stream": True})
            os.kill(host_id(target), signal.SIGKILL)
            text = b"".join([event async for event in events])
            assert b"[DONE]" in text or b"broke off" in text
            assert (await answer(inference, target))["choices"] == first["choices"]

    run(work())


def test_the_longest_unused_host_makes_room(tmp_path: Path) -> None:
    async def work() -> None:
        one, other = a_target(tmp_path, "one"), a_target(tmp_path, "other")
        async with inferring(tmp_path, max_loaded=1) as inference:
            await answer(inference, one)
            await answer(inference, other)
            assert len(inference.hosts.loaded) == 1
            assert processes(str(one.local.path)) == []

    run(work())


def test_a_host_in_use_does_not_make_room(tmp_path: Path) -> None:
    async def work() -> None:
        one, other = a_target(tmp_path, "one"), a_target(tmp_path, "other")
        async with (
            inferring(tmp_path, max_loaded=1, request_timeout_s=0.5) as inference,
            inference.place(one) as place,  # a start has a deadline of its own
        ):
            assert place.socket is not None and place.socket.exists()
            with pytest.raises(ApiError, match="busy") as caught:
                await answer(inference, other)
            assert caught.value.status == 503

    run(work())


def test_requests_for_two_models_take_turns(tmp_path: Path) -> None:
    async def work() -> None:
        targets = [a_target(tmp_path, "one"), a_target(tmp_path, "other")]
        async with inferring(tmp_path, max_loaded=1) as inference:
            said = await asyncio.gather(*(answer(inference, targets[i % 2]) for i in range(4)))
            assert [one["model"] for one in said] == ["one", "other"] * 2

    run(work())


def test_a_model_that_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    async def work() -> None:
        target = a_target(tmp_path)
        (tmp_path / "m" / "model.safetensors").unlink()
        async with inferring(tmp_path) as inference:
            with pytest.raises(ApiError, match="could not be loaded") as caught:
                await answer(inference, target)
            assert caught.value.status == 500 and caught.value.code == "model_not_loaded"
            assert "model.safetensors" in caught.value.message
            assert inference.hosts.loaded == []

    run(work())


def an_adapter(base: Path, out: Path) -> Path:
    """A LoRA that changes the model clearly."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
    )
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    model.save_pretrained(out)
    return out


def test_a_tuned_model_answers_with_its_checkpoint(tmp_path: Path) -> None:
    async def work() -> None:
        base = a_target(tmp_path)
        tuned = a_target(tmp_path, checkpoint=an_adapter(base.local.path, tmp_path / "step_000001"))
        fields = {"max_tokens": 12, "logprobs": True}
        async with inferring(tmp_path) as inference:
            plain, changed = [await answer(inference, target, **fields) for target in (base, tuned)]
        texts = [said["choices"][0]["logprobs"]["content"] for said in (plain, changed)]
        assert texts[0] != texts[1]
        assert [entry["token"] for entry in texts[1]] == greedy_tokens(base.local.path, tuned.checkpoint)

    run(work())


def greedy_tokens(base: Path, adapter: Path | None) -> list[str]:
    """What transformers and peft say, token by token."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(adapter))
    text = tokenizer.apply_chat_template(GREEDY["messages"], add_generation_prompt=True, tokenize=False)
    ids, said = tokenizer.encode(text, add_special_tokens=False), list[str]()
    with torch.inference_mode():
        for _ in range(12):
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            ids.append(token)
            said.append(tokenizer.decode([token]))
    return said


def test_a_killed_server_leaves_no_host_behind(tmp_path: Path) -> None:
    target = a_target(tmp_path)
    code = f"""
import asyncio, sys
sys.path.insert(0, "tests")
from pathlib import Path
from test_hosts import a_target, answer, inferring
async def work():
    async with inferring(Path({str(tmp_path)!r})) as inference:
        await answer(inference, a_target(Path({str(tmp_path)!r})))
        print("loaded", flush=True)
        await asyncio.Event().wait()
asyncio.run(work())
"""
    server = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None and server.stdout.readline() == "loaded\n"
        assert processes(f'"path":"{target.local.path}"')
    finally:
        server.kill()
        server.wait()
    deadline = time.monotonic() + DEADLINE_S
    while processes(f'"path":"{target.local.path}"') and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes(f'"path":"{target.local.path}"') == []
