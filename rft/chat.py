"""Messages <-> token ids: the first prompt, what follows a sampled turn, and the tool calls inside one.

Guarantees: sampled ids are never re-tokenised. What rft adds after them is rendered by the model's own chat template
and appended as ids; only where the template would rewrite earlier turns does the rollout fork (`is_fork`).
A malformed call is data: it comes back as a ToolCall whose `error` tells the model what was wrong.
Does not execute tools and does not know about engines.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rft.errors import UserError
from rft.types import Item, Message, ToolCall, ToolResult

Dialect = Literal["hermes", "llama3", "mistral"]

_GENERIC_RULES = """

# Tools
{tools}
To call a tool, write <tool_call>{{"name": NAME, "arguments": {{...}}}}</tool_call> and stop. \
The result comes back in <tool_response></tool_response>."""

_PROBE_TOOL = {
    "type": "function",
    "function": {"name": "rft_probe_tool", "description": "d", "parameters": {"type": "object", "properties": {}}},
}


@dataclass(frozen=True, slots=True)
class Continuation:
    """Ids to append before the next turn is sampled; with `is_fork` they replace the whole history."""

    ids: list[int]
    is_fork: bool


class Chat:
    """The chat format of one model, learnt from its tokenizer's template.

    `tokenizer` is a transformers tokenizer with a chat template. A template that ignores `tools` gets the generic
    convention: tools listed in the system text, `<tool_call>{json}</tool_call>` out, `<tool_response>` back in.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            raise UserError(
                "the tokenizer has no chat template", where="model.path", cure="use an instruction-tuned model"
            )
        self.tokenizer = tokenizer
        self.knows_tools = "rft_probe_tool" in self._render([{"role": "user", "content": "x"}], [_PROBE_TOOL])
        self.dialect: Dialect = _dialect_of(tokenizer.chat_template) if self.knows_tools else "hermes"
        self.end_of_turn = self._end_of_turn()

    @classmethod
    def from_folder(cls, path: Path) -> Chat:
        """Load the tokenizer of a model folder, never from a hub. Raises UserError naming the path."""
        from transformers import AutoTokenizer

        if not (path / "config.json").is_file():
            raise UserError(
                f"{path} is not a model folder (it has no config.json)",
                where="model.path",
                cure="run scripts/prepare_model, or give the folder of an open-weight model",
            )
        try:
            return cls(AutoTokenizer.from_pretrained(path, local_files_only=True))
        except (OSError, ValueError) as error:
            raise UserError(
                f"the tokenizer in {path} cannot be loaded: {error}", where="model.path", cure="check the model folder"
            ) from None

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Ids that end a turn: the template's end of turn and the tokenizer's end of text."""
        return tuple(sorted({self.end_of_turn, self.tokenizer.eos_token_id}))

    def first_prompt(self, item: Item) -> list[int]:
        """The ids the first turn is sampled after: the row's messages, its tools, the generation prompt."""
        return self._encode(self._render(self._opening(item), self._template_tools(item), prompt=True))

    def parse(self, ids: list[int], item: Item, call_prefix: str) -> Message:
        """The assistant message that `ids` spell, with its tool calls, well-formed or not.

        Call ids are `call_<call_prefix>_<n>`, so the caller keeps them unique within a rollout.
        """
        text = self.tokenizer.decode(ids, skip_special_tokens=False)
        for stop in self.stop_token_ids:
            text = text.removesuffix(self.tokenizer.decode([stop], skip_special_tokens=False))
        reasoning, closed, answer = text.rpartition("</think>")
        content, found = _PARSERS[self.dialect](answer) if item.tools else (answer, [])
        calls = [_checked(raw, index, call_prefix, item) for index, raw in enumerate(found)]
        return Message(
            role="assistant",
            content=content.strip(),
            reasoning=reasoning.replace("<think>", "").strip() if closed else "",
            tool_calls=calls,
        )

    def continuation(self, item: Item, messages: list[Message], sampled_ids: list[int]) -> Continuation:
        """What to append after `sampled_ids` so that the model reads what the world said at the end of `messages`.

        `messages` are all messages after the row's own: the model's and the world's (tool results, replies) in turn,
        the last ones being those to add. A turn cut by its token limit gets its missing end-of-turn id first.
        """
        num_results = _num_replies(messages)
        opening, tools = self._opening(item), self._template_tools(item)
        history = opening + self._chat_messages(messages[:-num_results])
        results = self._chat_messages(messages[-num_results:])
        after = self._render(history + results, tools, prompt=True)
        # Templates may decorate the last assistant message (Qwen3 adds an empty <think>), so texts are not compared:
        # the suffix is what follows the end of the last assistant message, found by counting ends of turns.
        end = self.tokenizer.decode([self.end_of_turn], skip_special_tokens=False)
        num_ends = self._render(history, tools).count(end)
        parts = after.split(end)
        is_kept = after.startswith(self._render(opening, tools).rstrip())
        if not is_kept or not 0 < num_ends < len(parts):
            return Continuation(self._encode(after), is_fork=True)
        suffix = self._encode(end.join(parts[num_ends:]))
        has_ended = bool(sampled_ids) and sampled_ids[-1] in self.stop_token_ids
        return Continuation(suffix if has_ended else [self.end_of_turn, *suffix], is_fork=False)

    def _opening(self, item: Item) -> list[dict[str, Any]]:
        messages = [message.as_chat() for message in item.messages]
        if item.tools and not self.knows_tools:
            rules = _GENERIC_RULES.format(tools="\n".join(_compact_spec(tool) for tool in item.tools))
            if messages[0]["role"] not in ("system", "developer"):
                messages.insert(0, {"role": "system", "content": ""})
            messages[0] = {**messages[0], "content": (messages[0]["content"] + rules).strip()}
        for message in messages:
            if message["role"] == "developer":
                message["role"] = "system"
        return messages

    def _template_tools(self, item: Item) -> list[dict[str, Any]] | None:
        return item.tools if item.tools and self.knows_tools else None

    def _chat_messages(self, messages: list[Message]) -> list[dict[str, Any]]:
        """Messages after the row's own, as the template takes them."""
        if self.knows_tools:
            return [_with_parsed_arguments(message) for message in messages]
        chat: list[dict[str, Any]] = []
        for message in messages:
            if message.role != "tool":
                chat.append({"role": "assistant", "content": _generic_text(message)})
                continue
            response = f"<tool_response>{message.content}</tool_response>"
            if chat and chat[-1]["role"] == "user":
                chat[-1]["content"] += "\n" + response
            else:
                chat.append({"role": "user", "content": response})
        return chat

    def _render(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, *, prompt: bool = False
    ) -> str:
        return str(
            self.tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=prompt, tokenize=False)
        )

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _end_of_turn(self) -> int:
        """The id the template writes after an assistant message; the tokenizer's eos where it writes none."""
        marker = "rft-end-probe"
        text = self._render([{"role": "user", "content": "x"}, {"role": "assistant", "content": marker}])
        specials = set(self.tokenizer.all_special_ids)
        tail = self._encode(text[text.rfind(marker) + len(marker) :])
        return next((token for token in tail if token in specials), int(self.tokenizer.eos_token_id))


