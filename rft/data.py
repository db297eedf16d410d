"""Dataset rows: JSONL files -> Items, and which items a step works on.

Guarantees: a row is accepted whole or the error names file, line, field and cure (up to ten problems at once); the
order is a pure function of (seed, step), so that a resumed run needs no state. Does not look inside free fields.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, NoReturn, TypeVar, get_args

from rft.errors import DataError
from rft.types import Item, Message, Role, ToolCall

MAX_PROBLEMS = 10
_ROLES = get_args(Role)
_TEXT_BLOCKS = ("text", "input_text", "output_text")
_MESSAGE_KEYS = {"role", "content", "name", "tool_calls", "tool_call_id"}
_ENDS: dict[str, tuple[tuple[str, ...], str]] = {  # who may speak last in a row, and the cure
    "user": (("user", "developer"), "end the row with the user's message; the model writes what follows"),
    "assistant": (("assistant",), "end the row with what the model is to say"),
}
ToolSpecs = Mapping[str, dict[str, Any] | None]  # name -> its entry in a row's `tools`; None: only rows know it
Parsed = TypeVar("Parsed")


@dataclass(slots=True)
class Problems:
    """What is wrong with one line; every problem names its field and its cure."""

    line: int
    found: list[tuple[int, str, str, str]] = field(default_factory=list)  # line, field, problem, cure

    def add(self, path: str, problem: str, cure: str) -> None:
        self.found.append((self.line, path, problem, cure))


@dataclass(frozen=True, slots=True)
class Looked(Generic[Parsed]):
    """One line of a file: its object (None: it holds none), what was made of it, and what is wrong with it."""

    row: dict[str, Any] | None
    value: Parsed | None
    found: list[tuple[int, str, str, str]]  # line, field, problem, cure


def load_items(path: Path, tool_specs: ToolSpecs | None) -> list[Item]:
    """The rows of a JSONL file as Items with ids `<file stem>-<line number>`; blank lines are skipped.

    tool_specs: the tools that the environment serves, by name; a row may name no others, and one without the key
    `tools` gets all whose spec is known. None skips that check. Raises DataError.
    """
    return load_rows(path, lambda row, item_id, problems: parse_item(row, item_id, tool_specs, problems))


def load_rows(path: Path, parse: Callable[[dict[str, Any], str, Problems], Parsed | None]) -> list[Parsed]:
    """What `parse` makes of every row, given the id of its item; it adds what is wrong to `problems`.

    Raises DataError with up to ten problems at once, also for a file without rows.
    """
    parsed: list[Parsed] = []
    found: list[tuple[int, str, str, str]] = []
    for looked in look_through(path, parse):
        found += looked.found
        if looked.value is not None:
            parsed.append(looked.value)
        if len(found) >= MAX_PROBLEMS:
            break
    if found:
        _refuse(path, found[:MAX_PROBLEMS])
    if not parsed:
        raise DataError("the file has no rows", where=str(path), cure="write one JSON object per line")
    return parsed


def look_through(
    path: Path, parse: Callable[[dict[str, Any], str, Problems], Parsed | None]
) -> Iterator[Looked[Parsed]]:
    """What `load_rows` makes of every row, the wrong ones too. Raises DataError for a file that cannot be read."""
    for line, raw in _lines(path):
        problems = Problems(line)
        row = _decode(raw, problems)
        value = parse(row, f"{path.stem}-{line:05d}", problems) if row is not None else None
        yield Looked(row, value, problems.found)


def items_for_step(items: list[Item], step: int, items_per_step: int, seed: int) -> list[Item]:
    """The items of 0-based `step`: a slice of seeded epochs laid end to end, each a permutation of `items`.

    With at least `items_per_step` items no step holds an item twice, also where it crosses into a new epoch.
    """
    num_items, start = len(items), step * items_per_step
    first = start // num_items
    order: list[int] = []
    chosen: list[Item] = []
    for epoch in range((start + items_per_step - 1) // num_items + 1):
        order = _epoch_order(epoch, order, num_items, items_per_step, seed)
        if epoch >= first:
            begin = max(0, start - epoch * num_items)
            end = min(num_items, start + items_per_step - epoch * num_items)
            chosen += [items[index] for index in order[begin:end]]
    return chosen


def further_items(items: list[Item], taken: list[Item], step: int, seed: int) -> Iterator[Item]:
    """Items beyond those `taken` by 0-based `step`, each once, in an order seeded by the step."""
    held = {item.id for item in taken}
    others = [item for item in items if item.id not in held]
    random.Random(f"{seed}:further:{step}").shuffle(others)
    yield from others


def overlap(first: list[Item], second: list[Item]) -> int:
    """How many items of `second` have the same messages as some item of `first`: worth a warning when not 0."""
    known = {_messages_key(item) for item in first}
    return sum(_messages_key(item) in known for item in second)


def _messages_key(item: Item) -> str:
    return json.dumps([message.model_dump() for message in item.messages], sort_keys=True)


def _epoch_order(epoch: int, previous: list[int], num_items: int, items_per_step: int, seed: int) -> list[int]:
    """The permutation of an epoch; what the last step of `previous` already holds cannot complete that step."""
    order = list(range(num_items))
    random.Random(f"{seed}:{epoch}").shuffle(order)
    num_held = (epoch * num_items) % items_per_step
    if num_held == 0 or num_items < items_per_step:
        return order
    held = set(previous[-num_held:])
    head = [index for index in order if index not in held][: items_per_step - num_held]
    taken = set(head)
    return head + [index for index in order if index not in taken]


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered non-blank lines as bytes: only a newline ends a line, whatever Unicode a string contains."""
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                line = raw.removeprefix(b"\xef\xbb\xbf").strip() if number == 1 else raw.strip()
                if line:
                    yield number, line
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise DataError(f"cannot be read: {reason}", where=str(path), cure="check the path") from None


