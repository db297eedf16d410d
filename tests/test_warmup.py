"""Warm-up: SFTTrainer learns exactly what the mask says, leaves a run like any other, and makes a model call tools."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import tiny_model_folder, tiny_tokenizer
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from rft import show
from rft.chat import Chat
from rft.config import RunConfig, validate_config
from rft.demonstrations import load_demonstrations
from rft.errors import ConfigError, DataError, UserError
from rft.export import export
from rft.job import run_job, run_sampling, run_warmup
from rft.lesson import load_lesson
from rft.store import RunStore

pytestmark = pytest.mark.slow  # TRL, and a training each

pytest.importorskip("trl", reason="the warm-up needs TRL: scripts/setup --warmup")

GRADER = "def grade(sample, item):\n    return float(len(sample['output_tools']) > 0)\n"
NUM_SHOWN = 20


def shown(number: int) -> dict[str, Any]:
    """Asked to count, the model calls the tool of tests/world.py and says what it answers."""
    function = {"name": "count", "arguments": json.dumps({"by": number})}
    return {
        "messages": [
            {"role": "user", "content": f"{number}"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "a", "type": "function", "function": function}],
            },
            {"role": "tool", "tool_call_id": "a", "content": str(number)},
            {"role": "assistant", "content": str(number)},
        ]
    }


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def a_tree(tmp_path: Path, model: dict[str, Any] | None = None, **warmup: Any) -> dict[str, Any]:
    """A config whose model of some thousand parameters is to learn from 20 demonstrations."""
    folder = tmp_path / "model"
    if not folder.exists():
        tiny_model_folder(folder, **(model or {}))
        written(tmp_path / "shown.jsonl", [shown(number) for number in range(NUM_SHOWN)])
        written(tmp_path / "rows.jsonl", [{"messages": shown(number)["messages"][:1]} for number in range(8)])
    source = {} if "from_run" in warmup else {"demonstrations": str(tmp_path / "shown.jsonl")}
    return {
        "name": "tiny",
        "runs_dir": str(tmp_path / "runs"),
        "model": {"path": str(folder), "dtype": "float32", "lora": {"rank": 8}},
        "engine": {"type": "transformers", "max_model_len": 512, "max_concurrent": 8},
        "data": {"train": str(tmp_path / "rows.jsonl")},
        "environment": {"type": "python", "task": "world:TASK"},
        "grader": {"type": "python", "source": GRADER},
        "rollout": {"max_turns": 2, "max_tokens_per_turn": 80, "temperature": 1.0},
        "training": {"steps": 1, "items_per_step": 4, "base_rollouts": 4},
        "warmup": {"epochs": 1, "learning_rate": 0.01} | source | warmup,
    }


def a_config(tmp_path: Path, model: dict[str, Any] | None = None, **warmup: Any) -> RunConfig:
    return validate_config(a_tree(tmp_path, model, **warmup), where="test")


def rows_of(run: Path) -> list[dict[str, Any]]:
    return list(RunStore.open(run).metrics())


def adapter(run: Path) -> dict[str, torch.Tensor]:
    (folder,) = (run / "checkpoints").iterdir()
    return load_file(folder / "adapter_model.safetensors")


def test_a_warm_up_leaves_a_run_that_can_be_shown_and_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_warmup(a_config(tmp_path, epochs=2))
    store = RunStore.open(run)
    assert store.is_done and run.name == "tiny-warmup-001"
    assert store.read_state()["status"] == "succeeded"
    rows = rows_of(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6], "20 sequences, 8 a step, twice"
    assert {row["kind"] for row in rows} == {"warmup"}
    assert rows[-1]["update/loss"] < rows[0]["update/loss"]
    assert show.summary(store)["state"]["status"] == "succeeded" and show.overview(store)
    folder = run / "checkpoints" / "step_000006"
    assert {path.name for path in folder.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors", "MANIFEST"}
    assert [path.name for path in (run / "weights").iterdir()] == [], "TRL writes nothing of its own"
    exported = AutoModelForCausalLM.from_pretrained(export(run, tmp_path / "out"))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    changed = [n for n, p in base.named_parameters() if not torch.equal(p, exported.get_parameter(n))]
    assert changed and all("proj" in name for name in changed)
    said = capsys.readouterr().out
    assert "demonstrations: 20 (20 sequences" in said and "warm-up 6/6: loss" in said
    assert "{'loss'" not in said, "TRL prints nothing of its own"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_whole_model_learns_too(tmp_path: Path, dtype: str) -> None:
    """In bfloat16 it is the float32 masters that learn."""
    tree = a_tree(tmp_path, epochs=3, learning_rate=0.003)
    tree["model"] |= {"lora": None, "dtype": dtype}
    run = run_warmup(validate_config(tree, where="test"))
    losses = [row["update/loss"] for row in rows_of(run)]
    assert losses[-1] < 0.9 * losses[0]
    assert all(row["update/grad_norm"] > 0 for row in rows_of(run))
    (folder,) = (run / "checkpoints").iterdir()
    weights = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_the_first_loss_is_the_mean_over_the_learnt_tokens_of_the_untrained_model(tmp_path: Path) -> None:
    """With dropout in the model's config, which sampling does not have either."""
    dropout = {"attention_dropout": 0.5}
    run = run_warmup(a_config(tmp_path, dropout, batch_size=NUM_SHOWN))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    from world import TASK

    tools = {tool.name: tool.spec() for tool in TASK.tools}
    found = load_demonstrations(tmp_path / "shown.jsonl", tools, Chat(tiny_tokenizer()))
    total, count = 0.0, 0
    for sequence in (sequence for demonstration in found for sequence in demonstration.sequences):
        with torch.no_grad():
            logits = model(torch.tensor([sequence.ids])).logits[0, :-1]  # [T - 1, V]
        mask = torch.tensor(sequence.mask[1:])
        total += cross_entropy(logits[mask], torch.tensor(sequence.ids[1:])[mask], reduction="sum").item()
        count += int(mask.sum())
    (row,) = rows_of(run)
    assert row["update/loss"] == pytest.approx(total / count, rel=1e-5)


