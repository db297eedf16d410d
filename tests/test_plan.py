"""The planner: worked by hand, against what others publish, monotone, and its refusals name what then fits."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from published import FIGURES, GIB, LLAMA_8B, LLAMA_70B, Figure, a_setup
from test_house import HEAVY, python
from typer.testing import CliRunner

from rft.cli import app
from rft.config import load_config
from rft.errors import ConfigError, UserError
from rft.plan.changes import _GROWTH, _LEVERS, Change, smallest_change
from rft.plan.engine import cache_bytes, engine_memory
from rft.plan.hardware import GPUS, Cluster, parse_cluster
from rft.plan.memory import kept, trainer_memory
from rft.plan.numbers import Plan, make_plan
from rft.plan.presentation import cure_of
from rft.plan.setup import Lora, Setup, Workload, tensor_parallel
from rft.plan.shape import ModelShape, read_shape, shape_of
from rft.plan.speed import sampling_speed, training_speed, update_work
from rft.plan.split import Ask, best_outcome, fits, layouts, outcome_of

ROOT = Path(__file__).resolve().parent.parent
SMOL = ROOT / "models" / "smollm2-135m-instruct"
H100 = Cluster(GPUS["H100"], 8, 8)
QWEN3_30B: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_hidden_layers": 48,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
}
QWEN_72B = LLAMA_70B | {"model_type": "qwen2", "intermediate_size": 29568, "vocab_size": 152064}
QWEN_32B = (
    QWEN_72B | {"hidden_size": 5120, "intermediate_size": 27648, "num_attention_heads": 40} | {"num_hidden_layers": 64}
)
QWEN_14B = QWEN_32B | {"intermediate_size": 13824, "num_hidden_layers": 48}
DEEPSEEK_V3: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "num_hidden_layers": 61,
    "vocab_size": 129280,
}


# --- shapes ---


@pytest.mark.parametrize(
    ("tree", "published"),
    [
        (LLAMA_8B, 8_030_261_248),  # the numbers of each model's own card or report
        (LLAMA_70B, 70_553_706_496),
        (QWEN3_30B, 30_532_122_624),
        (DEEPSEEK_V3, 671_026_419_200),
        (
            {
                "model_type": "qwen2",
                "hidden_size": 3584,
                "intermediate_size": 18944,
                "num_attention_heads": 28,
                "num_key_value_heads": 4,
                "num_hidden_layers": 28,
                "vocab_size": 152064,
            },
            7_615_616_512,
        ),
        (
            {
                "model_type": "mixtral",
                "hidden_size": 4096,
                "intermediate_size": 14336,
                "num_local_experts": 8,
                "num_experts_per_tok": 2,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "num_hidden_layers": 32,
                "vocab_size": 32000,
            },
            46_702_792_704,
        ),
        (
            {
                "model_type": "gemma3",
                "text_config": {
                    "hidden_size": 1152,
                    "intermediate_size": 6912,
                    "num_attention_heads": 4,
                    "num_key_value_heads": 1,
                    "head_dim": 256,
                    "num_hidden_layers": 26,
                    "vocab_size": 262144,
                    "model_type": "gemma3_text",
                },
            },
            999_885_952,
        ),
        ({"model_type": "gpt2", "n_embd": 768, "n_head": 12, "n_layer": 12, "vocab_size": 50257}, 123_653_376),
    ],
)
def test_parameters_are_the_published_ones(tree: dict[str, Any], published: int) -> None:
    """GPT-2's learned positions (786,432) are no part of the shape, and biases are not."""
    assert shape_of(tree, name="model").parameters == pytest.approx(published, rel=2e-3)


def test_the_shapes_of_real_modules(tmp_path: Path) -> None:
    """Against transformers' own modules: parameters, and peft's adapters through rft's trainer."""
    if not SMOL.is_dir():
        pytest.skip("models/smollm2-135m-instruct is missing: run scripts/prepare_model")
    shape = read_shape(SMOL)
    assert (shape.parameters, shape.in_linears) == (134_515_008, 106_168_320)
    assert shape.adapters(16, None) == 4_884_480  # what peft says of all-linear
    assert shape.adapters(16, ("q_proj", "v_proj")) < shape.adapters(16, None)


