"""What an eval run works on: the rows of its data source, and how a row becomes a question for a model.

A line of a source is `{"item": {...}, "sample": {...}}`, the sample left out where a model is to answer; a line without
`item` is an item itself. Stored completions and responses are not kept by this server as sources.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from rft.errors import GraderError
from rft.graders.judge import JudgeMessage, check_messages, render_messages
from rft.graders.sample import sample_of_text
from rft.graders.template import check_template, render
from rft.server.errors import ApiError
from rft.server.json_bodies import cleaned

if TYPE_CHECKING:
    from rft.server.services import Services

MAX_ROWS = 10_000
_MAX_FILE_BYTES = 64_000_000
_CODE = "invalid_data_source"
_TAKEN = ("temperature", "top_p", "seed", "max_completion_tokens", "reasoning_effort", "response_format", "tools")
_MESSAGES = TypeAdapter(list[JudgeMessage])


@dataclass(frozen=True, slots=True)
class EvalRow:
    """One line of a source."""

    item: dict[str, Any]
    sample: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class Question:
    """How items become requests. `messages` are templates; `reference` names the item's key that holds them."""

    model: str
    messages: list[JudgeMessage] = field(default_factory=list)
    reference: str = "item.messages"
    params: dict[str, Any] = field(default_factory=dict)

    def body(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """A chat completion's. Raises GraderError when the item lacks what it needs."""
        if self.messages:
            messages: Any = render_messages(self.messages, dict(item), {})
        else:
            messages = _parsed(render("{{" + self.reference + "}}", item, {}))
        if not isinstance(messages, list) or not messages:
            raise GraderError(f"{self.reference} is no list of messages", cure="set data_source.input_messages")
        return {"model": self.model, "messages": messages, **self.params}


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


async def rows_of(services: Services, data_source: Mapping[str, Any], project: str) -> list[EvalRow]:
    """Raises ApiError (400, or 404 for an unknown file) that names the line."""
    source = data_source.get("source")
    kind = source.get("type") if isinstance(source, Mapping) else None
    if not isinstance(source, Mapping) or kind not in ("file_content", "file_id"):
        message = f"The source {kind!r} cannot be read here: send the rows as file_content, or upload them (file_id)."
        raise ApiError(message, code="unsupported_data_source", param="data_source.source")
    if kind == "file_content":
        lines: Any = source.get("content")
        if not isinstance(lines, list):
            raise _refusal("content must be a list of rows", "data_source.source.content")
    else:
        path = services.files.path(str(source.get("id")), project, param="data_source.source.id")
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise _refusal(f"the file is larger than {_MAX_FILE_BYTES:,} bytes", "data_source.source.id")
        lines = await asyncio.to_thread(_read, path)
    if not lines or len(lines) > MAX_ROWS:
        raise _refusal(f"a run takes 1 to {MAX_ROWS:,} rows, not {len(lines):,}", "data_source.source")
    return [_row(line, index) for index, line in enumerate(lines, 1)]


def _read(path: Path) -> list[Any]:
    """One row too many at most."""
    found: list[Any] = []
    with path.open("rb") as file:
        for line in file:
            if line.strip() and len(found) <= MAX_ROWS:
                found.append(cleaned(_parsed(line.decode("utf-8", "replace"))))
    return found


def _row(line: Any, number: int) -> EvalRow:
    item = line.get("item", line) if isinstance(line, dict) else None
    sample = line.get("sample") if isinstance(line, dict) and "item" in line else None
    if not isinstance(item, dict) or not isinstance(sample, dict | None):
        raise _refusal(f"row {number} is not an object with `item` (and `sample`)", "data_source.source")
    return EvalRow(item, sample)


def shown(data_source: Mapping[str, Any]) -> dict[str, Any]:
    """As a run gives it back: the rows that it held are in the run's items, and not in every list of runs."""
    source = data_source["source"]
    return {**data_source, "source": {**source, "content": []} if "content" in source else source}


def _refusal(problem: str, param: str) -> ApiError:
    return ApiError(f"Invalid data source: {problem}.", code=_CODE, param=param)


def question_of(data_source: Mapping[str, Any]) -> Question | None:
    """None where the rows bring their samples. Raises ApiError (400)."""
    model = data_source.get("model")
    if data_source.get("type") == "jsonl" or model is None:
        return None
    given = data_source.get("input_messages")
    params = _params(data_source.get("sampling_params") or {})
    if not given:
        return Question(str(model), params=params)
    if isinstance(given, Mapping) and given.get("type") == "item_reference":
        reference = str(given.get("item_reference"))
        _check(lambda: check_template("{{" + reference + "}}"), "data_source.input_messages.item_reference")
        return Question(str(model), reference=reference, params=params)
    template = given.get("template") if isinstance(given, Mapping) else None
    messages = _check(
        lambda: check_messages(_MESSAGES.validate_python(template)), "data_source.input_messages.template"
    )
    return Question(str(model), messages=messages, params=params)


def _check(make: Any, param: str) -> Any:
    try:
        return make()
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        place = ".".join([param, *(str(part) for part in problem["loc"])])
        raise _refusal(problem["msg"], place) from None
    except ValueError as error:
        raise _refusal(str(error), param) from None


def _params(given: Mapping[str, Any]) -> dict[str, Any]:
    """As chat completions have them; what comes from the responses API in its own shape is translated."""
    params = {key: given[key] for key in _TAKEN if given.get(key) is not None}
    shape = (given.get("text") or {}).get("format") if isinstance(given.get("text"), Mapping) else None
    if isinstance(shape, Mapping) and shape.get("type") == "json_schema":
        rest = {key: value for key, value in shape.items() if key != "type"}
        params["response_format"] = {"type": "json_schema", "json_schema": rest}
    elif isinstance(shape, Mapping):
        params["response_format"] = dict(shape)
    if isinstance(params.get("tools"), list):
        params["tools"] = [_tool(tool) for tool in params["tools"]]
    return params


def _tool(tool: Any) -> Any:
    if not isinstance(tool, Mapping) or "function" in tool or tool.get("type") != "function":
        return tool
    return {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}


def sample_of_completion(completion: Mapping[str, Any]) -> dict[str, Any]:
    """What graders see of a chat completion. Raises GraderError when it is none."""
    completion = cleaned(completion)
    try:
        message = completion["choices"][0]["message"]
        text, calls = message.get("content") or "", message.get("tool_calls") or []
    except (LookupError, TypeError, AttributeError):
        raise GraderError("the model's answer is not a chat completion") from None
    own = {"choices": completion["choices"], "output_tools": calls, "model": completion.get("model")}
    return {**sample_of_text(text), **own, "trace": [message]}


def sample_of_row(sample: Mapping[str, Any] | None) -> dict[str, Any]:
    """A stored sample, completed from its text; {} for a row without one, whose templates may only name the item."""
    if sample is None:
        return {}
    text = sample.get("output_text")
    return {**(sample_of_text(text) if isinstance(text, str) else {}), **sample}
