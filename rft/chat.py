"""Messages <-> token ids: the first prompt, what follows a sampled turn, and the tool calls inside one.

Guarantees: sampled ids are never re-tokenised. What rft adds after them is rendered by the model's own chat template
and appended as ids; only where the template would rewrite earlier turns does the rollout fork (`is_fork`).
Does not execute tools and does not know about engines.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rft.calls import Dialect, dialect_of, parse_calls, spell_calls
from rft.errors import UserError
from rft.frames import Frames, Written
from rft.types import Item, Message, ToolCall, ToolResult

_NUM_KEPT_OPENINGS = 1024
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


@dataclass(frozen=True, slots=True)
class _Opening:
    """An item's own messages in the model's format. Holds the item, so that no other one gets its identity."""

    item: Item
    messages: list[dict[str, Any]]
    text: str  # without a generation prompt
    ids: list[int]  # with it


class Chat:
    """The chat format of one model, learnt from its tokenizer's template.

    `tokenizer` is a transformers tokenizer with a chat template. A template that ignores `tools` gets the generic
    convention: tools listed in the system text, `<tool_call>{json}</tool_call>` out, `<tool_response>` back in. Where a
    template has no system role, the system text opens the first user message.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            raise UserError(
                "the tokenizer has no chat template, as base models have none",
                where="model.path",
                cure="use an instruction-tuned model, or put a template into that folder as chat_template.jinja",
            )
        self.tokenizer = tokenizer
        self._core: Any = None
        self.knows_tools = "rft_probe_tool" in self._render([{"role": "user", "content": "x"}], [_PROBE_TOOL])
        self.dialect: Dialect = dialect_of(tokenizer.chat_template) if self.knows_tools else "hermes"
        self._takes_system = self._can_render_system()
        self._takes_many_calls = self._can_render_two_calls()
        self.end_of_turn = self._end_of_turn()
        self.stop_token_ids = tuple(sorted({self.end_of_turn, int(tokenizer.eos_token_id)}))
        """Ids that end a turn: the template's end of turn and the tokenizer's end of text."""
        self._stop_texts = [self._decode(stop) for stop in self.stop_token_ids]
        self._end = self._decode(self.end_of_turn)
        self._core = _core_of(tokenizer, self._end)
        self._openings: OrderedDict[int, _Opening] = OrderedDict()
        self._num_ends: dict[Any, int] = {}
        self._frames = Frames(self._end)

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

    def first_prompt(self, item: Item) -> list[int]:
        """The ids the first turn is sampled after: the row's messages, its tools, the generation prompt."""
        return list(self._opening(item).ids)

    def parse(self, ids: list[int], item: Item, call_prefix: str) -> Message:
        """The assistant message that `ids` spell, with its tool calls, well-formed or not.

        Call ids are `call_<call_prefix>_<n>`, so the caller keeps them unique within a rollout.
        """
        text = (self._core or self.tokenizer).decode(ids, skip_special_tokens=False)
        for stop in self._stop_texts:
            text = text.removesuffix(stop)
        reasoning, answer = split_reasoning(text)
        content, calls = parse_calls(answer, self.dialect, item, call_prefix) if item.tools else (answer, [])
        return Message(
            role="assistant",
            content=content.strip(),
            reasoning=reasoning,
            tool_calls=calls,
        )

    def spell(self, item: Item, messages: list[Message]) -> list[int] | None:
        """The ids, end of turn included, with which this model would say the last of `messages`.

        `messages` are all messages after the row's own. What is spelled is what the template writes where `parse`
        reads that as the same message, else the plainest form; None where the format cannot say it at all.
        """
        for text in self._spellings(item, messages):
            ids = [*self._encode(text), self.end_of_turn]
            is_cut = any(token in self.stop_token_ids for token in ids[:-1])
            if not is_cut and _says_the_same(self.parse(ids, item, "spelled"), messages[-1]):
                return ids
        return None

    def _spellings(self, item: Item, messages: list[Message]) -> Iterator[str]:
        message = messages[-1]
        opening, tools = self._opening(item).messages, self._template_tools(item)
        prompt = self._render(opening + self._chat_messages(messages[:-1]), tools, prompt=True)
        last = self._chat_messages([message])[0] | (
            {"reasoning_content": message.reasoning} if message.reasoning else {}
        )
        written = self._render([*opening, *self._chat_messages(messages[:-1]), last], tools)
        if written.startswith(prompt):
            said, ended, _ = written[len(prompt) :].rpartition(self._end)
            yield said if ended else written[len(prompt) :].rstrip()
        is_open = prompt.rstrip().endswith("<think>")
        thought = f"{'' if is_open else '<think>'}\n{message.reasoning}\n</think>\n\n"
        calls = spell_calls(message.tool_calls, self.dialect) if message.tool_calls else ""
        yield (thought if message.reasoning or is_open else "") + "\n".join(filter(None, [message.content, calls]))

    def count_tokens(self, text: str) -> int:
        """How many ids a text is."""
        return len(self._encode(text)) if text else 0

    def continuation(self, item: Item, messages: list[Message], sampled_ids: list[int]) -> Continuation:
        """What to append after `sampled_ids` so that the model reads what the world said at the end of `messages`.

        `messages` are all messages after the row's own: the model's and the world's (tool results, replies) in turn,
        the last ones being those to add. A turn cut by its token limit gets its missing end-of-turn id first.
        """
        num_replies = _num_replies(messages)
        before = messages[:-num_replies]
        spoken, *replies = self._chat_messages(messages[-num_replies - 1 :])
        # Mistral's template writes system texts and tools into the last message
        place = bool(item.tools), len(before) > 1, *(message.role for message in item.messages)
        written = self._frames.written(place, spoken, replies, lambda replies: self._rendered(item, before, replies))
        ids = self._encode(written.text)
        if not written.is_fork and not (sampled_ids and sampled_ids[-1] in self.stop_token_ids):
            ids = [self.end_of_turn, *ids]
        return Continuation(ids, written.is_fork)

    def _rendered(self, item: Item, before: list[Message], replies: list[dict[str, Any]]) -> Written:
        """What the template adds for `replies` after the messages `before` them.

        Templates may decorate the last assistant message (Qwen3 adds an empty <think>), so texts are not compared: what
        is added follows the end of the last assistant message, found by counting ends of turns.
        """
        opening, tools = self._opening(item), self._template_tools(item)
        history = opening.messages + self._chat_messages(before)
        after = self._render(history + replies, tools, prompt=True)
        parts = after.split(self._end)
        num_ends = self._count_ends(history, replies, tools, len(parts) - 1)
        if not after.startswith(opening.text) or not 0 < num_ends < len(parts):
            return Written(after, is_fork=True)
        return Written(self._end.join(parts[num_ends:]), is_fork=False)

    def _count_ends(
        self,
        history: list[dict[str, Any]],
        replies: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        num_in_all: int,
    ) -> int:
        """Ends of turns in the history. What replies of a kind add does not depend on it, and is learnt once."""
        if any(self._end in str(reply.get("content")) for reply in replies):
            return self._render(history, tools).count(self._end)
        kind = tuple((m["role"], bool(m.get("content")), bool(m.get("tool_calls"))) for m in [history[-1], *replies])
        if kind not in self._num_ends:
            self._num_ends[kind] = num_in_all - self._render(history, tools).count(self._end)
        return num_in_all - self._num_ends[kind]

    def _opening(self, item: Item) -> _Opening:
        """The item's own messages; kept, since the rollouts of a group share their item."""
        found = self._openings.get(id(item))
        if found is None:
            messages, tools = self._opening_messages(item), self._template_tools(item)
            prompt = self._render(messages, tools, prompt=True)
            # Phi-3's template closes a text that is no prompt with an end of text: only what both share comes first
            text = _shared_start(self._render(messages, tools), prompt).rstrip()
            found = _Opening(item, messages, text, self._encode(prompt))
            self._openings[id(item)] = found
            if len(self._openings) > _NUM_KEPT_OPENINGS:
                self._openings.popitem(last=False)
        return found

    def _opening_messages(self, item: Item) -> list[dict[str, Any]]:
        messages = self._row_messages(item.messages)
        if item.tools and not self.knows_tools:
            rules = _GENERIC_RULES.format(tools="\n".join(_compact_spec(tool) for tool in item.tools))
            if messages[0]["role"] not in ("system", "developer"):
                messages.insert(0, {"role": "system", "content": ""})
            messages[0] = {**messages[0], "content": (messages[0]["content"] + rules).strip()}
        for message in messages:
            if message["role"] == "developer":
                message["role"] = "system"
        roles = [message["role"] for message in messages[:2]]
        if roles == ["system", "user"] and not self._takes_system:
            system, user, *rest = messages
            return [{**user, "content": f"{system['content']}\n\n{user['content']}"}, *rest]
        return messages

    def _row_messages(self, messages: list[Message]) -> list[dict[str, Any]]:
        """A row's own messages; calls and results in its history look as they do in a rollout."""
        chat: list[dict[str, Any]] = []
        for index, message in enumerate(messages):
            if not message.tool_calls and message.role != "tool":
                chat.append(message.as_chat())
            elif self.knows_tools:
                chat.append(self._as_template_takes_it(message))
            elif message.role == "tool" and index and messages[index - 1].role == "tool":
                chat[-1]["content"] += "\n" + _generic_result(message)
            else:
                chat += self._chat_messages([message])
        return chat

    def _template_tools(self, item: Item) -> list[dict[str, Any]] | None:
        return item.tools if item.tools and self.knows_tools else None

    def _chat_messages(self, messages: list[Message]) -> list[dict[str, Any]]:
        """Messages after the row's own, as the template takes them."""
        if self.knows_tools:
            return [self._as_template_takes_it(message) for message in messages]
        chat: list[dict[str, Any]] = []
        for message in messages:
            if message.role == "assistant":
                chat.append({"role": "assistant", "content": _generic_text(message)})
                continue
            response = _generic_result(message) if message.role == "tool" else message.content
            if chat and chat[-1]["role"] == "user":
                chat[-1]["content"] += "\n" + response
            else:
                chat.append({"role": "user", "content": response})
        return chat

    def _as_template_takes_it(self, message: Message) -> dict[str, Any]:
        """With arguments as objects, which templates expect, and no more calls than the template can write."""
        calls = message.tool_calls if self._takes_many_calls else message.tool_calls[:1]
        chat = message.as_chat() | ({"tool_calls": [_with_parsed_arguments(call) for call in calls]} if calls else {})
        if self.dialect == "mistral":
            _shorten_ids(chat)
        return chat

    def _can_render_system(self) -> bool:
        """False for templates that raise at a system message, as Gemma's first one does, or leave it out."""
        marker = "rft-system-probe"
        try:
            text = self._render([{"role": "system", "content": marker}, {"role": "user", "content": "x"}])
        except Exception:  # whatever a template raises, in words of its own
            return False
        return marker in text

    def _can_render_two_calls(self) -> bool:
        """False for templates that raise at a second call in one message, as Llama 3's do."""
        if not self.knows_tools:
            return True
        call = {"id": "call00001", "type": "function", "function": {"name": "rft_probe_tool", "arguments": {}}}
        try:
            self._render(
                [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [call] * 2}]
            )
        except Exception:  # whatever a template raises, in words of its own
            return False
        return True

    def _render(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, *, prompt: bool = False
    ) -> str:
        return str(
            self.tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=prompt, tokenize=False)
        )

    def _encode(self, text: str) -> list[int]:
        found = (self._core or self.tokenizer).encode(text, add_special_tokens=False)
        ids: list[int] = found if self._core is None else found.ids
        return ids

    def _decode(self, token: int) -> str:
        return str(self.tokenizer.decode([token], skip_special_tokens=False))

    def _end_of_turn(self) -> int:
        """The id the template writes after an assistant message; the tokenizer's eos where it writes none."""
        marker = "rft-end-probe"
        text = self._render([{"role": "user", "content": "x"}, {"role": "assistant", "content": marker}])
        # the ends of turn of Gemma and Phi-3 are special tokens without a name like eos
        added = {token for token, entry in self.tokenizer.added_tokens_decoder.items() if entry.special}
        specials = added | set(self.tokenizer.all_special_ids)
        tail = self._encode(text[text.rfind(marker) + len(marker) :])
        return next((token for token in tail if token in specials), int(self.tokenizer.eos_token_id))