def test_a_latent_cache_is_small_and_a_mixture_meets_a_part() -> None:
    shape = shape_of(DEEPSEEK_V3, name="v3")
    assert shape.cached == 61 * (512 + 64)
    active = shape.active + 2 * shape.embedding
    assert active == pytest.approx(37.5e9, rel=0.02)  # "37B activated", arXiv:2412.19437
    mixture = shape_of(QWEN3_30B, name="q")
    assert mixture.active + 2 * mixture.embedding == pytest.approx(3.3e9, rel=0.03)  # "3.3B activated", its card


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "4096"}, "hidden_size is '4096', not a positive whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads is '0'"),
        ({"num_hidden_layers": True}, "num_hidden_layers is 'True'"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1,000,000,000"),
        ({"num_key_value_heads": [8, 4]}, "num_key_value_heads is '[8, 4]'"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layers of kind linear_attention"),
        ({"is_encoder_decoder": True}, "an encoder and a decoder"),
        ({"num_experts": 8}, "num_experts_per_tok is missing"),
        ({"kv_lora_rank": 512}, "qk_rope_head_dim is missing"),
    ],
)
def test_a_config_it_does_not_know_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        shape_of(LLAMA_8B | change, name="model", where="m/config.json")
    assert named in str(caught.value) and "m/config.json" in str(caught.value) and "cure: " in str(caught.value)


@pytest.mark.parametrize("text", [None, "", "{", "[]", "3", '"x"', "\xff\xfe"])
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_shape(tmp_path)


# --- memory, by hand ---


def test_the_state_of_llama_8b_by_hand() -> None:
    """Numbers x bytes: LoRA keeps bfloat16 weights and 4 + 4 + 8 bytes an adapter; all weights 2 + 4 + 4 + 8."""
    parameters, adapters = 8_030_261_248, 41_943_040
    lora = trainer_memory(a_setup(LLAMA_8B), "single", 1)
    assert lora.weights == 2 * parameters + 4 * adapters
    assert (lora.gradients, lora.optimizer) == (4 * adapters, 8 * adapters)
    assert (lora.merged, lora.reference, lora.gathered) == (0, 0, 0)
    full = trainer_memory(a_setup(LLAMA_8B, lora=None), "single", 1)
    assert (full.weights, full.gradients, full.optimizer) == (2 * parameters, 4 * parameters, 12 * parameters)
    small = trainer_memory(a_setup(LLAMA_8B, lora=None, has_float_masters=False), "single", 1)
    assert (small.weights, small.gradients, small.optimizer) == (2 * parameters, 2 * parameters, 4 * parameters)
    sharded = trainer_memory(a_setup(LLAMA_8B, lora=None), "fsdp2", 8)
    assert sharded.weights + sharded.gradients + sharded.optimizer == 16 * parameters / 8
    layer = 4096 * (4096 + 4096 + 2 * 1024) + 3 * 4096 * 14336
    root = 2 * 128256 * 4096
    assert sharded.gathered == (root + 2 * layer) * 2 + (root + layer) * 6
    merged = trainer_memory(a_setup(LLAMA_8B, sync="merged"), "single", 1)
    assert merged.merged == 2 * 32 * layer
    zero = trainer_memory(a_setup(LLAMA_8B), "deepspeed", 8)
    assert zero.optimizer == 12 * adapters / 8 and zero.gradients == 4 * adapters / 8 + 4 * adapters


def test_the_activations_of_a_llama_layer_by_hand() -> None:
    """4,096 tokens in bfloat16 with LoRA: see the comments of `_kept_per_token`."""
    hidden, inner, key = 4096, 14336, 1024
    norms = 2 * hidden * 4 + 2 * hidden * 2
    attention = (hidden + key + key + hidden) * 2 + hidden * 2 + 4 * 32
    layer = norms + attention + 4 * inner * 2 + 7 * 16 * 2
    outside = 2 * 128 * 2 + hidden * (4 + 2 + 2 + 4)
    setup = a_setup(LLAMA_8B)
    assert kept(setup, 4096) == 4096 * (32 * layer + outside)
    again = replace(setup, has_checkpointing=True)
    assert kept(again, 4096) == 4096 * (32 * hidden * 2 + layer + outside)
    full = replace(setup, lora=None)  # norms keep what their weights multiply; no A x
    assert kept(full, 4096) == 4096 * (32 * (layer + 2 * hidden * 2 - 7 * 16 * 2) + outside)


