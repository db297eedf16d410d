"""Full fine-tuning: exact gradients, float32 masters, freezing, and what both kinds of training share."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_batch import random_group, values
from test_policy import gradients, make_policy, model_folder
from transformers import AutoModelForCausalLM

from rft.config import LoraConfig, ModelConfig, TrainingConfig
from rft.errors import ConfigError, MemoryLimitError, NumericsError, SyncError, UserError
from rft.trainers import checkpoint
from rft.trainers.batch import MicroBatch, build_micro_batches, count_tokens
from rft.trainers.grpo import Window, _check_skips
from rft.trainers.halving import halve
from rft.trainers.policy import Policy
from rft.trainers.ranks import build_accelerator
from rft.trainers.sync import Sync
from rft.trainers.update import StepStats

torch.set_num_threads(1)  # the models here are too small for threads to pay


def full_policy(path: Path, dtype: str = "float32", freeze: tuple[str, ...] = (), **training) -> Policy:
    options = {"steps": 4, "learning_rate": 1e-3, **training}
    master = options.pop("master_dtype", None)
    model = ModelConfig(path=path, dtype=dtype, lora=None, freeze=list(freeze), master_dtype=master)
    return Policy(model, TrainingConfig(**options), 0.8, build_accelerator(seed=0), seed=0)


def a_window(seed: int = 0, layout: str = "packed", limit: int = 10_000) -> list[MicroBatch]:
    groups = [random_group(seed), random_group(seed + 1)]
    return build_micro_batches(groups, values(groups), limit, layout)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "gemma2"])
def test_gradients_are_those_of_plain_autograd(tmp_path, kind):
    """All weights, tied ones (llama, gpt2) with both of their gradients; against transformers' own logits."""
    policy = full_policy(model_folder(tmp_path, kind))
    (batch,) = build_micro_batches([random_group(2)], [torch.linspace(-1, 1, 8)], 10_000, "plain")
    ours = gradients(policy, [batch])
    policy.optimizer.zero_grad()
    logits = policy.causal_lm(input_ids=batch.input_ids).logits.flatten(0, 1)[batch.predictors] / 0.8
    expected = torch.log_softmax(logits.float(), -1)[batch.predictor_index, batch.targets]
    ratio = (expected - batch.sampled_logprobs).exp()
    clipped = ratio.clamp(0.8, 1.28)
    (-torch.min(ratio * batch.advantages, clipped * batch.advantages).sum() / batch.num_tokens).backward()
    theirs = torch.cat([parameter.grad.flatten() for parameter in policy.weights.parameters])
    assert (ours - theirs).norm() / theirs.norm() < 1e-5
    packed = gradients(policy, build_micro_batches([random_group(2)], [torch.linspace(-1, 1, 8)], 10_000, "packed"))
    assert (packed - theirs).norm() / theirs.norm() < 1e-5


def test_masters_keep_what_bfloat16_would_lose(tmp_path):
    path = model_folder(tmp_path)
    small = {"dtype": "bfloat16", "learning_rate": 1e-6, "steps": 50}
    with_masters, without = full_policy(path, **small), full_policy(path, master_dtype="bfloat16", **small)
    before = [parameter.detach().clone() for parameter in without.weights.parameters]
    for policy in (with_masters, without):
        for step in range(8):
            policy.step(a_window(step), 100)
    assert {p.dtype for p in with_masters.weights.parameters} == {torch.float32}

    def moved_share(policy: Policy) -> float:
        pairs = zip(before, policy.weights.parameters, strict=True)
        moved = torch.cat([(old.float() != new.float()).flatten() for old, new in pairs])
        return moved.float().mean().item()

    assert moved_share(without) < 0.1, "an update of 1e-6 vanishes in most bfloat16 weights"
    assert moved_share(with_masters) > 0.9


def test_the_model_is_its_masters_rounded_once(tmp_path):
    policy = full_policy(model_folder(tmp_path), dtype="bfloat16", learning_rate=1e-2)
    policy.step(a_window(), 100)
    trained = [parameter for parameter in policy.causal_lm.parameters() if parameter.requires_grad]
    for parameter, master in zip(trained, policy.weights.parameters, strict=True):
        assert parameter.dtype == torch.bfloat16 and parameter.grad is None
        assert torch.equal(parameter, master.bfloat16())
    assert {tensor.dtype for tensor in policy.full_state_dict().values()} == {torch.bfloat16}


def test_gradients_are_added_up_in_float32(tmp_path):
    policy = full_policy(model_folder(tmp_path), dtype="bfloat16")
    (batch,) = a_window()[:1]
    one = gradients(policy, [batch])
    several = gradients(policy, [batch] * 7)
    assert torch.allclose(several, 7 * one, rtol=1e-5, atol=1e-9), "a sum in bfloat16 is off by up to 4e-3"