def split_reasoning(text: str) -> tuple[str, str]:
    """What a thinking model wrote up to the last </think>, and what follows; ("", text) where there is none."""
    reasoning, closed, answer = text.rpartition("</think>")
    return (reasoning.replace("<think>", "").strip(), answer) if closed else ("", text)


def tool_message(result: ToolResult) -> Message:
    """The message that shows a result to the model."""
    return Message(role="tool", content=result.output, tool_call_id=result.call_id)


def _compact_spec(tool: dict[str, Any]) -> str:
    """A tool in one line of JSON, without the keys that only constrain servers."""
    function = tool["function"]
    spec = {key: function[key] for key in ("name", "description") if function.get(key)}
    spec["parameters"] = function.get("parameters", {}).get("properties", {})
    required = function.get("parameters", {}).get("required")
    if required:
        spec["required"] = required
    return json.dumps(spec, ensure_ascii=False)


def _says_the_same(first: Message, second: Message) -> bool:
    """True when two messages differ in nothing but outer white space, call ids and the layout of arguments."""
    texts = [(m.content.strip(), m.reasoning.strip()) for m in (first, second)]
    calls = [[(c.name, c.error, _canonical(c)) for c in m.tool_calls] for m in (first, second)]
    return texts[0] == texts[1] and calls[0] == calls[1]


