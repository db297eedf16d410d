"""The seam: an Environment opens one Session per rollout; the Session is the world that rollout acts in.

A Session's defaults are those of a world that only answers tool calls. One that is an episode (a game, a simulated
user) also speaks first, answers messages without calls, ends by itself and says how it went.
"""

from __future__ import annotations

from typing import Any, Protocol

from rft.envs.outage import Outages
from rft.types import Item, Message, ToolCall, ToolResult

ToolSpecs = dict[str, dict[str, Any] | None]
"""Tool name -> its entry for a row's `tools`; None where only the rows know it."""


class Session(Protocol):
    """The world of one rollout, single use: opened with it, closed with it, also on cancellation."""

    opening: str = ""
    """What the world says before the first turn; added to the row's last message."""

    is_over: bool = False
    """True once the world has ended the episode: no further turn is sampled."""

    def hear(self, message: Message) -> None:
        """The model's whole message of a turn, said before its calls are executed or it is replied to."""
        return

    async def call(self, call: ToolCall) -> ToolResult:
        """Execute one well-formed call; what the model should see comes back, `ToolError` means discard.

        The calls of one turn run at once.
        """
        ...

    async def reply(self, message: Message) -> list[Message]:
        """What the world says to a message without tool calls; nothing: that message was the final answer."""
        return []

    async def finish(self) -> None:
        """The conversation has ended: do what takes time before `outcome` is asked, e.g. compute a reward.

        Called once, before `close`; raises `ToolError` when it cannot be known how the episode went.
        """
        return

    def outcome(self) -> dict[str, Any]:
        """Facts about the end of the episode (JSON), e.g. {"reward": 1.0}; graders see them as `sample.environment`."""
        return {}

    async def close(self) -> None: ...


class Environment(Protocol):
    """A source of Sessions."""

    outages: Outages  # rollouts wait for the end of one, on the run's time and not on theirs

    async def discover(self) -> ToolSpecs:
        """The tools it serves. Asked before any data is read; raises UserError when it cannot be known."""
        ...

    async def check(self) -> None:
        """Fail with a `UserError` naming the cure when the environment cannot be reached."""
        ...

    async def open(self, item: Item, rollout_id: str) -> Session: ...

    async def close(self) -> None: ...
