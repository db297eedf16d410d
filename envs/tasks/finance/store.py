"""The documents of the finance task: BM25 over their passages, a list of titles, reading page by page.

A passage is a line of a document, long ones cut: a figure comes back with its label and its document's id. Guarantees:
the same query gives the same passages; only a document's own text follows its id in brackets, whatever that text holds.
"""

from __future__ import annotations

import os
import textwrap
import threading
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from rft.envs.documents import Document, load_documents
from rft.envs.retrieval_index import build, words
from rft.errors import UserError

PASSAGE_CHARS = 240
PAGE_CHARS = 1200
_MAX_TITLES = 20
_lock = threading.Lock()


class Store:
    """All of it in memory; nothing in it changes."""

    def __init__(self, documents: Iterable[Document]) -> None:
        self._documents = {document.id.casefold(): document for document in documents}
        cut = (passage for document in self._documents.values() for passage in passages(document))
        self._passages = {passage.id: passage for passage in cut}
        self._index = build([*self._passages.values()], None)

    def search(self, query: str, k: int) -> str:
        """The k best passages, one a line, each headed by its document; "" when no word is known."""
        found = (self._passages[name] for name in self._index.search(query, k))
        return "\n".join(f"[{passage.id.rpartition('#')[0]}] {passage.title} - {passage.text}" for passage in found)

    def titles(self, text: str) -> str:
        """`id: title` of the documents whose titles hold every word of the text; "" when there is none."""
        asked = set(words(text))
        found = [document for document in self._documents.values() if asked <= set(words(document.title))]
        lines = [f"{document.id}: {_plain(document.title)}" for document in found[:_MAX_TITLES]]
        return "\n".join(lines + ([f"and {len(found) - _MAX_TITLES} more"] if len(found) > _MAX_TITLES else []))

    def read(self, name: str, start: int) -> str | None:
        """A page of a document from character `start` on; None when there is no such document or page."""
        document = self._documents.get(name.strip().strip("[]").casefold())
        if document is None or not 0 <= start < max(1, len(document.text)):
            return None
        end = start + PAGE_CHARS
        lines = [_plain(line) for line in document.text[start:end].splitlines()]
        rest = [f"read on with start={end}"] if end < len(document.text) else []
        return "\n".join([f"[{document.id}] {_plain(document.title)}", *lines, *rest])


def passages(document: Document) -> list[Document]:
    """The lines of a document, those longer than a passage cut between words, as documents `id#number`."""
    cut = (part for line in document.text.splitlines() for part in textwrap.wrap(line, PASSAGE_CHARS))
    title = _plain(document.title)
    return [Document(f"{document.id}#{number}", _plain(text), title) for number, text in enumerate(cut)]


def _plain(line: str) -> str:
    """One line that cannot pass for the heading of a document."""
    return " ".join(line.replace("[", "(").replace("]", ")").split())


def shared_store() -> Store:
    """The process's one store, of $RFT_FINANCE_DIR or data/finance. Raises UserError when it is not prepared."""
    with _lock:  # a burst of first calls must not build it once each
        return _shared_store(Path(os.environ.get("RFT_FINANCE_DIR", "data/finance")) / "documents.jsonl")


@cache
def _shared_store(path: Path) -> Store:
    if not path.is_file():
        cure = "run scripts/prepare_finance, or set RFT_FINANCE_DIR to the folder that it wrote"
        raise UserError(f"there is no file {path}", where="task finance", cure=cure)
    return Store(load_documents(path).values())
