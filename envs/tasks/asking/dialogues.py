"""Dialogues with somebody who runs tools, in which a needed argument is withheld: `multi_turn_miss_param` of BFCL.

In each conversation of the source one turn lacks something, nothing can be called, and the user adds it a turn later.
What was withheld follows from the source: an argument of the calls made then whose value that later message says and
no earlier one. Conversations where nothing follows are left out. Split by the API that the withheld argument is for.
"""

from __future__ import annotations

import ast
import json
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rft.types import Split

PIN = "bfcl-eval==2026.3.23"  # Apache-2.0
SHA256 = "3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a"
_DATA = "bfcl_eval/data"
_FILE = "BFCL_v4_multi_turn_miss_param.json"
_APIS: dict[str, tuple[Split, str]] = {  # file of functions -> split, what its owner runs
    "gorilla_file_system": ("train", "the user's files"),
    "trading_bot": ("train", "stock trading"),
    "ticket_api": ("train", "support tickets"),
    "math_api": ("train", "calculations"),
    "vehicle_control": ("validation", "the user's car"),
    "message_api": ("validation", "messages"),
    "travel_booking": ("test", "travel bookings"),
    "posting_api": ("test", "a social network"),
}
_SLOTS = {  # of the grader (CALLS in grader.py) -> parameters of the functions
    "file": "file_name file_name1 file_name2 source",
    "place": "folder dir_name destination city cityA cityB location travel_from travel_to",
    "symbol": "symbol stock",
    "amount": "amount liter gallon fuelAmount distance lines",
    "price": "insurance_cost price value budget_limit",
    "token": "access_token",
    "password": "password",
    "user": "username user_id",
    "person": "receiver_id mentions user",
    "tags": "tags",
    "text": "comment_content content message title description",
    "date": "travel_date",
    "class": "travel_class",
    "sector": "sector",
    "card": "card_id",
    "ticket": "ticket_id",
    "word": "pattern name",
    "currency": "base_currency target_currency",
    "passport": "passport_number",
    "name": "first_name last_name user_first_name user_last_name cardholder_name",
}
_SLOT_OF = {parameter: slot for slot, parameters in _SLOTS.items() for parameter in parameters.split()}
_MAX_CHARS = 900  # of a conversation: longer ones do not fit a small model's prompt
_MIN_VALUE_CHARS = 2  # shorter values are found in any text


@dataclass(frozen=True, slots=True)
class Dialogue:
    """What the user said up to the message that lacks something. `api` runs what `runs` says."""

    source_id: str
    api: str
    runs: str
    split: Split
    said: tuple[str, ...]
    given: tuple[str, ...]
    missing: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Value:
    """One argument of a call of the source."""

    function: str
    parameter: str
    text: str


def load_dialogues(wheel: Path) -> list[Dialogue]:
    """In the order of the source. Raises KeyError, ValueError or zipfile.BadZipFile for a file of another shape."""
    with zipfile.ZipFile(wheel) as archive:
        functions = _functions(archive)
        rows = _rows(archive, f"{_DATA}/{_FILE}")
        answers = {row["id"]: row["ground_truth"] for row in _rows(archive, f"{_DATA}/possible_answer/{_FILE}")}
    found = (_dialogue(row, answers[row["id"]], functions) for row in rows)
    return [dialogue for dialogue in found if dialogue is not None]


def _functions(archive: zipfile.ZipFile) -> dict[str, tuple[str, list[str]]]:
    """Of each function its API and the names of its parameters."""
    return {
        row["name"]: (api, list(row["parameters"]["properties"]))
        for api in _APIS
        for row in _rows(archive, f"{_DATA}/multi_turn_func_doc/{api}.json")
    }


def _rows(archive: zipfile.ZipFile, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in archive.read(name).decode("utf-8").splitlines() if line.strip()]


def _dialogue(
    row: dict[str, Any], calls: list[list[str]], functions: dict[str, tuple[str, list[str]]]
) -> Dialogue | None:
    """The conversation up to the turn without calls; None where what it lacks does not follow from the next."""
    said = [str(turn[0]["content"]).strip() for turn in row["question"]]
    turn = next((place for place, found in enumerate(calls) if not found), len(said))
    if turn + 1 >= len(said):
        return None
    values = [value for call in calls[turn + 1] for value in _values(call, functions)]
    before, after = " ".join(said[: turn + 1]), said[turn + 1]
    withheld = [value for value in values if _says(after, value.text) and not _says(before, value.text)]
    missing = list(dict.fromkeys(_SLOT_OF[value.parameter] for value in withheld if value.parameter in _SLOT_OF))
    if not missing or len(missing) > 2 or len(before) > _MAX_CHARS:
        return None
    api, _ = functions[next(value.function for value in withheld if value.parameter in _SLOT_OF)]
    split, runs = _APIS[api]
    told = {_SLOT_OF[value.parameter] for value in values if value.parameter in _SLOT_OF and _says(before, value.text)}
    given = tuple(slot for slot in _SLOTS if slot in told - set(missing))
    return Dialogue(row["id"], api, runs, split, tuple(said[: turn + 1]), given, tuple(missing))


def _values(call: str, functions: dict[str, tuple[str, list[str]]]) -> Iterator[_Value]:
    """The arguments of a call written as Python, e.g. `cp(source='a', destination='b')`; nothing of it is run."""
    node = ast.parse(call, mode="eval").body
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise ValueError(f"not a call: {call}")
    name = node.func.id
    pairs = [
        *zip(functions[name][1], node.args, strict=False),
        *((word.arg or "", word.value) for word in node.keywords),
    ]
    for parameter, value in pairs:
        found = ast.literal_eval(value)
        for part in found if isinstance(found, list) else [found]:
            yield _Value(name, parameter, str(part).removesuffix(".0").lstrip("@#").lower())


def _says(text: str, value: str) -> bool:
    """Whether a text holds a value as words of its own; numbers may have thousands separators."""
    if len(value) < _MIN_VALUE_CHARS and not value.isdigit():
        return False
    plain = re.sub(r"(?<=\d),(?=\d{3})", "", text.lower())
    return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", plain) is not None
