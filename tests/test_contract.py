"""The rows of the contract's feature table that need a whole server: jobs that train, models that answer.

Everything is real but the size of the model: `rft serve` in a process, `accelerate launch`, the SDK, tools and graders
over HTTP. The agent's model has learnt by heart to call two tools at once and to answer then. Other rows have their
tests beside what they test; the last test here counts them.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import threading
import time
import zlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from openai import BadRequestError, OpenAI
from serving import rft_serve, served
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from tiny import taught_model_folder, tiny_model_folder

ROOT = Path(__file__).parent.parent
SECRET = "whsec_" + "cmZ0LWlzLWxvY2FsLXJmdC1pcy1sb2NhbA=="
CALLS = "".join(f'<tool_call>{{"name": "{name}", "arguments": {{}}}}</tool_call>' for name in ("look", "peek"))
NUM_STEPS = 4
_LIMIT_S = 400.0
_TOOL_S = 0.3
VOWELS = {
    "type": "python",
    "name": "vowels",
    "source": "def grade(sample, item):\n    return min(1.0, sum(c in 'aeiou' for c in sample['output_text']) / 8)\n",
}


def spec(name: str) -> dict[str, Any]:
    parameters: dict[str, Any] = {"type": "object", "properties": {}}
    return {"type": "function", "function": {"name": name, "description": name, "parameters": parameters}}


def agent_row(fault: str = "") -> dict[str, Any]:
    tools = [spec("look"), spec("peek")]
    return {"messages": [{"role": "user", "content": "go"}], "tools": tools, "fault": fault}


@dataclass
class World:
    """Tools with the faults that their items ask for, an endpoint grader, a webhook receiver; all remember."""

    calls: list[dict[str, Any]] = field(default_factory=list)
    spans: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))
    attempts: dict[tuple[str, str], int] = field(default_factory=lambda: defaultdict(int))
    graded: list[dict[str, Any]] = field(default_factory=list)
    dead: set[str] = field(default_factory=set)
    hooks: list[tuple[bytes, dict[str, str]]] = field(default_factory=list)
    hooked: threading.Event = field(default_factory=threading.Event)

    def app(self) -> Starlette:
        routes = [
            Route("/tool", self._tool, methods=["POST"]),
            Route("/grade", self._grade, methods=["POST"]),
            Route("/hook", self._hook, methods=["POST"]),
        ]
        return Starlette(routes=routes)

    async def _tool(self, request: Request) -> JSONResponse:
        body = await request.json()
        self.calls.append(body | {"key": request.headers.get("x-key")})
        trace, fault = body["trace_id"], body["item"].get("fault")
        self.attempts[trace, body["call_id"]] += 1
        started = time.monotonic()
        await asyncio.sleep(_TOOL_S)  # what the tool takes: calls of a turn must overlap
        self.spans[trace].append((started, time.monotonic()))
        if fault == "dead" and (not self.dead or trace in self.dead):
            self.dead.add(trace)  # the first rollout alone: the one that replaces it goes through
            return JSONResponse({"error": "down"}, status_code=500)
        if fault == "flaky" and self.attempts[trace, body["call_id"]] < 3:
            return JSONResponse({"error": "busy"}, status_code=503)
        if fault == "missing":
            return JSONResponse({"error": "no such shelf"}, status_code=404)
        output = "x" * 1_200_000 if fault == "large" else "nothing"
        return JSONResponse({"output": output, "call_id": body["call_id"], "id": body["id"]})

    async def _grade(self, request: Request) -> JSONResponse:
        body = await request.json()
        self.graded.append(body)
        return JSONResponse({"score": zlib.crc32(body["trace_id"].encode()) % 100 / 100})

    async def _hook(self, request: Request) -> JSONResponse:
        self.hooks.append((await request.body(), dict(request.headers)))
        self.hooked.set()
        return JSONResponse({})


@dataclass
class Place:
    """A server, its client and its world."""

    client: OpenAI
    world: World
    address: str  # of the world
    folder: Path

    def upload(self, rows: list[dict[str, Any]], name: str) -> str:
        path = self.folder / f"{name}.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        file = self.client.files.create(file=path.open("rb"), purpose="fine-tune")
        return self.client.files.wait_for_processing(file.id).id

    def until(self, job_id: str, *statuses: str) -> Any:
        deadline = time.monotonic() + _LIMIT_S
        while (job := self.client.fine_tuning.jobs.retrieve(job_id)).status not in statuses:
            assert job.status not in ("failed", "cancelled") and time.monotonic() < deadline, (job.status, job.error)
            time.sleep(0.2)
        return job

    def until_step(self, job_id: str, step: int) -> None:
        deadline = time.monotonic() + _LIMIT_S
        while not any(number >= step for number in self.steps(job_id)):
            assert time.monotonic() < deadline, f"no step {step} within {_LIMIT_S:.0f} s"
            time.sleep(0.1)

    def steps(self, job_id: str) -> list[int]:
        """Of the job's metrics events, oldest first."""
        events = [event for event in self.client.fine_tuning.jobs.list_events(job_id) if event.type == "metrics"]
        return [event.data["step"] for event in reversed(events)]  # type: ignore[index]

    def learn(self, grader: dict[str, Any], seed: int, n_epochs: int) -> Any:
        rows = [{"messages": [{"role": "user", "content": f"say {number}"}]} for number in range(12)]
        settings = {"n_epochs": n_epochs, "batch_size": 5, "eval_interval": 100, "eval_samples": 8}
        method = {"type": "reinforcement", "reinforcement": {"grader": grader, "hyperparameters": settings}}
        return self.client.fine_tuning.jobs.create(
            model="exact",
            training_file=self.upload(rows[:10], f"train-{seed}"),
            validation_file=self.upload(rows[10:], f"validation-{seed}"),
            method=method,  # type: ignore[arg-type]
            seed=seed,
        )

    def validation(self, job: Any, name: str) -> list[tuple[str, float]]:
        """What was said and its score, of every item of an eval run."""
        (run,) = [run for run in self.client.evals.runs.list(job.eval_id) if run.name == name]
        items = self.client.evals.runs.output_items.list(run.id, eval_id=job.eval_id)
        return [(item.sample.output[0].content or "", item.results[0].score) for item in items]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder, world = tmp_path_factory.mktemp("contract"), World()
    results = [["nothing", "nothing"], ["error", "no such shelf"], ["busy, 413", "too large: ab"]]
    taught = taught_model_folder(folder / "taught", agent_row(), [CALLS, "done"], results)
    tiny = tiny_model_folder(folder / "tiny")
    rollout = {"max_tokens_per_turn": 160, "temperature": 0.3, "truncated_grade": None}
    with served(world.app()) as address, pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONTRACT_HOOK_SECRET", SECRET)
        config = {
            "port": 0,
            "data_dir": str(folder / "data"),
            "inference": {"engine": "transformers"},
            "worker": {"max_running": 1},
            "webhooks": [{"url": f"{address}/hook", "secret_env": "CONTRACT_HOOK_SECRET"}],
            "models": {
                "agent": {
                    "path": str(taught),
                    "dtype": "float32",
                    "max_model_len": 4000,
                    "run": {
                        "engine": {"type": "transformers", "max_model_len": 4000},
                        "rollout": rollout,
                        "training": {"base_rollouts": 2, "learning_rate": 1e-6},
                    },
                },
                "exact": {
                    "path": str(tiny),
                    "dtype": "float32",
                    "max_model_len": 512,
                    "run": {
                        "model": {"lora": None},
                        "engine": {"type": "transformers", "max_model_len": 512, "max_concurrent": 1},
                        "rollout": rollout | {"max_tokens_per_turn": 16, "temperature": 1.0},
                        "training": {"base_rollouts": 8, "learning_rate": 6e-3, "advantage_scale": "group"},
                    },
                },
            },
        }
        path = folder / "server.yaml"
        path.write_text(json.dumps(config))
        with rft_serve(path, folder / "server.log", "--no-auth") as (url, _):
            yield Place(OpenAI(base_url=url, api_key="unused", webhook_secret=SECRET), world, address, folder)


