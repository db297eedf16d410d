"""The life of one job, whatever it does: its folder is locked, its state written, what it started is stopped.

States in state.json: starting -> running -> succeeded | failed | cancelled | paused. Knows nothing of what a job does.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from rft.assembly import Parts, build_parts
from rft.chat import Chat
from rft.collect import Collector
from rft.config import RunConfig
from rft.engines.pool import outages_of
from rft.engines.remote import Sampler
from rft.errors import Paused, RftError
from rft.progress import Display
from rft.reuse import StoredRollouts
from rft.rollout import Workshop
from rft.sampling import Sampling
from rft.store import RunStore
from rft.types import Item, Split
from rft.watch import Watchdog

_CANCEL_TIMEOUT_S = 60.0  # more than a session may take to end and to close


@dataclass(frozen=True, slots=True)
class Job:
    """What every kind of job works with."""

    config: RunConfig
    store: RunStore
    display: Display
    items: dict[Split, list[Item]]
    chat: Chat | None  # None where the model is asked with messages
    watchdog: Watchdog
    stack: AsyncExitStack
    stored: StoredRollouts = field(default_factory=StoredRollouts)

    def note(self, text: str) -> None:
        self.store.append_event("info", text)
        self.display.line(text)

    def first_prompt(self, item: Item) -> list[int]:
        assert self.chat is not None, "a model of ours has a chat format"
        return self.chat.first_prompt(item)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a kind of job does: where its folder comes from, its work, and what follows when that succeeded.

    facts: stay in state.json beside the status, however the job ends.
    """

    opened: Callable[[], RunStore]
    work: Callable[[Job], None]
    finish: Callable[[Job], None]
    facts: dict[str, Any] = field(default_factory=dict)


def quieten() -> None:
    """Warnings of ours are plain lines, bars of others are off."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    disable_progress_bar()  # transformers' own bars would break ours


def carry_out(
    plan: Plan, config: RunConfig, items: dict[Split, list[Item]], chat: Chat | None, display: Display
) -> Path:
    """Do a job from its start to its end; its run folder. Raises RftError with one clear message."""
    with display:
        store = plan.opened()
        display.line(f"run folder: {store.path}")
        watchdog = Watchdog(loop := asyncio.Runner(), store, lambda: display.label)
        job = Job(config, store, display, items, chat, watchdog, AsyncExitStack())
        with store, recorded(store, plan.facts), loop, watchdog:
            try:
                plan.work(job)
            finally:
                loop.run(_wind_down(job.stack))
        if is_paused(store, display):
            return store.path
        with store:
            plan.finish(job)
    return store.path


async def _wind_down(stack: AsyncExitStack) -> None:
    """Cancel what an interrupt left running, let it close what it opened, then close what all of it used."""
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    if left:
        await asyncio.wait(left, timeout=_CANCEL_TIMEOUT_S)
    await stack.aclose()


@contextmanager
def recorded(store: RunStore, facts: dict[str, Any] | None = None) -> Iterator[None]:
    """Write how the job ends into its folder, whatever way it ends. A pause is an end without an error."""
    store.write_state({**(facts or {}), "status": "starting"})
    try:
        yield
    except KeyboardInterrupt:
        _end(store, "cancelled", "interrupted")
        raise
    except Paused:
        _end(store, "paused", "")
        return
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


def is_paused(store: RunStore, display: Display) -> bool:
    """Whether the job ended by a pause; says so."""
    state = store.read_state()
    if state["status"] != "paused":
        return False
    display.line(f"{Paused(state.get('step', 0))}; --resume continues it")
    return True


def check_parts(job: Job, engine: Sampler | None = None) -> Parts:
    """Tools and graders that answer, and an engine that has not been started: by default the config's."""
    with job.display.phase("checking tools and graders", keep=False):
        parts = job.watchdog.run(build_parts(job.config, job.store, job.stack, job.note, engine))
    outages = outages_of(parts.engine, parts.environment)
    job.watchdog.attach(parts.engine, outages, job.config.stall_limit_s)
    return parts


def sampling_of(job: Job, parts: Parts) -> Sampling:
    """What the job samples and evaluates with, from parts that have been started."""
    config = job.config
    workshop = Workshop(
        parts.engine,
        job.chat,
        parts.environment,
        parts.grader,
        parts.shadow_graders,
        config.rollout,
        config.engine.max_model_len,
        job.watchdog.waits,
    )
    collector = Collector(workshop, job.store.path.name, config.seed, job.store.append_rollout, job.stored)
    return Sampling(config, collector, job.watchdog, job.store, job.display, job.items)
