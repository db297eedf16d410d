"""Rows of a HealthBench file: conversations that physicians marked as lacking context, with that criterion.

Reads the published JSONL (one object with `prompt` and `rubrics` a line) and the JSON of results that the guide loads
(`metadata.example_level_metadata`, with `rubric_items`). Its rows must not be published: nothing here ships any, and
none is printed. Split by a hash of the conversation, so that a row stays in its split when the file grows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rft.errors import DataError
from rft.types import Split

CRITERION = "seeks additional context to reduce uncertainty"  # how the guide's criterion begins
_ROLES = ("system", "developer", "user", "assistant")


def load_healthbench(path: Path) -> dict[Split, list[dict[str, Any]]]:
    """The rows that carry the criterion, by split: `messages`, `rubric`, `source`. Raises DataError."""
    rows: dict[Split, list[dict[str, Any]]] = {"train": [], "validation": [], "test": []}
    for number, example in _examples(path):
        row = _row(example, f"{path}:{number}")
        if row is not None:
            rows[_split_of(row["source"])].append(row)
    if not any(rows.values()):
        raise DataError(
            f'no row has a criterion with "{CRITERION}"', where=str(path), cure="give HealthBench's JSONL, or results"
        )
    return rows


def _examples(path: Path) -> Iterator[tuple[int, Any]]:
    """(number, example): lines of JSONL, or entries of the one object that holds results."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read: {error}", where=str(path), cure="check the path") from None
    try:
        whole = json.loads(text)
    except ValueError:
        whole = None
    if isinstance(whole, dict) and "metadata" in whole:
        metadata = whole["metadata"]
        found = metadata.get("example_level_metadata") if isinstance(metadata, dict) else None
        if not isinstance(found, list):
            raise DataError("metadata holds no example_level_metadata", where=str(path), cure="give a results file")
        yield from enumerate(found, 1)
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                cure = "write one JSON object per line"
                raise DataError(f"is not JSON: {error}", where=f"{path}:{number}", cure=cure) from None


def _row(example: Any, where: str) -> dict[str, Any] | None:
    """The row of one example; None without the criterion. Raises DataError naming the line."""
    cure = 'a row is {"prompt": [{"role", "content"}, ...], "rubrics": [{"criterion", ...}, ...]}'
    if not isinstance(example, dict):
        raise DataError("is not a JSON object", where=where, cure=cure)
    rubrics, prompt = example.get("rubrics", example.get("rubric_items")), example.get("prompt")
    if not isinstance(rubrics, list) or not isinstance(prompt, list) or not prompt:
        raise DataError("has no prompt or no rubrics", where=where, cure=cure)
    criteria = [str(rubric.get("criterion", "")) for rubric in rubrics if isinstance(rubric, dict)]
    rubric = next((" ".join(text.split()) for text in criteria if CRITERION in " ".join(text.lower().split())), None)
    if rubric is None:
        return None
    messages = [_message(message, where, cure) for message in prompt]
    if messages[-1]["role"] != "user":
        raise DataError("prompt does not end with the user", where=where, cure=cure)
    source = str(example.get("prompt_id") or hashlib.sha256(json.dumps(messages).encode()).hexdigest()[:32])
    return {"messages": messages, "rubric": rubric, "source": source}


def _message(message: Any, where: str, cure: str) -> dict[str, str]:
    if (
        not isinstance(message, dict)
        or message.get("role") not in _ROLES
        or not isinstance(message.get("content"), str)
    ):
        raise DataError("prompt holds something that is no message", where=where, cure=cure)
    return {"role": message["role"], "content": message["content"]}


def _split_of(source: str) -> Split:
    """80 / 10 / 10 by the hash of the source."""
    place = int(hashlib.sha256(source.encode()).hexdigest(), 16) % 10
    return "validation" if place == 8 else "test" if place == 9 else "train"
