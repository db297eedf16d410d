"""DeepSpeed on two gloo ranks: one rank's weights, skipped steps, checkpoints that any launch continues."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_policy import model_folder

from rft.config import ModelConfig, TrainingConfig
from rft.errors import ConfigError
from rft.trainers import deepspeed

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed: pip install deepspeed"
)

# The same story for every launch: two steps and one that must be skipped, a checkpoint, a step; the step again from
# the checkpoint in a policy of its own.
_RANK = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
from test_batch import random_group, values
from rft.config import LoraConfig, ModelConfig, TrainingConfig
from rft.trainers import checkpoint
from rft.trainers.batch import build_micro_batches, count_tokens, split_over_ranks, weigh
from rft.trainers.policy import Policy
from rft.trainers.ranks import build_accelerator

if "deepspeed" in sys.modules or __import__("os").environ.get("ACCELERATE_USE_DEEPSPEED"):
    import deepspeed.ops
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled first
torch.set_num_threads(1)
_, _, model, lora, output, source = sys.argv
config = ModelConfig(path=Path(model), dtype="float32", lora=LoraConfig(rank=4, alpha=8) if lora == "lora" else None)
training = TrainingConfig(steps=4, learning_rate=1e-3, weight_decay=0.1, max_grad_norm=0.5)
accelerator = build_accelerator(0)

def make():
    policy = Policy(config, training, 0.8, accelerator, 0)
    if lora == "lora":
        with torch.no_grad():
            for index, parameter in enumerate(policy.weights.parameters):
                torch.manual_seed(index)
                parameter.add_(0.05 * torch.randn_like(parameter))
        policy.stepper.take_weights()
    return policy

def step(policy, seed, poisoned=False):
    groups = [random_group(seed), random_group(seed + 10), random_group(seed + 20)]
    batches = build_micro_batches(groups, values(groups), 60, "packed")
    if poisoned:
        batches[0] = replace(batches[0], sampled_logprobs=batches[0].sampled_logprobs * float("nan"))
    return policy.update(split_over_ranks(batches, policy.ranks.num), count_tokens(batches))

def weights(policy):
    return [parameter.detach().clone() for parameter in policy.weights.parameters]

def lead(policy):
    if source != "-":
        assert checkpoint.load(Path(source), policy)["step"] == 2
        return {"after": [step(policy, 3).loss], "last": weights(policy)}
    stats = [step(policy, 0), step(policy, 1), step(policy, 2, poisoned=True)]
    first = weights(policy)
    saved = checkpoint.save(Path(output).parent / "checkpoints", 2, policy, {})
    stats.append(step(policy, 3))
    return {"first": first, "last": weights(policy), "saved": str(saved),
            "loss": [s.loss for s in stats], "norm": [s.grad_norm for s in stats],
            "skipped": [s.is_skipped for s in stats], "bad": [list(s.bad_rollouts) for s in stats],
            "rate": [s.learning_rate for s in stats]}

policy = make()
if policy.ranks.leads:
    with policy.ranks.leading():
        torch.save(lead(policy), output)
else:
    policy.ranks.follow(policy)
"""


def run(tmp_path: Path, kind: str, stage: int | None, source: str = "-") -> dict[str, Any]:
    """The story on one rank (`stage` None) or on two with DeepSpeed; `source`: a checkpoint to go on from."""
    folder = tmp_path / f"stage{stage}"
    folder.mkdir(exist_ok=True)
    output = folder / ("resumed.pt" if source != "-" else "told.pt")
    script = folder / "rank.py"
    script.write_text(_RANK)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    base = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT.parent), "OMP_NUM_THREADS": "1"}
    num_ranks = 1 if stage is None else 2
    if stage is not None:
        base |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
        base |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}
    command = [sys.executable, str(script), str(ROOT), str(model_folder(tmp_path)), kind, str(output), source]
    ranks = []
    for rank in range(num_ranks):
        environment = base if num_ranks == 1 else {**base, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        for process in ranks:
            _, errors = process.communicate(timeout=280)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in ranks:
            process.kill()
    told: dict[str, Any] = torch.load(output, weights_only=True)
    return told


def apart(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "stage"), [("full", 1), ("full", 2), ("lora", 2)])
def test_two_ranks_are_one(tmp_path: Path, kind: str, stage: int) -> None:
    alone, together = run(tmp_path, kind, None), run(tmp_path, kind, stage)
    assert alone["skipped"] == together["skipped"] == [False, False, True, False]
    assert together["rate"] == alone["rate"] and together["bad"][2] and not together["bad"][3]
    for index in (0, 1, 3):
        assert together["loss"][index] == pytest.approx(alone["loss"][index], rel=1e-4, abs=1e-5)
        assert together["norm"][index] == pytest.approx(alone["norm"][index], rel=1e-4)
    assert apart(alone["first"], together["first"]) < 1e-5
    assert apart(alone["last"], together["last"]) < 1e-5
    # a checkpoint of either launch is continued by the other, and by itself
    for source, with_stage in ((alone, stage), (together, None), (together, stage)):
        assert apart(run(tmp_path, kind, with_stage, source["saved"])["last"], together["last"]) < 1e-5


@pytest.mark.parametrize(
    ("environment", "model", "training", "words"),
    [
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, {}, {}, r"zero_stage: stage 3 is not supported(.|\n)*fsdp2"),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, {}, {}, "deepspeed_config.offload_optimizer_device"),
        ({"ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"}, {}, {}, "deepspeed_config.config_file"),
        ({"ACCELERATE_GRADIENT_CLIPPING": "1.0"}, {}, {}, r"gradient_clipping(.|\n)*max_grad_norm"),
        ({}, {"lora": None, "dtype": "bfloat16"}, {}, r"model.dtype: DeepSpeed would(.|\n)*float32"),
        ({}, {}, {"optimizer": "adamw_8bit"}, "training.optimizer: DeepSpeed steps AdamW only"),
    ],
)
def test_what_deepspeed_does_not_do_here_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    model: dict[str, Any],
    training: dict[str, Any],
    words: str,
) -> None:
    for name, value in {"ACCELERATE_USE_DEEPSPEED": "true", **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=words):
        deepspeed.is_asked_for(ModelConfig(path=Path("m"), **model), TrainingConfig(steps=1, **training))


def test_what_it_does_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    for name in ("CONFIG_FILE", "OFFLOAD_OPTIMIZER_DEVICE", "OFFLOAD_PARAM_DEVICE"):  # what accelerate's launch says
        monkeypatch.setenv(f"ACCELERATE_DEEPSPEED_{name}", "none")
    for model in ({}, {"lora": None, "dtype": "float32"}):
        assert deepspeed.is_asked_for(ModelConfig(path=Path("m"), **model), TrainingConfig(steps=1))