def test_frozen_modules_stay_as_they_are(tmp_path):
    path = model_folder(tmp_path)
    policy = full_policy(path, freeze=("model.embed_tokens", "model.layers.0.*"), learning_rate=1e-2)
    before = {name: tensor.clone() for name, tensor in policy.full_state_dict().items()}
    policy.step(a_window(), 100)
    for name, tensor in policy.full_state_dict().items():
        is_frozen = name.startswith(("model.embed_tokens", "model.layers.0."))
        assert torch.equal(tensor, before[name]) == is_frozen, name
    with pytest.raises(ConfigError, match=r"(?s)model\.freeze: `model\.layer\.0` names nothing.*model\.layers"):
        full_policy(path, freeze=("model.layer.0",))
    with pytest.raises(ConfigError, match="nothing is left"):
        full_policy(path, freeze=("model",))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)])
def test_resumed_equals_uninterrupted(tmp_path, dtype, lora):
    model = ModelConfig(path=model_folder(tmp_path), dtype=dtype, lora=lora)
    options = TrainingConfig(steps=4, learning_rate=1e-2, schedule="linear")

    def fresh() -> Policy:
        return Policy(model, options, 0.8, build_accelerator(seed=0), seed=0)

    policy = fresh()
    policy.step(a_window(0), 100)
    saved = checkpoint.save(tmp_path / "checkpoints", 1, policy, {})
    policy.step(a_window(1), 100)
    resumed = fresh()
    checkpoint.load(saved, resumed)
    resumed.step(a_window(1), 100)
    for one, other in zip(policy.weights.parameters, resumed.weights.parameters, strict=True):
        assert torch.equal(one, other)
    states = policy.training_state()["optimizer"]["state"], resumed.training_state()["optimizer"]["state"]
    assert all(torch.equal(states[0][i][name], states[1][i][name]) for i in states[0] for name in states[0][i])


def test_weights_of_the_other_kind_are_refused(tmp_path):
    path = model_folder(tmp_path)
    full, adapted = full_policy(path), make_policy(path)
    whole = checkpoint.save(tmp_path / "full", 1, full, {})
    adapter = checkpoint.save(tmp_path / "lora", 1, adapted, {})
    with pytest.raises(UserError, match=r"(?s)adapter_config\.json.*model\.lora=null"):
        checkpoint.load_weights(whole, adapted)
    with pytest.raises(UserError, match=r"(?s)no model\.safetensors.*model\.lora"):
        checkpoint.load_weights(adapter, full)
    other = make_policy(path, lora=LoraConfig(rank=8))
    with pytest.raises(UserError, match=r"(?s)does not fit.*rank"):
        checkpoint.load_weights(adapter, other)


@pytest.mark.parametrize("is_full", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_gradient_checkpointing_changes_nothing_but_memory(tmp_path, kind, is_full):
    path = model_folder(tmp_path, kind)
    make = full_policy if is_full else make_policy
    kept, saved = make(path), make(path, gradient_checkpointing=True)
    one, other = gradients(kept, a_window()), gradients(saved, a_window())
    assert (one - other).norm() / one.norm() < 1e-6
    assert _num_saved_bytes(saved) < 0.75 * _num_saved_bytes(kept)


def _num_saved_bytes(policy: Policy) -> int:
    """What one forward pass keeps for its backward pass."""
    sizes: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: sizes.update({tensor.data_ptr(): tensor.nbytes}) or tensor, lambda tensor: tensor
    ):
        policy.scorer(a_window()[0], 0.8)
    return sum(sizes.values())


def test_the_reference_may_be_a_second_model(tmp_path):
    path = model_folder(tmp_path)
    other = model_folder(tmp_path / "other", seed=5)
    batch = a_window()[0]
    untrained = full_policy(path).logprobs(batch)
    policy = full_policy(path, kl_coef=0.5)
    assert torch.equal(policy.reference_logprobs(batch), untrained), "without model.reference it is the untrained model"
    stats = [policy.step([batch], batch.num_tokens) for _ in range(2)]
    assert stats[0].reference_kl == 0 and stats[1].reference_kl > 0
    model = ModelConfig(path=path, dtype="float32", lora=LoraConfig(rank=4), reference=other)
    adapted = Policy(model, TrainingConfig(steps=1, kl_coef=0.5), 0.8, build_accelerator(seed=0), seed=0)
    assert torch.equal(adapted.reference_logprobs(batch), full_policy(other).logprobs(batch))


# --- memory and numbers that run out ---


@pytest.mark.parametrize("layout", ["packed", "plain"])
def test_halves_have_the_same_gradient(tmp_path, layout):
    policy = make_policy(model_folder(tmp_path))
    (batch,) = build_micro_batches([random_group(3)], [torch.linspace(-1, 1, 8)], 10_000, layout)
    whole = gradients(policy, [batch])
    halves = halve(batch)
    assert len(halves) == 2 and count_tokens(halves) == batch.num_tokens
    assert all(half.num_row_tokens < batch.num_row_tokens for half in halves)
    assert torch.allclose(policy._in_order(halves), policy._in_order([batch]), atol=2e-5)
    assert (gradients(policy, halves) - whole).norm() / whole.norm() < 1e-5
    quarters = [quarter for half in halves for quarter in halve(half)]
    assert (gradients(policy, quarters) - whole).norm() / whole.norm() < 1e-5


