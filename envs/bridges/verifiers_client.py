"""The model that a verifiers environment asks: its questions go to rft's rollout, whose turns are its answers.

Lives on the loop of the environment's thread. Needs verifiers 0.1.x, so imported when used.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from verifiers import OverlongPromptError
from verifiers.clients import Client
from verifiers.types import Response, ResponseMessage
from verifiers.types import ToolCall as AskedCall

from rft.errors import ToolError
from rft.types import Message

_TEXT_PARTS = ("text", "input_text", "output_text")


class Dialogue:
    """One rollout of the environment, turn by turn."""

    def __init__(self, environment: Any, row: dict[str, Any]) -> None:
        self._environment, self._row = environment, row
        self._client = _RolloutClient()
        self._rollout: asyncio.Task[Any] | None = None
        self._num_seen = 0

    async def start(self) -> list[dict[str, Any]] | None:
        """Begin; the first prompt, None when the environment ends without one."""
        rollout = self._environment.run_rollout(self._row, client=self._client, model="rft", sampling_args={})
        self._rollout = asyncio.create_task(rollout)
        return await self._next()

    async def say(self, message: Message) -> list[dict[str, Any]] | None:
        """Answer as the model; the messages that the environment adds, None when it ends."""
        self._client.answers.put_nowait(message)
        self._num_seen += 1
        return await self._next()

    async def finish(self, last: Message | None) -> Any:
        """Answer for the last time, then let the environment end as if the context were full; what it says of it."""
        if self._rollout is None:
            raise ToolError("the environment's rollout did not begin")
        if last is not None:
            self._client.answers.put_nowait(last)
        self._client.answers.put_nowait(None)
        return await self._rollout

    async def stop(self) -> None:
        if self._rollout is not None and not self._rollout.done():
            self._rollout.cancel()
            await asyncio.wait([self._rollout])

    async def _next(self) -> list[dict[str, Any]] | None:
        assert self._rollout is not None
        question = asyncio.create_task(self._client.questions.get())
        await asyncio.wait([self._rollout, question], return_when=asyncio.FIRST_COMPLETED)
        if not question.done():
            question.cancel()
            self._rollout.result()  # raises what the environment raised
            return None
        messages = [_as_dict(message) for message in question.result()]
        added, is_first = messages[self._num_seen :], self._num_seen == 0
        if len(messages) < self._num_seen or (not is_first and any(each["role"] == "assistant" for each in added)):
            raise ToolError("the environment rewrites what was said before, which rft cannot train on")
        self._num_seen = len(messages)
        return added


class _RolloutClient(Client):  # type: ignore[misc]
    """Asks nobody: `questions` are answered from `answers`; None means that no more will come."""

    def __init__(self) -> None:
        super().__init__(None)
        self.questions: asyncio.Queue[Any] = asyncio.Queue()
        self.answers: asyncio.Queue[Message | None] = asyncio.Queue()

    async def get_response(self, prompt: Any, model: str, sampling_args: Any, tools: Any = None, **_: Any) -> Any:
        """The next answer. Raises OverlongPromptError when there is none: environments end their rollout on it."""
        self.questions.put_nowait(prompt)
        message = await self.answers.get()
        if message is None:
            raise OverlongPromptError("a limit of the rollout was met")
        return Response(id="rft", created=int(time.time()), model=model, usage=None, message=_response(message))

    # What the base class asks of its subclasses to make `get_response` of: nothing calls them here.

    def setup_client(self, config: Any) -> Any:
        raise NotImplementedError

    async def to_native_tool(self, tool: Any) -> Any:
        raise NotImplementedError

    async def to_native_prompt(self, messages: Any) -> Any:
        raise NotImplementedError

    async def get_native_response(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError

    async def raise_from_native_response(self, response: Any) -> None:
        raise NotImplementedError

    async def from_native_response(self, response: Any) -> Any:
        raise NotImplementedError

    async def close(self) -> None:
        """Nothing is held."""


def _response(message: Message) -> Any:
    """rft's turn as verifiers' message: a call that was malformed is not passed on, rft has answered it."""
    sound = [call for call in message.tool_calls if call.error is None]
    calls = [AskedCall(id=call.call_id, name=call.name, arguments=call.arguments) for call in sound]
    return ResponseMessage(
        content=message.content,
        reasoning_content=message.reasoning or None,
        tool_calls=calls or None,
        finish_reason="tool_calls" if calls else "stop",
        is_truncated=False,
        tokens=None,
    )


def _as_dict(message: Any) -> dict[str, Any]:
    """A message of the environment with its content as text. Raises ToolError for a picture."""
    plain: dict[str, Any] = message if isinstance(message, dict) else message.model_dump()
    content = plain.get("content")
    if isinstance(content, list):
        parts = [part if isinstance(part, dict) else part.model_dump() for part in content]
        if any(part.get("type") not in _TEXT_PARTS for part in parts):
            raise ToolError("the environment shows a picture or a sound; only text can be shown to the model")
        content = "".join(str(part.get("text", "")) for part in parts)
    return {**plain, "content": "" if content is None else str(content)}
