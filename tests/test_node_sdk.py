"""The server through OpenAI's Node SDK, in its pinned version: what a user does, told in tests/node/story.mjs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from serving import rft_serve
from tiny import tiny_model_folder
from upstream import Upstream, a_call, answering

NODE = Path(__file__).resolve().parent / "node"
STORY_S = 420.0

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("node") is None, reason="there is no node: install Node.js 20 or newer"),
    pytest.mark.skipif(
        not (NODE / "node_modules/openai/package.json").is_file(),
        reason="the Node SDK is not there: npm install --prefix tests/node (scripts/test does it)",
    ),
]


def a_config(folder: Path, strong: str, caller: str) -> Path:
    run = {
        "engine": {"type": "transformers", "max_model_len": 256},
        "rollout": {"max_tokens_per_turn": 8, "temperature": 1.0},
        "training": {"base_rollouts": 2},
    }
    tiny = {"path": str(tiny_model_folder(folder / "tiny")), "dtype": "float32", "max_model_len": 256, "run": run}
    config = {
        "port": 0,
        "data_dir": str(folder / "data"),
        "inference": {"engine": "transformers"},
        "models": {"tiny": tiny, "strong": {"url": strong}, "caller": {"url": caller}},
    }
    path = folder / "server.yaml"
    path.write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What came back to the story."""
    folder = tmp_path_factory.mktemp("node")
    row = {"messages": [{"role": "user", "content": "say yes"}]}
    (folder / "train.jsonl").write_text("".join(json.dumps(row | {"n": n}) + "\n" for n in range(10)))
    loop = Upstream({"content": None, "tool_calls": [a_call("add", "call_1", a=2, b=3)]}, {"content": "It is 5."})
    with answering(Upstream({"content": "Paris"})) as strong, answering(loop) as caller:
        config = a_config(folder, strong, caller)
        with rft_serve(config, folder / "server.log", "--no-auth") as (url, _):
            environment = os.environ | {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": "unused"}
            command = ["node", "story.mjs", str(folder / "train.jsonl")]
            story = subprocess.run(
                command, cwd=NODE, env=environment, capture_output=True, text=True, timeout=STORY_S, check=False
            )
    assert story.returncode == 0, story.stderr[-3000:] + (folder / "server.log").read_text()[-2000:]
    assert [message["content"] for message in loop.bodies[1]["messages"] if message["role"] == "tool"] == ["5"]
    return json.loads(story.stdout)


def test_models_and_files(told: Any) -> None:
    assert told["models"] == ["tiny", "strong", "caller"]
    assert told["content"] is True and told["deleted"] is True
    assert told["missing"]["class"] == "NotFoundError" and told["missing"]["status"] == 404


def test_answers_streams_and_a_tool_loop(told: Any) -> None:
    assert (told["chat"], told["streamed"], told["toolLoop"]) == ("Paris", "Paris", "It is 5.")


def test_a_job_runs_and_its_model_answers(told: Any) -> None:
    assert told["job"] == {"status": "succeeded", "error": None, "hasModel": True}
    assert told["numEvents"] > 2 and told["numCheckpoints"] >= 1
    assert told["answeredBy"] is True


def test_refusals_are_the_classes_that_the_sdk_knows(told: Any) -> None:
    assert told["refused"]["class"] == "BadRequestError"
    assert told["refused"]["param"] == "method.reinforcement.hyperparameters.compute_multiplier"
    assert told["cancelled"] == {
        "class": "BadRequestError",
        "status": 400,
        "code": "job_already_terminal",
        "param": None,
    }
