"""One rank or two, replicated or sharded, adapters or the whole model: the same weights."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import pytest
import torch
import yaml
from ranks import CASES, Result, run_cases, train_case
from test_policy import model_folder

from rft.cluster.machine import free_port
from rft.errors import ConfigError
from rft.trainers import sharding
from rft.trainers.ranks import build_accelerator

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def on_two(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    return run_cases(model, tmp_path_factory.mktemp("ranks"))


@pytest.mark.slow  # two more processes import torch
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_make_the_weights_of_one(
    case: str, on_two: dict[str, Result], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    one, two = train_case(case, model, tmp_path), on_two[case]
    assert one is not None
    tolerance = 1e-2 if "bfloat16" in case else 1e-5
    assert two.losses == pytest.approx(one.losses, rel=tolerance, abs=tolerance)
    assert two.norms == pytest.approx(one.norms, rel=tolerance)
    assert one.weights.keys() == two.weights.keys()
    for name, tensor in one.weights.items():
        assert two.weights[name].dtype == tensor.dtype
        assert (two.weights[name] - tensor).abs().max() < tolerance, name
    # one weight that rounds to its other neighbour in bfloat16 moves a score by some hundredths
    assert two.scores == pytest.approx(one.scores, abs=20 * tolerance)
    assert two.gap < 10 * tolerance
    assert len(one.optimizer) == len(two.optimizer)
    for index, state in one.optimizer.items():
        for name, tensor in state.items():
            assert torch.allclose(two.optimizer[index][name], tensor, atol=tolerance), (index, name)


@pytest.mark.slow
def test_a_shard_is_half_of_the_weights(on_two: dict[str, Result]) -> None:
    """Uneven dimensions leave rank 0 a little more; adapters are whole on both."""
    assert on_two["sharded full"].num_local < on_two["replicated full"].num_local * 0.6
    assert on_two["sharded lora"].num_local < on_two["replicated lora"].num_local * 0.75


def test_launch_settings_that_would_be_ignored_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(ConfigError, match="only FSDP2"):
        sharding.is_asked_for()
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert sharding.is_asked_for()
    monkeypatch.setenv("FSDP_ACTIVATION_CHECKPOINTING", "true")
    with pytest.raises(ConfigError, match=r"training\.gradient_checkpointing"):
        sharding.is_asked_for()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ConfigError, match=r"model\.dtype"):
        build_accelerator(seed=0)


LAUNCHES = sorted((Path(__file__).resolve().parent.parent / "configs" / "accelerate").glob("*.yaml"))
FIRST_COLLECTIVE = """
import sys
from rft.trainers import sharding
from rft.trainers.ranks import Ranks, build_accelerator
ranks = Ranks(build_accelerator(seed=0))
# one write each, so that two processes do not mix their lines
sys.stdout.write(f"rank {ranks.index} of {ranks.num}: {ranks.sum([1.0])[0]:g} {sharding.is_asked_for()}\\n")
"""


@pytest.mark.parametrize("path", LAUNCHES, ids=lambda path: path.stem)
def test_launch_files_say_what_they_are_for(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("# ") and "Hardware:" in text
    assert yaml.safe_load(text)["mixed_precision"] == "no"


@pytest.mark.slow
@pytest.mark.parametrize("path", LAUNCHES, ids=lambda path: path.stem)
def test_accelerate_launches_with_each_file_up_to_the_first_collective(path: Path, tmp_path: Path) -> None:
    """As far as a machine without GPUs allows: its ranks are gloo ones on the CPU."""
    if path.stem == "deepspeed":
        pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    script = tmp_path / "first.py"
    script.write_text(FIRST_COLLECTIVE)
    launch = yaml.safe_load(path.read_text())
    num_nodes, num_ranks = launch.get("num_machines", 1), launch["num_processes"]
    if num_nodes > 1:
        num_ranks = num_nodes  # what is tested is how the nodes meet
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(path)]
    command += ["--num_processes", str(num_ranks)]
    if num_nodes > 1:
        command += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port("127.0.0.1", 0))]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    nodes = [
        subprocess.Popen(
            [*command, "--machine_rank", str(index), str(script)], env=env, stdout=PIPE, stderr=PIPE, text=True
        )
        for index in range(num_nodes)
    ]
    try:
        outputs = [node.communicate(timeout=180) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0] * num_nodes, [stderr[-3000:] for _, stderr in outputs]
    lines = sorted(line for stdout, _ in outputs for line in stdout.splitlines() if line.startswith("rank"))
    is_sharded = "fsdp_config" in launch
    assert lines == [f"rank {rank} of {num_ranks}: {num_ranks} {is_sharded}" for rank in range(num_ranks)]


def test_processes_that_do_not_form_a_group_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """`accelerate launch` for GPUs on a machine that has none."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="ACCELERATE_USE_CPU=true"):
        build_accelerator(seed=0)
