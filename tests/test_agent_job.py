"""An agent job over HTTP, with the real SDK, engine, tools and model: tools, endpoint grader, max_episode_steps.

It succeeds, its model answers in a tool loop through the Responses API, and beats the base model on the validation
file. The whole thing takes minutes.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from serving import rft_serve, served
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from rft.envs.serve import ToolServer
from rft.envs.tasks.icd10.grader import grade as code_grade

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
MODEL = "smollm2"
SUFFIX = "coder"
MAX_EPISODE_STEPS = 5
NUM_STEPS = 2
_LIMIT_S = 1500.0
_CODE = re.compile(r"\b[A-Z]\d[0-9A-Z](?:\.[0-9A-Z]{1,4})?\b")


def shaped_score(sample: dict[str, Any], item: dict[str, Any]) -> float:
    """The quickstart's grade: mostly the code, a little for using the tool and for answering from its results."""
    results = [m["content"] for m in sample["trace"] if m["role"] == "tool" and not m.get("is_error")]
    found = _CODE.search(sample["output_text"])
    score = 0.1 * bool(results)
    if found:
        score += 0.1 * any(found.group() in _CODE.findall(text) for text in results)
        score += 0.8 * code_grade(sample, item)
    return score


def grading_app(calls: list[dict[str, Any]]) -> Starlette:
    async def grade(request: Request) -> JSONResponse:
        body = await request.json()
        calls.append({"trace_id": body["trace_id"], "key": request.headers.get("authorization")})
        return JSONResponse({"score": shaped_score(body["sample"], body["item"])})

    return Starlette(routes=[Route("/grade", grade, methods=["POST"])])


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenAI]:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # of the trainer: with one a step takes twice as long
    config = {
        "port": 0,
        "data_dir": str(tmp_path / "data"),
        "models": {
            MODEL: {
                "path": str(ROOT / "models" / "smollm2-135m-instruct"),
                "dtype": "float32",
                "max_model_len": 1024,
                "run": {
                    "engine": {"type": "vllm", "max_model_len": 1024},
                    "rollout": {"max_turns": 3, "max_tokens_per_turn": 48, "truncated_grade": None},
                    "training": {"learning_rate": 6.0e-4, "base_rollouts": 8, "advantage_scale": "group"},
                },
            }
        },
    }
    path = tmp_path / "server.yaml"
    path.write_text(json.dumps(config))
    with rft_serve(path, tmp_path / "server.log", "--no-auth") as (url, _):
        yield OpenAI(base_url=url, api_key="unused")


def upload(client: OpenAI, folder: Path, split: str, num_rows: int) -> str:
    lines = (ROOT / "data" / "icd10" / f"{split}.jsonl").read_text().splitlines()[:num_rows]
    path = folder / f"{split}.jsonl"
    path.write_text("\n".join(lines))
    return client.files.create(file=path.open("rb"), purpose="fine-tune").id


def ended(client: OpenAI, job_id: str) -> Any:
    deadline = time.monotonic() + _LIMIT_S
    while (job := client.fine_tuning.jobs.retrieve(job_id)).status not in ("succeeded", "failed", "cancelled"):
        assert time.monotonic() < deadline, f"{job.status} after {_LIMIT_S:.0f} s"
        time.sleep(2)  # as users poll
    return job


def flat(tool: dict[str, Any]) -> dict[str, Any]:
    """A row's tool as the Responses API has it."""
    return {"type": "function", **tool["function"]}


def tool_loop(client: OpenAI, model: str, row: dict[str, Any], url: str) -> tuple[str, int]:
    """What the model says at the end of the conversation, and how many tool calls it made: the published loop."""
    import urllib.request

    context: list[Any] = list(row["messages"])
    num_calls = 0
    for _ in range(4):
        tools = [flat(tool) for tool in row["tools"]]
        response = client.responses.create(model=model, input=context, tools=tools, temperature=0.2, store=False)
        context += response.output
        calls = [item for item in response.output if item.type == "function_call"]
        if not calls:
            return response.output_text, num_calls
        for call in calls:
            body = {"type": "function_call", "id": call.id, "call_id": call.call_id, "name": call.name}
            body |= {"arguments": call.arguments, "trace_id": "trace_loop", "item": row}
            request = urllib.request.Request(f"{url}/{call.name}", json.dumps(body).encode(), method="POST")
            request.add_header("content-type", "application/json")
            with urllib.request.urlopen(request, timeout=30) as answer:
                output = json.load(answer)["output"]
            num_calls += 1
            context.append({"type": "function_call_output", "call_id": call.call_id, "output": output})
    return "", num_calls


def mean_score(client: OpenAI, eval_id: str, name: str) -> float:
    (run,) = [run for run in client.evals.runs.list(eval_id) if run.name == name]
    scores = [item.results[0].score for item in client.evals.runs.output_items.list(run.id, eval_id=eval_id)]
    return sum(scores) / len(scores)


def test_an_agent_job_learns_and_its_model_answers_with_tools(client: OpenAI, tmp_path: Path) -> None:
    calls: list[dict[str, Any]] = []
    with ToolServer("icd10") as tools, served(grading_app(calls)) as grader:
        job = client.fine_tuning.jobs.create(
            model=MODEL,
            training_file=upload(client, tmp_path, "train", 6 * NUM_STEPS),
            validation_file=upload(client, tmp_path, "validation", 12),
            seed=7,
            suffix=SUFFIX,
            metadata={"kind": "agent"},
            method={  # type: ignore[arg-type]
                "type": "reinforcement",
                "reinforcement": {
                    "tools": [
                        {"name": name, "server_url": f"{tools.base_url}/{name}", "headers": {"x-secret": "hush-hush"}}
                        for name in ("search_codes", "lookup_code")
                    ],
                    "grader": {
                        "type": "endpoint",
                        "name": "shaped",
                        "url": f"{grader}/grade",
                        "headers": {"authorization": "Bearer hush-hush"},
                    },
                    "max_episode_steps": MAX_EPISODE_STEPS,
                    "hyperparameters": {"n_epochs": 1, "batch_size": 6, "eval_interval": NUM_STEPS, "eval_samples": 2},
                },
            },
        )
        job = ended(client, job.id)
        assert job.status == "succeeded", job.error
        assert re.fullmatch(rf"ft:{MODEL}:[a-z0-9-]+:{SUFFIX}:\w{{8}}", job.fine_tuned_model)
        assert calls and all(call["key"] == "Bearer hush-hush" for call in calls)
        assert "hush-hush" not in job.to_json()
        before, after = (mean_score(client, job.eval_id, name) for name in ("Step 0", f"Step {NUM_STEPS}"))
        assert after > before + 0.02
        row = json.loads((ROOT / "data" / "icd10" / "validation.jsonl").read_text().splitlines()[0])
        answer, num_calls = tool_loop(client, job.fine_tuned_model, row, tools.base_url)
        assert num_calls >= 1
        assert isinstance(answer, str)
