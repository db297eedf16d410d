"""What a job looks at before anything heavy: its rows, its prompts, its run folder. Every complaint names the cure."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

from rft import checkpoints
from rft.chat import Chat
from rft.config import RunConfig, validate_config
from rft.data import load_items, overlap
from rft.envs import discover_tools
from rft.errors import UserError
from rft.files import read_json
from rft.store import RunStore
from rft.types import Item, Split

# What a resumed run may change: where and how long it runs, never what it optimises.
_MAY_CHANGE_ON_RESUME = {
    "engine",
    "runs_dir",
    "evaluation",
    "rollout.stall_limit_s",
    "warmup",
    "trackers",
    "training.steps",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.keep_best",
}
_SHAPE = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")  # of a model's config.json


def load_splits(config: RunConfig) -> dict[Split, list[Item]]:
    """Every split that the config names, cut to the size the evaluation asks for. Raises DataError."""
    tool_specs = asyncio.run(discover_tools(config.environment))
    splits: dict[Split, list[Item]] = {"train": load_items(config.data.train, tool_specs)}
    if config.data.validation is not None:
        splits["validation"] = load_items(config.data.validation, tool_specs)[: config.evaluation.validation_items]
        shared = overlap(splits["train"], splits["validation"])
        if shared:
            logging.getLogger("rft").warning("%d validation rows are also in the training file", shared)
    if config.data.test is not None:
        splits["test"] = load_items(config.data.test, tool_specs)[: config.evaluation.test_items]
    return splits


def check_fits(config: RunConfig, chat: Chat, items: dict[Split, list[Item]]) -> None:
    """Every prompt must leave room for one turn inside the engine's context."""
    room = config.engine.max_model_len - config.rollout.max_tokens_per_turn
    for split in items.values():
        for item in split:
            length = len(chat.first_prompt(item))
            if length > room:
                raise UserError(
                    f"the prompt has {length} tokens; engine.max_model_len leaves room for {room}",
                    where=item.id,
                    cure="raise engine.max_model_len or shorten the row",
                )


def open_store(config: RunConfig, run_id: str | None, resume: bool, checkpoint: str | None = None) -> RunStore:
    """A new run's folder, or one to continue, with an intact checkpoint, `checkpoint` where it is given, as its newest.

    Raises UserError, or StorageError that names a corrupt checkpoint.
    """
    if not resume:
        if checkpoint is not None:
            cure = "add --resume, or start from another run's weights with --init-from"
            raise UserError("says where a resumed run goes on", where="--checkpoint", cure=cure)
        check_start(config)
        return RunStore.create(config.runs_dir, run_id or _next_id(config), config.model_dump(mode="json"))
    path = config.runs_dir / run_id if run_id else _newest_unfinished(config)
    store = RunStore.open(path)
    _check_same(_stored_config(store), config.model_dump(mode="json"))
    _check_checkpoints(config, store, checkpoint)
    store.lock()
    store.withdraw_pause()
    return store


def check_start(config: RunConfig) -> None:
    """The weights that a run starts from: they are there, intact, and of a model like this one."""
    if config.model.init_from is None:
        return
    source = checkpoints.find(config.model.init_from)
    checkpoints.verify(source, "--init-from {path}")
    stored = source.parent.parent / "config.json"
    model = read_json(stored).get("model", {}) if stored.is_file() else {}
    theirs = Path(str(model.get("path", ""))) / "config.json"
    ours = config.model.path / "config.json"
    if not (theirs.is_file() and ours.is_file()):
        return  # the weights themselves are compared when they are loaded
    shapes = read_json(theirs), read_json(ours)
    for key in _SHAPE:
        old, new = (shape.get(key) for shape in shapes)
        if old != new:
            raise UserError(
                f"{source} was trained on {theirs.parent}, whose {key} is {old}; that of {ours.parent} is {new}",
                where="model.init_from",
                cure="set model.path to the model of that run",
            )


def _check_checkpoints(config: RunConfig, store: RunStore, name: str | None) -> None:
    """The checkpoint to go on from is intact and the newest; without one, what the run started from still is."""
    for path in checkpoints.incomplete(store.checkpoints):
        logging.getLogger("rft").warning("checkpoint %s is incomplete (it has no MANIFEST) and is ignored", path)
    chosen = checkpoints.latest(store.checkpoints) if name is None else checkpoints.named(store.checkpoints, name)
    if chosen is None:
        check_start(config)
        return
    checkpoints.verify(chosen)
    if name is not None:
        store.lock()
        checkpoints.supersede_after(chosen)


def _stored_config(store: RunStore) -> dict[str, Any]:
    """The run's config, with the defaults of what its version of rft did not have yet."""
    where = str(store.path / "config.json")
    return validate_config(store.config(), where).model_dump(mode="json")


def _next_id(config: RunConfig) -> str:
    numbers = [int(path.name[-3:]) for path in config.runs_dir.glob(f"{config.name}-[0-9][0-9][0-9]")]
    return f"{config.name}-{max(numbers, default=0) + 1:03d}"


def _newest_unfinished(config: RunConfig) -> Path:
    runs = sorted(config.runs_dir.glob(f"{config.name}-[0-9][0-9][0-9]"))
    unfinished = [path for path in runs if not (path / "DONE").exists()]
    if not unfinished:
        raise UserError(
            f"no unfinished run named {config.name}",
            where=str(config.runs_dir),
            cure="leave out --resume to start one, or name a run with --run-id",
        )
    return unfinished[-1]


def _check_same(stored: dict[str, Any], asked: dict[str, Any], prefix: str = "") -> None:
    """Refuse to continue a run under another objective. Raises UserError naming the first field that differs."""
    for key in sorted(stored.keys() | asked.keys()):
        path = f"{prefix}{key}"
        old, new = stored.get(key), asked.get(key)
        if path in _MAY_CHANGE_ON_RESUME or old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            _check_same(old, new, f"{path}.")
            continue
        raise UserError(
            f"the run was started with {old!r}, the config now says {new!r}",
            where=path,
            cure="resume with the config of the run (config.json in its folder), or start a new run",
        )
