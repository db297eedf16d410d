"""Chunks of a chat completion as the events of a response, in the order and with the numbers that the SDK expects."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from rft.server.errors import ApiError
from rft.server.ids import new_id
from rft.server.inference import sse
from rft.server.inference.response_objects import call_item, finished, message_item, reasoning_item, response_body
from rft.server.inference.response_request import ResponseRequest


class ResponseEvents:
    """One response in the making: `begin`, `feed` per chunk, `end`; each yields server-sent events."""

    def __init__(self, request: ResponseRequest) -> None:
        self.response = response_body(request, new_id("resp_"), int(time.time()))
        self._request = request
        self._output: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None  # the item that grows: a thought or the text
        self._text = ""  # of that item
        self._calls: dict[int, dict[str, Any]] = {}  # by their index in the chunks
        self._finish_reason: str | None = None
        self._usage: dict[str, Any] | None = None
        self._num_events = 0

    def begin(self) -> Iterator[bytes]:
        yield self._event("response.created", response=self.response)
        yield self._event("response.in_progress", response=self.response)

    def feed(self, chunk: dict[str, Any]) -> Iterator[bytes]:
        """Raises ApiError for the error that a stream ended with."""
        if "error" in chunk:
            error = chunk["error"] if isinstance(chunk["error"], dict) else {}
            raise ApiError(str(error.get("message") or "The model broke off."), status=500, code="server_error")
        self._usage = chunk.get("usage") or self._usage
        for choice in chunk.get("choices") or []:
            delta = choice.get("delta") or {}
            self._finish_reason = choice.get("finish_reason") or self._finish_reason
            thought = delta.get("reasoning_content") or delta.get("reasoning")
            if isinstance(thought, str) and thought:
                yield from self._grow("reasoning", thought)
            if delta.get("content"):
                yield from self._grow("message", delta["content"])
            for call in delta.get("tool_calls") or []:
                yield from self._grow_call(call)

    def end(self) -> Iterator[bytes]:
        """Close what is open; `response` is complete then."""
        yield from self._close_text()
        for call in self._calls.values():
            yield from self._close_call(call)
        if not self._output:
            yield from self._grow("message", "")
            yield from self._close_text()
        if self._finish_reason == "length":
            self._output[-1]["status"] = "incomplete"
        self.response = finished(self.response, self._output, self._finish_reason, self._usage)
        yield self._event(f"response.{self.response['status']}", response=self.response)

    def fail(self, error: ApiError) -> Iterator[bytes]:
        problem = {"code": "server_error", "message": error.message}
        self.response = self.response | {"status": "failed", "error": problem, "output": self._output}
        yield self._event("response.failed", response=self.response)

    def _grow(self, kind: str, text: str) -> Iterator[bytes]:
        if self._open is None or self._open["type"] != kind:
            yield from self._close_text()
            yield from self._open_text(kind)
        self._text += text
        yield self._event(f"{self._family}.delta", delta=text, **self._place())

    def _open_text(self, kind: str) -> Iterator[bytes]:
        if kind == "message":
            self._open = message_item(new_id("msg_"), "") | {"status": "in_progress", "content": []}
        else:
            self._open = {"id": new_id("rs_"), "type": "reasoning", "summary": []}
        self._text = ""
        self._output.append(self._open)
        yield self._event("response.output_item.added", item=self._open, output_index=len(self._output) - 1)
        part = self._part("")
        if part is not None:
            yield self._event(f"{self._part_family}.added", part=part, **self._part_place())

    def _close_text(self) -> Iterator[bytes]:
        if self._open is None:
            return
        yield self._event(f"{self._family}.done", text=self._text, **self._place())
        part = self._part(self._text)
        if part is not None:
            yield self._event(f"{self._part_family}.done", part=part, **self._part_place())
        is_message = self._open["type"] == "message"
        whole = (
            message_item(self._open["id"], self._text)
            if is_message
            else reasoning_item(self._request, self._open["id"], self._text)
        )
        index = self._output.index(self._open)
        self._output[index], self._open = whole, None
        yield self._event("response.output_item.done", item=whole, output_index=index)

    def _grow_call(self, call: dict[str, Any]) -> Iterator[bytes]:
        function = call.get("function") or {}
        known = self._calls.get(call.get("index", 0))
        if known is None:
            yield from self._close_text()
            whole = {
                "id": call.get("id") or new_id("call_"),
                "function": {"name": function.get("name"), "arguments": ""},
            }
            known = call_item(new_id("fc_"), whole) | {"status": "in_progress"}
            self._calls[call.get("index", 0)] = known
            self._output.append(known)
            yield self._event("response.output_item.added", item=dict(known), output_index=len(self._output) - 1)
        if function.get("arguments"):
            known["arguments"] += function["arguments"]
            place = {"item_id": known["id"], "output_index": self._output.index(known)}
            yield self._event("response.function_call_arguments.delta", delta=function["arguments"], **place)

    def _close_call(self, call: dict[str, Any]) -> Iterator[bytes]:
        index = self._output.index(call)
        call["status"] = "completed"
        said = {"arguments": call["arguments"], "name": call["name"]}
        yield self._event("response.function_call_arguments.done", item_id=call["id"], output_index=index, **said)
        yield self._event("response.output_item.done", item=call, output_index=index)

    @property
    def _family(self) -> str:
        assert self._open is not None
        if self._open["type"] == "message":
            return "response.output_text"
        return "response.reasoning_summary_text" if self._request.has_summary else "response.reasoning_text"

    @property
    def _part_family(self) -> str:
        assert self._open is not None
        return "response.content_part" if self._open["type"] == "message" else "response.reasoning_summary_part"

    def _part(self, text: str) -> dict[str, Any] | None:
        assert self._open is not None
        if self._open["type"] == "message":
            return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
        return {"type": "summary_text", "text": text} if self._request.has_summary else None

    def _part_place(self) -> dict[str, Any]:
        """Where the open part is: item, output and content index."""
        assert self._open is not None
        is_summary = self._open["type"] == "reasoning" and self._request.has_summary
        key = "summary_index" if is_summary else "content_index"
        return {"item_id": self._open["id"], "output_index": self._output.index(self._open), key: 0}

    def _place(self) -> dict[str, Any]:
        assert self._open is not None
        return self._part_place() | ({"logprobs": []} if self._open["type"] == "message" else {})

    def _event(self, kind: str, /, **fields: Any) -> bytes:
        payload = {"type": kind, "sequence_number": self._num_events, **fields}
        self._num_events += 1
        return sse.event(payload, kind)
