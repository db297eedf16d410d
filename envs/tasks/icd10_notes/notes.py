"""Short clinical notes, made up around diagnoses in official wording: what a note says and what must be coded.

A note mentions one to three diagnoses to code and perhaps a distractor, which must not be: a negated finding or a
relative's disease. No note holds a code. Deterministic for a given random state.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from rft.envs.tasks.icd10.table import Table, official_terms

MAX_TERM_CHARS = 45
_PLAIN_TERM = re.compile(r"[A-Za-z][A-Za-z' -]+")
# what a list of diagnoses would be read into as a second one, or says that nothing is to be coded
_UNCLEAR = re.compile(r"\b(?:and|or|with|without|no|not|history|status|absence)\b", re.IGNORECASE)

FRAMES = (
    "Seen today for {diagnoses}.",
    "Assessment: {diagnoses}.",
    "{age}-year-old {sex} with {diagnoses}.",
    "Follow-up visit for {diagnoses}. Vitals normal.",
    "Discharge diagnosis: {diagnoses}.",
    "{age}-year-old {sex}, treated for {diagnoses}. Feels better.",
    "Impression: {diagnoses}. Plan discussed.",
    "Referred because of {diagnoses}.",
)
UNSEEN_FRAMES = (  # of validation and test notes alone
    "Clinic letter: this {age}-year-old {sex} has {diagnoses}.",
    "Problem list: {diagnoses}. Return in six weeks.",
)
DISTRACTORS = (
    "No sign of {distractor}.",
    "Mother had {distractor}.",
    "Negative for {distractor}.",
    "Family history: {distractor}.",
)


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """A leaf code, and a wording of it."""

    code: str
    term: str


@dataclass(frozen=True, slots=True)
class Note:
    text: str
    diagnoses: tuple[Diagnosis, ...]
    distractor: Diagnosis | None


def diagnoses_of(official: Table, known: frozenset[str]) -> list[Diagnosis]:
    """Plainly worded inclusion terms of one known code each, in the official order; "NOS" is not said in notes."""
    codes_of: dict[str, set[str]] = {}
    found = []
    for code, official_term in official_terms(official):
        term = official_term.removesuffix(" NOS")
        codes_of.setdefault(term.lower(), set()).add(code)
        if code in known and is_plain(term):
            found.append(Diagnosis(code, term))
    return [diagnosis for diagnosis in found if len(codes_of[diagnosis.term.lower()]) == 1]


def is_plain(term: str) -> bool:
    """Whether a note can hold the term so that a reader sees where it begins and ends."""
    fits = len(term) <= MAX_TERM_CHARS and _PLAIN_TERM.fullmatch(term) is not None
    return fits and _UNCLEAR.search(term) is None


def write_note(
    diagnoses: Sequence[Diagnosis], distractor: Diagnosis | None, frames: Sequence[str], chance: random.Random
) -> Note:
    values = {"age": chance.randint(19, 88), "sex": chance.choice(("man", "woman"))}
    text = chance.choice(frames).format(diagnoses=_listed(diagnoses, chance), **values)
    if distractor is not None:
        text += " " + chance.choice(DISTRACTORS).format(distractor=distractor.term)
    return Note(text, tuple(diagnoses), distractor)


def _listed(diagnoses: Sequence[Diagnosis], chance: random.Random) -> str:
    terms = [diagnosis.term for diagnosis in diagnoses]
    if len(terms) == 1:
        return terms[0]
    if chance.random() < 0.5:
        return "; ".join(terms)
    return f"{', '.join(terms[:-1])} and {terms[-1]}"
