"""Multipart bodies: one file, streamed to disk as it arrives, and a few short fields beside it.

Guarantees: memory stays at a megabyte or two whatever the body's size; disk work happens off the event loop; a body
that stops arriving ends with an error. How large the file may be decides the one who takes its bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rft.server.errors import ApiError
from rft.server.requests import UPLOADS

_BLOCK_BYTES = 2**20  # what is handed to a thread at once
_MAX_PARTS, _MAX_FIELD_BYTES = 32, 64_000
_SILENCE_S = 60.0  # between two pieces of a body
_DRAIN_BYTES, _DRAIN_S = 2**26, 10.0


@dataclass(slots=True)
class Form:
    """What came beside the file. `filename` is None when no file came."""

    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None

    def required(self, name: str) -> str:
        """Raises ApiError (400) when the field is missing."""
        if name not in self.fields:
            raise missing(name)
        return self.fields[name]


def _cut_off() -> ApiError:
    return ApiError("The upload was cut off: the body's closing boundary is missing.", code="upload_incomplete")


def missing(name: str) -> ApiError:
    return ApiError(f"Missing required parameter: '{name}'.", code="missing_required_parameter", param=name)


async def read_form(request: Request, file_field: str, take: Callable[[bytes], None]) -> Form:
    """Read a body to its end; `take` gets the bytes of the file in turn, in a thread.

    Raises ApiError (400, or 408 for a client that fell silent), and what `take` raises.
    """
    form = Form()
    parts = _Parts(form, file_field, take)
    parser = parts.parser(request.headers.get("content-type", ""))
    block = bytearray()
    try:
        async for piece in _pieces(request):
            block += piece
            if len(block) >= _BLOCK_BYTES:
                await asyncio.to_thread(parser.write, bytes(block))
                block.clear()
        await asyncio.to_thread(parser.write, bytes(block))
    except FormParserError as error:
        raise ApiError(f"The body is not valid multipart/form-data: {error}", code="invalid_multipart") from None
    except ClientDisconnect:
        raise _cut_off() from None
    if not parts.is_complete:
        raise _cut_off()
    if form.filename is None:
        raise missing(file_field)
    return form


async def _pieces(request: Request) -> AsyncIterator[bytes]:
    stream = aiter(request.stream())
    while True:
        try:
            async with asyncio.timeout(_SILENCE_S):
                piece = await anext(stream)
        except StopAsyncIteration:
            return
        except TimeoutError:
            message = f"No part of the body arrived within {_SILENCE_S:g} s."
            raise ApiError(message, status=408, code="upload_timeout") from None
        yield piece


class Drained:
    """Reads and drops what is left of an upload before an answer to it is sent, so that a client that is refused, and
    still sending, gets to see why instead of a broken connection. Very large rests are not waited for.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or not UPLOADS.fullmatch(scope["path"]):
            return await self._app(scope, receive, send)
        is_over = False

        async def watched() -> Message:
            nonlocal is_over
            message = await receive()
            is_over = not message.get("more_body", False)  # also when the client is gone
            return message

        async def send_after(message: Message) -> None:
            num_bytes = 0
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_DRAIN_S):
                    while not is_over and num_bytes <= _DRAIN_BYTES and message["type"] == "http.response.start":
                        num_bytes += len((await watched()).get("body", b""))
            await send(message)

        await self._app(scope, watched, send_after)
        return None


class _Parts:
    """The parser's callbacks: fields are collected, bytes of the one file are passed on."""

    def __init__(self, form: Form, file_field: str, take: Callable[[bytes], None]) -> None:
        self._form, self._file_field, self._take = form, file_field, take
        self._num_parts = self._num_field_bytes = 0
        self._header, self._value, self._disposition = bytearray(), bytearray(), b""
        self._name, self._text = "", bytearray()
        self._is_file = False
        self.is_complete = False

    def parser(self, content_type: str) -> MultipartParser:
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data" or b"boundary" not in options:
            message = "Send the file as multipart/form-data, with a boundary in the content-type header."
            raise ApiError(message, code="invalid_content_type")
        callbacks = {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._header.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._end_headers,
            "on_part_data": self._data,
            "on_part_end": self._end,
            "on_end": self._complete,
        }
        return MultipartParser(options[b"boundary"], callbacks)  # type: ignore[arg-type]

    def _begin(self) -> None:
        self._num_parts += 1
        if self._num_parts > _MAX_PARTS:
            raise ApiError(f"The body has more than {_MAX_PARTS} parts.", code="invalid_multipart")
        self._disposition = b""

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._header.clear()
        self._value.clear()

    def _end_headers(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name = _text(options.get(b"name", b""))
        self._text = bytearray()
        self._is_file = b"filename" in options
        if not self._is_file:
            return
        if self._name != self._file_field or self._form.filename is not None:
            message = f"The body must hold one file, as '{self._file_field}'."
            raise ApiError(message, code="invalid_multipart", param=self._name or None)
        self._form.filename = _text(options[b"filename"])

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self._take(data[start:end])
            return
        self._num_field_bytes += end - start
        if self._num_field_bytes > _MAX_FIELD_BYTES:
            message = f"The fields beside the file are longer than {_MAX_FIELD_BYTES:,} bytes."
            raise ApiError(message, code="invalid_multipart", param=self._name or None)
        self._text += data[start:end]

    def _complete(self) -> None:
        self.is_complete = True

    def _end(self) -> None:
        if not self._is_file:
            self._form.fields[self._name] = _text(self._text)


def _text(data: bytes | bytearray) -> str:
    return data.decode("utf-8", errors="replace")