def _canonical(call: ToolCall) -> str:
    return call.arguments if call.error else json.dumps(json.loads(call.arguments))


def _generic_text(message: Message) -> str:
    calls = [
        f'<tool_call>{{"name": "{call.name}", "arguments": {call.arguments}}}</tool_call>'
        for call in message.tool_calls
    ]
    return "\n".join(filter(None, [message.content, *calls]))


def _generic_result(message: Message) -> str:
    return f"<tool_response>{message.content}</tool_response>"


def _with_parsed_arguments(call: ToolCall) -> dict[str, Any]:
    """Templates expect `arguments` as an object; a malformed call is shown as it was written."""
    chat = call.as_chat()
    try:
        chat["function"]["arguments"] = json.loads(call.arguments)
    except (ValueError, RecursionError):
        chat["function"]["arguments"] = {"malformed": call.arguments}
    return chat


def _core_of(tokenizer: Any, end: str) -> Any:
    """What encodes and decodes inside a transformers tokenizer; None where it would not say the same.

    Looking at options that are never given takes transformers three times as long as encoding a tool's result.
    """
    core, text = getattr(tokenizer, "backend_tokenizer", None), f" A\u00e9 , b ' s .\n<think>1 2</think>{end}\nuser"
    ids = tokenizer.encode(text, add_special_tokens=False)  # this also turns off what would cut or pad
    if core is None or core.encode(text, add_special_tokens=False).ids != ids:
        return None
    is_same = core.decode(ids, skip_special_tokens=False) == tokenizer.decode(ids, skip_special_tokens=False)
    return core if is_same else None


def _shared_start(one: str, other: str) -> str:
    length = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:length]


def _shorten_ids(message: dict[str, Any]) -> None:
    """Mistral's templates refuse ids of calls that are not nine letters or digits."""
    for call in message.get("tool_calls", []):
        call["id"] = _short_id(call["id"])
    if "tool_call_id" in message:
        message["tool_call_id"] = _short_id(message["tool_call_id"])


def _short_id(call_id: str) -> str:
    return hashlib.sha256(call_id.encode()).hexdigest()[:9]


def _num_replies(messages: list[Message]) -> int:
    count = 0
    while count < len(messages) and messages[-1 - count].role != "assistant":
        count += 1
    if count == 0:
        raise ValueError("a continuation needs the world's messages at the end")
    return count