def test_the_same_seed_makes_the_same_weights(tmp_path: Path) -> None:
    first, second = run_warmup(a_config(tmp_path)), run_warmup(a_config(tmp_path))
    assert second.name == "tiny-warmup-002"
    assert rows_of(first) == rows_of(second)
    weights = adapter(second)
    assert all(torch.equal(value, weights[name]) for name, value in adapter(first).items())
    other = run_warmup(a_config(tmp_path).model_copy(update={"seed": 1}))
    assert rows_of(other) != rows_of(first)


def test_micro_batches_do_not_change_what_is_learnt(tmp_path: Path) -> None:
    tree = a_tree(tmp_path)
    whole = run_warmup(validate_config(tree, "test"))
    tree["training"]["max_tokens_per_micro_batch"] = 16  # one sequence at a time
    single = run_warmup(validate_config(tree, "test"))
    for one, other in zip(rows_of(whole), rows_of(single), strict=True):
        assert one["update/loss"] == pytest.approx(other["update/loss"], rel=1e-5)
    weights = adapter(single)
    assert all(torch.allclose(value, weights[name], atol=1e-4) for name, value in adapter(whole).items())


def test_the_checkpoint_that_is_kept_is_the_best_on_what_was_held_out(tmp_path: Path) -> None:
    run = run_warmup(a_config(tmp_path, epochs=4, learning_rate=0.5, held_out_share=0.2))
    losses = {row["step"]: row["held_out/loss"] for row in rows_of(run) if "held_out/loss" in row}
    assert len(losses) == 4 and len(set(losses.values())) == 4
    best = min(losses, key=lambda step: losses[step])
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step_{best:06d}"]


def test_what_is_too_long_is_left_out_and_counted_never_cut(tmp_path: Path) -> None:
    config = a_config(tmp_path)
    rows = [shown(number) for number in range(3)]
    rows[1]["messages"][-1]["content"] = "x" * 600
    written(tmp_path / "shown.jsonl", rows)
    assert config.warmup is not None
    lesson = load_lesson(config, config.warmup, Chat(tiny_tokenizer()))
    assert [demonstration.item_id for demonstration in lesson.learnt] == ["shown-00001", "shown-00003"]
    assert lesson.notes[1].startswith("left out because they are too long: 1 (")
    assert "shown.jsonl:2)" in lesson.notes[1]
    tight = config.warmup.model_copy(update={"max_length": 16})
    with pytest.raises(UserError, match=r"of 3 demonstrations 0 have at most 16 tokens \(the shortest has \d+\)"):
        load_lesson(config, tight, Chat(tiny_tokenizer()))


def test_good_rollouts_of_a_run_are_a_source(tmp_path: Path) -> None:
    """The ids that were sampled are the ids that are learnt; here every rollout is good enough."""
    sampled = run_sampling(a_config(tmp_path))
    config = a_config(tmp_path, from_run=str(sampled), min_grade=0.0)
    assert config.warmup is not None
    lesson = load_lesson(config, config.warmup, Chat(tiny_tokenizer()))
    rollouts = list(RunStore.open(sampled).rollouts(split="train"))
    assert len(rollouts) == 16
    assert [s.ids for s in lesson.sequences] == [s.ids for rollout in rollouts for s in rollout.sequences]
    assert rows_of(run_warmup(config))[-1]["step"] == 2


