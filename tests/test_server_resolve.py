"""From a job to the config that runs: models, judges, limits, numbers, seeds; written for its owner alone."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from job_server import GRADER, Api, a_config, an_api, reinforcement, row, tuned_by
from openai import BadRequestError
from tiny import tiny_model_folder

from rft import checkpoints
from rft.config import TransformersEngineConfig, VllmEngineConfig
from rft.server.jobs.automatic import items_per_step, num_steps, resolved
from rft.server.jobs.resolve import merged, schedule
from rft.server.keys import DEFAULT_PROJECT
from rft.server.models import checkpoint_name
from rft.server.settings import ServerConfig
from rft.store import RunStore

AUTO = {
    "n_epochs": "auto",
    "batch_size": "auto",
    "learning_rate_multiplier": "auto",
    "compute_multiplier": "auto",
    "eval_interval": "auto",
    "eval_samples": "auto",
    "reasoning_effort": "default",
}


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with an_api(tmp_path) as found:
        yield found


def judge(model: str) -> dict[str, Any]:
    return {"type": "score_model", "name": "j", "model": model, "input": [{"role": "user", "content": "rate"}]}


def test_what_a_job_decides_and_what_the_table(api: Api, tmp_path: Path) -> None:
    hyperparameters = {
        "n_epochs": 5,
        "batch_size": 4,
        "learning_rate_multiplier": 2,
        "compute_multiplier": 1.5,
        "eval_interval": 3,
        "eval_samples": 2,
        "reasoning_effort": "high",
    }
    held_out = api.uploads.add([row(500)])
    job = api.wait(api.create(method=tuned_by(**hyperparameters), seed=7, validation_file=held_out))
    config = api.config_of(job)
    training = config.training
    assert (training.steps, training.items_per_step, training.base_rollouts) == (15, 4, 4)
    assert (training.learning_rate, training.compute_multiplier) == (0.002, 1.5)
    assert (training.keep_best, config.evaluation.every, config.evaluation.rollouts_per_item) == (3, 3, 2)
    assert (config.rollout.max_tokens_per_turn, config.rollout.truncated_grade) == (200, -1.0)
    assert (config.seed, config.name, config.runs_dir) == (7, job.id, api.services.jobs.runs.resolve())
    assert config.model.path == (tmp_path / "model").resolve() and config.model.dtype == "float32"
    assert isinstance(config.engine, VllmEngineConfig) and config.engine.max_model_len == 1024
    assert config.environment is None and config.judges == {}
    assert config.data.train == api.folder(job).resolve() / "data" / "train.jsonl"
    assert config.data.validation == api.folder(job).resolve() / "data" / "validation.jsonl"


def test_the_table_may_say_otherwise(tmp_path: Path) -> None:
    run = {
        "engine": {"type": "transformers", "max_model_len": 128},
        "rollout": {"truncated_grade": None, "max_tokens_per_turn": 60},
        "training": {"keep_best": 1, "checkpoint_every": 5},
        "model": {"lora": None},
        "warmup": {"learning_rate": 0.5},
    }
    config = a_config(tmp_path)
    models = {"m": config.models["m"].model_copy(update={"run": run})}
    with an_api(tmp_path, config.model_copy(update={"models": models})) as api:
        used = api.config_of(api.wait(api.create(method=tuned_by(reasoning_effort="high"))))
        assert isinstance(used.engine, TransformersEngineConfig) and used.engine.max_model_len == 128
        assert used.rollout.truncated_grade is None and used.rollout.max_tokens_per_turn == 64
        assert (used.training.keep_best, used.training.checkpoint_every, used.model.lora) == (1, 5, None)
        assert used.warmup is None


def test_a_model_whose_config_cannot_run_is_refused_at_create(tmp_path: Path) -> None:
    config = a_config(tmp_path)
    models = {"m": config.models["m"].model_copy(update={"run": {"training": {"surprise": 1}}})}
    with an_api(tmp_path, config.model_copy(update={"models": models})) as api:
        with pytest.raises(BadRequestError, match=r"training\.surprise: unknown key") as caught:
            api.create()
        assert caught.value.code == "invalid_run_config"
        assert list(api.services.jobs.runs.iterdir()) == []


@pytest.mark.parametrize(("effort", "tokens"), [("low", 50), ("default", 100), ("medium", 100), ("high", 200)])
def test_effort_is_the_length_of_a_turn(api: Api, effort: str, tokens: int) -> None:
    job = api.create(method=tuned_by(reasoning_effort=effort))
    assert api.config_of(job).rollout.max_tokens_per_turn == tokens


def test_judges_are_found_in_the_table(api: Api, tmp_path: Path) -> None:
    parts = {"a": judge("far"), "b": judge("gpt-4o-2024-08-06"), "c": GRADER}
    grader = {"type": "multi", "graders": parts, "calculate_output": "(a + b) / 2 + 0 * c"}
    judges = api.config_of(api.create(method=reinforcement(grader=grader))).judges
    assert judges.keys() == {"far", "gpt-4o-2024-08-06"}
    far, near = judges["far"], judges["gpt-4o-2024-08-06"]
    assert (far.url, far.model, far.api_key_env) == ("http://127.0.0.1:9/v1", "name-there", "FAR_KEY")
    assert (near.path, near.dtype, near.max_model_len) == ((tmp_path / "model").resolve(), "float32", 1024)


def a_tuned_model(api: Api, name: str = "ft:m:rft::abcdefgh") -> Path:
    """A job with a checkpoint, and names for both."""
    job = api.create()
    body = api.services.jobs.get(job.id)
    folder = api.folder(job) / "checkpoints" / checkpoints.name_of(3)
    folder.mkdir(parents=True)
    (folder / checkpoints.MANIFEST).write_text("x")
    api.services.models.add_tuned(body, name, step=None, project=DEFAULT_PROJECT)
    api.services.models.add_tuned(body, checkpoint_name(name, 3), step=3, project=DEFAULT_PROJECT)
    return folder


@pytest.mark.parametrize("name", ["ft:m:rft::abcdefgh", "ft:m:rft::abcdefgh:ckpt-step-3"])
def test_row_42_a_job_goes_on_from_a_tuned_model(api: Api, name: str) -> None:
    folder = a_tuned_model(api)
    job = api.wait(api.create(model=name))
    assert job.status == "queued" and job.model == name
    config = api.config_of(job)
    assert config.model.init_from == folder.resolve()
    assert config.training.learning_rate == 0.001


def test_a_tuned_model_is_no_judge(api: Api) -> None:
    a_tuned_model(api)
    with pytest.raises(BadRequestError) as caught:
        api.create(method=reinforcement(grader=judge("ft:m:rft::abcdefgh")))
    assert (caught.value.code, caught.value.param) == ("model_not_available", "method.reinforcement.grader.model")


def test_the_response_format_reaches_the_rollouts(api: Api) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
    used = api.config_of(api.create(method=reinforcement(response_format=form))).rollout.response_format
    assert used is not None and used.model_dump() == form


def test_a_source_survives_the_file(api: Api) -> None:
    source = 'def grade(sample, item):\n    return 1.0  # "é" \u2028 \t 😀 \\n : - {\n'
    grader = {"type": "python", "name": "yes", "source": source}
    job = api.wait(api.create(method=reinforcement(grader=grader)))
    assert job.status == "queued"
    assert api.config_of(job).grader.source == source
    assert job.method.reinforcement.grader.source == source


def test_integrations_are_shown_and_become_trackers(api: Api) -> None:
    given = {"type": "wandb", "wandb": {"project": "p", "name": "n", "tags": ["t"]}}
    job = api.create(integrations=[given])
    assert [part.to_dict() for part in job.integrations] == [given]


def test_numbers_come_from_the_rows_as_the_module_says() -> None:
    random_ = random.Random(1)
    for num_rows in [1, 2, 4, 5, 10, 12, 17, *(random_.randint(1, 50_000) for _ in range(300))]:
        numbers = resolved(AUTO, num_rows)
        assert "auto" not in numbers.values() and numbers.keys() == AUTO.keys()
        batch, epochs = numbers["batch_size"], numbers["n_epochs"]
        assert 1 <= batch <= min(32, num_rows) and 1 <= epochs <= 50
        steps = num_steps(num_rows, epochs, batch)
        assert 1 <= numbers["eval_interval"] <= steps
        assert steps <= 30 or epochs == 1
        assert num_rows * epochs <= steps * items_per_step(num_rows, batch) < num_rows * epochs + batch
        given = {**AUTO, "n_epochs": 7, "batch_size": 256, "eval_interval": 2, "reasoning_effort": "low"}
        kept = resolved(given, num_rows)
        assert (kept["n_epochs"], kept["batch_size"], kept["eval_interval"]) == (7, 256, 2)
        assert kept["reasoning_effort"] == "low"


def test_a_batch_larger_than_the_file_is_the_file(api: Api) -> None:
    job = api.wait(api.create(method=tuned_by(batch_size=256, n_epochs=3)))
    assert job.method.reinforcement.hyperparameters.batch_size == 256
    config = api.config_of(job)
    assert (config.training.items_per_step, config.training.steps) == (12, 3)


def test_mappings_are_merged_and_nothing_else() -> None:
    first, second = {"a": {"b": 1, "c": [1]}, "d": 1}, {"a": {"c": [2], "e": {"f": 1}}, "d": {"g": 1}}
    assert merged(first, second) == {"a": {"b": 1, "c": [2], "e": {"f": 1}}, "d": {"g": 1}}
    assert first == {"a": {"b": 1, "c": [1]}, "d": 1}


def test_a_schedule_changes_its_numbers_only(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump({"training": {"steps": 1, "learning_rate": 0.5}, "grader": {"source": "a\nb"}}))
    schedule(path, resolved(AUTO, 160), 160)
    assert yaml.safe_load(path.read_text()) == {
        "training": {"steps": 16, "learning_rate": 0.5, "items_per_step": 10},
        "grader": {"source": "a\nb"},
        "evaluation": {"every": 3},
    }
    assert path.stat().st_mode & 0o777 == 0o600


def a_trainable(tmp_path: Path) -> ServerConfig:
    tiny_model_folder(tmp_path / "tiny")
    run = {
        "engine": {"type": "transformers"},
        "rollout": {"max_tokens_per_turn": 12},
        "training": {"base_rollouts": 2},
        "model": {"lora": {"rank": 4}},
    }
    model = {"path": tmp_path / "tiny", "dtype": "float32", "max_model_len": 256, "run": run}
    return ServerConfig.model_validate({"data_dir": tmp_path / "data", "models": {"m": model}})


def rft(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rft", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["reinforcement", "supervised"])
def test_what_a_job_leaves_is_what_rft_trains(tmp_path: Path, kind: str) -> None:
    rows = [row(number) for number in range(12)]
    method = tuned_by(n_epochs=1, batch_size=6)
    if kind == "supervised":
        rows = [{"messages": [*each["messages"], {"role": "assistant", "content": "ok"}]} for each in rows]
        method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1}}}
    with an_api(tmp_path, a_trainable(tmp_path)) as api:
        held_out = api.uploads.add([row(500)] if kind == "reinforcement" else rows[:1])
        job = api.wait(api.create(rows, method=method, validation_file=held_out))
        assert job.status == "queued"
        config = api.folder(job) / "job_config.yaml"
    ran = rft("train" if kind == "reinforcement" else "warmup", str(config), "--run-id", job.id)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    store = RunStore.open(config.parent)
    assert store.is_done and checkpoints.latest(store.checkpoints) is not None
