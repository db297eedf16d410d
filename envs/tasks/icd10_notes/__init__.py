"""ICD-10-CM coding of notes: find the codes of the one to three diagnoses that a note mentions.

`TASK` has the tool `search_codes`, over the table and vectors that scripts/prepare_icd10_notes writes. Notes are worded
in notes.py, prompts in rows.py. A config refers to grader.py, exact_f1.py and support.py, each a grader's whole text.
"""

from __future__ import annotations

from rft.envs.tasks import Task, Tool

NUM_RESULTS = 3
_MAX_QUERY_CHARS = 300  # the longest description has 250


def search_codes(query: str) -> str:
    """Search codes by words."""
    from rft.envs.tasks.icd10_notes.search import shared_index  # heavy: naming the task must stay cheap

    found = shared_index().lines(query[:_MAX_QUERY_CHARS], NUM_RESULTS)
    return found or "no code found: try other words"


def _prepare() -> None:
    search_codes(query="fracture")


TASK = Task(name="icd10_notes", tools=(Tool(search_codes),), prepare=_prepare)
