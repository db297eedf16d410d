"""Financial questions over documents: find the figure, answer with the number and the document it stands in.

`TASK` has the tools `search`, `list` and `read`. No tool repeats what the model wrote, and only `search` and `read`
head their text with a document's id in brackets: what is cited can be checked against what was shown.
scripts/prepare_finance writes the documents and the dataset.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rft.envs.tasks import ArgumentError, Task, Tool

if TYPE_CHECKING:
    from rft.envs.tasks.finance.store import Store

_MAX_RESULTS = 10  # the schema does not say so: every word of it is read by the model in every rollout


def search(query: str, k: int = 3) -> str:
    """Search the documents by words."""
    return _store().search(query, min(max(k, 1), _MAX_RESULTS)) or "nothing found: try other words"


def list(words: str = "") -> str:  # the tool's name; nothing here needs the type's
    """List documents by title."""
    return _store().titles(words) or "no such title"


def read(id: str, start: int = 0) -> str:
    """Read a document."""
    text = _store().read(id, start)
    if text is None:
        raise ArgumentError("there is no such document, or it is shorter: search and list give the ids")
    return text


def _store() -> Store:
    """The documents and their index, only when a tool is used: naming the task must stay cheap."""
    from rft.envs.tasks.finance.store import shared_store

    return shared_store()


def _prepare() -> None:
    search(query="revenues")


TASK = Task(name="finance", tools=(Tool(search), Tool(list), Tool(read)), prepare=_prepare)
