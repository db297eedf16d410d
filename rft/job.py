"""One job: check everything cheap first, start what the run needs, train, report; whatever was started is stopped.

States in state.json: starting -> running -> succeeded | failed | cancelled. A job that did not succeed can be
continued with `resume`: it goes on after its last checkpoint.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils.logging import disable_progress_bar

from rft.assembly import build_parts, load_policy, start_parts
from rft.chat import Chat
from rft.collect import Collector
from rft.config import RunConfig
from rft.data import load_items, overlap
from rft.envs import discover_tools
from rft.errors import RftError, UserError
from rft.progress import Display
from rft.report import final_table, write_report
from rft.rollout import Workshop
from rft.store import RunStore
from rft.types import Item, Split
from rft.watch import Watchdog

if TYPE_CHECKING:
    from accelerate import Accelerator

    from rft.trainers.policy import Policy

# What a resumed run may change: where and how long it runs, never what it optimises.
_MAY_CHANGE_ON_RESUME = {
    "engine",
    "runs_dir",
    "evaluation",
    "rollout.stall_limit_s",
    "training.steps",
    "training.checkpoint_every",
    "training.keep_checkpoints",
}


def run_job(config: RunConfig, *, run_id: str | None = None, resume: bool = False) -> Path:
    """Train from `config` (or continue a run) and return the run folder. Raises RftError with one clear message."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    disable_progress_bar()  # transformers' own bars would break ours
    is_leader = int(os.environ.get("RANK", "0")) == 0
    items = _load_splits(config)
    chat = Chat.from_folder(config.model.path)
    _check_fits(config, chat, items)
    if not is_leader:
        _follow(config)
        return config.runs_dir
    with Display() as display:
        store = _open_store(config, run_id, resume)
        display.line(f"run folder: {store.path}")
        watchdog = Watchdog(loop := asyncio.Runner(), store, lambda: display.label)
        with store, _recorded(store), loop, watchdog:
            stack = AsyncExitStack()
            try:
                _lead(config, store, display, items, chat, watchdog, stack)
            finally:
                loop.run(stack.aclose())
        display.show(final_table(write_report(store)))
        store.mark_done()
        display.line(f"report: {store.path / 'report.json'} and report.png")
    return store.path


def _load_splits(config: RunConfig) -> dict[Split, list[Item]]:
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


def _check_fits(config: RunConfig, chat: Chat, items: dict[Split, list[Item]]) -> None:
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


def _open_store(config: RunConfig, run_id: str | None, resume: bool) -> RunStore:
    if not resume:
        return RunStore.create(config.runs_dir, run_id or _next_id(config), config.model_dump(mode="json"))
    path = config.runs_dir / run_id if run_id else _newest_unfinished(config)
    store = RunStore.open(path)
    _check_same(store.config(), config.model_dump(mode="json"))
    return store


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


@contextmanager
def _recorded(store: RunStore) -> Iterator[None]:
    """Write how the job ends into its folder, whatever way it ends."""
    store.write_state({"status": "starting"})
    try:
        yield
    except KeyboardInterrupt:
        _end(store, "cancelled", "interrupted")
        raise
    except RftError as error:
        _end(store, "failed", str(error))
        raise
    except BaseException as error:  # a bug: recorded, then shown with its traceback
        _end(store, "failed", f"{type(error).__name__}: {error}")
        raise
    _end(store, "succeeded", "")


def _end(store: RunStore, status: str, error: str) -> None:
    store.append_event("error" if status == "failed" else "info", f"job {status}", {"error": error} if error else None)
    store.write_state({**store.read_state(), "status": status, "error": error or None})


def _lead(
    config: RunConfig,
    store: RunStore,
    display: Display,
    items: dict[Split, list[Item]],
    chat: Chat,
    watchdog: Watchdog,
    stack: AsyncExitStack,
) -> None:
    from rft.trainers.grpo import Leader, train
    from rft.trainers.sync import Sync

    def note(text: str) -> None:
        store.append_event("info", text)
        display.line(text)

    with display.phase("checking tools and graders", keep=False):
        parts = watchdog.run(build_parts(config, store, stack, note))
    with display.phase("starting the engine and loading the model") as phase:
        accelerator, policy = watchdog.run(start_parts(config, parts, store, stack, phase.status))
    watchdog.attach(parts.engine, parts.environment.outages if parts.environment else None, config.stall_limit_s)
    workshop = Workshop(
        parts.engine,
        chat,
        parts.environment,
        parts.grader,
        parts.shadow_graders,
        config.rollout,
        config.engine.max_model_len,
        watchdog.waits,
    )
    leader = Leader(
        loop=watchdog,
        engine=parts.engine,
        collector=Collector(workshop, store.path.name, config.seed, store.append_rollout),
        sync=Sync(config.training.sync, store.weights, config.model.path, accelerator.device.type, config.model.dtype),
        store=store,
        display=display,
        items=items,
        first_prompt=chat.first_prompt,
    )
    step = _restore(_latest_checkpoint(store.checkpoints, accelerator), policy)
    store.rewind(step)
    if step:
        display.line(f"continuing after step {step}")
    train(config, policy, accelerator, leader, step + 1)
    leader.sync.clear()


def _latest_checkpoint(folder: Path | None, accelerator: Accelerator) -> Path | None:
    """The checkpoint to continue from, as rank 0 sees it; `folder` is None on the other ranks."""
    from accelerate.utils import broadcast_object_list

    from rft.trainers import checkpoint

    box = [checkpoint.latest(folder) if folder is not None else None]
    if accelerator.num_processes > 1:
        broadcast_object_list(box, from_process=0)
    return box[0]


def _restore(latest: Path | None, policy: Policy) -> int:
    """Load a checkpoint, if there is one; the step it was made at, 0 without one."""
    from rft.trainers import checkpoint

    return int(checkpoint.load(latest, policy)["step"]) if latest is not None else 0


def _follow(config: RunConfig) -> None:
    """A rank that only trains: same policy, same steps, no engine, no run folder of its own."""
    from rft.trainers.grpo import train

    accelerator, policy = load_policy(config)
    step = _restore(_latest_checkpoint(None, accelerator), policy)
    train(config, policy, accelerator, None, step + 1)
