"""Demonstrations: what a warm-up learns from, as the training sequences that rollouts saying the same would leave.

From a file (the format of OpenAI's chat fine-tuning) or from the graded rollouts of a run. The model's own messages
carry the loss, their ends of turn included; nothing else does. A mistake in a file is a DataError naming its line.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from rft.chat import Chat, tool_message
from rft.data import Problems, ToolSpecs, load_rows, parse_item
from rft.errors import UserError
from rft.store import RunStore
from rft.types import Item, Message, Rollout, Sequence, StopReason, ToolCall, ToolResult, Turn

_CALL_CURE = "write the call as the model is to make it, with the tools of this row"


@dataclass(frozen=True, slots=True)
class Demonstration:
    """One example: several sequences where the chat template makes a rollout fork."""

    item_id: str
    where: str  # for a person: file:line, or the rollout's id
    sequences: list[Sequence]

    @property
    def num_tokens(self) -> int:
        """Of its longest sequence."""
        return max(len(sequence.ids) for sequence in self.sequences)


@dataclass(frozen=True, slots=True)
class _Dialogue:
    """A row: what the model is asked, what follows, and which of the messages that follow are learnt."""

    item: Item
    messages: list[Message]
    is_learnt: list[bool]
    first: int  # the place of `messages[0]` in the row


def load_demonstrations(path: Path, tool_specs: ToolSpecs | None, chat: Chat) -> list[Demonstration]:
    """The demonstrations of a JSONL file: rows as for training whose messages go on and end with the assistant's.

    The messages up to the last one of the user are the prompt; what the assistant says after it is learnt.
    `"weight": 1` on an earlier assistant message makes it learnt too, `"weight": 0` on a later one not;
    `reasoning_content` is what a thinking model thinks first. Raises DataError with up to ten problems at once.
    """

    def parse(row: dict[str, Any], item_id: str, problems: Problems) -> Demonstration | None:
        dialogue = _dialogue(row, item_id, tool_specs, problems)
        turns = _turns(dialogue, chat, problems) if dialogue is not None else []
        if problems.found:
            return None
        return Demonstration(item_id, f"{path}:{problems.line}", _sequences(item_id, turns))

    return load_rows(path, parse)


def demonstrations_of_run(store: RunStore, min_grade: float, chat: Chat) -> list[Demonstration]:
    """The training rollouts of a run whose grade is at least `min_grade`, as they were sampled, each text once.

    Raises UserError when the run sampled with another tokenizer, or has no such rollouts.
    """
    _check_tokenizer(store, chat)
    found: dict[str, Demonstration] = {}
    best: float | None = None
    for rollout in store.rollouts(split="train"):
        if rollout.grade is None or not any(turn.output_ids for turn in rollout.turns):
            continue
        best = rollout.grade.score if best is None else max(best, rollout.grade.score)
        if rollout.grade.score >= min_grade:
            sequences = [sequence for sequence in rollout.sequences if any(sequence.mask)]
            key = json.dumps([sequence.ids for sequence in sequences])
            found.setdefault(key, Demonstration(rollout.item_id, rollout.id, sequences))
    if not found:
        best_is = f"the best is {best:g}" if best is not None else "the run has no graded training rollouts"
        raise UserError(
            f"no training rollout has a grade of {min_grade:g}; {best_is}",
            where=f"warmup.from_run: {store.path}",
            cure="lower warmup.min_grade, or name another run",
        )
    return list(found.values())


def _check_tokenizer(store: RunStore, chat: Chat) -> None:
    """Ids mean something in one vocabulary only."""
    other = Path(str(store.config().get("model", {}).get("path", "")))
    if Chat.from_folder(other).tokenizer.get_vocab() != chat.tokenizer.get_vocab():
        raise UserError(
            f"the run sampled with another tokenizer ({other})",
            where=f"warmup.from_run: {store.path}",
            cure="name a run of this model, or give warmup.demonstrations",
        )


# --- a row of a file ---


def _dialogue(row: dict[str, Any], item_id: str, tool_specs: ToolSpecs | None, problems: Problems) -> _Dialogue | None:
    raw = row.get("messages")
    spoken = raw if isinstance(raw, list) else []
    extras = [_take_extras(message, index, problems) for index, message in enumerate(spoken)]
    plain = {**row, "messages": [message for message, _, _ in extras]} if extras else row
    item = parse_item(plain, item_id, tool_specs, problems, ends_with="assistant")
    if item is None:
        return None
    messages = [
        message.model_copy(update={"reasoning": reasoning}) if reasoning else message
        for message, (_, _, reasoning) in zip(item.messages, extras, strict=True)
    ]
    weights = [weight for _, weight, _ in extras]
    is_user = [message.role in ("user", "developer") for message in messages]
    after_user = len(is_user) - is_user[::-1].index(True) if any(is_user) else 0
    is_learnt = [
        message.role == "assistant" and (weight == 1 or (weight is None and index >= after_user))
        for index, (message, weight) in enumerate(zip(messages, weights, strict=True))
    ]
    if not any(is_learnt):
        problems.add("messages", "no assistant message is learnt from", "give one of them weight 1")
        return None
    learnt = is_learnt.index(True)
    first = learnt - is_user[:learnt][::-1].index(True) if any(is_user[:learnt]) else 0
    if first == 0:
        problems.add("messages", "the model speaks first", "begin with what the user says")
        return None
    dialogue = _Dialogue(
        item.model_copy(update={"messages": messages[:first]}), messages[first:], is_learnt[first:], first
    )
    _check_calls(dialogue, problems)
    return None if problems.found else dialogue


def _take_extras(message: Any, index: int, problems: Problems) -> tuple[Any, int | None, str]:
    """A message without the keys that only demonstrations have, its weight, and its reasoning."""
    if not isinstance(message, dict) or message.get("role") != "assistant":
        return message, None, ""
    rest = {key: value for key, value in message.items() if key not in ("weight", "reasoning_content")}
    weight, reasoning = message.get("weight"), message.get("reasoning_content") or ""
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        problems.add(f"messages[{index}].weight", "must be 0 or 1", "drop the key to learn the message")
    if not isinstance(reasoning, str):
        problems.add(f"messages[{index}].reasoning_content", "must be a string", "write a string or drop the key")
    return rest, weight, reasoning if isinstance(reasoning, str) else ""


def _check_calls(dialogue: _Dialogue, problems: Problems) -> None:
    """Every call is one that a rollout could make, and has its result before anything else is said."""
    open_ids: list[str] = []
    previous = "user"
    for index, message in enumerate(dialogue.messages, dialogue.first):
        path = f"messages[{index}]"
        if message.role == "tool" and message.tool_call_id in open_ids:
            open_ids.remove(str(message.tool_call_id))
        elif message.role == "tool":
            problems.add(f"{path}.tool_call_id", "is not the id of a call just made", "repeat the id of the call")
        elif open_ids:
            problems.add(path, f"the call {open_ids[0]} has no result", "put a tool message after the call")
            open_ids = []
        elif message.role == previous == "assistant":
            problems.add(path, "the assistant speaks twice in a row", "join the two messages")
        if message.role == "assistant":
            open_ids = [call.call_id for call in message.tool_calls]
            _check_call_texts(message, path, dialogue.item, problems)
        previous = message.role


def _check_call_texts(message: Message, path: str, item: Item, problems: Problems) -> None:
    if len({call.call_id for call in message.tool_calls}) < len(message.tool_calls):
        problems.add(f"{path}.tool_calls", "two calls have one id", "give every call an id of its own")
    if len(message.tool_calls) > 1 and not item.parallel_tool_calls:
        problems.add(f"{path}.tool_calls", "only one call per turn is allowed", "drop parallel_tool_calls: false")
    for number, call in enumerate(message.tool_calls):
        here = f"{path}.tool_calls[{number}].function"
        if call.name not in item.tool_names:
            names = ", ".join(item.tool_names) or "none"
            problems.add(
                f"{here}.name", f"there is no tool {json.dumps(call.name)}; the tools are: {names}", _CALL_CURE
            )
        if not _is_json_object(call.arguments):
            problems.add(f"{here}.arguments", "is not a JSON object in a string", _CALL_CURE)


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


# --- a row as the turns of a rollout ---


def _turns(dialogue: _Dialogue, chat: Chat, problems: Problems) -> list[Turn]:
    """What a rollout that says the same would have recorded; nothing, with a problem added, where none could."""
    try:
        return _played(dialogue, chat, problems)
    except TemplateError as error:
        cure = "write the messages in an order that the model's template takes"
        problems.add("messages", f"the model's chat template refuses them: {error}", cure)
        return []


def _played(dialogue: _Dialogue, chat: Chat, problems: Problems) -> list[Turn]:
    """The dialogue, said again: an assistant message that is not learnt becomes part of the next turn's input."""
    item = dialogue.item
    turns: list[Turn] = []
    said: list[Message] = []
    pending, is_fork = chat.first_prompt(item), False
    for index, (message, is_learnt) in enumerate(zip(dialogue.messages, dialogue.is_learnt, strict=True)):
        if message.role != "assistant":
            continue
        ids = chat.spell(item, [*said, message])
        if ids is None:
            cure = "reword it: without the marks that the model's format uses, and its calls under tool_calls"
            problem = "would not be read back as it is written"
            problems.add(f"messages[{dialogue.first + index}]", problem, cure)
            return []
        parsed = chat.parse(ids, item, f"{item.id[-16:]}_{index}")
        if is_learnt:
            turns.append(_turn(pending, ids, parsed, is_fork))
            pending, is_fork = [], False
        else:
            pending = pending + ids
        replies = _replies(dialogue.messages, index, parsed.tool_calls)
        said += [parsed, *replies]
        if replies:
            continuation = chat.continuation(item, said, ids)
            is_fork = is_fork or continuation.is_fork
            pending = continuation.ids if continuation.is_fork else pending + continuation.ids
    return turns