def tool_message(result: ToolResult) -> Message:
    """The message that shows a result to the model."""
    return Message(role="tool", content=result.output, tool_call_id=result.call_id)


@dataclass(frozen=True, slots=True)
class _RawCall:
    """A call as found in the text: a decoded object, or why it could not be decoded."""

    payload: Any
    text: str
    error: str | None = None


def _decode(text: str) -> _RawCall:
    try:
        return _RawCall(json.loads(text), text)
    except json.JSONDecodeError as error:
        return _RawCall(None, text, f"the call is not valid JSON: {error.msg} at character {error.pos}")


def _parse_hermes(text: str) -> tuple[str, list[_RawCall]]:
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number of times (Qwen, Hermes, generic)."""
    calls = [_decode(match.strip()) for match in re.findall(r"<tool_call>(.*?)</tool_call>", text, re.DOTALL)]
    content = re.sub(r"<tool_call>.*?</tool_call>", "", text, flags=re.DOTALL)
    content, opened, rest = content.partition("<tool_call>")
    if opened:
        calls.append(_RawCall(None, rest.strip(), "the call does not end with </tool_call>"))
    return content, calls


def _parse_llama3(text: str) -> tuple[str, list[_RawCall]]:
    """A bare `{"name": ..., "parameters": {...}}`, several separated by `;`, perhaps after `<|python_tag|>`."""
    body = text.replace("<|python_tag|>", "").strip()
    if not body.startswith("{"):
        return text, []
    decoder, position = json.JSONDecoder(), 0
    calls: list[_RawCall] = []
    while position < len(body):
        try:
            payload, end = decoder.raw_decode(body, position)
        except json.JSONDecodeError as error:
            return "", [*calls, _RawCall(None, body[position:], f"the call is not valid JSON: {error.msg}")]
        calls.append(_RawCall(payload, body[position:end]))
        position = end + len(body[end:]) - len(body[end:].lstrip("; \n"))
    if not all(isinstance(call.payload, dict) and "name" in call.payload for call in calls):
        return text, []  # an answer that happens to be JSON
    return "", calls


def _parse_mistral(text: str) -> tuple[str, list[_RawCall]]:
    """`[TOOL_CALLS][{...}, ...]`, or `[TOOL_CALLS]name[ARGS]{...}` once per call."""
    content, marked, body = text.partition("[TOOL_CALLS]")
    if not marked:
        return text, []
    if body.lstrip().startswith("["):
        raw = _decode(body.strip())
        many = raw.payload if isinstance(raw.payload, list) else []
        return content, [_RawCall(payload, json.dumps(payload)) for payload in many] or [raw]
    return content, [_decode_named(part) for part in body.split("[TOOL_CALLS]")]


def _decode_named(text: str) -> _RawCall:
    name, marked, arguments = text.partition("[ARGS]")
    raw = _decode((arguments if marked else name[name.find("{") :]).strip())
    name = name if marked else name[: max(name.find("{"), 0)]
    return raw if raw.error else _RawCall({"name": name.strip(), "arguments": raw.payload}, text)


_PARSERS: dict[Dialect, Callable[[str], tuple[str, list[_RawCall]]]] = {
    "hermes": _parse_hermes,
    "llama3": _parse_llama3,
    "mistral": _parse_mistral,
}


def _dialect_of(template: Any) -> Dialect:
    text = str(template)
    if "[TOOL_CALLS]" in text:
        return "mistral"
    return "hermes" if "<tool_call>" in text else "llama3"


def _checked(raw: _RawCall, index: int, call_prefix: str, item: Item) -> ToolCall:
    """A ToolCall whose name and arguments are usable, or one whose `error` says why they are not."""
    payload = raw.payload if isinstance(raw.payload, dict) else {}
    name = payload.get("name")
    arguments = payload.get("arguments", payload.get("parameters", {}))
    error = raw.error or _problem(raw.payload, name, arguments, item)
    if error is None and index > 0 and not item.parallel_tool_calls:
        error = "only one call per turn is allowed"
    return ToolCall(
        id=f"fc_{call_prefix}_{index}",
        call_id=f"call_{call_prefix}_{index}",
        name=name if isinstance(name, str) else "",
        arguments=raw.text if error else json.dumps(arguments, ensure_ascii=False),
        error=error,
    )


def _problem(payload: Any, name: Any, arguments: Any, item: Item) -> str | None:
    if not isinstance(payload, dict):
        return "a call must be a JSON object with name and arguments"
    if name not in item.tool_names:
        return f"there is no tool {json.dumps(name)}; the tools are: {', '.join(item.tool_names)}"
    return None if isinstance(arguments, dict) else "arguments must be a JSON object"


def _compact_spec(tool: dict[str, Any]) -> str:
    """A tool in one line of JSON, without the keys that only constrain servers."""
    function = tool["function"]
    spec = {key: function[key] for key in ("name", "description") if function.get(key)}
    spec["parameters"] = function.get("parameters", {}).get("properties", {})
    required = function.get("parameters", {}).get("required")
    if required:
        spec["required"] = required
    return json.dumps(spec, ensure_ascii=False)


def _generic_text(message: Message) -> str:
    calls = [
        f'<tool_call>{{"name": "{call.name}", "arguments": {call.arguments}}}</tool_call>'
        for call in message.tool_calls
    ]
    return "\n".join(filter(None, [message.content, *calls]))


def _with_parsed_arguments(message: Message) -> dict[str, Any]:
    """Templates expect `arguments` as an object; a malformed call is shown as it was written."""
    chat = message.as_chat()
    for call in chat.get("tool_calls", []):
        try:
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        except json.JSONDecodeError:
            call["function"]["arguments"] = {"malformed": call["function"]["arguments"]}
    return chat


def _num_replies(messages: list[Message]) -> int:
    count = 0
    while count < len(messages) and messages[-1 - count].role != "assistant":
        count += 1
    if count == 0:
        raise ValueError("a continuation needs the world's messages at the end")
    return count
