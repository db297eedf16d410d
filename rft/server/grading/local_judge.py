"""A judge that this server answers itself: a local or tuned model, through the same inference that clients use."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from rft.errors import GraderError
from rft.graders.judge import SERVER_ERROR, Judge, JudgeConfig, Place
from rft.server.errors import ApiError
from rft.server.models import Target
from rft.wire import Reply

_URL = "http://localhost"  # of no server: requests do not leave the process
_TIMEOUT_S = 600.0  # the first request loads the model


class LocalJudge(Judge):
    """`inference` has `async chat(target, body) -> dict`, as rft/server/inference has it."""

    def __init__(self, name: str, target: Target, inference: Any) -> None:
        super().__init__(name, JudgeConfig(url=_URL, timeout_s=_TIMEOUT_S))
        self.place = Place(_URL, target.name)
        self._target, self._inference = target, inference

    @property
    def is_own(self) -> bool:
        return True

    async def _send(self, body: bytes) -> Reply:
        """Raises GraderError where the model cannot be asked, or does not answer in time."""
        try:
            async with asyncio.timeout(self.config.timeout_s):
                completion = await self._inference.chat(self._target, json.loads(body))
        except TimeoutError:
            problem = f"no answer within {self.config.timeout_s:g} s"
        except ApiError as error:
            problem = error.message
        else:
            return Reply(200, json.dumps(completion).encode())
        raise GraderError(f"the judge {self.name}: {problem}", flag=SERVER_ERROR, retryable=True)
