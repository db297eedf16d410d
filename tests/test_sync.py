"""Publishing weights, and a probe that notices when they did not arrive."""

from __future__ import annotations

import asyncio
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file
from scripted_engine import ScriptedEngine
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from rft.chat import Chat
from rft.config import ModelConfig, TransformersEngineConfig
from rft.engines import EngineLoad, PublishedWeights, sync_kind
from rft.engines.pool import EnginePool
from rft.engines.transformers import TransformersEngine
from rft.errors import EngineError, StorageError, SyncError
from rft.trainers.sync import ProbeResult, Sync
from tests.tiny import tiny_model_folder, tiny_tokenizer

PROMPTS = [list(range(30, 100)), [7, 8, 9, 200, 3]]
Kind = Literal["auto", "adapter", "merged"]


class PlainPolicy:
    """A policy without adapters: a model whose linear layers can be moved."""

    def __init__(self, folder: Path) -> None:
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def move(self, size: float) -> None:
        """Add noise to the linear layers, as large as `size` times their own standard deviation."""
        noise = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                if "_proj" in name:
                    weight.add_(torch.randn(weight.shape, generator=noise) * size * weight.std())

    def score(self, ids: list[int], start: int) -> list[float]:
        with torch.no_grad():
            logprobs = torch.log_softmax(self.model(torch.tensor([ids])).logits[0, :-1], -1)
        scores: list[float] = logprobs.gather(-1, torch.tensor(ids)[1:, None])[start - 1 :, 0].tolist()
        return scores

    def full_state_dict(self) -> dict[str, Tensor]:
        tied = self.model.all_tied_weights_keys
        return {name: value for name, value in self.model.state_dict().items() if name not in tied}

    def full_tensors(self) -> Generator[tuple[str, Tensor], None, None]:
        yield from self.full_state_dict().items()

    def save_weights(self, path: Path) -> None:
        path.mkdir()
        (path / "adapter_config.json").write_text("{}")


@dataclass
class Rig:
    runner: asyncio.Runner
    engine: TransformersEngine
    policy: PlainPolicy
    sync: Sync

    def probe(self) -> ProbeResult:
        return self.runner.run(self.sync.probe(self.policy, self.engine, PROMPTS))

    def load(self, weights: PublishedWeights) -> None:
        self.runner.run(self.engine.load(weights))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def rig(folder: Path, tmp_path: Path) -> Iterator[Rig]:
    engine = TransformersEngine(TransformersEngineConfig(max_model_len=128), ModelConfig(path=folder, dtype="float32"))
    with asyncio.Runner() as runner:
        runner.run(engine.start())
        yield Rig(runner, engine, PlainPolicy(folder), Sync("merged", tmp_path / "weights", folder, "float32"))
        runner.run(engine.close())


def test_weights_arrive(rig: Rig) -> None:
    assert rig.probe().max_gap < 1e-4
    for version in (1, 2, 3):
        rig.policy.move(0.3)
        rig.load(rig.sync.publish(rig.policy, version))
        assert rig.probe().max_gap < 1e-4
        assert rig.engine.policy_version == version


def test_wrong_weights_are_found_by_the_gap(rig: Rig) -> None:
    rig.policy.move(1.0)
    with pytest.raises(SyncError, match=r"policy version 0: log-probabilities differ from the trainer's by 0\."):
        rig.probe()


@pytest.mark.parametrize("size", [0.003, 0.3])
def test_one_lost_sync_is_found_however_small_the_step(rig: Rig, folder: Path, size: float) -> None:
    sync = Sync("merged", rig.sync._folder, folder, "bfloat16")  # the bound for bfloat16 cannot see the step
    rig.sync = sync
    rig.probe()
    rig.policy.move(size)
    rig.load(PublishedWeights(1, folder))  # says that it loaded version 1, and has the old weights
    with pytest.raises(SyncError, match="still computes with policy version 0 instead of 1"):
        rig.probe()


def test_every_engine_of_several_is_probed(rig: Rig, folder: Path) -> None:
    second = TransformersEngine(TransformersEngineConfig(max_model_len=128), ModelConfig(path=folder, dtype="float32"))
    rig.runner.run(second.start())
    pool = EnginePool([rig.engine, second])
    rig.policy.move(0.3)
    weights = rig.sync.publish(rig.policy, 1)
    rig.runner.run(pool.load(weights))
    rig.runner.run(second.load(PublishedWeights(1, folder)))  # says that it has them
    with pytest.raises(SyncError, match="log-probabilities differ"):
        rig.runner.run(rig.sync.probe(rig.policy, pool, PROMPTS))
    rig.runner.run(second.load(weights))
    assert rig.runner.run(rig.sync.probe(rig.policy, pool, PROMPTS)).max_gap < 1e-4
    rig.runner.run(second.close())


