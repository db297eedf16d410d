"""The published guide as it is printed, against a real server: real training, real inference, a scripted gpt-5."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from openai import OpenAI
from seeds.upstream import app, grade, questions
from serving import rft_serve, served
from tiny import tiny_model_folder

ROOT = Path(__file__).resolve().parent.parent.parent
_LIMIT_S = 900


def test_the_scripted_model_prefers_short_questions() -> None:
    assert grade("Since when?") > grade("Rest.") > grade("word " * 90)
    assert len(set(questions(20))) == 20


@pytest.mark.slow
def test_the_guide_runs_as_printed(tmp_path: Path) -> None:
    upstream = app()
    with served(upstream) as address:
        model = {
            "path": str(tiny_model_folder(tmp_path / "tiny")),
            "dtype": "float32",
            "max_model_len": 512,
            "judged_by": "gpt-5",
            "run": {
                "engine": {"type": "transformers", "max_model_len": 512},
                "rollout": {"max_tokens_per_turn": 32, "max_turns": 1, "truncated_grade": None},
                "training": {"base_rollouts": 4, "learning_rate": 1e-3},
            },
        }
        config = tmp_path / "server.yaml"
        config.write_text(
            json.dumps(
                {
                    "port": 0,
                    "data_dir": str(tmp_path / "data"),
                    "models": {"o4-mini-2025-04-16": model, "gpt-5": {"url": f"{address}/v1"}},
                    "inference": {"engine": "transformers"},
                }
            )
        )
        with rft_serve(config, tmp_path / "server.log", "--no-auth") as (url, _):
            command = [sys.executable, "scripts/run_seed_cookbook", "--base-url", url, "--folder", str(tmp_path / "g")]
            result = subprocess.run(
                command,
                cwd=ROOT,
                env=os.environ | {"MPLBACKEND": "Agg"},
                capture_output=True,
                text=True,
                timeout=_LIMIT_S,
            )
            assert result.returncode == 0, result.stdout[-1500:] + result.stderr[-3000:]
            assert "Job completed with status: succeeded" in result.stdout
            assert "Base Model Response" in result.stdout
            (job,) = OpenAI(base_url=url, api_key="unused").fine_tuning.jobs.list()
    assert job.fine_tuned_model is not None and job.fine_tuned_model in result.stdout
    judged = [body for body in upstream.state.requests if "Agent reply:" in json.dumps(body["messages"])]
    assert len(judged) >= 15 * 4 * 4  # steps x items x rollouts