@pytest.fixture(scope="module")
def agent_job(place: Place) -> Any:
    """A job with tools, paused after its first step and resumed; while paused its snapshot has answered."""
    training = [agent_row(fault) for fault in ["", "", "", "dead", "", "", "flaky", "", "", ""]]
    validation = [agent_row(fault) for fault in ("", "large", "missing", "flaky")]
    tools = [
        {"name": name, "server_url": f"{place.address}/tool", "headers": {"x-key": "k"}} for name in ("look", "peek")
    ]
    settings = {"n_epochs": 2, "batch_size": 5, "eval_interval": 2, "compute_multiplier": 1.0}
    reinforcement = {
        "tools": tools,
        "grader": {"type": "endpoint", "name": "ours", "url": f"{place.address}/grade"},
        "max_episode_steps": 6,
        "hyperparameters": settings,
    }
    client = place.client
    job = client.fine_tuning.jobs.create(
        model="agent",
        training_file=place.upload(training, "agent-train"),
        validation_file=place.upload(validation, "agent-validation"),
        method={"type": "reinforcement", "reinforcement": reinforcement},  # type: ignore[arg-type]
        suffix="Shop",
        seed=3,
    )
    place.until(job.id, "running")
    place.until_step(job.id, 1)
    client.fine_tuning.jobs.pause(job.id)
    paused = place.until(job.id, "paused", "succeeded")
    assert paused.status == "paused"
    snapshot = client.responses.create(model=paused.fine_tuned_model, input="hello", max_output_tokens=16)
    assert snapshot.status in ("completed", "incomplete") and snapshot.model == paused.fine_tuned_model
    assert client.fine_tuning.jobs.resume(job.id).status == "queued"
    return place.until(job.id, "succeeded")


