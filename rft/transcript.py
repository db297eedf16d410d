"""One rollout as a person reads it: the prompt, every turn with its calls and answers, the grade.

What a model or a tool wrote is indented behind a bar and has no control characters, so it can imitate nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from rft.plain import plain
from rft.store import RunStore
from rft.types import Grade, Rollout, ToolCall, ToolResult, Turn

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def transcript(rollout: Rollout, prompt: str) -> Iterator[str]:
    """The lines. prompt: the text that the first turn continues."""
    place = f"{rollout.split}, step {rollout.step}, attempt {rollout.attempt}"
    yield f"{_line(rollout.id)}: item {_line(rollout.item_id)}, {place}"
    yield (
        f"ended by {rollout.stop_reason.value} after {len(rollout.turns)} turns, {len(rollout.tool_calls)} calls,"
        f" {rollout.num_sampled_tokens} sampled tokens, {rollout.duration_s:.2f} s"
    )
    if rollout.error:
        yield "error"
        yield from _quoted(rollout.error)
    yield "prompt"
    yield from _quoted(prompt)
    for number, turn in enumerate(rollout.turns, 1):
        yield from _turn(number, turn)
    if rollout.environment:
        yield "the environment says"
        yield from _quoted(json.dumps(rollout.environment, ensure_ascii=False))
    if rollout.grade is None:
        yield "no grade"
    else:
        yield from _grade("grade", rollout.grade)


def _turn(number: int, turn: Turn) -> Iterator[str]:
    cut = ", cut off by its limit" if turn.finish_reason == "length" else ""
    fork = ", the history was rendered anew" if turn.is_fork else ""
    yield (
        f"turn {number}: {turn.num_output_tokens} tokens in {turn.sampled_s:.2f} s,"
        f" policy version {turn.policy_version}{cut}{fork}"
    )
    if turn.message.reasoning:
        yield "  it thought"
        yield from _quoted(turn.message.reasoning)
    if turn.message.content:
        yield from _quoted(turn.message.content)
    results = {result.call_id: result for result in turn.results}
    for call in turn.message.tool_calls:
        yield from _call(call, results.get(call.call_id))
    for reply in turn.replies:
        yield f"  the environment answers, as {reply.role}"
        yield from _quoted(reply.content)


def _call(call: ToolCall, result: ToolResult | None) -> Iterator[str]:
    yield f"  calls {_line(call.name)} ({_line(call.call_id)})" + (
        f", malformed: {_line(call.error)}" if call.error else ""
    )
    yield from _quoted(call.arguments)
    if result is None:
        yield "  no answer: the rollout ended before"
        return
    attempts = f", {result.num_attempts} attempts" if result.num_attempts > 1 else ""
    yield f"  {'error' if result.is_error else 'answer'} after {result.latency_s:.3f} s{attempts}"
    yield from _quoted(result.output)


def _grade(name: str, grade: Grade, indent: str = "") -> Iterator[str]:
    cached = ", from the cache" if grade.is_cached else f", {grade.latency_s:.3f} s"
    yield f"{indent}{_line(name)} {grade.score:g}{cached}"
    for flag, detail in grade.errors.items():
        yield f"{indent}  {_line(flag)}"
        yield from _quoted(detail)
    for key, part in grade.parts.items():
        yield from _grade(f"part {key}", part, indent + "  ")
    for key, score in grade.shadow.items():
        yield f"{indent}  shadow {_line(key)} {score:g}"
    for key, problem in grade.shadow_errors.items():
        yield f"{indent}  shadow {_line(key)} failed: {_line(problem)}"


def _line(text: str) -> str:
    return plain(text)


def _quoted(text: str) -> Iterator[str]:
    yield from (f"    | {line}" for line in plain(text, keep="\n\t").split("\n"))


def prompt_of(rollout: Rollout, store: RunStore, config: dict[str, Any]) -> str:
    """The first prompt as text, read with the tokenizer of the config's model; without that, how long it is."""
    if not rollout.turns:
        return "(nothing was sampled)"
    if rollout.turns[0].usage is not None:
        return "(the model was asked with messages over a chat API: the item has them)"
    ids = rollout.turns[0].input_ids
    model = config.get("model")
    places = store.places(str(model.get("path", "")) if isinstance(model, dict) else "")
    files = [place / "tokenizer.json" for place in places]
    path = next((file for file in files if file.is_file()), files[-1])
    try:
        text: str = _tokenizer(path).decode(ids, skip_special_tokens=False)
        return text
    except Exception as error:  # tokenizers raises bare Exceptions; the rest of the rollout is worth showing anyway
        return f"({len(ids)} tokens; {path} cannot be read: {error})"


@lru_cache(maxsize=2)
def _tokenizer(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(path))


def as_text(lines: Iterable[str]) -> Text:
    """A transcript for a terminal: its headings stand out from what was written by others."""
    text = Text()
    for line in lines:
        text.append(line + "\n", style="" if line.lstrip().startswith("|") else _heading_style(line.strip()))
    return text


def _heading_style(line: str) -> str:
    is_bad = line.startswith("error") or ", malformed" in line or ", cut off" in line
    return "bold red" if is_bad else "bold cyan"
