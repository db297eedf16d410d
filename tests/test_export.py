"""Export: the merged folder is base + adapter, loads without rft and peft, and appears whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as Tokenizer

from rft.errors import StorageError, UserError
from rft.export import export
from rft.store import RunStore

PROMPT = torch.tensor([[5, 6, 7, 8, 9]])


def save_base(folder: Path, dtype: torch.dtype) -> Path:
    from tokenizers import Tokenizer as Core
    from tokenizers.models import WordLevel

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype)
    model.generation_config.temperature, model.generation_config.do_sample = 0.7, True
    model.save_pretrained(folder)
    tokenizer = Tokenizer(tokenizer_object=Core(WordLevel({f"w{index}": index for index in range(64)}, "w0")))
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(folder)
    return folder


def save_adapter(base: Path, folder: Path, seed: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    policy = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    torch.manual_seed(seed)
    for name, parameter in policy.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.2)
    policy.save_pretrained(folder)
    (folder / "MANIFEST").write_text("{}")


def make_run(tmp_path: Path, dtype: str = "float32") -> tuple[Path, Path]:
    base = save_base(tmp_path / "base", getattr(torch, dtype))
    store = RunStore.create(tmp_path / "runs", "run-001", {"model": {"path": str(base), "dtype": dtype}})
    for step in (4, 8):
        save_adapter(base, store.checkpoints / f"step_{step:06d}", step)
    store.close()
    return store.path, base


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(PROMPT).logits.float()  # [1, 5, 64] float32


@pytest.mark.parametrize(("checkpoint", "step"), [("last", 8), ("4", 4), ("step_000004", 4)])
def test_exported_model_is_base_plus_adapter(tmp_path: Path, checkpoint: str, step: int) -> None:
    run, base = make_run(tmp_path)
    out = export(run, tmp_path / "out" / "model", checkpoint)
    exported = AutoModelForCausalLM.from_pretrained(out)
    bare = AutoModelForCausalLM.from_pretrained(base)
    assert type(exported) is LlamaForCausalLM
    assert not torch.allclose(logits(exported), logits(bare), atol=1e-2)
    adapted = PeftModel.from_pretrained(bare, run / "checkpoints" / f"step_{step:06d}")
    torch.testing.assert_close(logits(exported), logits(adapted), atol=1e-4, rtol=1e-4)


def test_weights_are_rounded_once(tmp_path: Path) -> None:
    """In bf16: round(W + s B A), with the sum in fp32 (s = alpha / r = 2), and nothing else changes."""
    run, base = make_run(tmp_path, "bfloat16")
    old = load_file(base / "model.safetensors")
    new = load_file(export(run, tmp_path / "out") / "model.safetensors")
    lora = load_file(run / "checkpoints" / "step_000008" / "adapter_model.safetensors")
    assert old.keys() == new.keys()
    for name, weight in new.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        expected = old[name]
        if f"{module}.lora_A.weight" in lora:
            delta = lora[f"{module}.lora_B.weight"].float() @ lora[f"{module}.lora_A.weight"].float()
            expected = (old[name].float() + 2 * delta).bfloat16()
        assert weight.dtype == torch.bfloat16
        torch.testing.assert_close(weight, expected, atol=0, rtol=2**-8)
        assert (weight == expected).float().mean() > 0.99, "another order of sums may move single roundings"


def test_tokenizer_and_generation_settings_come_along(tmp_path: Path) -> None:
    run, base = make_run(tmp_path)
    out = export(run, tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "w3"}], tokenize=False) == "w3"
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    assert not list(out.glob("adapter*"))


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years")
    with pytest.raises(UserError, match="not empty"):
        export(run, out)
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    (out / "thesis.txt").unlink()
    export(run, out)
    assert (out / "model.safetensors").exists()


def test_a_failed_export_leaves_nothing(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path)
    (run / "checkpoints" / "step_000008" / "adapter_model.safetensors").write_bytes(b"cut off")
    with pytest.raises(SafetensorError):
        export(run, tmp_path / "place" / "out")
    assert list((tmp_path / "place").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        export(run, tmp_path / "file" / "out", "4")


def test_only_complete_checkpoints_count(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path)
    (run / "checkpoints" / "step_000008" / "MANIFEST").unlink()
    with pytest.raises(UserError, match="step_000004"):
        export(run, tmp_path / "out", "8")
    (run / "checkpoints" / "step_000004" / "adapter_config.json").unlink()
    with pytest.raises(UserError, match=r"adapter_config\.json is missing"):
        export(run, tmp_path / "out")


def test_a_base_model_that_went_away(tmp_path: Path) -> None:
    run, base = make_run(tmp_path)
    base.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="base model is not there"):
        export(run, tmp_path / "out")
