"""Minor health questions from templates: what somebody says about a concern, and what was left out of it.

Every question has one concern and tells of four things, the slots: how long, the age, medicines, allergies; one or
two of them are withheld, in some questions none. Deterministic: the same seed gives the same questions in the same
order. All of it is made up; nothing here is medical advice.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

SLOTS = ("duration", "age", "medicines", "allergies")
# Concerns are the sources: what is tested on is never trained on. (opening, what is asked for)
CONCERNS = {
    "train": (
        "a headache",
        "a sore throat",
        "a dry cough",
        "a stuffy nose",
        "a sunburn on my shoulders",
        "an itchy mosquito bite",
        "a sore knee",
        "a stiff neck",
        "an ache in my lower back",
        "heartburn after meals",
        "a bloated stomach",
        "dry eyes",
        "a small mouth ulcer",
        "cramps in my calves",
        "a blister on my heel",
        "chapped lips",
        "tired legs in the evening",
        "trouble falling asleep",
    ),
    "validation": ("an earache", "a bruise on my arm", "dandruff", "an upset stomach"),
    "test": (
        "an itchy rash on my arm",
        "a twisted ankle",
        "a runny nose",
        "a hoarse voice",
        "poor sleep",
        "a sore shoulder",
        "a toothache",
        "dry skin on my hands",
    ),
}
_OPENINGS = ("I have {}.", "I am dealing with {}.", "I've got {}.", "I am bothered by {}.")
_ENDINGS = ("What should I do?", "What can I do about it?", "Any advice?", "What helps?", "How can I get rid of it?")
_FACTS = {
    "duration": (
        "It started {} ago.",
        "I have had it for {}.",
        "It has been going on for {}.",
        "This began about {} ago.",
    ),
    "age": ("I am {}.", "I'm {} years old.", "I turned {} this year.", "My age is {}."),
    "medicines": (
        "I take {}.",
        "The only medicine I use is {}.",
        "I am on {}.",
        "My doctor has me on {}.",
    ),
    "allergies": (
        "I am allergic to {}.",
        "I have an allergy to {}.",
        "My only allergy is {}.",
        "I have reacted badly to {} before.",
    ),
}
_VALUES = {
    "duration": ("two days", "three days", "four days", "a week", "ten days", "two weeks", "three weeks", "a month"),
    "age": ("19", "24", "28", "33", "37", "41", "46", "52", "58", "63", "69", "74"),
    "medicines": ("ibuprofen", "paracetamol", "vitamin D", "an iron tablet", "metformin", "blood pressure tablets"),
    "allergies": ("penicillin", "peanuts", "latex", "pollen", "aspirin", "shellfish"),
}
_NUM_WITHHELD = (0, 0, 0, *[1] * 14, 2, 2, 2)  # of twenty questions: always the same one is right for a quarter


@dataclass(frozen=True, slots=True)
class Question:
    """One message of a user. `given` and `missing` are slots, in the order of SLOTS."""

    concern: str
    text: str
    given: tuple[str, ...]
    missing: tuple[str, ...]


def build_questions(concerns: tuple[str, ...], num: int, seed: str) -> list[Question]:
    """`num` different questions; concerns, withheld slots and how many of them are spread evenly."""
    chooser = random.Random(seed)
    questions: dict[str, Question] = {}
    while len(questions) < num:
        place = len(questions)
        num_withheld = _NUM_WITHHELD[place // len(concerns) % len(_NUM_WITHHELD)]
        question = _question(concerns[place % len(concerns)], num_withheld, chooser)
        questions.setdefault(question.text, question)
    found = list(questions.values())
    chooser.shuffle(found)
    return found


def _question(concern: str, num_withheld: int, chooser: random.Random) -> Question:
    missing = set(chooser.sample(SLOTS, num_withheld))
    given = [slot for slot in SLOTS if slot not in missing]
    facts = [chooser.choice(_FACTS[slot]).format(chooser.choice(_VALUES[slot])) for slot in given]
    chooser.shuffle(facts)
    sentences = [chooser.choice(_OPENINGS).format(concern), *facts, chooser.choice(_ENDINGS)]
    return Question(concern, " ".join(sentences), tuple(given), tuple(slot for slot in SLOTS if slot in missing))
