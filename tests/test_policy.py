"""The policy: packed equals plain, merged equals live, one gradient for every split, clear errors."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_batch import group, random_group, turn, values
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

from rft.config import LoraConfig, ModelConfig, TrainingConfig
from rft.errors import ConfigError, UserError
from rft.trainers import attention
from rft.trainers.attention import attention_inputs, block_mask, cut_chains
from rft.trainers.batch import MicroBatch, build_micro_batches, count_tokens, split_over_ranks, weigh
from rft.trainers.policy import Policy
from rft.trainers.ranks import build_accelerator
from rft.trainers.update import backward

torch.set_num_threads(1)  # the models here are too small for threads to pay

TINY = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": LlamaConfig(**TINY, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**TINY),
    "gpt2": GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2),
    "gemma2": Gemma2Config(**TINY, final_logit_softcapping=5.0, attn_logit_softcapping=4.0, query_pre_attn_scalar=8),
    "granite": GraniteConfig(**TINY, logits_scaling=3.0),
}


def model_folder(tmp_path: Path, kind: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """A random model of a few thousand parameters, saved as any user's model would be."""
    path = tmp_path / kind
    if not path.exists():
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(CONFIGS[kind]).to(dtype).save_pretrained(path)
    return path


def make_policy(path: Path, dtype: str = "float32", lora: LoraConfig | None = None, **training) -> Policy:
    options = {"steps": 4, "learning_rate": 1e-2, **training}
    model = ModelConfig(path=path, dtype=dtype, lora=lora or LoraConfig(rank=4, alpha=8))
    policy = Policy(model, TrainingConfig(**options), 0.8, build_accelerator(seed=0), seed=0)
    with torch.no_grad():  # B = 0 would leave A without a gradient and the adapter without a trace
        for index, parameter in enumerate(policy.weights.parameters):
            torch.manual_seed(index)
            parameter.add_(0.05 * torch.randn_like(parameter))
    return policy


def gradients(policy: Policy, batches: list[MicroBatch]) -> torch.Tensor:
    """The gradient of one window as a vector, through the policy's own accumulation."""
    policy.optimizer.zero_grad()
    for batch in batches:
        backward(policy, batch)
    return torch.cat([parameter.grad.flatten() for parameter in policy.weights.parameters])


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_packed_equals_plain(tmp_path, kind):
    policy = make_policy(model_folder(tmp_path, kind))
    groups = [random_group(0), random_group(1, num_rollouts=5)]
    results = []
    for layout, limit in (("plain", 10_000), ("plain", 150), ("packed", 10_000), ("packed", 50)):
        batches = build_micro_batches(groups, values(groups), limit, layout)
        results.append((policy._in_order(batches), gradients(policy, batches)))
    logprobs, gradient = results[0]
    assert logprobs.numel() == count_tokens(build_micro_batches(groups, values(groups), 50, "packed"))
    for other_logprobs, other_gradient in results[1:]:
        assert (other_logprobs - logprobs).abs().max() < 2e-5
        assert (other_gradient - gradient).norm() / gradient.norm() < 1e-5


@pytest.mark.parametrize("entropy_coef", [0.0, 0.3])
@pytest.mark.parametrize("sync", ["merged", "adapter"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "granite"])
def test_logprobs_and_gradients_are_those_of_plain_autograd(tmp_path, kind, sync, entropy_coef):
    """Against transformers' own logits and torch's own autograd, nothing of ours in between."""
    policy = make_policy(model_folder(tmp_path, kind), sync=sync, entropy_coef=entropy_coef)
    (batch,) = build_micro_batches([random_group(2)], [torch.linspace(-1, 1, 8)], 10_000, "plain")
    ours = gradients(policy, [batch])
    policy.optimizer.zero_grad()
    logits = policy.causal_lm(input_ids=batch.input_ids).logits.flatten(0, 1)[batch.predictors] / 0.8
    logs = torch.log_softmax(logits.float(), -1)
    expected = logs[batch.predictor_index, batch.targets]
    ratio = (expected - batch.sampled_logprobs).exp()
    clipped = ratio.clamp(0.8, 1.28)
    entropies = -(logs.exp() * logs).sum(-1)[batch.predictor_index]
    per_token = torch.min(ratio * batch.advantages, clipped * batch.advantages) + entropy_coef * entropies
    (-per_token.sum() / batch.num_tokens).backward()
    theirs = torch.cat([parameter.grad.flatten() for parameter in policy.weights.parameters])
    assert (policy.logprobs(batch) - expected).abs().max() < 2e-5
    assert (ours - theirs).norm() / theirs.norm() < 1e-5
    assert all(parameter.grad is None for parameter in policy.weights.model.parameters() if not parameter.requires_grad)