def test_the_engine_of_llama_8b_by_hand() -> None:
    """128 KiB a token; an H100 at 0.9 keeps 71.19 GiB, of which weights take 14.96."""
    setup = a_setup(LLAMA_8B, max_model_len=8192)
    assert cache_bytes(setup) == 32 * 2 * 8 * 128 * 2 == 131072
    memory = engine_memory(setup, GPUS["H100"], 0.9)
    assert memory.cache_tokens == int(memory.cache // 131072)
    assert memory.total == pytest.approx(0.9 * 79.1 * GIB)
    assert memory.concurrency == 64 < memory.cache_tokens // setup.work.context
    assert cache_bytes(replace(setup, engine_args=("--tensor-parallel-size", "4"))) == 131072 / 4
    many = a_setup(LLAMA_8B, engine_args=("-tp=16",))
    assert cache_bytes(many) == 131072 / 8  # eight heads on sixteen GPUs: each on two


def test_the_work_of_an_update_by_hand() -> None:
    """FLOPs a weight and token: 6, 4 beside frozen ones, 8 with recomputation; the head by position."""
    shape = shape_of(LLAMA_8B, name="model")
    scores = 32 * 2 * 100 * (4096 + 4096)
    full = update_work(a_setup(shape, lora=None), 10, 0, 100)
    assert full.flops == pytest.approx(10 * (6 * shape.active + 3.5 * scores))
    lora = update_work(a_setup(shape), 10, 0, 100)
    assert lora.flops == pytest.approx(10 * (4 * shape.active + 3.5 * scores + 4 * 41_943_040))
    again = update_work(a_setup(shape, lora=None, has_checkpointing=True), 10, 0, 100)
    assert again.flops == pytest.approx(10 * (8 * shape.active + 4.5 * scores))
    head = update_work(a_setup(shape), 10, 3, 100).flops - lora.flops
    assert head == pytest.approx(3 * 4 * shape.embedding)


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.what)
def test_published_figures(figure: Figure) -> None:
    assert figure.plan() == pytest.approx(figure.published, rel=figure.bound)


# --- random shapes ---


