"""ICD-10-CM coding: find the code of a diagnosis by searching the official descriptions.

`TASK` has the tools `search_codes` and `lookup_code`; `GRADER_SOURCE` is the grader to put into a config.
The dataset is written by scripts/prepare_icd10.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rft.envs.tasks import Task, Tool

if TYPE_CHECKING:
    from rft.envs.tasks.icd10.search import SearchIndex

GRADER_SOURCE = (Path(__file__).parent / "grader.py").read_text(encoding="utf-8")
_MAX_RESULTS = 10  # the schema does not say so: every word of it is read by the model in every rollout
_MAX_CHILDREN = 20


def search_codes(query: str, k: int = 3) -> str:
    """Search codes by words."""
    return _index().lines(query, min(max(k, 1), _MAX_RESULTS)) or "no code found: try other words"


def lookup_code(code: str) -> str:
    """Show a code and its children."""
    table = _index().table
    known = table.find(code)
    if known is None:
        return f"there is no code {code[:20]}: search_codes finds codes by words"
    parent, children = table.parents[known], table.children.get(known, [])
    lines = [f"{known} {table.descriptions[known]}"]
    lines += [f"parent: {parent} {table.descriptions[parent]}"] if parent else []
    lines += [f"child: {child} {table.descriptions[child]}" for child in children[:_MAX_CHILDREN]]
    lines += [f"and {len(children) - _MAX_CHILDREN} more"] if len(children) > _MAX_CHILDREN else []
    return "\n".join(lines)


def _index() -> SearchIndex:
    """The index, and the libraries it needs, only when a tool is used: naming the task must stay cheap."""
    from rft.envs.tasks.icd10.search import shared_index

    return shared_index()


def _prepare() -> None:
    search_codes(query="fracture")


TASK = Task(name="icd10", tools=(Tool(search_codes), Tool(lookup_code)), prepare=_prepare)