def test_merged_and_adapter_numerics_agree(tmp_path):
    path, groups = model_folder(tmp_path), [random_group(0)]
    batches = build_micro_batches(groups, values(groups), 10_000, "packed")
    merged, adapter = make_policy(path, sync="merged"), make_policy(path, sync="adapter")
    assert (merged._in_order(batches) - adapter._in_order(batches)).abs().max() < 2e-5
    one, other = gradients(merged, batches), gradients(adapter, batches)
    assert (one - other).norm() / other.norm() < 1e-5


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_merged_state_dict_is_a_model_folder(tmp_path, kind):
    policy = make_policy(model_folder(tmp_path, kind))
    groups = [random_group(0)]
    policy.step(build_micro_batches(groups, values(groups), 10_000, "packed"), 100)
    before = {name: value.clone() for name, value in policy.weights.model.state_dict().items()}
    merged = policy.full_state_dict()
    attention = policy.causal_lm.config._attn_implementation.replace("rft_chains", "sdpa")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / kind, dtype=torch.float32, attn_implementation=attention)
    saved.load_state_dict(merged, strict=False)
    expected_keys = set(saved.state_dict()) - set(saved.all_tied_weights_keys)
    assert set(merged) == expected_keys
    ids = list(range(3, 40))
    logprobs = torch.log_softmax(saved.eval()(torch.tensor([ids])).logits[0].float(), -1)
    expected = [logprobs[i - 1, ids[i]].item() for i in range(5, len(ids))]
    assert policy.score(ids, 5) == pytest.approx(expected, abs=2e-5)
    after = policy.weights.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_merged_state_dict_in_bfloat16_is_rounded_once(tmp_path):
    policy = make_policy(model_folder(tmp_path), dtype="bfloat16")
    layer = policy.causal_lm.model.layers[0].mlp.up_proj
    a, b, scale = layer.factors
    assert a.dtype == b.dtype == torch.float32 and scale == 2.0
    expected = (layer.base_layer.weight.float() + scale * (b @ a)).to(torch.bfloat16)
    assert torch.equal(policy.full_state_dict()["model.layers.0.mlp.up_proj.weight"], expected)