def a_shape(draw: random.Random) -> ModelShape:
    heads = draw.choice([8, 16, 32, 64])
    tree = LLAMA_8B | {
        "hidden_size": 128 * heads,
        "intermediate_size": draw.choice([2, 3, 4]) * 128 * heads,
        "num_attention_heads": heads,
        "num_key_value_heads": draw.choice([1, heads // 4, heads]),
        "num_hidden_layers": draw.choice([4, 24, 48, 80]),
        "vocab_size": draw.choice([32000, 128256, 262144]),
        "tie_word_embeddings": draw.random() < 0.5,
    }
    if draw.random() < 0.3:
        experts = draw.choice([8, 64])
        tree |= {"num_experts": experts, "num_experts_per_tok": draw.choice([1, 2, 8]), "moe_intermediate_size": 1024}
    return shape_of(tree, name="random")


def random_setup(draw: random.Random) -> Setup:
    is_full = draw.random() < 0.4
    lora = None if is_full else Lora(draw.choice([8, 64]), draw.choice([None, ("q_proj", "v_proj")]))
    return a_setup(
        a_shape(draw),
        lora=lora,
        sync=draw.choice(["auto", "reload", "transfer"] if is_full else ["auto", "merged", "adapter"]),
        value_bytes=draw.choice([2, 4]),
        has_checkpointing=draw.random() < 0.3,
        max_tokens=draw.choice([2048, 16384, 65536]),
        max_model_len=draw.choice([2048, 8192, 32768]),
        has_float_masters=draw.random() < 0.7,
        gpu_memory_share=draw.choice([0.3, 0.45, 0.8]),
        staleness=draw.choice([0, 1]),
    )


def random_ask(draw: random.Random) -> Ask:
    gpu = GPUS[draw.choice(list(GPUS))]
    count = draw.choice([1, 2, 8, 16])
    trainers = draw.choice([None, None, max(1, count // 2)])
    launch = draw.choice([None, None, "ddp"]) if (trainers or count) > 1 else None
    return Ask(random_setup(draw), Cluster(gpu, count, 8), trainers, launch)


@pytest.mark.parametrize("seed", range(20))
def test_memory_is_monotone(seed: int) -> None:
    """More tokens, a longer sequence: more memory. Recomputation, shards: less. Every part is positive."""
    draw = random.Random(seed)
    setup = random_setup(draw)
    totals = [trainer_memory(replace(setup, max_tokens=n, max_model_len=16), "ddp", 8).total for n in (512, 4096, 8192)]
    assert totals == sorted(set(totals))
    longer = replace(setup, max_model_len=2 * setup.row_tokens)
    assert trainer_memory(longer, "ddp", 8).total > trainer_memory(setup, "ddp", 8).total
    plain, again = (replace(setup, has_checkpointing=value) for value in (False, True))
    assert kept(again, 4096) < kept(plain, 4096)
    shards = [trainer_memory(setup, "fsdp2", ranks).total for ranks in (2, 4, 16, 64)]
    assert shards == sorted(shards, reverse=True)
    assert all(trainer_memory(setup, "ddp", 8).__getattribute__(name) >= 0 for name in ("gradients", "activations"))
    caches = [engine_memory(replace(setup, max_concurrent=n), H100.gpu, 0.9).cache for n in (1, 64, 512)]
    assert caches == sorted(caches, reverse=True)


@pytest.mark.parametrize("seed", range(20))
def test_speed_is_monotone(seed: int) -> None:
    draw = random.Random(seed)
    setup = random_setup(draw)
    times = [training_speed(setup, "ddp", ranks, H100).seconds for ranks in (2, 4, 8)]
    assert times[0] > times[2] or training_speed(setup, "ddp", 8, H100).limit == "link"
    memory = engine_memory(replace(setup, value_bytes=2), GPUS["H200"], 0.9)
    if memory.concurrency > 0:
        seconds = [sampling_speed(setup, memory, count, GPUS["H200"]).seconds for count in (1, 2, 4)]
        assert seconds == sorted(seconds, reverse=True)
        longer = replace(setup, work=replace(setup.work, sampled=2 * setup.work.sampled))
        assert sampling_speed(longer, memory, 1, GPUS["H200"]).seconds > seconds[0]


@pytest.mark.parametrize("seed", range(60))
def test_a_refusal_names_a_change_that_fits(seed: int) -> None:
    """And `fits`, which looks at the ends alone, says what looking at every layout says."""
    ask = random_ask(random.Random(seed))
    assert fits(ask) == any(outcome_of(ask, layout).fits for layout in layouts(ask))
    if fits(ask):
        return
    found = smallest_change(ask)
    if found is None:
        grown = replace(ask, cluster=replace(ask.cluster, num_gpus=1024), trainer_gpus=None, launch=None)
        assert not fits(grown), "more GPUs would do"
        return
    change, changed = found
    assert change.overrides or change.flags
    outcome = best_outcome(changed)
    assert outcome is not None and outcome.fits and fits(changed)


def test_the_smallest_change_is_the_cheapest_that_fits() -> None:
    """No cheaper one or two levers fit, whatever they are set to."""
    refused = [ask for ask in map(random_ask, map(random.Random, range(40))) if not fits(ask)]
    assert len(refused) > 8
    for ask in refused[:12]:
        found = smallest_change(ask)
        levers = [(lever, value, lever.cost) for lever in _LEVERS for value in lever.values(ask)]
        levers += [(_GROWTH, size, 20 + 4 * power) for power, size in enumerate(_GROWTH.values(ask), 1)]
        spent = 200 if found is None else sum(cost_of(ask, found[0], lever) for lever in (*_LEVERS, _GROWTH))
        for chosen in itertools.chain(itertools.combinations(levers, 1), itertools.combinations(levers, 2)):
            if sum(cost for _, _, cost in chosen) < spent and len({lever.cost for lever, _, _ in chosen}) == len(
                chosen
            ):
                tried = ask
                for lever, value, _ in chosen:
                    tried = lever.apply(tried, value)
                assert not fits(tried), (found, chosen)


def cost_of(ask: Ask, change: Change, lever: Any) -> int:
    """What a lever adds to a change; nothing where it has no part in it."""
    words = {*change.overrides, *change.flags}
    for place, value in enumerate(lever.values(ask), 1):
        told = lever.told(ask, value)
        if {*told.overrides, *told.flags} <= words:
            return int(lever.cost + (4 * place if lever is _GROWTH else 0))
    return 0


def test_an_engine_gets_as_many_gpus_as_the_split_has() -> None:
    """Twelve of sixteen train: four are left for an engine, eight would leave it no place."""
    ask = Ask(
        a_setup(QWEN_72B, max_model_len=8192, has_checkpointing=True), Cluster(GPUS["H100"], 16, 8), trainer_gpus=12
    )
    found = smallest_change(ask)
    assert found is not None and found[0].overrides == ('engine.args=["--tensor-parallel-size", "4"]',)


def test_one_gpu_grows_into_a_cluster() -> None:
    """All of a 70B model on one GPU: more of them, and some of these for one engine together."""
    ask = Ask(a_setup(LLAMA_70B, lora=None), Cluster(GPUS["H100"], 1, 8))
    found = smallest_change(ask)
    assert found is not None and fits(found[1])
    assert any("--tensor-parallel-size" in text for text in found[0].overrides)
    assert found[0].flags == (f"--gpus {found[1].cluster}",) and found[1].cluster.num_gpus >= 16


# --- splits ---


def test_overlapping_sampling_and_training_are_balanced() -> None:
    """With staleness the slower side decides: no other split of the GPUs has a shorter one."""
    ask = Ask(a_setup(LLAMA_8B, staleness=1, max_tokens=8192), H100)
    best = best_outcome(ask)
    assert best is not None and best.fits and 1 < best.layout.num_trainers + best.layout.num_engines == 8
    slowest = [
        max(outcome.training.seconds, outcome.sampling.seconds)
        for outcome in (outcome_of(ask, layout) for layout in layouts(ask))
        if outcome.fits
    ]
    assert best.step_s == pytest.approx(min(slowest))
    taking_turns = best_outcome(Ask(replace(ask.setup, staleness=0), H100))
    assert taking_turns is not None and taking_turns.step_s > best.step_s


def test_long_rollouts_are_limited_by_the_cache() -> None:
    work = Workload(items=64, rollouts_per_item=8, prompt=16_000, sampled=16_000, results=0)
    setup = a_setup(LLAMA_8B, work=work, max_model_len=32_768, max_concurrent=256)
    memory = engine_memory(setup, GPUS["H100"], 0.9)
    found = sampling_speed(setup, memory, 4, GPUS["H100"])
    assert found.limit == "KV memory" and found.concurrency == memory.concurrency < 128


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8x80", ("H100", 8, 8)),
        ("8xH100", ("H100", 8, 8)),
        ("h200", ("H200", 1, 8)),
        ("2x8x80", ("H100", 16, 8)),
        ("4xrtx4090", ("RTX4090", 4, 8)),
        (" 1x40 ", ("A100-40", 1, 8)),
    ],
)
def test_clusters(text: str, expected: tuple[str, int, int]) -> None:
    found = parse_cluster(text)
    assert (found.gpu.name, found.num_gpus, found.gpus_per_node) == expected


@pytest.mark.parametrize(
    "text",
    ["", "8x", "x80", "0x80", "00x80", "2x0x80", "٨x80", "8x81", "8xTPU", "-1x80", "99999x80", "8 80", "8x80\n; rm"],
)
def test_what_is_no_cluster_is_refused_with_what_there_is(text: str) -> None:
    with pytest.raises(UserError, match="8xH100") as caught:
        parse_cluster(text)
    assert caught.value.where == "--gpus"


def test_tensor_parallel_is_read_from_the_flags() -> None:
    assert tensor_parallel(["--x", "1"]) == 1 == tensor_parallel([])
    assert tensor_parallel(["--tensor-parallel-size", "4"]) == 4 == tensor_parallel(["-tp=4"])
    with pytest.raises(UserError, match=r"engine\.args"):
        tensor_parallel(["--tensor-parallel-size"])


# --- the command ---


def a_model(path: Path, tree: dict[str, Any] = LLAMA_8B) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(tree))
    return path


def written(folder: Path, **sections: Any) -> Path:
    """A config without any of the files it names."""
    tree: dict[str, Any] = {
        "model": {"path": str(folder / "nowhere")},
        "data": {"train": str(folder / "train.jsonl")},
        "environment": {"type": "http", "tools": [{"name": "search", "server_url": "http://127.0.0.1:9/search"}]},
        "grader": {"type": "string_check", "name": "g", "input": "a", "reference": "a", "operation": "eq"},
        "training": {"steps": 2},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree | sections))
    return path


def plan_of(*arguments: str) -> Any:
    """`rft plan` in this process."""
    return CliRunner().invoke(app, ["plan", *arguments])


def test_the_json_is_stable(tmp_path: Path) -> None:
    """Two runs say the same, one of them a process, and the keys are those that others read."""
    config, model = written(tmp_path), a_model(tmp_path / "llama")
    arguments = [str(config), "--gpus", "8x80", "--model", str(model), "--json"]
    command = [sys.executable, "-m", "rft", "plan", *arguments]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert process.returncode == 0, process.stderr
    assert process.stdout == plan_of(*arguments).stdout
    found = json.loads(process.stdout)
    assert Plan.model_validate(found).fits and found["change"] is None
    facts = {"cluster", "gpu_memory_gib", "fits", "model", "rollouts_per_step", "assumptions"}
    assert set(found) == facts | {"split", "trainer", "engine", "step_s", "problems", "change"}
    assert found["model"]["parameters"] == 8_030_261_248
    assert sum(found["trainer"]["parts_gib"].values()) == pytest.approx(found["trainer"]["total_gib"], abs=0.1)


def test_a_refusal_is_one_message_whose_overrides_fit(tmp_path: Path) -> None:
    """The command it names is run as it stands."""
    config, model = written(tmp_path), a_model(tmp_path / "llama", LLAMA_70B)
    full = [
        "model.lora=null",
        "training.sync=auto",
        "training.max_tokens_per_micro_batch=65536",
        "model.dtype=bfloat16",
    ]
    plan = make_plan(load_config(config, full), "8x80", model=model)
    assert not plan.fits and plan.problems and plan.change is not None
    text = cure_of(plan)
    assert all(word in text for word in plan.change.overrides)
    flags = dict(word.split(" ", 1) for word in plan.change.flags)
    gpus = flags.get("--gpus", "8x80")
    assert make_plan(load_config(config, [*full, *plan.change.overrides]), gpus, model=model).fits
    result = plan_of(str(config), *full, "--gpus", "8x80", "--model", str(model))
    assert isinstance(result.exception, UserError) and result.exception.exit_code == 2
    assert plan.problems[0] in str(result.exception) and "the smallest change that fits" in str(result.exception)
    asked = json.loads(plan_of(str(config), *full, "--gpus", "8x80", "--model", str(model), "--json").stdout)
    assert asked["fits"] is False and asked["change"]["overrides"] == plan.change.overrides


def test_the_table_says_split_speed_limits_and_assumptions(tmp_path: Path) -> None:
    config, model = written(tmp_path), a_model(tmp_path / "llama")
    result = plan_of(str(config), "--gpus", "8xH100", "--model", str(model))
    assert result.exit_code == 0
    for words in ("8.03B parameters", "8xH100", "trainer: weights", "engine: KV cache", "split: ", "limited by",
                  "assumed: a prompt has"):  # fmt: skip
        assert words in result.stdout


def test_what_is_given_is_not_assumed(tmp_path: Path) -> None:
    config, model = load_config(written(tmp_path)), a_model(tmp_path / "llama")
    plan = make_plan(config, "8x80", model=model, tokens={"prompt": 10, "sampled": 10, "results": 0})
    assert plan.assumptions == []


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--gpus", "8x81"], "--gpus: '8x81' names no GPUs"),
        (["--gpus", "2x80", "--trainer-gpus", "3"], "--trainer-gpus: 3 of 2 GPUs"),
        (["--model", "nowhere"], "--model: nowhere: no config.json can be read"),
        (
            ["--launch", "deepspeed", "model.lora=null", "training.sync=auto", "model.dtype=bfloat16"],
            "--launch deepspeed",
        ),
    ],
)
def test_mistakes_are_named(tmp_path: Path, arguments: list[str], named: str) -> None:
    model = ["--model", str(a_model(tmp_path / "llama"))] if "--model" not in arguments else []
    error = plan_of(str(written(tmp_path)), *model, *arguments).exception
    assert isinstance(error, UserError) and named in str(error) and "cure: " in str(error)


