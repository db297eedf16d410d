"""Going on: from a checkpoint that is damaged, with a config of an older version, from another run's weights."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_job import a_config, a_tree, stable
from tiny import tiny_model_folder

from rft import cli
from rft.checkpoints import complete
from rft.config import validate_config
from rft.errors import ConfigError, UserError
from rft.export import export
from rft.job import run_job, run_sampling
from rft.metrics import best_steps
from rft.store import RunStore
from rft.trainers.sync import Sync

pytestmark = pytest.mark.slow  # two trainings each

FULL = {"lora": None, "dtype": "float32"}


def rft(monkeypatch: pytest.MonkeyPatch, *args: str) -> int:
    """The command line in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["rft", *args])
    with pytest.raises(SystemExit) as ending:
        cli.main()
    return int(ending.value.code or 0)


def steps_of(run: Path) -> list[str]:
    return [path.name for path in complete(run / "checkpoints")]


def training_rows(run: Path) -> list[dict[str, Any]]:
    return [row for row in RunStore.open(run).metrics() if row["kind"] == "training"]


def write(tmp_path: Path, tree: dict[str, Any]) -> str:
    (tmp_path / "run.yaml").write_text(json.dumps(tree))  # JSON is YAML
    return str(tmp_path / "run.yaml")


def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_can_be_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write(tmp_path, a_tree(tmp_path, evaluation={"every": 99, "validation_items": 2}))
    run = run_job(validate_config(json.loads(Path(config).read_text()), "test"))
    rows = [stable(row) for row in RunStore.open(run).metrics()]
    (run / "DONE").unlink()
    weights = run / "checkpoints" / "step_000003" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    (run / "checkpoints" / "step_000009").mkdir()  # without a manifest
    assert rft(monkeypatch, "train", config, "--resume") == 1
    words = capsys.readouterr().err
    assert f"checkpoint {run}/checkpoints/step_000003 is corrupt: adapter_model.safetensors" in words
    assert "--resume --checkpoint step_000002" in words
    assert rft(monkeypatch, "train", config, "--resume", "--checkpoint", "step_000002") == 0
    assert "continuing after step 2" in capsys.readouterr().out
    assert [stable(row) for row in RunStore.open(run).metrics()] == rows
    assert training_rows(run)[-1]["rollouts/reused"] == 8, "what step 3 sampled is as good as before"
    assert (run / "checkpoints" / "superseded" / "step_000003").is_dir()


def test_an_incomplete_checkpoint_is_ignored_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = run_job(a_config(tmp_path, training={"steps": 1}), run_id="r")
    (run / "checkpoints" / "step_000009").mkdir()
    run_job(a_config(tmp_path, training={"steps": 1}), run_id="r", resume=True)
    assert "step_000009 is incomplete (it has no MANIFEST) and is ignored" in caplog.text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--checkpoint", "step_000001"], "add --resume"),
        (["--resume", "--run-id", "r", "--checkpoint", "7"], "there is no checkpoint `7`"),
        (["--init-from", "nowhere"], "nowhere: there is no complete checkpoint"),
    ],
)
def test_what_is_not_there_is_said_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    tree = a_tree(tmp_path)
    stored = validate_config(tree, "test").model_dump(mode="json")
    RunStore.create(tmp_path / "runs", "r", stored).close()
    assert rft(monkeypatch, "train", write(tmp_path, tree), *options) == 2
    told = capsys.readouterr()
    assert words in told.err and "starting the engine" not in told.out


def test_a_run_of_an_older_version_can_be_resumed(tmp_path: Path) -> None:
    """Its config lacks the fields that came later; one it does not know is named."""
    config = a_config(tmp_path, training={"steps": 1})
    run = run_job(config, run_id="r")
    stored = json.loads((run / "config.json").read_text())
    del stored["training"]["keep_best"], stored["model"]["freeze"], stored["shadow_graders"]
    (run / "config.json").write_text(json.dumps(stored))
    run_job(config, run_id="r", resume=True)
    (run / "config.json").write_text(json.dumps(stored | {"novel": 1}))
    with pytest.raises(ConfigError, match=r"config\.json: novel: unknown key"):
        run_job(config, run_id="r", resume=True)