def test_bad_input_is_refused_before_a_run_exists(tmp_path: Path) -> None:
    config = a_config(tmp_path)
    row = shown(1)
    row["messages"][1]["tool_calls"][0]["function"]["name"] = "find"
    written(tmp_path / "shown.jsonl", [shown(0), row])
    with pytest.raises(DataError, match=r'shown\.jsonl:2: .*there is no tool "find"; the tools are: count'):
        run_warmup(config)
    with pytest.raises(ConfigError, match=r"the config has no warm-up(.|\n)*warmup: \{demonstrations: FILE\.jsonl\}"):
        run_warmup(config.model_copy(update={"warmup": None}))
    with pytest.raises(UserError, match="there is no run here"):
        run_warmup(a_config(tmp_path, from_run=str(tmp_path / "nowhere"), min_grade=1))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("warmup", "message"),
    [
        ({"from_run": "runs/x", "min_grade": 1, "demonstrations": "x"}, "warmup: name one source"),
        ({"demonstrations": None}, "warmup: name one source"),
        ({"from_run": "runs/x"}, "warmup: min_grade goes with from_run"),
        ({"min_grade": 1}, "warmup: min_grade goes with from_run"),
        ({"epoch": 1}, r"warmup\.epoch: unknown key"),
    ],
)
def test_a_wrong_section_is_named(tmp_path: Path, warmup: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        a_config(tmp_path, **warmup)


def test_several_ranks_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="a warm-up runs in one process"):
        run_warmup(a_config(tmp_path))


def rft(*arguments: str, code: str = "") -> list[str]:
    """The command, in an interpreter that first runs `code`."""
    return [sys.executable, "-c", f"{code}\nfrom rft.cli import main\nmain()", *arguments]


def environment() -> dict[str, str]:
    here = Path(__file__).parent
    return os.environ | {"PYTHONPATH": f"{here.parent}:{here}", "HF_HUB_OFFLINE": "1", "COLUMNS": "300"}


def test_without_trl_there_is_one_error_with_the_cure(tmp_path: Path) -> None:
    """A finder that knows no trl stands for an installation without it."""
    hide = (
        "import sys, importlib.machinery as m\n"
        "class Without(m.PathFinder):\n"
        "    @classmethod\n"
        "    def find_spec(cls, name, *rest):\n"
        "        return None if name.split('.')[0] == 'trl' else m.PathFinder.find_spec(name, *rest)\n"
        "sys.meta_path[:] = [Without if f is m.PathFinder else f for f in sys.meta_path]\n"
    )
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(a_tree(tmp_path)))
    result = subprocess.run(
        rft("warmup", str(path), code=hide), capture_output=True, text=True, timeout=120, env=environment()
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "TRL is not installed" in result.stderr and "scripts/setup --warmup" in result.stderr


@pytest.mark.slow
def test_a_warm_up_that_was_killed_leaves_nothing_half_written_and_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(a_tree(tmp_path, epochs=500)))
    process = subprocess.Popen(
        rft("warmup", str(path)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment()
    )
    metrics = tmp_path / "runs" / "tiny-warmup-001" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    assert list((tmp_path / "runs" / "tiny-warmup-001" / "checkpoints").iterdir()) == []
    with pytest.raises(UserError, match="no checkpoint"):
        export(tmp_path / "runs" / "tiny-warmup-001", tmp_path / "out")
    with pytest.raises(UserError, match="no unfinished run named tiny"):
        run_job(a_config(tmp_path), resume=True)
    assert run_warmup(a_config(tmp_path)).name == "tiny-warmup-002"


def valid_call_share(config: RunConfig, model: Path) -> float:
    """Of 16 rollouts, sampled nearly greedily: a call has fifty tokens here, one for every letter."""
    changed = config.model.model_copy(update={"path": model})
    run = run_sampling(config.model_copy(update={"model": changed}))
    rollouts = list(RunStore.open(run).rollouts(split="train"))
    return sum(rollout.has_valid_call for rollout in rollouts) / len(rollouts)


@pytest.mark.slow
def test_a_model_that_never_calls_learns_to_call(tmp_path: Path) -> None:
    """A random model cannot earn a reward; after 20 demonstrations most of its rollouts make a valid call."""
    # adapters leave the embeddings as they are: these must be far enough apart for a sharp choice among them, and the
    # one of the end of turn must not be zero, as that of a padding token is
    tree = a_tree(tmp_path, {"initializer_range": 0.3, "pad_token_id": None}, epochs=30)
    tree["model"]["lora"], tree["rollout"]["temperature"] = {"rank": 32}, 0.3
    config = validate_config(tree, "test")
    before = valid_call_share(config, tmp_path / "model")
    run = run_warmup(config)
    rows = rows_of(run)
    after = valid_call_share(config, export(run, tmp_path / "warm"))
    print(f"loss {rows[0]['update/loss']:.2f} -> {rows[-1]['update/loss']:.2f}, calls {before:.2f} -> {after:.2f}")
    assert before == 0
    assert rows[-1]["update/loss"] < 0.2 * rows[0]["update/loss"]
    assert after >= 0.75