def _refuse(path: Path, found: list[tuple[int, str, str, str]]) -> NoReturn:
    if len(found) == 1:
        line, name, problem, cure = found[0]
        raise DataError(problem, where=f"{path}:{line}: {name}", cure=cure, found=tuple(found))
    lines = [f"{path}:{line}: {name}: {problem} (cure: {cure})" for line, name, problem, cure in found]
    more = f"the first {len(found)}" if len(found) == MAX_PROBLEMS else str(len(found))
    text = f"{more} problems:\n  " + "\n  ".join(lines)
    raise DataError(text, where=str(path), cure="fix the rows and start again", found=tuple(found))


def parse_item(
    row: dict[str, Any],
    item_id: str,
    tool_specs: ToolSpecs | None,
    problems: Problems,
    *,
    ends_with: Literal["user", "assistant"] = "user",
) -> Item | None:
    """The row as an item; None when anything was added to `problems`."""
    messages = _parse_messages(row.get("messages"), problems, ends_with)
    tools = _parse_tools(row.get("tools"), tool_specs, problems)
    parallel = row.get("parallel_tool_calls")
    if parallel is not None and not isinstance(parallel, bool):
        problems.add("parallel_tool_calls", "must be true or false", "drop the key for true")
    if problems.found:
        return None
    return Item(id=item_id, row=row, messages=messages, tools=tools, parallel_tool_calls=parallel is not False)


def _decode(raw: bytes, problems: Problems) -> dict[str, Any] | None:
    cure = "write one JSON object per line, in UTF-8"
    try:
        row = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant)
        # a lone surrogate escape is legal JSON that no tool, grader or file can encode
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        problems.add("row", f"is not UTF-8 (byte {error.start})", cure)
    except UnicodeEncodeError:
        problems.add("row", "contains half of a surrogate pair (\\ud800..\\udfff)", "remove the broken character")
    except json.JSONDecodeError as error:
        problems.add("row", f"is not JSON: {error.msg} at column {error.colno}", cure)
    except (ValueError, RecursionError) as error:
        problems.add("row", f"is not JSON: {error}", cure)
    else:
        if isinstance(row, dict):
            return row
        problems.add("row", f"is a JSON {_kind(row)}, not an object", cure)
    return None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _kind(value: Any) -> str:
    names = {list: "array", str: "string", bool: "boolean", int: "number", float: "number", type(None): "null"}
    return names.get(type(value), "object")


