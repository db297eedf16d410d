"""Search over the billable codes by words (BM25) and by meaning (embeddings), fused by rank.

Guarantees: found in the folder that scripts/prepare_icd10_notes wrote, which holds codes and descriptions only; safe to
use from many threads; vectors are mapped, not read. Without vectors it searches by words alone.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from rft.envs.retrieval_index import Embedder, best, fuse
from rft.envs.tasks.icd10.search import SearchIndex, load_index
from rft.errors import UserError

CURE = "run scripts/prepare_icd10_notes"
_NUM_FUSED = 100  # of each ranking
_RANK_OFFSET = 1  # first places count: on training terms recall@3 is 0.43, with the usual 60 it is 0.40
_lock = threading.Lock()


class Vectors:
    """Texts by the cosine of their vectors with the query's. matrix: [num_texts, h] float16, rows of length 1."""

    def __init__(self, matrix: np.ndarray[Any, Any], embedder: Embedder) -> None:
        import torch

        # numpy multiplies float16 twenty times slower; nothing is written through the mapping
        self._matrix, self._embedder = torch.from_numpy(matrix), embedder
        self._one_at_a_time = threading.Lock()

    def search(self, query: str, k: int) -> list[int]:
        """The places of the k nearest texts, nearest first."""
        import torch

        with self._one_at_a_time, _one_thread():
            vector = torch.from_numpy(self._embedder.vectors([query])[0])  # [h] float32
            scores = (self._matrix @ vector.half()).float().numpy()  # [num_texts] float32
        return best(scores, k)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Torch's threads spin while they wait for each other: beside a busy engine two take ten times as long as one."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class CodeIndex:
    """`search(query, k)` gives the k best codes. Each ranking alone is there to be measured."""

    def __init__(self, words: SearchIndex, vectors: Vectors | None) -> None:
        self.table, self._words, self._vectors = words.table, words, vectors
        self._codes = words.table.leaves
        self._places = {code: place for place, code in enumerate(self._codes)}
        self.search = lru_cache(maxsize=16384)(self._search)

    @property
    def has_vectors(self) -> bool:
        return self._vectors is not None

    def lines(self, query: str, k: int) -> str:
        """The k best codes with their descriptions, one a line; "" when nothing is found."""
        return "\n".join(f"{code} {self.table.descriptions[code]}" for code in self.search(query, k))

    def by_words(self, query: str, k: int) -> tuple[str, ...]:
        return self._words.search(query, k)

    def by_meaning(self, query: str, k: int) -> tuple[str, ...]:
        """Nothing without vectors, or for a query without a letter or digit."""
        if self._vectors is None or not any(letter.isalnum() for letter in query):
            return ()
        return tuple(self._codes[place] for place in self._vectors.search(query, k))

    def _search(self, query: str, k: int) -> tuple[str, ...]:
        if self._vectors is None:
            return self.by_words(query, k)
        rankings = (self.by_words(query, _NUM_FUSED), self.by_meaning(query, _NUM_FUSED))
        places = [[self._places[code] for code in ranking] for ranking in rankings]
        return tuple(self._codes[place] for place in fuse(places, _RANK_OFFSET)[:k])


def write_manifest(folder: Path, vectors: str | None, model: str | None) -> None:
    """Names, within the folder, the file of vectors and the model they are of; both None: words alone."""
    text = json.dumps({"vectors": vectors, "model": model})
    (folder / "search.json").write_text(text + "\n", encoding="utf-8")


def load_code_index(folder: Path) -> CodeIndex:
    """The index of a prepared folder. Raises UserError naming what is missing and the cure."""
    words = load_index(folder / "index")
    try:
        manifest = json.loads((folder / "search.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        manifest = None
    if words is None or manifest is None:
        raise UserError(f"{folder} holds no search index", where="task icd10_notes", cure=CURE)
    if manifest["vectors"] is None:
        return CodeIndex(words, None)
    try:
        matrix = np.load(folder / manifest["vectors"], mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"the vectors cannot be read: {error}", where="task icd10_notes", cure=CURE) from None
    return CodeIndex(words, Vectors(matrix, Embedder(folder / manifest["model"])))


def shared_index() -> CodeIndex:
    """The process's one index. Raises UserError as load_code_index does."""
    with _lock:  # a burst of first calls must not load it once each
        return _shared_index()


@cache
def _shared_index() -> CodeIndex:
    return load_code_index(Path(os.environ.get("RFT_ICD10_NOTES_DIR", "data/icd10_notes")))
