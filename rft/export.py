"""Export: the adapter of a run merged into its base model, as a plain model folder.

What transformers, vLLM or any other loader gets are the weights the run's engine sampled from: base and adapter are
added in fp32 and rounded once to the run's dtype. The folder appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rft.errors import StorageError, UserError
from rft.store import RunStore

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
# everything beside the weights that a loader of the base model finds there
COPIED = (
    *("tokenizer*", "vocab*", "merges*", "special_tokens*", "added_tokens*", "*.model", "chat_template*", "*.jinja"),
    *("generation_config.json", "preprocessor_config.json", "*.py", "LICENSE*", "NOTICE*"),
)


def export(run_dir: Path, out_dir: Path, checkpoint: str = "last") -> Path:
    """Write the model of `checkpoint` ("last", "12" or "step_000012") to `out_dir`, which must be new or empty.

    Raises UserError when there is no such run, checkpoint or base model, or when `out_dir` holds something.
    """
    store = RunStore.open(run_dir)
    folder = find_checkpoint(store.checkpoints, checkpoint)
    base, dtype = _base_of(store)
    out_dir = Path(os.path.abspath(out_dir))
    _check_free(out_dir)
    with _whole(out_dir) as temporary:
        _merge(base, folder, dtype).save_pretrained(temporary)
        for pattern in COPIED:
            for path in base.glob(pattern):
                shutil.copyfile(path, temporary / path.name)
    return out_dir


def find_checkpoint(checkpoints: Path, name: str) -> Path:
    """The folder of a complete checkpoint (its MANIFEST is written last)."""
    complete = sorted(path.parent for path in checkpoints.glob("step_*/MANIFEST*"))
    wanted = f"step_{int(name):06d}" if name.isascii() and name.isdigit() else name
    found = complete[-1:] if name == "last" else [path for path in complete if path.name == wanted]
    if not found:
        names = ", ".join(path.name for path in complete) or "none yet"
        raise UserError(f"there is no checkpoint `{name}`", where=str(checkpoints), cure=f"choose one of: {names}")
    missing = [file for file in ADAPTER_FILES if not (found[0] / file).is_file()]
    if missing:
        raise UserError(f"{', '.join(missing)} is missing", where=str(found[0]), cure="choose another checkpoint")
    return found[0]


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


def _merge(base: Path, adapter: Path, dtype: str) -> Any:
    """The base model with the adapter added in fp32, rounded once to `dtype`."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, local_files_only=True)
    # rounded to the run's dtype first: the adapter was trained on top of that
    merged = PeftModel.from_pretrained(model.float(), adapter, torch_device="cpu").merge_and_unload()
    return merged.to(getattr(torch, dtype))
