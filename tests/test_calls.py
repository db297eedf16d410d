"""Tool calls in hostile text: parsing never raises, and says what was wrong."""

from __future__ import annotations

from typing import get_args

import pytest

from rft.calls import Dialect, parse_calls
from rft.types import Item

SEARCH = {"type": "function", "function": {"name": "search", "parameters": {"type": "object"}}}
ITEM = Item(id="x", row={}, messages=[], tools=[SEARCH])
FRAMES: dict[Dialect, str] = {
    "hermes": "<tool_call>%s</tool_call>",
    "llama3": "<|python_tag|>%s",
    "mistral": "[TOOL_CALLS][%s]",
}


@pytest.mark.parametrize("dialect", get_args(Dialect))
@pytest.mark.parametrize("value", ["[" * 100_000, "9" * 5_000, "NaN", '"\\ud83d"', "\0"], ids=range(5))
def test_nothing_a_model_writes_raises(dialect: Dialect, value: str) -> None:
    key = "parameters" if dialect == "llama3" else "arguments"
    text = FRAMES[dialect] % f'{{"name": "search", "{key}": {{"query": {value}}}}}'
    _, calls = parse_calls(text, dialect, ITEM, "p")
    assert len(calls) == 1
    assert calls[0].error is None or "not valid JSON" in calls[0].error


def test_a_text_of_many_unfinished_calls_is_parsed_in_linear_time() -> None:
    _, calls = parse_calls("<tool_call>" * 20_000, "hermes", ITEM, "p")
    assert len(calls) == 1 and calls[0].error == "the call does not end with </tool_call>"