def _replies(messages: list[Message], index: int, calls: list[ToolCall]) -> list[Message]:
    """The world's messages after `messages[index]`: results in the order of their calls, then what else was said."""
    following: list[Message] = []
    for message in messages[index + 1 :]:
        if message.role == "assistant":
            break
        following.append(message)
    results = {message.tool_call_id: message.content for message in following if message.role == "tool"}
    by_call = zip(messages[index].tool_calls, calls, strict=True)
    told = [
        tool_message(ToolResult(call_id=new.call_id, output=results[old.call_id])) for old, new in by_call if results
    ]
    return told + [message for message in following if message.role != "tool"]


def _turn(input_ids: list[int], output_ids: list[int], message: Message, is_fork: bool) -> Turn:
    return Turn(
        input_ids=input_ids,
        output_ids=output_ids,
        logprobs=[0.0] * len(output_ids),
        finish_reason="stop",
        policy_version=0,
        message=message,
        is_fork=is_fork,
    )


def _sequences(item_id: str, turns: list[Turn]) -> list[Sequence]:
    rollout = Rollout(
        id="demonstration",
        item_id=item_id,
        split="train",
        step=0,
        attempt=0,
        seed=0,
        turns=turns,
        stop_reason=StopReason.ANSWERED,
        started_at=0.0,
        duration_s=0.0,
    )
    return rollout.sequences
