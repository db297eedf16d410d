"""BM25 search over the descriptions of all billable ICD-10-CM codes.

Guarantees: the same query gives the same codes in the same order, everywhere; safe to use from many threads. The index
is mapped from the folder that scripts/prepare_icd10 wrote, or built in memory (about three seconds) without it.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
from functools import cache, lru_cache
from pathlib import Path

import bm25s

from rft.envs.tasks.icd10.table import Table, load_table, official_table

FORMAT = 1  # of the index folder; a folder of another format is not used
_STOP_WORDS = frozenset(["a", "an", "and", "as", "at", "by", "due", "for", "from", "in", "is", "nos", "of", "on", "or"])
_STOP_WORDS |= {"other", "the", "to", "unspecified", "with", "without"}
_lock = threading.Lock()
_logger = logging.getLogger(__name__)


class SearchIndex:
    """`search(query, k)` gives the k best codes, fewer when fewer share a word with the query."""

    def __init__(self, table: Table, bm25: bm25s.BM25) -> None:
        self.table, self._bm25 = table, bm25
        self._codes = table.leaves
        self._vocabulary: dict[str, int] = bm25.vocab_dict
        self.search = lru_cache(maxsize=16384)(self._search)

    def lines(self, query: str, k: int) -> str:
        """The k best codes with their descriptions, one a line; "" when no word of the query is known."""
        return "\n".join(f"{code} {self.table.descriptions[code]}" for code in self.search(query, k))

    def _search(self, query: str, k: int) -> tuple[str, ...]:
        """Codes that share a word with the query, best first; equal scores in the official order."""
        ids = [self._vocabulary[word] for word in words(query) if word in self._vocabulary]
        if not ids:
            return ()
        scores = self._bm25.get_scores_from_ids(ids)  # [num_leaves] float32
        found = []
        for _ in range(k):  # k passes of argmax beat one partition: it is slow on many equal scores
            best = int(scores.argmax())  # the first of equals
            if scores[best] <= 0:
                break
            found.append(self._codes[best])
            scores[best] = 0.0
        return tuple(found)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.table.save(folder / "codes.json")
        self._bm25.save(str(folder / "bm25"), show_progress=False)
        (folder / "format.json").write_text(json.dumps({"format": FORMAT}), encoding="utf-8")


def words(text: str) -> list[str]:
    """Lower-case words without stop words, plural endings cut: what queries and descriptions are compared by."""
    found = re.findall(r"[a-z0-9]+", text.lower().replace("'s", ""))
    return [_singular(word) for word in found if word not in _STOP_WORDS]


def build_index(table: Table) -> SearchIndex:
    """Index the descriptions of the leaves: nothing else about a code may be found by search."""
    vocabulary: dict[str, int] = {}
    corpus = [
        [vocabulary.setdefault(word, len(vocabulary)) for word in words(table.descriptions[code])]
        for code in table.leaves
    ]
    bm25 = bm25s.BM25()
    bm25.index((corpus, vocabulary), create_empty_token=False, show_progress=False)
    return SearchIndex(table, bm25)


def load_index(folder: Path) -> SearchIndex | None:
    """The index that `SearchIndex.save` wrote, mapped into memory; None when there is none of this format."""
    try:
        if json.loads((folder / "format.json").read_text(encoding="utf-8")) != {"format": FORMAT}:
            return None
    except (OSError, ValueError):
        return None
    return SearchIndex(load_table(folder / "codes.json"), bm25s.BM25.load(str(folder / "bm25"), mmap=True))


def shared_index() -> SearchIndex:
    """The process's one index."""
    with _lock:  # a burst of first calls must not build it once each
        return _shared_index()


@cache
def _shared_index() -> SearchIndex:
    folder = Path(os.environ.get("RFT_ICD10_DIR", "data/icd10")) / "index"
    index = load_index(folder)
    if index is None:
        _logger.info("no search index in %s: building it in memory (scripts/prepare_icd10 writes it)", folder)
        index = build_index(official_table())
    return index


def _singular(word: str) -> str:
    if len(word) < 5 or not word.endswith("s") or word.endswith(("ss", "is", "us")):
        return word
    return word[:-2] if word.endswith("es") and len(word) > 5 else word[:-1]
