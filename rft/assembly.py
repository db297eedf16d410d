"""What a run samples with: tools, graders, judges, engine. Built and checked first, started when all checks passed.

Whatever was built or started is on the stack that the caller closes, in the reverse order.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rft.config import RunConfig
from rft.engines import build_engine
from rft.engines.pool import EnginePool
from rft.engines.remote import Sampler
from rft.envs import Environment, build_environment
from rft.envs.http import HttpEnvironment
from rft.envs.serve import ToolServer
from rft.graders import Grader, GraderTools, build_grader
from rft.graders.cache import GradeCache
from rft.graders.judge import Judges
from rft.store import RunStore

if TYPE_CHECKING:
    from rft.trainers.policy import Policy


@dataclass(frozen=True, slots=True)
class Parts:
    """What a run samples with."""

    engine: Sampler
    environment: Environment | None
    grader: Grader
    shadow_graders: dict[str, Grader]
    judges: Judges


async def build_parts(
    config: RunConfig,
    store: RunStore,
    stack: AsyncExitStack,
    on_note: Callable[[str], None],
    engine: Sampler | None = None,
) -> Parts:
    """Everything but the heavy: tools and grading endpoints are reached, python graders loaded, nothing is sampled.

    on_note: gets what a person should read: what protects graders, and later which server or engine is down or back.
    engine: what is sampled with; by default what the config names.
    """
    environment = await _build_environment(config, stack, on_note)
    judges = Judges(config.judges)
    stack.push_async_callback(judges.close)
    cache = GradeCache(store.grade_cache)
    stack.callback(cache.close)
    tools = GraderTools(judges, cache)
    specs = {"grader": config.grader, **{f"shadow grader {name}": s for name, s in config.shadow_graders.items()}}
    graders = {name: build_grader(spec, tools) for name, spec in specs.items()}
    notes: dict[str, None] = {}
    for grader in graders.values():
        stack.push_async_callback(grader.close)
        notes |= dict.fromkeys(await grader.start())
    for note in notes:
        on_note(note)
    engine = engine if engine is not None else build_engine(config, store.engine_log)
    stack.push_async_callback(engine.close)
    if isinstance(engine, EnginePool):
        engine.on_change = on_note
        if environment is not None:
            engine.outages = environment.outages  # the time of a rollout stands still while either is away
        else:
            engine.outages.on_change = on_note
    main = graders.pop("grader")
    shadows = dict(zip(config.shadow_graders, graders.values(), strict=True))
    return Parts(engine, environment, main, shadows, judges)


async def _build_environment(
    config: RunConfig, stack: AsyncExitStack, on_note: Callable[[str], None]
) -> Environment | None:
    if config.environment is None:
        return None
    environment = build_environment(config.environment)
    stack.push_async_callback(environment.close)
    if isinstance(environment, HttpEnvironment) and environment.config.serve:
        environment.base_url = stack.enter_context(ToolServer(environment.config.serve)).base_url
    environment.outages.on_change = on_note
    await environment.check()
    return environment


async def start_parts(
    config: RunConfig, parts: Parts, store: RunStore, stack: AsyncExitStack, on_status: Callable[[str], None]
) -> None:
    """Start the engine, then the judges."""
    parts.engine.on_status = on_status
    await parts.engine.start()
    await _start_judges(config, parts, store, stack, on_status)


async def start_with_policy(
    config: RunConfig, parts: Parts, store: RunStore, stack: AsyncExitStack, on_status: Callable[[str], None]
) -> Policy:
    """The same while the policy loads: both take long, neither needs the other.

    An in-process engine goes first: transformers cannot load two models in two threads of one process.
    """
    if config.engine.type == "transformers":
        await start_parts(config, parts, store, stack, on_status)
        return await asyncio.to_thread(load_policy, config)
    loading = asyncio.create_task(asyncio.to_thread(load_policy, config))
    await start_parts(config, parts, store, stack, on_status)
    return await loading


async def _start_judges(
    config: RunConfig, parts: Parts, store: RunStore, stack: AsyncExitStack, on_status: Callable[[str], None]
) -> None:
    """Every judge answers one small question before anything is sampled."""
    from rft.engines.judge import place_in_engine, start_judge

    for judge in parts.judges:
        if judge.config.path is not None:
            judge.place = place_in_engine(config, judge.config, parts.engine)
            if judge.place is None:
                server = await start_judge(judge, store.judge_log(judge.name), on_status)
                stack.push_async_callback(server.close)
        on_status(f"asking the judge {judge.name}")
        await judge.check()


def load_policy(config: RunConfig) -> Policy:
    """This rank's policy, untrained."""
    from rft.trainers.policy import Policy
    from rft.trainers.ranks import build_accelerator

    accelerator = build_accelerator(config.seed)
    return Policy(config.model, config.training, config.rollout.temperature, accelerator, config.seed)
