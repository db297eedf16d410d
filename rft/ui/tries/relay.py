"""The child's end of the pipes: judges that are asked through the server, which knows where they are and their keys."""

from __future__ import annotations

import asyncio
import json
import os
from itertools import count
from typing import Any

from rft.errors import GraderError
from rft.graders.judge import Judge, JudgeConfig, Judges, SamplingParams, Verdict
from rft.types import TokenUsage

MAX_LINE_BYTES = 16_000_000
_URL = "http://localhost"  # of no server: requests go through the pipe


class Relay:
    """Questions and answers, by id. One event loop."""

    def __init__(self, reader: asyncio.StreamReader, stdout: int) -> None:
        self._reader, self._stdout, self._ids = reader, stdout, count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}

    def judges(self, names: list[str]) -> Judges:
        judges = Judges()
        for name in names:
            judges.add(RelayedJudge(name, self))
        return judges

    def say(self, value: dict[str, Any]) -> None:
        """One line; the server reads as fast as we write."""
        data = json.dumps(value).encode() + b"\n"
        while data:
            data = data[os.write(self._stdout, data) :]

    async def ask(self, judge: str, question: dict[str, Any]) -> dict[str, Any]:
        number = next(self._ids)
        self._waiting[number] = asyncio.get_running_loop().create_future()
        self.say({"ask": {"id": number, "judge": judge, **question}})
        try:
            return await self._waiting[number]
        finally:
            del self._waiting[number]

    async def listen(self) -> None:
        """Hand answers to who waits for them, until the server says no more."""
        while line := await self._reader.readline():
            reply = json.loads(line)
            waiting = self._waiting.get(reply["id"])
            if waiting is not None and not waiting.done():
                waiting.set_result(reply)


class RelayedJudge(Judge):
    """A judge whose place only the server knows."""

    def __init__(self, name: str, relay: Relay) -> None:
        super().__init__(name, JudgeConfig(url=_URL))
        self._relay = relay

    async def ask(self, messages: list[dict[str, Any]], schema: dict[str, Any], params: SamplingParams) -> Verdict:
        """One judgement. Raises GraderError as the judge itself does."""
        question = {"messages": messages, "schema": schema, "params": params.model_dump(exclude_none=True)}
        reply = await self._relay.ask(self.name, question)
        if "problem" in reply:
            raise GraderError(reply["problem"], flag=reply["flag"], cure=reply["cure"])
        return Verdict(reply["answer"], TokenUsage.model_validate(reply["usage"]), reply["errors"])
