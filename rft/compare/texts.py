"""Whether two sides mean the same by an item's id: what the items say, from the data files and the prompts."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rft.files import parsed
from rft.store import RunStore
from rft.types import Rollout, Split

_MAX_SHOWN = 160  # characters of an item in a table


@dataclass(frozen=True, slots=True)
class ItemText:
    """What is known of an item: `messages` of the data file, as JSON; `prompt` ids, with the model they are ids of."""

    messages: str | None
    shown: str
    model: str
    prompt: tuple[int, ...]


def item_texts(
    store: RunStore, config: dict[str, Any], split: Split, items: dict[str, list[Rollout]]
) -> dict[str, ItemText]:
    """For every item. A data file that was changed after the run began says nothing of it."""
    rows = _rows(store, config, split, items.keys())
    section = config.get("model")
    model = str(section.get("path", "")) if isinstance(section, dict) else ""
    found = {}
    for item_id, rollouts in items.items():
        messages = rows.get(item_id, {}).get("messages")
        prompt = next((tuple(rollout.turns[0].input_ids) for rollout in rollouts if rollout.turns), ())
        text = None if messages is None else json.dumps(messages, sort_keys=True)
        found[item_id] = ItemText(text, _last_content(messages)[:_MAX_SHOWN], model, prompt)
    return found


def is_same(first: ItemText, other: ItemText) -> bool | None:
    """Whether both ask the same; None when neither the data nor the prompts can tell."""
    if first.prompt and first.prompt == other.prompt:
        return True
    if first.messages is not None and other.messages is not None:
        return first.messages == other.messages
    if first.prompt and other.prompt and first.model == other.model:
        return False  # ids of one tokenizer: the same text would be the same ids
    return None


def _rows(store: RunStore, config: dict[str, Any], split: Split, wanted: Collection[str]) -> dict[str, dict[str, Any]]:
    data = config.get("data")
    path = Path(str(data.get(split))) if isinstance(data, dict) and data.get(split) else None
    try:
        if path is None or path.stat().st_mtime > (store.path / "config.json").stat().st_mtime:
            return {}
        with path.open("rb") as file:
            named = ((f"{path.stem}-{number:05d}", line) for number, line in enumerate(file, 1))
            return {item_id: row for item_id, line in named if item_id in wanted and (row := parsed(line))}
    except (OSError, ValueError):  # gone, or no path at all
        return {}


def _last_content(messages: Any) -> str:
    """The text of the last message, "" where there is none of that shape."""
    last = messages[-1] if isinstance(messages, list) and messages else None
    content = last.get("content") if isinstance(last, dict) else None
    return content if isinstance(content, str) else ""
