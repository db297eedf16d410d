"""The dataset of the notes task: notes as questions, their codes as answers, split by chapter as the quickstart is.

All diagnoses of a note, its distractor as well, come from the chapters of its split; validation and test also hold
frames of notes that training never sees. All wording of the prompt is here. Deterministic.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rft.envs.tasks.icd10.rows import split_of
from rft.envs.tasks.icd10_notes.notes import FRAMES, UNSEEN_FRAMES, Diagnosis, Note, write_note
from rft.types import Split

NUM_NOTES: dict[Split, int] = {"train": 2000, "validation": 200, "test": 300}
SHARES = {1: 0.5, 2: 0.4, 3: 0.1}  # of notes, by the number of their diagnoses
DISTRACTOR_SHARE = 0.15  # of notes with several
_NOT_DISEASES = frozenset({"18", "19", "20", "21", "22"})  # symptoms, injuries, causes, reasons for a visit

SYSTEM_TEXT = (
    "Find the ICD-10-CM code of each diagnosis in the note. Search for each one first, then answer with the codes only."
)
QUESTION = "Note: {note}"
# One worked turn with a call per diagnosis: without it a small model calls no tool, or one for everything.
EXAMPLE_NOTE = "Seen today for hives; hay fever."
EXAMPLE_QUERIES = ("hives", "hay fever")  # of chapters of the training split


def messages_for(note: str) -> list[dict[str, str]]:
    """What the model reads before it writes: the instruction, the example, the note."""
    calls = [{"name": "search_codes", "arguments": {"query": query}} for query in EXAMPLE_QUERIES]
    return [
        {"role": "system", "content": SYSTEM_TEXT},
        {"role": "user", "content": QUESTION.format(note=EXAMPLE_NOTE)},
        {"role": "assistant", "content": "\n".join(f"<tool_call>{json.dumps(call)}</tool_call>" for call in calls)},
        {"role": "user", "content": QUESTION.format(note=note)},
    ]


def build_rows(
    diagnoses: dict[Split, list[Diagnosis]], tools: list[dict[str, Any]]
) -> dict[Split, list[dict[str, Any]]]:
    """The rows of the three splits; any first n of a split are a fair sample of it."""
    return {split: [_row(note, tools) for note in _notes(split, found)] for split, found in diagnoses.items()}


def split_diagnoses(diagnoses: Sequence[Diagnosis], chapter: Callable[[str], str]) -> dict[Split, list[Diagnosis]]:
    """Diseases, by the chapter of their code."""
    found: dict[Split, list[Diagnosis]] = {"train": [], "validation": [], "test": []}
    for diagnosis in diagnoses:
        number = chapter(diagnosis.code)
        if number not in _NOT_DISEASES:
            found[split_of(number)].append(diagnosis)
    return found


def _notes(split: Split, diagnoses: list[Diagnosis]) -> Iterator[Note]:
    chance = random.Random(f"icd10_notes:{split}")
    frames = FRAMES if split == "train" else FRAMES + UNSEEN_FRAMES
    for _ in range(NUM_NOTES[split]):
        (size,) = chance.choices(list(SHARES), list(SHARES.values()))
        drawn = _draw(diagnoses, size + 1, chance)
        has_distractor = size > 1 and chance.random() < DISTRACTOR_SHARE
        yield write_note(drawn[:size], drawn[size] if has_distractor else None, frames, chance)


def _draw(diagnoses: list[Diagnosis], size: int, chance: random.Random) -> list[Diagnosis]:
    """Diagnoses of different categories: what is right for one is then wrong for the others."""
    drawn: dict[str, Diagnosis] = {}
    while len(drawn) < size:
        diagnosis = chance.choice(diagnoses)
        drawn.setdefault(diagnosis.code[:3], diagnosis)
    return list(drawn.values())


def _row(note: Note, tools: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "messages": messages_for(note.text),
        "tools": tools,
        "codes": [diagnosis.code for diagnosis in note.diagnoses],
        "terms": [diagnosis.term for diagnosis in note.diagnoses],
        "distractor": note.distractor.code if note.distractor else None,
    }
