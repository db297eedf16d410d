"""Checkpoints: resumed equals uninterrupted, corruption is refused, an interrupted save is invisible."""

from __future__ import annotations

import errno
import json
import random

import numpy as np
import pytest
import torch
from test_batch import random_group, values
from test_policy import make_policy, model_folder

from rft.errors import StorageError
from rft.trainers import checkpoint
from rft.trainers.batch import build_micro_batches, count_tokens


def train(policy, seed):
    """One step on a window of its own, with the global random states playing a part in it."""
    groups = [random_group(seed)]
    batches = build_micro_batches(groups, [values(groups)[0] + torch.randn(8)], 10_000, "packed")
    stats = policy.step(batches, count_tokens(batches))
    return stats, random.random(), float(np.random.rand())


def state(policy):
    moments = [value for entry in policy.optimizer.state_dict()["state"].values() for value in entry.values()]
    return [parameter.detach().clone() for parameter in policy.weights.parameters] + moments


def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path):
    path = model_folder(tmp_path)
    policy = make_policy(path, schedule="cosine", warmup_steps=1)
    for generator in (random.seed, np.random.seed, torch.manual_seed):
        generator(5)
    train(policy, 0)
    saved = checkpoint.save(tmp_path / "checkpoints", 1, policy, {"item": 3, "order": [2, 0, 1]})
    uninterrupted = train(policy, 1)

    for generator in (random.seed, np.random.seed, torch.manual_seed):
        generator(99)
    resumed = make_policy(path, schedule="cosine", warmup_steps=1)
    assert checkpoint.load(saved, resumed) == {"item": 3, "order": [2, 0, 1], "step": 1}
    assert train(resumed, 1) == uninterrupted
    for one, other in zip(state(policy), state(resumed), strict=True):
        assert torch.equal(one, other)
    assert resumed.scheduler.get_last_lr() == policy.scheduler.get_last_lr()


@pytest.fixture
def two_checkpoints(tmp_path):
    policy = make_policy(model_folder(tmp_path))
    train(policy, 0)
    directory = tmp_path / "checkpoints"
    return policy, checkpoint.save(directory, 4, policy, {}), checkpoint.save(directory, 8, policy, {})


def test_layout_and_latest(two_checkpoints):
    _, first, second = two_checkpoints
    assert first.name == "step_000004" and checkpoint.latest(first.parent) == second
    names = {file.name for file in second.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "trainer.pt", "extra.json", "MANIFEST"} <= names
    assert "embed" not in (second / "MANIFEST").read_text()
    assert checkpoint.latest(first.parent / "nowhere") is None


@pytest.mark.parametrize("name", ["trainer.pt", "adapter_model.safetensors", "extra.json"])
def test_a_corrupt_file_is_refused_by_name(two_checkpoints, name):
    policy, first, second = two_checkpoints
    content = bytearray((second / name).read_bytes())
    content[len(content) // 2] ^= 1
    (second / name).write_bytes(content)
    before = state(policy)
    with pytest.raises(
        StorageError, match=rf"(?s){second.name} is corrupt: {name}.*--resume --checkpoint {first.name}"
    ):
        checkpoint.load(second, policy)
    assert all(torch.equal(one, other) for one, other in zip(before, state(policy), strict=True))
    assert checkpoint.load(first, policy) == {"step": 4}


def test_a_missing_file_is_refused(two_checkpoints):
    policy, first, _ = two_checkpoints
    (first / "trainer.pt").unlink()
    with pytest.raises(StorageError, match=r"(?s)trainer\.pt.*no earlier checkpoint"):
        checkpoint.load(first, policy)


def test_an_interrupted_save_is_invisible_and_swept_up(two_checkpoints):
    _, first, second = two_checkpoints
    directory = first.parent
    (directory / ".step_000012.77.tmp").mkdir()
    (directory / "step_000016").mkdir()  # renamed by hand, no manifest
    assert checkpoint.latest(directory) == second
    checkpoint.prune(directory, 1)
    assert not (directory / ".step_000012.77.tmp").exists()
    assert second.exists() and not first.exists()


def test_a_full_disk_names_the_folder_and_spares_the_rest(two_checkpoints):
    policy, _, second = two_checkpoints

    class FullDisk:
        """A policy whose adapter does not fit on the disk any more."""

        def save_weights(self, path):
            (path / "adapter_model.safetensors").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with pytest.raises(StorageError, match=r"(?s)step_000008.*No space left.*free space"):
        checkpoint.save(second.parent, 8, FullDisk(), {})
    assert sorted(path.name for path in second.parent.iterdir()) == ["step_000004", "step_000008"]
    assert checkpoint.load(second, policy) == {"step": 8}


def test_saving_the_same_step_again_replaces_it(two_checkpoints):
    policy, _, second = two_checkpoints
    checkpoint.save(second.parent, 8, policy, {"again": True})
    assert json.loads((second / "extra.json").read_text()) == {"again": True}
