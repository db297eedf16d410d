"""An engine that says what a script tells it, with real delays and real failures."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from rft.chat import Chat
from rft.engines import Completion, EngineLoad, PublishedWeights, SamplingParams
from rft.errors import EngineError

Script = Callable[[str, str, int], str]
"""(prompt text, rollout id, request number of that rollout) -> what the model says."""


@dataclass
class ScriptedEngine:
    """Spells `script`'s answer with the chat's tokenizer. Raises EngineError for the requests in `failures`.

    `failures` maps the number of a request (counted over all rollouts, from 0) to the error it meets, `lag` a
    rollout's id to how many versions behind it is answered. A request is answered from the version there was when it
    came, and `hold` may keep it for longer.
    """

    chat: Chat
    script: Script
    first_token_s: float = 0.0
    token_s: float = 0.0
    failures: dict[int, EngineError] = field(default_factory=dict)
    lag: Callable[[str], int] = lambda rollout_id: 0
    hold: Callable[[str], Awaitable[None]] | None = None  # gets the rollout's id
    policy_version: int = 0
    max_model_len: int = 4096
    max_concurrent: int = 4096
    on_status: Callable[[str], None] = lambda line: None
    requests: list[tuple[str, list[int], SamplingParams]] = field(default_factory=list)
    num_running: int = 0
    max_running: int = 0

    async def start(self) -> None:
        return None

    async def generate(self, prompt_ids: list[int], params: SamplingParams, rollout_id: str) -> Completion:
        number = len(self.requests)
        turn = sum(1 for seen, _, _ in self.requests if seen == rollout_id)
        self.requests.append((rollout_id, prompt_ids, params))
        text = self.script(self.chat.tokenizer.decode(prompt_ids), rollout_id, turn)
        ids = [*self.chat.tokenizer.encode(text, add_special_tokens=False), self.chat.end_of_turn]
        is_cut = len(ids) > params.max_tokens
        ids, version = ids[: params.max_tokens], max(0, self.policy_version - self.lag(rollout_id))
        self.num_running += 1
        self.max_running = max(self.max_running, self.num_running)
        try:
            await asyncio.sleep(self.first_token_s + self.token_s * len(ids))
            if self.hold is not None:
                await self.hold(rollout_id)
            if number in self.failures:
                raise self.failures[number]
        finally:
            self.num_running -= 1
        return Completion(ids, [-0.5] * len(ids), "length" if is_cut else "stop", version)

    async def load(self, weights: PublishedWeights) -> None:
        self.policy_version = weights.version

    async def score(self, ids: list[int], start: int) -> list[float]:
        return [-0.5] * (len(ids) - start)

    async def load_metrics(self) -> EngineLoad:
        return EngineLoad(self.num_running, 0, 0.0)

    async def close(self) -> None:
        return None
