"""One rank or two, replicated or sharded, adapters or the whole model: the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import CASES, Result, run_cases, train_case
from test_policy import model_folder

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
    assert two.scores == pytest.approx(one.scores, abs=5 * tolerance)
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
