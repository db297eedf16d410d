"""The rows of the task: what the model reads, and what only the grader sees. All wording of the prompt is here.

Splits share no source: health questions are split by concern, dialogues by API.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

from rft.envs.tasks.asking.dialogues import Dialogue
from rft.envs.tasks.asking.health import CONCERNS, SLOTS, Question, build_questions
from rft.types import Split

NUM_ROWS: dict[Split, int] = {"train": 720, "validation": 80, "test": 160}
SYSTEM_TEXT = "You are a careful health assistant. If something important is missing, ask for it first."
DIALOGUE_SYSTEM_TEXT = "You run {runs} for the user. If something you need is missing, ask for it first."
# Other concerns than any split's. Without examples a small model gives advice at once; with fewer it rarely asks for
# what the others ask for.
EXAMPLES = (
    (
        "I have hiccups. I am 45. They started an hour ago. I am allergic to eggs. What helps?",
        "Do you take any medicines?",
    ),
    (
        "I have a splinter. I take aspirin. It came a day ago. I am allergic to nuts. What should I do?",
        "How old are you?",
    ),
    ("I have sore feet. I am 30. I take vitamin C. I am allergic to milk. Any advice?", "How long have you had it?"),
    ("I have a cold sore. I am 61. It came a week ago. I take aspirin. What can I do?", "Do you have any allergies?"),
)
# What a warm-up shows: how to ask for each slot, and how to answer.
REPLIES = {
    "duration": ("How long have you had it?", "When did it start?", "How long has it been going on?"),
    "age": ("How old are you?", "What is your age?", "May I ask your age?"),
    "medicines": ("Do you take any medicines?", "What medicines do you take?", "Are you taking any medication?"),
    "allergies": ("Do you have any allergies?", "Are you allergic to anything?", "What are you allergic to?"),
    "": ("Rest for a few days and drink plenty of water.", "Try a warm compress, and see a doctor if it gets worse."),
}
_NUM_DEMONSTRATIONS = 96
DIALOGUE_EXAMPLE = (("Rename my newest photo.", "What should the new name be?"),)


def health_rows(num_examples: int) -> dict[Split, list[dict[str, Any]]]:
    """Any first n rows of a split are a fair sample of it. num_examples: how many of EXAMPLES the prompt shows."""
    return {
        split: [_health_row(question, num_examples) for question in build_questions(CONCERNS[split], num, split)]
        for split, num in NUM_ROWS.items()
    }


def demonstration_rows(num_examples: int) -> list[dict[str, Any]]:
    """Questions with a reply that does not look at what is missing: any slot is asked for, or an answer is given.

    A warm-up on them teaches how to ask, not what: that is left to the training.
    """
    chooser = random.Random("replies")
    rows = []
    for question in build_questions(CONCERNS["train"], _NUM_DEMONSTRATIONS, "demonstrations"):
        reply = chooser.choice(REPLIES[chooser.choice((*SLOTS, ""))])
        row = _health_row(question, num_examples)
        rows.append({"messages": [*row["messages"], _message("assistant", reply)]})
    return rows


def dialogue_rows(dialogues: Iterable[Dialogue]) -> dict[Split, list[dict[str, Any]]]:
    """In the order of the source."""
    rows: dict[Split, list[dict[str, Any]]] = {"train": [], "validation": [], "test": []}
    for dialogue in dialogues:
        rows[dialogue.split].append(_dialogue_row(dialogue))
    return rows


def _health_row(question: Question, num_examples: int) -> dict[str, Any]:
    messages = [_message("system", SYSTEM_TEXT), *_turns(EXAMPLES[:num_examples]), _message("user", question.text)]
    slots = {"domain": "health", "missing": list(question.missing), "given": list(question.given)}
    return {"messages": messages, **slots, "source": question.concern}


def _dialogue_row(dialogue: Dialogue) -> dict[str, Any]:
    *done, last = dialogue.said
    system = _message("system", DIALOGUE_SYSTEM_TEXT.format(runs=dialogue.runs))
    turns = _turns((*DIALOGUE_EXAMPLE, *((text, "Done.") for text in done)))
    slots = {"domain": "calls", "missing": list(dialogue.missing), "given": list(dialogue.given)}
    return {"messages": [system, *turns, _message("user", last)], **slots, "source": dialogue.api}


def _turns(pairs: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    return [_message(role, text) for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True)]


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
