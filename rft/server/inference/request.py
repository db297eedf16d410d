"""A chat completion as a local model can answer it: checked whole, in the words of training (Message, tools).

Every refusal is an ApiError (400) with the path of its field. What hosted models know and local ones do not (images,
audio, services of the host) is refused; what only tunes a hosted service is ignored. Light: no tokenizer, no model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from rft.server.errors import ApiError
from rft.types import Item, Message, ToolCall

_TEXTS = ("text", "input_text", "output_text")
_MAX_STOPS = 4


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore")

    include_usage: bool = False


class LocalChat(BaseModel):
    """The fields that shape an answer, and those that are accepted without effect."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    messages: list[dict[str, Any]] = Field(min_length=1)
    tools: list[dict[str, Any]] = Field(default_factory=list)
    tool_choice: Literal["auto", "none", "required"] | dict[str, Any] = "auto"
    parallel_tool_calls: bool = True
    response_format: dict[str, Any] | None = None
    max_completion_tokens: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    n: int = Field(1, ge=1, le=128)
    seed: int | None = Field(None, description="used by the engine transformers; vLLM's batches are not reproducible")
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    stop: list[str] = Field(default_factory=list, max_length=_MAX_STOPS)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)
    # without effect here
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    verbosity: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @property
    def limit(self) -> int | None:
        """Tokens that may be sampled; None: as many as the context leaves."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def forced_names(self) -> list[str]:
        """The tools of which one must be called; none of them: the model decides."""
        if isinstance(self.tool_choice, dict):
            return [self.tool_choice["function"]["name"]]
        return [tool["function"]["name"] for tool in self.tools] if self.tool_choice == "required" else []

    def item(self) -> Item:
        """Messages and tools as training knows them; without tools where none may be called."""
        messages = [_message(value, f"messages[{index}]") for index, value in enumerate(self.messages)]
        tools = [] if self.tool_choice == "none" else [_without_nulls(tool) for tool in self.tools]
        return Item(id="chat", row={}, messages=messages, tools=tools, parallel_tool_calls=self.parallel_tool_calls)


def parse(body: Mapping[str, Any]) -> LocalChat:
    """The checked request. Raises ApiError (400); null counts as not given."""
    given = {key: value for key, value in body.items() if value is not None}
    try:
        chat = LocalChat.model_validate(given)
    except ValidationError as error:
        raise _refusal(error) from None
    _check_tools(chat)
    _check_format(chat)
    if chat.top_logprobs and not chat.logprobs:
        raise _invalid("top_logprobs", "needs logprobs: true")
    chat.item()
    return chat


def _refusal(error: ValidationError) -> ApiError:
    problem = error.errors()[0]
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        message = f"Unrecognized request argument supplied, or one that local models do not support: {path}"
        return ApiError(message, code="unsupported_parameter", param=path)
    if problem["type"] == "missing":
        return ApiError(f"Missing required parameter: '{path}'.", code="missing_required_parameter", param=path)
    return _invalid(path, problem["msg"])


def _invalid(param: str, problem: str, code: str = "invalid_value") -> ApiError:
    return ApiError(f"Invalid value for '{param}': {problem}.", code=code, param=param)


def _check_tools(chat: LocalChat) -> None:
    names: list[str] = []
    for index, tool in enumerate(chat.tools):
        place, function = f"tools[{index}]", tool.get("function")
        if tool.get("type") != "function" or not isinstance(function, dict):
            raise _invalid(place, "local models have tools of type function only", "unsupported_value")
        if not isinstance(function.get("name"), str) or not function["name"]:
            raise _invalid(f"{place}.function.name", "must be a non-empty string")
        if not isinstance(function.get("parameters") or {}, dict):
            raise _invalid(f"{place}.function.parameters", "must be a JSON schema")
        if not isinstance(function.get("description") or "", str):
            raise _invalid(f"{place}.function.description", "must be a string")
        names.append(function["name"])
    if len(set(names)) < len(names):
        raise _invalid("tools", "two tools have the same name")
    if isinstance(chat.tool_choice, dict):
        function = chat.tool_choice.get("function")
        if chat.tool_choice.get("type") != "function" or not isinstance(function, dict):
            raise _invalid("tool_choice", "must be auto, none, required or name a function", "unsupported_value")
        if function.get("name") not in names:
            raise _invalid("tool_choice", f"there is no tool {json.dumps(function.get('name'))}")
    if chat.tool_choice == "required" and not names:
        raise _invalid("tool_choice", "is only allowed when tools are specified")


def _check_format(chat: LocalChat) -> None:
    form = chat.response_format
    if form is None:
        return
    kind = form.get("type")
    if kind not in ("text", "json_object", "json_schema"):
        raise _invalid("response_format.type", "must be text, json_object or json_schema")
    schema = form.get("json_schema")
    if kind == "json_schema" and not (isinstance(schema, dict) and isinstance(schema.get("schema"), dict)):
        raise _invalid("response_format.json_schema", "must be an object with name and schema")


def _without_nulls(tool: dict[str, Any]) -> dict[str, Any]:
    function = {key: value for key, value in tool["function"].items() if value is not None}
    return {"type": "function", "function": function}


def _message(value: dict[str, Any], place: str) -> Message:
    role = value.get("role")
    if role not in ("developer", "system", "user", "assistant", "tool"):
        raise _invalid(f"{place}.role", "must be developer, system, user, assistant or tool")
    calls = _calls(value.get("tool_calls"), f"{place}.tool_calls") if role == "assistant" else []
    content = value.get("content")
    if content is None and role != "assistant":
        raise _invalid(f"{place}.content", "is missing")
    call_id = value.get("tool_call_id")
    if role == "tool" and not isinstance(call_id, str):
        raise _invalid(f"{place}.tool_call_id", "must be the id of a tool call")
    reasoning, name = value.get("reasoning_content"), value.get("name")
    return Message(
        role=role,
        content=_text(content, f"{place}.content") if content is not None else "",
        reasoning=reasoning if isinstance(reasoning, str) and role == "assistant" else "",
        name=name if isinstance(name, str) else None,
        tool_calls=calls,
        tool_call_id=call_id if role == "tool" else None,
    )


def _text(content: Any, place: str) -> str:
    if isinstance(content, str):
        text = content
    elif isinstance(content, list):
        text = "".join(_block(block, f"{place}[{index}]") for index, block in enumerate(content))
    else:
        raise _invalid(place, "must be a string or a list of text blocks")
    return text.encode("utf-8", "replace").decode()  # half a surrogate pair cannot be tokenised


def _block(block: Any, place: str) -> str:
    kind = block.get("type") if isinstance(block, dict) else None
    if kind == "refusal":
        return str(block.get("refusal") or "")
    if kind not in _TEXTS or not isinstance(block.get("text"), str):
        raise _invalid(place, f"local models read text only, not a block of type {kind}", "unsupported_value")
    text: str = block["text"]
    return text


def _calls(value: Any, place: str) -> list[ToolCall]:
    try:
        return [_call(call, index) for index, call in enumerate(value or [])]
    except (AttributeError, KeyError, TypeError, ValueError):
        problem = 'must be a list of {"id", "type": "function", "function": {"name", "arguments": "<JSON string>"}}'
        raise _invalid(place, problem) from None


def _call(call: dict[str, Any], index: int) -> ToolCall:
    """A call whose arguments are no object stays as it is: the model may have written it so."""
    function, call_id = call["function"], call.get("id") or f"call_{index}"
    arguments = function["arguments"]
    try:
        is_object = isinstance(json.loads(arguments), dict)
    except (ValueError, RecursionError):
        is_object = False
    error = None if is_object else "the arguments are not a JSON object"
    return ToolCall(id=call_id, call_id=call_id, name=function["name"], arguments=arguments, error=error)
