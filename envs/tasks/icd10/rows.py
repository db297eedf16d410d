"""The dataset of the ICD-10-CM task: official inclusion terms as questions, their codes as answers, split by chapter.

Validation and test hold chapters that training never sees: what is learnt is searching, not the codes. All wording of
the prompt is here. Deterministic: the same table gives the same rows in the same order.
"""

from __future__ import annotations

import json
import random
from typing import Any

from rft.envs.tasks.icd10.grader import grade
from rft.envs.tasks.icd10.search import SearchIndex
from rft.envs.tasks.icd10.table import official_terms
from rft.types import Split

VALIDATION_CHAPTERS = frozenset({"6", "13"})  # G nervous system, M musculoskeletal
TEST_CHAPTERS = frozenset({"11"})  # K digestive system
MAX_TERM_CHARS = 60
_NUM_RESULTS = 10

SYSTEM_TEXT = "Find the ICD-10-CM code of the diagnosis. Search first, then answer with the best code only."
QUESTION = "Search for the diagnosis: {term}"
# One worked call, as turns of a conversation: without it a small model never calls a tool, nor with the example in the
# system text; with the whole dialogue it copies the answer or writes a <tool_response> itself.
EXAMPLE_TERM = "Hives"
EXAMPLE_QUERY = "urticaria"


def messages_for(term: str) -> list[dict[str, str]]:
    """What the model reads before it writes: the instruction, the example, the diagnosis."""
    call = json.dumps({"name": "search_codes", "arguments": {"query": EXAMPLE_QUERY}})
    return [
        {"role": "system", "content": SYSTEM_TEXT},
        {"role": "user", "content": QUESTION.format(term=EXAMPLE_TERM)},
        {"role": "assistant", "content": f"<tool_call>{call}</tool_call>"},
        {"role": "user", "content": QUESTION.format(term=term)},
    ]


def build_rows(index: SearchIndex, tools: list[dict[str, Any]]) -> dict[Split, list[dict[str, Any]]]:
    """The rows of the three splits, shuffled: any first n of a split are a fair sample of it.

    Training keeps the terms that search relates to their code at all (the category is among the ten best results);
    validation and test keep every term.
    """
    rows: dict[Split, list[dict[str, Any]]] = {"train": [], "validation": [], "test": []}
    terms = [pair for pair in official_terms(index.table) if len(pair[1]) <= MAX_TERM_CHARS]
    random.Random(0).shuffle(terms)
    for code, term in terms:
        chapter = index.table.chapter(code)
        split = split_of(chapter)
        if split == "train" and not any(result_grades(index, term, code)):
            continue
        row = {"messages": messages_for(term), "tools": tools, "code": code, "term": term, "chapter": chapter}
        rows[split].append(row)
    return rows


def split_of(chapter: str) -> Split:
    if chapter in TEST_CHAPTERS:
        return "test"
    return "validation" if chapter in VALIDATION_CHAPTERS else "train"


def result_grades(index: SearchIndex, term: str, code: str) -> list[float]:
    """The grades of the ten best results when the term itself is the query, best result first."""
    return [grade({"output_text": answer}, {"code": code}) for answer in index.search(term, _NUM_RESULTS)]