class SmallMemory(torch.nn.Module):
    """A scorer on a device that holds `limit` row tokens."""

    def __init__(self, scorer: torch.nn.Module, limit: int) -> None:
        super().__init__()
        self.scorer, self.limit = scorer, limit

    def forward(self, batch: MicroBatch, temperature: float, with_entropy_grad: bool = False):
        result = self.scorer(batch, temperature)
        if batch.num_row_tokens > self.limit:
            raise torch.OutOfMemoryError("out of memory")
        return result


def test_out_of_memory_halves_once_and_says_what_to_set(tmp_path, caplog):
    path = model_folder(tmp_path)
    (batch,) = build_micro_batches([random_group(3)], [torch.linspace(-1, 1, 8)], 10_000, "packed")
    expected = make_policy(path)
    expected.step([batch], batch.num_tokens)
    policy = make_policy(path)
    memory = SmallMemory(policy.scorer, batch.num_row_tokens - 1)
    policy.stepper.forward = memory
    policy.step([batch], batch.num_tokens)
    assert f"training.max_tokens_per_micro_batch={batch.num_row_tokens // 2}" in caplog.text
    assert policy.max_tokens == batch.num_row_tokens // 2, "the steps after it ask for less"
    for one, other in zip(expected.weights.parameters, policy.weights.parameters, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    memory.limit = 10
    with pytest.raises(MemoryLimitError, match=r"(?s)out of memory.*max_tokens_per_micro_batch=.*gradient_checkpoint"):
        policy.step([batch], batch.num_tokens)


def test_a_skipped_step_names_its_rollouts(tmp_path):
    policy = full_policy(model_folder(tmp_path))
    batch = a_window()[0]
    poisoned = batch.sampled_logprobs.clone()
    poisoned[batch.rollout_index == 3] = float("nan")
    stats = policy.step([replace(batch, sampled_logprobs=poisoned)], batch.num_tokens)
    assert stats.is_skipped and stats.bad_rollouts == (3,)
    assert policy.step([batch], batch.num_tokens).bad_rollouts == ()


def test_three_skipped_steps_in_a_row_end_the_run_and_name_the_rollouts(tmp_path, caplog):
    policy = full_policy(model_folder(tmp_path))
    batch = a_window()[0]
    poisoned = replace(batch, sampled_logprobs=torch.full_like(batch.sampled_logprobs, float("nan")))
    window = Window([[poisoned]], batch.num_tokens, [f"trace_{index}" for index in range(16)])
    skips: list[StepStats] = []
    for _ in range(2):
        _check_skips(skips, policy.update(window.shares, window.num_tokens), window)
        assert "trace_0, trace_1, trace_2, trace_3, trace_4 and 11 more" in caplog.text
    _check_skips(skips, policy.update([[batch]], batch.num_tokens), window)  # a step that counts starts the count anew
    for _ in range(2):
        _check_skips(skips, policy.update(window.shares, window.num_tokens), window)
    with pytest.raises(NumericsError, match=r"3 steps in a row(.|\n)*trace_0(.|\n)*rft show RUN --rollout ID"):
        _check_skips(skips, policy.update(window.shares, window.num_tokens), window)


# --- against a real engine ---


@pytest.mark.slow
def test_vllm_gets_all_weights_and_a_stale_head_is_caught(tmp_path):
    """The head is tied to the embedding: vLLM's CPU build keeps the old one when it reloads (traps of vLLM 0.31)."""
    from tests.test_engines import vllm_engine
    from tests.tiny import tiny_model_folder

    path = tiny_model_folder(tmp_path / "tiny", hidden_size=128, num_attention_heads=4)
    assert AutoModelForCausalLM.from_pretrained(path).config.tie_word_embeddings
    policy = full_policy(path, learning_rate=3e-2)
    sync = Sync("merged", tmp_path / "weights", path, "float32")
    prompts = [list(range(20, 60)), list(range(5, 90))]
    engine = vllm_engine(path, tmp_path / "engine.log")

    async def only_reload(version: int) -> None:
        """What a server does that rft did not launch."""
        server, engine._server = engine._server, None
        await engine.load(sync.publish(policy, version))
        engine._server = server

    async def check() -> None:
        await engine.start()
        try:
            await sync.probe(policy, engine, prompts)
            for version in (1, 2):
                policy.step(a_window(version), 100)
                await engine.load(sync.publish(policy, version))
                result = await sync.probe(policy, engine, prompts)
                assert result.mean_gap < 1e-3
            policy.step(a_window(3), 100)
            await only_reload(3)
            with pytest.raises(SyncError, match="policy version 3"):
                await sync.probe(policy, engine, prompts)
        finally:
            await engine.close()

    asyncio.run(asyncio.wait_for(check(), 300))