def test_a_snapshot_of_merged_weights_survives_the_next_step(tmp_path):
    policy = make_policy(model_folder(tmp_path))
    groups = [random_group(0)]
    batches = build_micro_batches(groups, values(groups), 10_000, "packed")
    first = policy.full_state_dict()
    copy = {name: value.clone() for name, value in first.items()}
    policy.step(batches, count_tokens(batches))
    second = policy.full_state_dict()
    assert all(torch.equal(first[name], value) for name, value in copy.items())
    assert not torch.equal(first["model.layers.0.mlp.up_proj.weight"], second["model.layers.0.mlp.up_proj.weight"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_raise_what_was_rewarded(tmp_path, dtype):
    policy = make_policy(model_folder(tmp_path), dtype=dtype)
    (batch,) = build_micro_batches([random_group(0)], [torch.tensor([1.0] + [0.0] * 7)], 10_000, "packed")
    before = policy.logprobs(batch)
    on_policy = replace(batch, sampled_logprobs=before)
    calls: list[int] = []
    stats = [policy.step([on_policy], batch.num_tokens, lambda: calls.append(1)) for _ in range(3)]
    assert len(calls) == 3
    assert stats[0].mean_logprob_gap < 1e-6 and stats[0].clip_share == 0.0 and stats[0].mean_ratio == pytest.approx(1)
    assert stats[2].mean_logprob_gap > 1e-4 and 0 < stats[0].entropy < 4.2 and not stats[0].is_skipped
    rewarded = batch.rollout_index == 0
    assert (policy.logprobs(batch) - before)[rewarded].mean() > 0.01


def test_the_entropy_bonus_raises_the_entropy(tmp_path):
    policy = make_policy(model_folder(tmp_path), entropy_coef=0.1)
    (batch,) = build_micro_batches([random_group(0)], [torch.zeros(8)], 10_000, "packed")
    stats = [policy.step([batch], batch.num_tokens) for _ in range(3)]
    assert stats[0].entropy < stats[1].entropy < stats[2].entropy
    entropies = policy.scorer(batch, 0.8)[1][batch.predictor_index]  # of the tokens, not of the distinct positions
    assert policy.step([batch], batch.num_tokens).loss == pytest.approx(-0.1 * entropies.mean().item(), rel=1e-5)


def test_equal_grades_leave_the_weights_alone(tmp_path):
    policy = make_policy(model_folder(tmp_path))
    batches = build_micro_batches([random_group(0)], [torch.zeros(8)], 10_000, "packed")
    stats = policy.step(batches, count_tokens(batches))
    assert stats.grad_norm == 0.0 and stats.loss == 0.0


def test_a_step_that_is_not_finite_changes_nothing(tmp_path):
    policy = make_policy(model_folder(tmp_path), schedule="linear")
    (batch,) = build_micro_batches([random_group(0)], [torch.linspace(-1, 1, 8)], 10_000, "packed")
    before = [parameter.detach().clone() for parameter in policy.weights.parameters]
    bad = replace(batch, advantages=batch.advantages * float("inf"))
    stats = policy.step([bad], batch.num_tokens)
    assert stats.is_skipped
    assert all(torch.equal(one, other) for one, other in zip(before, policy.weights.parameters, strict=True))
    assert not policy.step([batch], batch.num_tokens).is_skipped
    assert policy.scheduler.get_last_lr() == [pytest.approx(1e-2 * 3 / 4)]


def test_score_is_at_temperature_one(tmp_path):
    policy = make_policy(model_folder(tmp_path))
    ids = list(range(3, 30))
    logits = policy.causal_lm(torch.tensor([ids])).logits[0].float()
    expected = torch.log_softmax(logits, -1)[torch.arange(9, 26), torch.tensor(ids[10:])]
    assert policy.score(ids, 10) == pytest.approx(expected.tolist(), abs=2e-5)


def test_micro_batches_check_the_packed_layout_once(tmp_path):
    groups = [random_group(0), random_group(1)]
    policy = make_policy(model_folder(tmp_path))
    assert [batch.layout for batch in policy.micro_batches(groups, values(groups))] == ["packed"]
    plain = make_policy(model_folder(tmp_path), batch="plain")
    assert {batch.layout for batch in plain.micro_batches(groups, values(groups))} == {"plain"}


@pytest.mark.parametrize("window", [4, 30])
def test_a_model_that_cannot_be_packed_falls_back_loudly(tmp_path, caplog, window):
    """A sliding window shorter than the sequences: the relation of a packed row does not know it."""
    torch.manual_seed(0)
    path = tmp_path / "mistral"
    AutoModelForCausalLM.from_config(MistralConfig(**TINY, sliding_window=window)).save_pretrained(path)
    groups = [random_group(0)]
    policy = make_policy(path)
    assert policy.micro_batches(groups, values(groups))[0].layout == "plain"
    assert "slower" in caplog.text
    with pytest.raises(UserError, match=r"training\.batch"):
        make_policy(path, batch="packed").micro_batches(groups, values(groups))


def test_sequences_that_outgrow_the_window_are_noticed_after_the_check(tmp_path, caplog):
    torch.manual_seed(0)
    path = tmp_path / "mistral"
    AutoModelForCausalLM.from_config(MistralConfig(**TINY, sliding_window=60)).save_pretrained(path)
    policy, short, long = make_policy(path), random_group(0), group([[turn(list(range(61)), [k, 5])] for k in (1, 2)])
    assert policy.micro_batches([short], values([short]))[0].layout == "packed"
    assert policy.micro_batches([long], values([long]))[0].layout == "plain"
    assert "window of 60" in caplog.text


def test_attention_soft_caps_are_kept(tmp_path):
    """torch's fused kernel has no soft cap; Gemma 2 must be computed as engines compute it."""
    assert make_policy(model_folder(tmp_path, "gemma2")).causal_lm.config._attn_implementation == "eager"
    assert make_policy(model_folder(tmp_path, "llama")).causal_lm.config._attn_implementation == "rft_chains"


def test_a_wrong_path_names_the_cure(tmp_path):
    with pytest.raises(ConfigError, match="prepare_model"):
        make_policy(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"no config\.json"):
        make_policy(tmp_path)


def test_wrong_lora_targets_name_the_choice(tmp_path):
    path = model_folder(tmp_path)
    with pytest.raises(ConfigError, match="q_proj"):
        make_policy(path, lora=LoraConfig(targets=["nonsense"]))
    with pytest.raises(ConfigError, match="output head"):
        make_policy(path, lora=LoraConfig(targets=["q_proj", "lm_head"]))


def test_adapters_leave_the_head_alone(tmp_path):
    policy = make_policy(model_folder(tmp_path, "qwen2"))
    adapted = {name for name, module in policy.causal_lm.named_modules() if hasattr(module, "lora_A")}
    assert len(adapted) == 2 * 7 and "lm_head" not in adapted
    assert policy.trainable_parameters == sum(parameter.numel() for parameter in policy.weights.parameters) > 0


_RANK = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[2])
from test_batch import group, random_group, turn, values
from test_policy import make_policy
from rft.trainers.batch import build_micro_batches, count_tokens, split_over_ranks
torch.set_num_threads(1)
policy = make_policy(Path(sys.argv[1]))
groups = [random_group(seed) for seed in range(3)]
batches = build_micro_batches(groups, values(groups), 10_000, "packed")
shares = split_over_ranks(batches, policy.ranks.num)
stats = policy.step(shares[policy.ranks.index], count_tokens(batches))
if policy.ranks.leads:
    torch.save({"weights": [p.detach() for p in policy.weights.parameters], "loss": stats.loss, "norm": stats.grad_norm,
                "entropy": stats.entropy, "gap": stats.max_logprob_gap}, sys.argv[3])
"""


@pytest.mark.parametrize(
    ("loss", "staleness"),
    [("grpo", 0), ("dapo", 0), ("dr_grpo", 0), ("gspo", 0), ("cispo", 0), ("dapo", 1), ("gspo", 1)],
)
def test_a_window_has_one_gradient_however_it_is_split(tmp_path, loss, staleness):
    policy = make_policy(model_folder(tmp_path), loss=loss, kl_coef=0.1, entropy_coef=0.1, staleness=staleness)
    assert policy.objective.importance_cap == (2.0 if staleness else None)
    groups = [random_group(seed) for seed in range(3)]
    found = []
    splits = [("packed", 10_000, 1), ("packed", 120, 1), ("packed", 120, 2), ("packed", 50, 3), ("plain", 10_000, 1)]
    for layout, limit, num_ranks in splits:
        batches = weigh(build_micro_batches(groups, values(groups), limit, layout, num_ranks), loss, max_length=40)
        ranks = split_over_ranks(batches, num_ranks)
        found.append(sum(gradients(policy, rank) for rank in ranks))
    assert found[0].abs().max() > 0
    for other in found[1:-1]:
        assert (other - found[0]).norm() / found[0].norm() < 2e-6  # float32 sums in another order
    assert (found[-1] - found[0]).norm() / found[0].norm() < 1e-5, "the plain layout has other kernels"


@pytest.mark.parametrize("sync", ["merged", "adapter"])
def test_the_reference_is_the_model_without_its_adapter(tmp_path, sync):
    path = model_folder(tmp_path)
    policy = make_policy(path, sync=sync, kl_coef=0.5)
    (batch,) = build_micro_batches([random_group(0)], values([random_group(0)]), 10_000, "packed")
    plain = make_policy(path, sync=sync)
    for parameter in plain.weights.parameters:
        parameter.data.zero_()
    assert torch.allclose(policy.reference_logprobs(batch), plain.logprobs(batch), atol=1e-6)
    assert not torch.allclose(policy.reference_logprobs(batch), policy.logprobs(batch), atol=1e-3)
    stats = [policy.step([batch], batch.num_tokens) for _ in range(3)]
    assert stats[0].reference_kl > stats[2].reference_kl > 0, "the KL term pulls the policy back"


@pytest.mark.slow  # two more processes import torch
def test_the_step_does_not_depend_on_ranks_or_splits(tmp_path):
    """1 rank x 3 micro-batches == 1 rank x many == 2 ranks (one of them padded), fp32."""
    path = model_folder(tmp_path)
    groups = [random_group(seed) for seed in range(3)]
    results = []
    for limit in (10_000, 50):
        policy = make_policy(path)
        batches = build_micro_batches(groups, values(groups), limit, "packed")
        stats = policy.step(batches, count_tokens(batches))
        results.append((stats.loss, stats.grad_norm, [parameter.detach() for parameter in policy.weights.parameters]))
    script, output = tmp_path / "rank.py", tmp_path / "two_ranks.pt"
    script.write_text(_RANK)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = Path(__file__).resolve().parent
    shared = {"ACCELERATE_USE_CPU": "true", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = []
    for rank in ("0", "1"):
        environment = {**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank, "PYTHONPATH": str(root.parent)}
        command = [sys.executable, str(script), str(path), str(root), str(output)]
        ranks.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        for process in ranks:
            _, errors = process.communicate(timeout=180)
            assert process.returncode == 0, errors
    finally:
        for process in ranks:
            process.kill()
    two = torch.load(output, weights_only=True)
    results.append((two["loss"], two["norm"], two["weights"]))
    loss, norm, weights = results[0]
    for other_loss, other_norm, other_weights in results[1:]:
        assert other_loss == pytest.approx(loss, rel=1e-5) and other_norm == pytest.approx(norm, rel=1e-5)
        for one, other in zip(weights, other_weights, strict=True):
            assert (one - other).abs().max() < 1e-4  # AdamW's first step divides small gradients by themselves


def forest() -> MicroBatch:
    """One row of three groups: two begin alike, the third does not; the first token of each is its root."""
    groups = [random_group(seed) for seed in (4, 5, 6)]
    for one, start in zip(groups, ([1, 2, 3], [1, 2, 4], [7]), strict=True):
        for rollout in one.rollouts:
            rollout.turns[0].input_ids[:0] = start
    (batch,) = build_micro_batches(groups, values(groups), 10_000, "packed")
    assert (batch.position_ids == 0).sum() >= 2
    return batch


def test_the_block_mask_for_gpus_says_what_the_dense_mask_says():
    """FlexAttention itself needs a GPU; the relation it is given does not."""
    batch = forest()
    position = torch.arange(batch.input_ids.shape[1])
    zero = torch.tensor(0)
    relation = block_mask(batch).mask_mod(zero, zero, position[:, None], position[None, :])
    assert torch.equal(relation, batch.attention_mask[0, 0])


@pytest.mark.parametrize("longest", [3, 256])
def test_chains_say_what_the_dense_mask_says(monkeypatch, longest):
    monkeypatch.setattr(attention, "_MAX_QUERIES", longest)
    batch = forest()
    chains, found = cut_chains(batch), torch.zeros_like(batch.attention_mask[0, 0])
    for spans, length in zip(chains.keys, chains.lengths, strict=True):
        keys = torch.cat([torch.arange(start, end) for start, end in spans])
        for index, query in enumerate(keys[-length:]):
            found[query, keys[: keys.numel() - length + index + 1]] = True
    assert max(chains.lengths) <= longest and sum(chains.lengths) == batch.num_row_tokens
    assert torch.equal(found, batch.attention_mask[0, 0])


def test_attention_keeps_what_the_row_has_however_it_branches(tmp_path):
    """The bytes kept for the backward pass follow from the row's tokens, not from the paths through it."""
    policy = make_policy(model_folder(tmp_path))
    kept = []
    for count, length in ((2, 32), (32, 2)):  # 40 tokens, and 64 below them
        one = group([[turn(list(range(40)), [index, *range(length)])] for index in range(count)])
        (batch,) = build_micro_batches([one], values([one]), 10_000, "packed")
        assert batch.num_row_tokens == 104
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.nbytes) or x, lambda x: x):
            causal_lm = policy.causal_lm
            causal_lm.model(batch.input_ids, position_ids=batch.position_ids, **attention_inputs(causal_lm, batch))
        kept.append(sum(sizes))
    assert kept[0] == kept[1] > 0


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_a_forest_computes_what_its_trees_compute(tmp_path, kind):
    policy, groups = make_policy(model_folder(tmp_path, kind)), [random_group(seed) for seed in range(4)]
    together = build_micro_batches(groups, values(groups), 10_000, "packed")
    dealt = build_micro_batches(groups, values(groups), 100, "packed", num_ranks=2)
    plain = build_micro_batches(groups, values(groups), 10_000, "plain")
    assert len(together) == 1 and len(dealt) % 2 == 0
    expected = gradients(policy, plain)
    for batches in (together, dealt):
        assert (policy._in_order(batches) - policy._in_order(plain)).abs().max() < 2e-5
        assert (gradients(policy, batches) - expected).norm() / expected.norm() < 1e-5
