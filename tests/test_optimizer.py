"""The 8-bit optimizers: where they run, and that a resumed one is the uninterrupted one."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from rft.config import TrainingConfig
from rft.errors import ConfigError
from rft.trainers.optimizer import build_optimizer, load_optimizer_state, optimizer_state

CPU = torch.device("cpu")
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed: pip install bitsandbytes"
)


def parameters() -> list[nn.Parameter]:
    """One that is quantized, one that is too small for it."""
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(128, 64)), nn.Parameter(torch.randn(8))]


def step(owned: list[nn.Parameter], optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in owned:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    optimizer.zero_grad()


def training(name: str) -> TrainingConfig:
    return TrainingConfig.model_validate({"steps": 4, "optimizer": name, "learning_rate": 1e-2, "weight_decay": 0.1})


@pytest.mark.parametrize("name", ["adamw", pytest.param("adamw_8bit", marks=needs_bitsandbytes)])
def test_resumed_is_uninterrupted_bit_for_bit(tmp_path: Path, name: str) -> None:
    owned = parameters()
    optimizer = build_optimizer(owned, training(name), CPU)
    for seed in range(3):
        step(owned, optimizer, seed)
    torch.save(optimizer_state(optimizer), tmp_path / "state.pt")
    resumed = [nn.Parameter(parameter.detach().clone()) for parameter in owned]
    again = build_optimizer(resumed, training(name), CPU)
    load_optimizer_state(again, torch.load(tmp_path / "state.pt", weights_only=True))
    for seed in range(3, 6):
        step(owned, optimizer, seed)
        step(resumed, again, seed)
    for one, other in zip(owned, resumed, strict=True):
        assert torch.equal(one, other)


@needs_bitsandbytes
def test_eight_bits_are_eight_bits_and_near_the_truth() -> None:
    moved = []
    for name in ("adamw", "adamw_8bit"):
        owned = parameters()
        optimizer = build_optimizer(owned, training(name), CPU)
        for seed in range(3):
            step(owned, optimizer, seed)
        moved.append(owned)
    state = optimizer_state(optimizer)["state"][0]["__bnb_optimizer_quant_state__"]
    assert state["state1"].dtype == torch.uint8 and state["state1"].numel() == 128 * 64
    start = parameters()
    for first, one, other in zip(start, *moved, strict=True):
        assert (one - other).norm() / (one - first).norm() < 0.05


def test_pages_need_a_gpu() -> None:
    with pytest.raises(ConfigError, match=r"paged_adamw_8bit needs a GPU(.|\n)*adamw_8bit"):
        build_optimizer(parameters(), training("paged_adamw_8bit"), CPU)