def test_planning_loads_nothing_heavy() -> None:
    code = (
        f"import sys, rft.plan.numbers, rft.plan.presentation; print(*sorted(set({HEAVY.split()}) & set(sys.modules)))"
    )
    result = python(code)
    assert result.returncode == 0 and result.stdout.split() == [], result.stderr


ALL_WEIGHTS = ["model.lora=null", "training.sync=reload"]
TWO_GPUS = ["engine.args=[-tp, '2']", "engine.num_servers=4", "engine.devices=['0,1', '2,3', '4,5', '6,7']"]


@pytest.mark.parametrize(
    ("name", "gpus", "trainers", "tree", "overrides", "launch"),
    [
        ("eight", "8x80", 6, QWEN_14B, [], "ddp"),
        ("eight", "8x80", 6, QWEN_14B, ALL_WEIGHTS, "fsdp2"),
        (
            "eight",
            "8x80",
            6,
            QWEN_32B,
            ["engine.args=[-tp, '2']", "engine.num_servers=1", "engine.devices=['6,7']"],
            "ddp",
        ),
        ("eight_in_turn", "8x80", 8, QWEN_14B, [], "ddp"),
        ("eight_in_turn", "8x80", 8, QWEN_14B, [*ALL_WEIGHTS, *TWO_GPUS, "engine.gpu_memory_share=0.42"], "fsdp2"),
        ("eight_in_turn", "8x80", 8, QWEN_32B, [*TWO_GPUS, "engine.gpu_memory_share=0.7"], "fsdp2"),
        ("two_nodes", "2x8x80", 8, QWEN_32B, [], "ddp"),
        ("two_nodes", "2x8x80", 8, QWEN_14B, ALL_WEIGHTS, "fsdp2"),
        ("two_nodes", "2x8x80", 12, QWEN_32B, ALL_WEIGHTS, "fsdp2"),
        ("two_nodes", "2x8x80", 8, QWEN_72B, ["engine.args=[-tp, '4']"], "fsdp2"),
    ],
)
def test_the_cluster_configs_hold_what_they_say(
    tmp_path: Path, name: str, gpus: str, trainers: int, tree: dict[str, Any], overrides: list[str], launch: str
) -> None:
    config = load_config(ROOT / "configs" / "cluster" / f"{name}.yaml", overrides)
    if not (ROOT / config.data.train).exists():
        pytest.skip(f"{config.data.train} is missing: run scripts/prepare_icd10")
    plan = make_plan(config, gpus, model=a_model(tmp_path / "model", tree), trainer_gpus=trainers)
    assert plan.fits and plan.split is not None and plan.engine is not None, plan.problems
    assert plan.split.launch == launch and plan.split.engines * plan.engine.concurrency > 150


# --- measured ---


@pytest.mark.slow
def test_measured_memory_is_the_planned_one() -> None:
    """One row of scripts/bench_plan on the real model; time is not held, other tests run beside this one."""
    if not SMOL.is_dir():
        pytest.skip("models/smollm2-135m-instruct is missing: run scripts/prepare_model")
    command = [sys.executable, str(ROOT / "scripts" / "bench_plan"), "--only", "lora", "--tokens", "256", "--json"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    (row,) = json.loads(result.stdout.splitlines()[-1])["rows"]
    assert row["memory_ratio"] == pytest.approx(1, abs=0.15)
    assert row["planned_model_mb"] == pytest.approx(row["model_mb"], rel=0.15)