pytestmark = pytest.mark.slow


def test_row_07_and_10_a_paused_job_goes_on_where_it_was(place: Place, agent_job: Any) -> None:
    assert place.steps(agent_job.id) == list(range(1, NUM_STEPS + 1))
    messages = [event.message for event in place.client.fine_tuning.jobs.list_events(agent_job.id)][::-1]
    story = ["Created fine-tuning job", "Validating training file", "Files validated", "Fine-tuning job started"]
    story += ["New fine-tuned model created", "The job has successfully completed"]
    places = [next(i for i, text in enumerate(messages) if text.startswith(part)) for part in story]
    assert places == sorted(places)
    with pytest.raises(BadRequestError) as refused:
        place.client.fine_tuning.jobs.cancel(agent_job.id)
    assert refused.value.code == "job_already_terminal"


def test_row_14_and_15_the_results_of_a_real_job(place: Place, agent_job: Any) -> None:
    text = place.client.files.content(agent_job.result_files[0]).text
    assert text.splitlines()[0].startswith("step,")
    assert len(text.splitlines()) == 1 + 1 + NUM_STEPS  # the header, step 0
    found = list(place.client.fine_tuning.jobs.checkpoints.list(agent_job.id))
    assert found[0].step_number == NUM_STEPS
    answer = place.client.responses.create(model=found[-1].fine_tuned_model_checkpoint, input="go", max_output_tokens=8)
    assert answer.model == found[-1].fine_tuned_model_checkpoint


def test_row_17_names_of_tuned_models(place: Place, agent_job: Any) -> None:
    name = agent_job.fine_tuned_model
    assert re.fullmatch(r"ft:agent:[a-z0-9-]+:[Ss]hop:\w{8}", name)
    assert name in {model.id for model in place.client.models.list()}
    assert place.client.models.retrieve(name).owned_by


def test_row_18_and_19_a_tool_loop_with_the_tuned_model(place: Place, agent_job: Any) -> None:
    context: list[Any] = agent_row()["messages"]
    tools: Any = [{"type": "function", **tool["function"]} for tool in agent_row()["tools"]]
    model = agent_job.fine_tuned_model
    response = place.client.responses.create(model=model, input=context, tools=tools, temperature=0.0, store=False)
    calls = [item for item in response.output if item.type == "function_call"]
    assert [call.name for call in calls] == ["look", "peek"]
    context += response.output
    context += [{"type": "function_call_output", "call_id": call.call_id, "output": "nothing"} for call in calls]
    response = place.client.responses.create(model=model, input=context, tools=tools, temperature=0.0, store=False)
    assert response.output_text == "done"
    chat = place.client.chat.completions.create(
        model=model, messages=agent_row()["messages"], tools=agent_row()["tools"], temperature=0.0
    )
    assert [call.function.name for call in chat.choices[0].message.tool_calls or []] == ["look", "peek"]  # type: ignore[union-attr]


