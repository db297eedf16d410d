"""Dataset rows: what is accepted, how errors read, and the order of items."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rft.data import items_for_step, load_items, overlap
from rft.errors import DataError
from rft.types import Item, Message

USER = {"role": "user", "content": "Heart attack"}
TOOL = {"type": "function", "function": {"name": "search", "parameters": {"type": "object", "properties": {}}}}


def write(tmp_path: Path, *rows: Any) -> Path:
    path = tmp_path / "train.jsonl"
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def error_of(tmp_path: Path, *rows: Any, tool_specs: Any = None) -> str:
    with pytest.raises(DataError) as caught:
        load_items(write(tmp_path, *rows), tool_specs)
    return str(caught.value)


def make_items(count: int) -> list[Item]:
    return [Item(id=str(i), row={}, messages=[Message(role="user", content=str(i))]) for i in range(count)]


def test_a_row_becomes_an_item(tmp_path: Path) -> None:
    row = {"messages": [{"role": "system", "content": "s"}, USER], "tools": [TOOL], "code": "I21.9", "any": {"n": [1]}}
    (item,) = load_items(write(tmp_path, row), {"search": None})
    assert item.id == "train-00001" and item.row == row and item.tool_names == ["search"] and item.parallel_tool_calls
    assert [message.role for message in item.messages] == ["system", "user"]


def test_content_blocks_are_joined(tmp_path: Path) -> None:
    blocks = [{"type": "input_text", "text": "Heart "}, {"type": "text", "text": "attack"}]
    (item,) = load_items(write(tmp_path, {"messages": [{"role": "user", "content": blocks}]}), None)
    assert item.messages[0].content == "Heart attack"


def test_the_hosted_service_normalisation_is_accepted(tmp_path: Path) -> None:
    message = {"role": "developer", "content": "x", "name": None, "refusal": None}
    row = {"messages": [message], "tools": None, "parallel_tool_calls": False}
    (item,) = load_items(write(tmp_path, row), {})
    assert item.tools == [] and not item.parallel_tool_calls


def test_a_history_with_tool_calls_is_kept(tmp_path: Path) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "search", "arguments": "{}"}}
    history = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "I21.9", "tool_call_id": "call_1"},
        USER,
    ]
    (item,) = load_items(write(tmp_path, {"messages": history}), None)
    assert item.messages[1].as_chat()["tool_calls"] == [call]
    assert item.messages[2].tool_call_id == "call_1"


def test_bom_crlf_blank_lines_and_line_separators_inside_strings(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    text = json.dumps({"messages": [{"role": "user", "content": "Ménière\u2028\u0085\x0b"}]}, ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n\r\n" + text.encode() + b"\r\n")
    items = load_items(path, None)
    assert [item.id for item in items] == ["rows-00001", "rows-00003"]
    assert items[0].messages[0].content == "Ménière\u2028\u0085\x0b"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (b"{", "train.jsonl:1: row: is not JSON"),
        (b'{"messages": NaN}', "NaN is not a JSON number"),
        (b"[" * 100_000, "is not JSON"),
        (b"\xff{}", "is not UTF-8"),
        (b'{"x": "\\ud83d"}', "surrogate"),
        (b"[1]", "is a JSON array, not an object"),
        ({}, "train.jsonl:1: messages: is missing"),
        ({"messages": []}, "must be a non-empty list"),
        ({"messages": ["x"]}, "messages[0]: is a JSON string"),
        ({"messages": [{"role": "robot", "content": "x"}, USER]}, 'messages[0].role: is "robot"'),
        ({"messages": [USER, {"role": "assistant", "content": "x"}]}, "the last message is from assistant"),
        ({"messages": [{"role": "user"}]}, "messages[0].content: is missing"),
        ({"messages": [{"role": "user", "content": 3}]}, "is a JSON number, not text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            'messages[0].content[0]: is not a text block (type "input_image")',
        ),
        ({"messages": [{"role": "user", "content": "x", "weight": 1}]}, "messages[0].weight: is not a key"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}, USER]}, "not a list of tool calls"),
        ({"messages": [USER], "parallel_tool_calls": "yes"}, "parallel_tool_calls: must be true or false"),
        ({"messages": [USER], "tools": {}}, "tools: is a JSON object, not a list"),
        ({"messages": [USER], "tools": [{"name": "search"}]}, "tools[0]: is not a function tool"),
        ({"messages": [USER], "tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        (
            {"messages": [USER], "tools": [{"type": "function", "function": {"name": "s", "parameters": []}}]},
            "tools[0].function.parameters",
        ),
        ({"messages": [USER], "tools": [TOOL, TOOL]}, "search appears twice"),
    ],
)
def test_an_error_names_place_and_cure(tmp_path: Path, row: Any, words: str) -> None:
    text = error_of(tmp_path, row)
    assert words in text and "train.jsonl:1: " in text and "cure: " in text


def test_a_tool_without_endpoint_is_refused(tmp_path: Path) -> None:
    text = error_of(tmp_path, {"messages": [USER], "tools": [TOOL]}, tool_specs={"other": None})
    assert "search has no endpoint" in text and "add it to environment.tools" in text


def test_problems_are_collected_up_to_ten(tmp_path: Path) -> None:
    text = error_of(tmp_path, {"messages": [USER]}, {"messages": []}, b"{")
    assert "2 problems" in text and "train.jsonl:2: messages" in text and "train.jsonl:3: row" in text
    assert error_of(tmp_path, *[{"messages": []}] * 25).count("train.jsonl:") == 10 + 1  # and the file itself


def test_missing_and_empty_files_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        load_items(tmp_path / "none.jsonl", None)
    with pytest.raises(DataError, match="has no rows"):
        load_items(write(tmp_path, b"", b"  "), None)


@pytest.mark.parametrize(("num_items", "items_per_step"), [(12, 4), (13, 5), (7, 7), (9, 8), (50, 1)])
def test_steps_cover_epochs_without_repeating_inside_a_step(num_items: int, items_per_step: int) -> None:
    items = make_items(num_items)
    steps = [items_for_step(items, step, items_per_step, seed=3) for step in range(num_items * 3)]
    for chosen in steps:
        assert len({item.id for item in chosen}) == len(chosen) == items_per_step
    flat = [item.id for chosen in steps for item in chosen]
    for epoch in range(3):
        assert Counter(flat[epoch * num_items : (epoch + 1) * num_items]) == Counter(item.id for item in items)


def test_the_order_depends_on_seed_and_epoch_only() -> None:
    items = make_items(20)
    ids = [
        [item.id for item in items_for_step(items, step, 20, seed)] for step, seed in ((0, 1), (0, 1), (1, 1), (0, 2))
    ]
    assert ids[0] == ids[1] and ids[0] != ids[2] and ids[0] != ids[3]


def test_a_step_larger_than_the_data_repeats_items() -> None:
    chosen = items_for_step(make_items(3), 1, 8, seed=0)
    assert len(chosen) == 8 and max(Counter(item.id for item in chosen).values()) <= 4


def test_overlap_counts_rows_with_the_same_messages() -> None:
    items = make_items(6)
    assert overlap(items[:3], items[2:5]) == 1 and overlap(items[:3], items[3:]) == 0


def test_a_row_without_tools_gets_those_whose_spec_is_known(tmp_path: Path) -> None:
    path = write(tmp_path, {"messages": [USER]}, {"messages": [USER], "tools": []})
    first, second = load_items(path, {"search": TOOL, "other": None})
    assert first.tools == [TOOL] and second.tools == []
    assert "tools" not in first.row


def test_an_error_also_lists_its_places(tmp_path: Path) -> None:
    path = write(tmp_path, {"messages": [USER]}, {}, b"[]")
    with pytest.raises(DataError) as caught:
        load_items(path, None)
    assert [(line, field) for line, field, *_ in caught.value.found] == [(2, "messages"), (3, "row")]
    with pytest.raises(DataError) as caught:
        load_items(write(tmp_path, {}), None)
    assert [(line, field) for line, field, *_ in caught.value.found] == [(1, "messages")]
