"""Export: what a run trained, as a plain model folder: adapters merged into their base, or the whole model.

What transformers, vLLM or any other loader gets are the weights the run's engine sampled from: base and adapter are
added in fp32, or float32 masters taken, and rounded once to the run's dtype. The folder appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rft import checkpoints
from rft.errors import StorageError, UserError
from rft.metrics import best_steps
from rft.store import RunStore
from rft.threads import LOADING_A_MODEL

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
WHOLE_FILE = "model.safetensors"  # of a run without adapters
# everything beside the weights that a loader of the base model finds there
COPIED = (
    *("tokenizer*", "vocab*", "merges*", "special_tokens*", "added_tokens*", "*.model", "chat_template*", "*.jinja"),
    *("generation_config.json", "preprocessor_config.json", "*.py", "LICENSE*", "NOTICE*"),
)


def export(run_dir: Path, out_dir: Path, checkpoint: str = "last") -> Path:
    """Write the model of `checkpoint` ("last", "best", "12" or "step_000012") to `out_dir`, which must be new or empty.

    Raises UserError when there is no such run, checkpoint or base model, or when `out_dir` holds something.
    """
    store = RunStore.open(run_dir)
    folder = find_checkpoint(store, checkpoint)
    base, dtype = _base_of(store)
    out_dir = Path(os.path.abspath(out_dir))
    _check_free(out_dir)
    merge(base, folder, out_dir, dtype)
    return out_dir


def merge(base: Path, checkpoint: Path, out_dir: Path, dtype: str) -> None:
    """Write the model that a checkpoint's folder makes of `base` to `out_dir`, which must be new or empty."""
    with _whole(out_dir) as temporary:
        _model(base, checkpoint, dtype).save_pretrained(temporary)
        for pattern in COPIED:
            for path in base.glob(pattern):
                shutil.copyfile(path, temporary / path.name)


def find_checkpoint(store: RunStore, name: str) -> Path:
    """The folder of a complete checkpoint, of "best" the one with the best validation grade. Raises UserError."""
    if name == "best":
        name = str(_best_step(store))
    found = checkpoints.named(store.checkpoints, name)
    missing = [file for file in ADAPTER_FILES if not (found / file).is_file()]
    if missing and not (found / WHOLE_FILE).is_file():
        raise UserError(f"{', '.join(missing)} is missing", where=str(found), cure="choose another checkpoint")
    return found


def _best_step(store: RunStore) -> int:
    saved = [checkpoints.step_of(path) for path in checkpoints.complete(store.checkpoints)]
    best = best_steps(store.metrics(), 1, saved)
    if not best:
        cure = "choose `last`, or a step; data.validation and evaluation.every say what is evaluated when"
        raise UserError(
            "no checkpoint of this run was evaluated on a validation split", where=str(store.path), cure=cure
        )
    return best.pop()


def _base_of(store: RunStore) -> tuple[Path, str]:
    """The base model's folder and the dtype the run trained in."""
    model: dict[str, Any] = store.config().get("model", {})
    base = Path(str(model.get("path", "")))
    if not (base / "config.json").is_file():
        cure = "run from the folder in which the run was started, or put the model back"
        raise UserError("the base model is not there", where=f"{base} (model.path of the run)", cure=cure)
    return base, str(model.get("dtype", "bfloat16"))


def _check_free(out_dir: Path) -> None:
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise UserError("exists and is not empty", where=str(out_dir), cure="choose another folder, or remove it")


@contextlib.contextmanager
def _whole(out_dir: Path) -> Iterator[Path]:
    """A folder to fill beside `out_dir`, renamed to it when the block ends well and removed when it does not."""
    temporary = out_dir.with_name(f".{out_dir.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.rename(out_dir)
    except OSError as error:
        raise StorageError(f"{out_dir} cannot be written: {error}", cure="check space and rights there") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _model(base: Path, checkpoint: Path, dtype: str) -> Any:
    """What the engine of the run sampled from, in `dtype`."""
    import torch
    from transformers import AutoModelForCausalLM

    with LOADING_A_MODEL:
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, local_files_only=True)
    if (checkpoint / WHOLE_FILE).is_file():
        return _replaced(model, checkpoint / WHOLE_FILE)
    from peft import PeftModel

    # rounded to the run's dtype first: the adapter was trained on top of that
    merged = PeftModel.from_pretrained(model.float(), checkpoint, torch_device="cpu").merge_and_unload()
    return merged.to(getattr(torch, dtype))


def _replaced(model: Any, file: Path) -> Any:
    """`model` with all weights from `file`: masters in float32, which are rounded once. Tied weights are there once."""
    from safetensors.torch import load_file

    result = model.load_state_dict(load_file(file), strict=False)
    tied = getattr(model, "all_tied_weights_keys", {})
    odd = sorted({*result.missing_keys} - {*tied} | {*result.unexpected_keys})
    if odd:
        raise UserError(f"the weights do not fit the base model: {odd[0]}", where=str(file), cure="put the model back")
    model.tie_weights()
    return model