class Flat(PlainPolicy):
    """A policy that says what the scripted engine says, and counts how often."""

    def __init__(self) -> None:
        self.num_scored = 0

    def score(self, ids: list[int], start: int) -> list[float]:
        self.num_scored += 1
        return [-0.5] * (len(ids) - start)


class Scored(ScriptedEngine):
    """Does not answer when it is asked for scores, or is down, if `is_dead`."""

    is_dead = False

    async def score(self, ids: list[int], start: int) -> list[float]:
        if self.is_dead:
            raise EngineError("the server died")
        return await super().score(ids, start)

    async def load_metrics(self) -> EngineLoad:
        await self.score([], 0)
        return await super().load_metrics()


def test_of_many_engines_each_is_asked_and_the_trainer_once(tmp_path: Path) -> None:
    """One that dies under the probe is left out, the run goes on with the others."""
    engines = [Scored(Chat(tiny_tokenizer()), lambda *_: "") for _ in range(16)]
    pool, policy = EnginePool(engines), Flat()
    engines[5].is_dead = True

    async def story() -> None:
        assert (await Sync("merged", tmp_path, tmp_path).probe(policy, pool, PROMPTS)).max_gap == 0
        assert policy.num_scored <= 3, "both prompts, and the one that is remembered"
        assert engines[5] not in pool.members and len(pool.members) == 15
        for engine in engines:
            engine.is_dead = True
        with pytest.raises(EngineError, match="the server died"):
            await Sync("merged", tmp_path, tmp_path).probe(policy, pool, PROMPTS)
        await pool.close()

    asyncio.run(story())


def test_unmoved_policy_is_no_lost_sync(rig: Rig) -> None:
    rig.probe()
    rig.load(rig.sync.publish(rig.policy, 1))
    assert rig.probe().mean_gap < 1e-4


def test_nan_is_never_agreement(rig: Rig) -> None:
    with torch.no_grad():
        next(iter(rig.policy.model.parameters())).fill_(float("nan"))
    with pytest.raises(SyncError):
        rig.probe()


def test_probe_needs_something_to_compare(rig: Rig) -> None:
    with pytest.raises(ValueError, match="at least one sequence"):
        rig.runner.run(rig.sync.probe(rig.policy, rig.engine, [[5]]))


def test_long_sequences_are_cut_to_the_context(rig: Rig) -> None:
    result = rig.runner.run(rig.sync.probe(rig.policy, rig.engine, [list(range(200)) * 3]))
    assert result.mean_gap < 1e-4


def test_published_folder_is_a_model_folder(rig: Rig, folder: Path) -> None:
    rig.policy.move(0.3)
    weights = rig.sync.publish(rig.policy, 12)
    assert weights == PublishedWeights(12, rig.sync._folder / "v000012", "merged")
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= {file.name for file in weights.path.iterdir()}
    again = PlainPolicy(weights.path)
    assert again.score(PROMPTS[0], 1) == rig.policy.score(PROMPTS[0], 1)


def test_two_versions_stay_and_nothing_half_written(rig: Rig) -> None:
    for version in (1, 2, 3, 3):
        rig.sync.publish(rig.policy, version)
    assert sorted(path.name for path in rig.sync._folder.iterdir()) == ["v000002", "v000003"]


def test_failed_write_leaves_the_old_version(rig: Rig) -> None:
    first = rig.sync.publish(rig.policy, 1)
    before = load_file(first.path / "model.safetensors")

    def fail() -> Any:
        raise OSError(28, "No space left on device")

    rig.policy.full_state_dict = fail  # type: ignore[method-assign]
    with pytest.raises(StorageError, match=r"No space left(.|\n)*cure"):
        rig.sync.publish(rig.policy, 1)
    assert [path.name for path in rig.sync._folder.iterdir()] == ["v000001"]
    assert before.keys() == load_file(first.path / "model.safetensors").keys()


@pytest.mark.parametrize(
    ("mode", "device", "kind"),
    [
        ("auto", "cpu", "merged"),
        ("auto", "cuda", "adapter"),
        ("adapter", "cpu", "adapter"),
        ("merged", "cuda", "merged"),
    ],
)
def test_how_weights_travel(rig: Rig, tmp_path: Path, folder: Path, mode: Kind, device: str, kind: str) -> None:
    weights = Sync(sync_kind(mode, device), tmp_path / "out", folder).publish(rig.policy, 4)
    assert weights.kind == kind
    assert (weights.path / "adapter_config.json").exists() == (kind == "adapter")
