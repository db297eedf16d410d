"""A conversation as the ids its next turn is sampled after: those that training would have had.

A turn that this process sampled goes in as the ids that were sampled; any other assistant message as the ids with
which the model would have said it. What the template cannot take apart so is rendered whole.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import OrderedDict

from rft.chat import Chat
from rft.types import Item, Message

_NUM_REMEMBERED = 512


class Conversations:
    """Prompts of one model, and the turns it sampled last, by the conversation they end."""

    def __init__(self, chat: Chat) -> None:
        self._chat = chat
        self._sampled: OrderedDict[str, tuple[list[int], list[int]]] = OrderedDict()  # prompt, sampled ids

    def prompt(self, item: Item) -> list[int]:
        """The ids of all messages of `item` and of the generation prompt."""
        opening, said = _taken_apart(item)
        if said is None:
            return self._chat.first_prompt(item)
        ids: list[int] = []
        for end in _turn_ends(said):
            before, message = said[:end], said[end]
            prompt, sampled = self._sampled.get(_key(opening, said[: end + 1]), (None, None))
            if prompt is None or sampled is None:
                prompt = ids or self._chat.first_prompt(opening)
                is_broken = any(call.error for call in message.tool_calls)
                sampled = None if is_broken else self._chat.spell(opening, [*before, message])
            if sampled is None:
                return self._chat.first_prompt(item)
            until = next((i for i in range(end + 1, len(said)) if said[i].role == "assistant"), len(said))
            more = self._chat.continuation(opening, said[:until], sampled)
            ids = more.ids if more.is_fork else [*prompt, *sampled, *more.ids]
        return ids or self._chat.first_prompt(opening)

    def remember(self, item: Item, message: Message, prompt: list[int], sampled: list[int]) -> None:
        """That the model said `message` with the ids `sampled` after `prompt`, which is the prompt of `item`."""
        opening, said = _taken_apart(item)
        if said is None:
            return
        self._sampled[_key(opening, [*said, message])] = (prompt, sampled)
        while len(self._sampled) > _NUM_REMEMBERED:
            self._sampled.popitem(last=False)


def _taken_apart(item: Item) -> tuple[Item, list[Message] | None]:
    """What stood before the model's first turn, and what followed; None where that is no sequence of turns."""
    roles = [message.role for message in item.messages]
    first = roles.index("assistant") if "assistant" in roles else len(roles)
    opening = item.model_copy(update={"messages": item.messages[:first]})
    said = item.messages[first:]
    is_odd = (
        first == 0
        or roles[-1] == "assistant"
        or any(message.role in ("system", "developer") for message in said)
        or any(one == other == "assistant" for one, other in itertools.pairwise(roles))
    )
    return opening, None if is_odd else said


def _turn_ends(said: list[Message]) -> list[int]:
    return [index for index, message in enumerate(said) if message.role == "assistant"]


def _key(opening: Item, said: list[Message]) -> str:
    """Two conversations that say the same have one; what was thought and how arguments are laid out do not count."""
    messages = [
        (m.role, m.content.strip(), [(c.name, _plain(c.arguments), c.call_id) for c in m.tool_calls], m.tool_call_id)
        for m in [*opening.messages, *said]
    ]
    text = json.dumps([messages, opening.tools], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(arguments: str) -> str:
    try:
        return json.dumps(json.loads(arguments), sort_keys=True)
    except (ValueError, RecursionError):
        return arguments
