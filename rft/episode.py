"""The session of one rollout: opened, asked at the end how it went, and closed whatever happens.

A session that does not close in time costs a warning, not the run. Does not know what is said in it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from rft.envs import Environment, Session
from rft.errors import WorldError
from rft.types import Item
from rft.waits import Waits

logger = logging.getLogger(__name__)

_CLOSE_TIMEOUT_S = 30.0


@dataclass(slots=True)
class Episode:
    """`item` carries what the environment said first; `outcome` is what it says at the end, {} until then."""

    session: Session | None
    item: Item
    outcome: dict[str, Any] = field(default_factory=dict)


@asynccontextmanager
async def an_episode(
    environment: Environment | None, item: Item, rollout_id: str, waits: Waits
) -> AsyncIterator[Episode]:
    """An episode without a session where there is no environment. Raises ToolError when it does not open or finish."""
    if environment is None:
        yield Episode(None, item)
        return
    with waits.on(rollout_id, item.id, "environment"):
        session = await environment.open(item, rollout_id)
    try:
        episode = Episode(session, _with_opening(item, session.opening))
        try:
            yield episode
        finally:
            with waits.on(rollout_id, item.id, "environment"):
                await _finish(session, episode)
    finally:
        await _close(session)


def _with_opening(item: Item, opening: str) -> Item:
    """The item with what the environment says first added to its last message."""
    if not opening:
        return item
    *before, last = item.messages
    content = f"{last.content}\n\n{opening}".strip()
    return item.model_copy(update={"messages": [*before, last.model_copy(update={"content": content})]})


async def _finish(session: Session, episode: Episode) -> None:
    """Let the session find out how the episode went; one that is being cancelled does not wait long for it."""
    task = asyncio.current_task()
    is_cancelled = task is not None and task.cancelling() > 0
    try:
        async with asyncio.timeout(_CLOSE_TIMEOUT_S if is_cancelled else None):
            await session.finish()
    except (TimeoutError, WorldError) as failure:
        if not is_cancelled:
            raise
        logger.warning("how a cancelled episode went is not known: %s", failure)
    finally:
        episode.outcome = session.outcome()


async def _close(session: Session) -> None:
    try:
        async with asyncio.timeout(_CLOSE_TIMEOUT_S):
            await session.close()
    except TimeoutError:
        logger.warning("a session did not close within %.0f s and was left", _CLOSE_TIMEOUT_S)