def test_row_31_and_32_tools_and_grader_share_the_rollouts_id(place: Place, agent_job: Any) -> None:
    call = place.world.calls[0]
    assert call.keys() >= {"type", "id", "call_id", "name", "arguments", "trace_id", "item"}
    assert call["type"] == "function_call" and json.loads(call["arguments"]) == {}
    assert call["item"]["messages"] == agent_row()["messages"]
    assert {call["key"] for call in place.world.calls} == {"k"}
    graded = [body["trace_id"] for body in place.world.graded]
    called = {call["trace_id"] for call in place.world.calls}
    assert len(graded) == len(set(graded)), "every rollout has an id of its own"
    assert set(graded) <= called and called - set(graded) == place.world.dead
    assert all(len(body["sample"]["output_tools"]) == 2 for body in place.world.graded)


def test_row_33_calls_of_a_turn_run_at_once(place: Place, agent_job: Any) -> None:
    num_overlapping = 0
    for spans in place.world.spans.values():
        spans.sort()
        num_overlapping += any(later[0] < earlier[1] for earlier, later in itertools.pairwise(spans))
    assert num_overlapping > len(place.world.spans) / 2


def test_row_34_and_36_what_the_model_saw_of_faults(place: Place, agent_job: Any) -> None:
    (run,) = [run for run in place.client.evals.runs.list(agent_job.eval_id) if run.name == "Step 0"]
    seen: dict[str, str] = {}
    for item in place.client.evals.runs.output_items.list(run.id, eval_id=agent_job.eval_id):
        trace: Any = item.datasource_item["trace"]
        outputs = [span["span_data"]["output"] for span in trace["spans"] if span["span_data"]["type"] == "FUNCTION"]
        seen[str(item.datasource_item["fault"])] = outputs[0]
    assert seen[""] == "nothing" and seen["flaky"] == "nothing"
    assert "413" in seen["large"] and len(seen["large"]) < 2000
    assert "no such shelf" in seen["missing"]
    (dead,) = place.world.dead
    assert max(num for (trace, _), num in place.world.attempts.items() if trace == dead) == 4  # the call and 3 retries


def test_row_37_a_grader_that_always_raises_fails_the_job(place: Place) -> None:
    broken = {"type": "python", "name": "broken", "source": "def grade(sample, item):\n    raise ValueError('oops')\n"}
    job = place.learn(broken, seed=5, n_epochs=1)
    deadline = time.monotonic() + _LIMIT_S
    while (job := place.client.fine_tuning.jobs.retrieve(job.id)).status not in ("failed", "succeeded"):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert job.status == "failed" and job.error.code == "grader_failure_rate_exceeded"
    assert "ValueError: oops" in job.error.message


def test_row_38_39_and_41_learning_happens_and_is_repeated_by_its_seed(place: Place) -> None:
    jobs = [place.until(place.learn(VOWELS, seed=42, n_epochs=8).id, "succeeded") for _ in range(2)]
    first, second = ([place.validation(job, name) for name in ("Step 0", "Step 16")] for job in jobs)
    assert sorted(first[0]) == sorted(second[0]), "the evaluation before any training is the same"
    assert sorted(first[1]) == sorted(second[1]), "one engine, one sequence at a time: so is the end"
    before, after = (fmean(score for _, score in items) for items in first)
    assert after > before + 0.2
    usage = jobs[0].usage_metrics
    assert usage["seconds"]["training"] > 0

    def score(model: str) -> float:
        prompt: Any = [{"role": "user", "content": "say 11"}]
        answers = place.client.chat.completions.create(model=model, messages=prompt, n=8, max_completion_tokens=16)
        return fmean(sum(letter in "aeiou" for letter in choice.message.content or "") for choice in answers.choices)

    assert score(jobs[0].fine_tuned_model) > score("exact") + 1


def test_row_40_the_webhook_verifies(place: Place, agent_job: Any) -> None:
    deadline = time.monotonic() + 30
    while not (found := [hook for hook in place.world.hooks if agent_job.id.encode() in hook[0]]):
        assert time.monotonic() < deadline, "the webhook was not called"
        place.world.hooked.wait(0.1)
    body, headers = found[0]
    event = place.client.webhooks.unwrap(body, headers)
    assert event.type == "fine_tuning.job.succeeded" and event.data.id == agent_job.id


def test_every_row_of_the_table_has_a_test() -> None:
    names = re.findall(
        r"def test_row_([\d_and]+)", "\n".join(p.read_text() for p in Path(__file__).parent.glob("*.py"))
    )
    assert {int(row) for name in names for row in re.findall(r"\d+", name)} == set(range(1, 43))
