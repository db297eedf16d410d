"""The dataset of the ICD-10-CM task: official inclusion terms as questions, their codes as answers, split by chapter.

Validation and test hold chapters that training never sees: what is learnt is searching, not the codes. All wording of
the prompt is here. Deterministic: the same table gives the same rows in the same order.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from rft.envs.tasks.icd10.grader import grade
from rft.envs.tasks.icd10.search import SearchIndex
from rft.envs.tasks.icd10.table import official_terms
from rft.types import Split

VALIDATION_CHAPTERS = frozenset({"6", "13"})  # G nervous system, M musculoskeletal
TEST_CHAPTERS = frozenset({"11"})  # K digestive system
MAX_TERM_CHARS = 60
_FINDABLE_RANK = 10

EXAMPLE_TERM = "Heart attack"
EXAMPLE_QUERY = "acute myocardial infarction"
EXAMPLE_CODE = "I21.9"

_SYSTEM_TEXT = """Find the ICD-10-CM code of the diagnosis. Search first, then answer with the best code only.

Example
User: {term}
Assistant: <tool_call>{{"name": "search_codes", "arguments": {{"query": "{query}"}}}}</tool_call>
User: <tool_response>{results}</tool_response>
Assistant: {code}"""


def system_text(search_codes: Callable[[str], str]) -> str:
    """The system message, its example answered by the real tool."""
    results = search_codes(EXAMPLE_QUERY)
    return _SYSTEM_TEXT.format(term=EXAMPLE_TERM, query=EXAMPLE_QUERY, results=results, code=EXAMPLE_CODE)


def build_rows(index: SearchIndex, system: str, tools: list[dict[str, Any]]) -> dict[Split, list[dict[str, Any]]]:
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
        if split == "train" and best_grade(index, term, code, _FINDABLE_RANK) == 0:
            continue
        messages = [{"role": "system", "content": system}, {"role": "user", "content": term}]
        rows[split].append({"messages": messages, "tools": tools, "code": code, "term": term, "chapter": chapter})
    return rows


def split_of(chapter: str) -> Split:
    if chapter in TEST_CHAPTERS:
        return "test"
    return "validation" if chapter in VALIDATION_CHAPTERS else "train"


def best_grade(index: SearchIndex, term: str, code: str, k: int) -> float:
    """The grade of the best of the first k results when the term itself is the query."""
    answers = index.search(term, k)
    return max((grade({"output_text": answer}, {"code": code}) for answer in answers), default=0.0)