def test_exactly_the_best_and_the_last_checkpoint_stay(tmp_path: Path) -> None:
    """Also after an interruption; the best is what `rft export --checkpoint best` takes."""
    training = {"steps": 4, "items_per_step": 2, "base_rollouts": 4, "keep_checkpoints": 1, "keep_best": 1}
    sections = {"training": training | {"learning_rate": 0.05}, "evaluation": {"every": 1, "validation_items": 3}}
    run = run_job(a_config(tmp_path, **sections), run_id="r")
    (best,) = best_steps(RunStore.open(run).metrics(), 1, range(1, 5))
    assert steps_of(run) == sorted({f"step_{best:06d}", "step_000004"})
    sections["training"] = sections["training"] | {"steps": 6}
    run_job(a_config(tmp_path, **sections), run_id="r", resume=True)
    grades = {r["step"]: r["grade"] for r in RunStore.open(run).metrics() if r["kind"] == "evaluation"}
    (best,) = best_steps(RunStore.open(run).metrics(), 1, [best, 5, 6])
    assert steps_of(run) == sorted({f"step_{best:06d}", "step_000006"})
    assert grades[best] == max(grades[step] for step in (1, 2, 3, 4, 5, 6))
    out = load_file(export(run, tmp_path / "best", "best") / "model.safetensors")
    named = load_file(export(run, tmp_path / "named", f"{best}") / "model.safetensors")
    assert all(torch.equal(out[name], named[name]) for name in out)


def test_of_equal_grades_the_later_step_is_the_best() -> None:
    rows = [
        {"kind": "evaluation", "split": "validation", "step": step, "grade": g}
        for step, g in enumerate([9, 1, 1, None])
    ]
    assert best_steps(rows, 1, [1, 2, 3]) == {2}
    assert best_steps(rows, 9, [1, 2, 3]) == {1, 2}
    assert best_steps(rows, 0, [1, 2, 3]) == set()


def test_export_best_of_a_run_without_validation_says_so(tmp_path: Path) -> None:
    store = RunStore.create(tmp_path, "r", {"model": {}})
    with pytest.raises(UserError, match="evaluated on a validation split"):
        export(store.path, tmp_path / "out", "best")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_export_of_a_whole_model_is_what_the_engine_sampled_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    monkeypatch.setattr(Sync, "clear", lambda self: None)  # what was published is compared
    tree = a_tree(tmp_path, training={"steps": 2, "items_per_step": 2, "base_rollouts": 4, "learning_rate": 0.001})
    tree["model"] |= FULL | {"dtype": dtype}
    run = run_job(validate_config(tree, "test"))
    published = load_file(run / "weights" / "v000002" / "model.safetensors")
    exported = load_file(export(run, tmp_path / "out") / "model.safetensors")
    assert exported.keys() == published.keys()
    assert all(torch.equal(exported[name], published[name]) for name in exported)
    assert {value.dtype for value in exported.values()} == {getattr(torch, dtype)}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == dtype


