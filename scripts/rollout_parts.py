"""What scripts/bench_rollouts and scripts/simulate_scale share: a task, a collector with cheap parts, rows of a table.

Importing this is light: rft and transformers are imported when something is built.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "smollm2-135m-instruct"
CALL = '<tool_call>{"name": "search", "arguments": {"query": "acute appendicitis"}}</tool_call>'
ANSWER = "K35.80"
RESULT = "K35.80 Unspecified acute appendicitis"
SPEC = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Search the table of codes.",
        "parameters": {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]},
    },
}


@cache
def load_chat(model: Path = MODEL) -> Any:
    from rft.chat import Chat

    return Chat.from_folder(model)


def spell(chat: Any, text: str) -> list[int]:
    """The ids with which a model says the text."""
    return [*chat.tokenizer.encode(text, add_special_tokens=False), chat.end_of_turn]


def make_items(count: int) -> list[Any]:
    from rft.types import Item

    def ask(number: int) -> list[dict[str, str]]:
        text = f"Patient {number} has an acute appendicitis with generalised peritonitis and no abscess. Which code?"
        return [{"role": "user", "content": text}]

    return [
        Item.model_validate({"id": f"item-{n}", "row": {"code": ANSWER}, "messages": ask(n), "tools": [SPEC]})
        for n in range(count)
    ]


def make_collector(
    engine: Any, chat: Any, environment: Any, on_rollout: Callable[[Any], None], num_at_once: int, max_turns: int = 8
) -> Any:
    """A collector with a real chat format and a string check; engine and environment are the caller's."""
    from rft.collect import Collector
    from rft.config import RolloutConfig
    from rft.graders import build_grader
    from rft.graders.string_check import StringCheckSpec
    from rft.rollout import Workshop

    texts = {"input": "{{ sample.output_text }}", "reference": "{{ item.code }}"}
    grader = build_grader(StringCheckSpec.model_validate({"type": "string_check", **texts, "operation": "eq"}))
    limits = RolloutConfig(max_concurrent=num_at_once, max_turns=max_turns)
    return Collector(Workshop(engine, chat, environment, grader, {}, limits, 4096), "bench", 0, on_rollout)


Row = dict[str, Any]


def row(value: float, unit: str, target: float | None = None, *, is_most: bool = False) -> Row:
    """One line of the table; `is_most`: the target is the largest value that meets it, else the smallest."""
    is_met = None if target is None else (value <= target if is_most else value >= target)
    return {"value": value, "unit": unit, "target": target, "is_most": is_most, "is_met": is_met}


def print_rows(rows: dict[str, Row], width: int = 44) -> None:
    for name, line in rows.items():
        sign, target = "<=" if line["is_most"] else ">=", line["target"]
        bound = "" if target is None else f"  target {sign} {target:g}"
        print(f"{name:{width}} {line['value']:10.3f} {line['unit']:4}{bound}", flush=True)


def name_missed(script: str, rows: dict[str, Row]) -> bool:
    """Say on stderr which targets were missed; whether any was."""
    missed = {name: line for name, line in rows.items() if line["is_met"] is False}
    for name, line in missed.items():
        print(f"{script}: {name}: {line['value']:.3f}, target {line['target']:g}", file=sys.stderr)
    return bool(missed)