def _parse_messages(value: Any, problems: Problems, ends_with: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        problem = "is missing" if value is None else "must be a non-empty list"
        problems.add("messages", problem, 'write "messages": [{"role": "user", "content": "..."}]')
        return []
    messages = [_parse_message(message, f"messages[{index}]", problems) for index, message in enumerate(value)]
    last = value[-1].get("role") if isinstance(value[-1], dict) else None
    roles, cure = _ENDS[ends_with]
    if last in _ROLES and last not in roles:
        problem = f"the last message is from {last}, not from {ends_with}"
        problems.add(f"messages[{len(value) - 1}].role", problem, cure)
    return [message for message in messages if message is not None]


def _parse_message(value: Any, path: str, problems: Problems) -> Message | None:
    if not isinstance(value, dict):
        problems.add(path, f"is a JSON {_kind(value)}, not an object", 'write {"role": ..., "content": ...}')
        return None
    num_before = len(problems.found)
    role = value.get("role")
    if role not in _ROLES:
        problems.add(f"{path}.role", f"is {json.dumps(role)}", f"use one of {', '.join(_ROLES)}")
    for key in sorted(key for key, part in value.items() if key not in _MESSAGE_KEYS and part is not None):
        problems.add(f"{path}.{key}", "is not a key of a message", "remove it, or move it to the top of the row")
    for key in ("name", "tool_call_id"):
        if not isinstance(value.get(key), str | None):
            problems.add(f"{path}.{key}", "must be a string", "write a string or drop the key")
    calls = _parse_calls(value.get("tool_calls"), f"{path}.tool_calls", problems)
    content = _parse_content(value.get("content"), f"{path}.content", bool(calls), problems)
    if role not in _ROLES or len(problems.found) > num_before:
        return None
    name, call_id = value.get("name"), value.get("tool_call_id")
    return Message(role=role, content=content, name=name, tool_calls=calls, tool_call_id=call_id)


def _parse_content(value: Any, path: str, may_be_null: bool, problems: Problems) -> str:
    """Text, or a list of text blocks whose texts are joined."""
    if isinstance(value, str):
        return value
    if value is None and may_be_null:
        return ""
    if isinstance(value, list):
        return "".join(_parse_block(block, f"{path}[{index}]", problems) for index, block in enumerate(value))
    problem = "is missing" if value is None else f"is a JSON {_kind(value)}, not text"
    problems.add(path, problem, "write a string or a list of text blocks")
    return ""


def _parse_block(block: Any, path: str, problems: Problems) -> str:
    kind = block.get("type") if isinstance(block, dict) else _kind(block)
    if kind not in _TEXT_BLOCKS or not isinstance(block.get("text"), str):
        cure = 'only text is trained on: {"type": "text", "text": "..."}'
        problems.add(path, f"is not a text block (type {json.dumps(kind)})", cure)
        return ""
    text: str = block["text"]
    return text


def _parse_calls(value: Any, path: str, problems: Problems) -> list[ToolCall]:
    """Calls in a row's own history, in the shape of chat-completions."""
    if value is None:
        return []
    try:
        return [
            ToolCall(
                id=call.get("id") or f"fc_{index}",
                call_id=call.get("id") or f"call_{index}",
                name=call["function"]["name"],
                arguments=call["function"]["arguments"],
            )
            for index, call in enumerate(value)
        ]
    except (AttributeError, KeyError, TypeError, ValueError):
        cure = 'write [{"id": ..., "type": "function", "function": {"name": ..., "arguments": "<JSON string>"}}]'
        problems.add(path, "is not a list of tool calls", cure)
        return []


def _parse_tools(value: Any, tool_specs: ToolSpecs | None, problems: Problems) -> list[dict[str, Any]]:
    if value is None:
        return [spec for spec in (tool_specs or {}).values() if spec is not None]
    if not isinstance(value, list):
        problems.add("tools", f"is a JSON {_kind(value)}, not a list", "write a list of function tools")
        return []
    seen: set[str] = set()
    for index, tool in enumerate(value):
        name = _parse_tool(tool, f"tools[{index}]", problems)
        if name is None:
            continue
        if name in seen:
            problems.add(f"tools[{index}].function.name", f"{name} appears twice", "give every tool its own name")
        elif tool_specs is not None and name not in tool_specs:
            problems.add(f"tools[{index}].function.name", f"{name} has no endpoint", "add it to environment.tools")
        seen.add(name)
    return value


def _parse_tool(tool: Any, path: str, problems: Problems) -> str | None:
    """The tool's name when it is well-formed."""
    cure = 'write {"type": "function", "function": {"name": ..., "description": ..., "parameters": {...}}}'
    if not isinstance(tool, dict) or tool.get("type") != "function" or not isinstance(tool.get("function"), dict):
        problems.add(path, "is not a function tool", cure)
        return None
    function = tool["function"]
    name, parameters = function.get("name"), function.get("parameters", {})
    if not isinstance(name, str) or not name:
        problems.add(f"{path}.function.name", "must be a non-empty string", cure)
        return None
    if not isinstance(parameters, dict) or parameters.get("type", "object") != "object":
        problems.add(f"{path}.function.parameters", 'must be a JSON schema of type "object"', cure)
        return None
    if not isinstance(function.get("description"), str | None):
        problems.add(f"{path}.function.description", "must be a string", cure)
        return None
    return name