@pytest.mark.parametrize("lora", [{"rank": 4}, None], ids=["lora", "full"])
def test_a_run_starts_from_anothers_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: dict[str, Any] | None
) -> None:
    """The engine too; resumed before its first step it starts from the same ones, though the other run has gone."""
    tree = a_tree(tmp_path, evaluation={"every": 1, "validation_items": 3}, seed=3)
    tree["model"]["lora"] = lora
    tree["training"] |= {"learning_rate": 0.01 if lora else 0.002, "steps": 2}
    first = run_job(validate_config(tree, "test"), run_id="first")
    monkeypatch.chdir(tmp_path)  # relative paths
    config = write(tmp_path, tree | {"training": tree["training"] | {"steps": 1}})
    assert rft(monkeypatch, "train", config, "--run-id", "second", "--init-from", "runs/first") == 0
    second = tmp_path / "runs" / "second"
    (row,) = training_rows(second)
    assert row["logprob_gap/max"] < 1e-4
    started = RunStore.open(second).path / "checkpoints" / "step_000000"
    ends = [
        load_file(next(folder.glob("*.safetensors"))) for folder in (started, first / "checkpoints" / "step_000002")
    ]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[1])

    again = tmp_path / "runs" / "again"
    (second).rename(again)  # as if it had been killed after its start
    for late in (again / "checkpoints" / "step_000001", first):
        late.rename(tmp_path / f"gone-{late.name}")
    (again / "metrics.jsonl").unlink()
    init = ["--init-from", "runs/first"]
    assert rft(monkeypatch, "train", config, "--run-id", "again", "--resume", *init) == 0
    (resumed,) = training_rows(again)
    assert resumed["logprob_gap/max"] < 1e-4
    again_start = load_file(next((again / "checkpoints" / "step_000000").glob("*.safetensors")))
    assert all(torch.equal(again_start[name], ends[0][name]) for name in ends[0])


@pytest.fixture
def one_thread() -> Iterator[None]:
    """How many threads a matrix product gets depends on the machine's load, and so do its last bits."""
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(number)


@pytest.mark.usefixtures("one_thread")
def test_first_grades_are_those_of_the_final_policy(tmp_path: Path) -> None:
    """Validation at step 0 of the second run samples as the first one's final policy does: same prompts, same gap."""
    tree = a_tree(tmp_path, evaluation={"every": 1, "validation_items": 3, "rollouts_per_item": 4})
    first = run_job(validate_config(tree | {"training": tree["training"] | {"steps": 2, "learning_rate": 0.05}}, "t"))
    tree["model"]["init_from"] = str(first / "checkpoints" / "step_000002")
    second = run_job(validate_config(tree | {"training": tree["training"] | {"steps": 0}}, "t"), run_id="second")
    tree["model"]["init_from"] = None
    tree["model"]["path"] = str(export(first, tmp_path / "exported"))
    merged = run_job(validate_config(tree | {"training": tree["training"] | {"steps": 0}}, "t"), run_id="merged")
    texts = [[r.output_text for r in RunStore.open(run).rollouts(0, "validation")] for run in (second, merged)]
    assert texts[0] == texts[1]


def test_a_run_of_another_model_is_refused(tmp_path: Path) -> None:
    first = run_job(a_config(tmp_path, training={"steps": 1}))
    tree = a_tree(tmp_path)
    tree["model"] |= {"path": str(tiny_model_folder(tmp_path / "wider", hidden_size=64)), "init_from": str(first)}
    with pytest.raises(UserError, match=r"whose hidden_size is 48; that of .*wider is 64"):
        run_job(validate_config(tree, "test"), run_id="other")
    assert not (tmp_path / "runs" / "other").exists()


def test_a_run_that_only_samples_uses_what_it_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = a_config(tmp_path, training={"steps": 2, "items_per_step": 2, "base_rollouts": 4})
    run = run_sampling(config, run_id="r")
    metrics, rollouts = run / "metrics.jsonl", run / "rollouts" / "step_000002.jsonl"
    rows, sampled = [stable(row) for row in RunStore.open(run).metrics()], rollouts.read_text().splitlines()
    metrics.write_text(metrics.read_text().splitlines(keepends=True)[0])
    rollouts.write_text("\n".join(sampled[:3]) + "\n" + sampled[3][:50])
    run_sampling(config, run_id="r", resume=True)
    assert "continuing after step 1: 3 finished rollouts of step 2 are used" in capsys.readouterr().out
    resumed = RunStore.open(run)
    assert [stable(row) for row in resumed.metrics()] == rows
    assert len(list(resumed.rollouts(2))) == len(sampled) == 8
