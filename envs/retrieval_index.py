"""The index of a set of documents: BM25 over words, vectors of a local embedding model, reciprocal rank fusion.

Guarantees: deterministic, equal scores in the documents' order; safe to use from many threads; on disk an index is
complete or absent (written beside its place, then renamed), and found by the hash of what it was made from.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import bm25s
import numpy as np

from rft.envs.documents import Document
from rft.errors import UserError

logger = logging.getLogger(__name__)

FORMAT = 1  # of the folder; part of the hash
KEEP_ABOVE_S = 2.0  # building that takes longer is worth a folder on the user's disk
_FUSED, _RANK_OFFSET = 100, 60  # how many of each search are fused, and Cormack's constant
_NUM_REMEMBERED = 4096
_BATCH, _MAX_TOKENS = 32, 512


class Index:
    """`search(query, k)` gives ids, best first."""

    def __init__(self, documents: list[Document], bm25: bm25s.BM25, dense: Dense | None) -> None:
        self._ids = [document.id for document in documents]
        self._bm25, self._dense = bm25, dense
        self._vocabulary: dict[str, int] = bm25.vocab_dict
        self.search: Callable[[str, int], tuple[str, ...]] = lru_cache(_NUM_REMEMBERED)(self._search)

    def _search(self, query: str, k: int) -> tuple[str, ...]:
        if self._dense is None:
            return tuple(self._ids[place] for place in self._by_words(query, k))
        ranked = (self._by_words(query, max(k, _FUSED)), self._dense.search(query, max(k, _FUSED)))
        return tuple(self._ids[place] for place in fuse(ranked)[:k])

    def _by_words(self, query: str, k: int) -> list[int]:
        known = [self._vocabulary[word] for word in words(query) if word in self._vocabulary]
        if not known:
            return []
        scores = self._bm25.get_scores_from_ids(known)  # [num_documents] float32
        return [place for place in best(scores, k) if scores[place] > 0]

    def excerpt(self, document: Document, query: str, num_chars: int) -> str:
        """The title, and the text around the first word of the query that it holds, the rarest words first."""
        known = {word for word in words(query) if word in self._vocabulary}
        text = " ".join(document.text.split())
        by_rarity = sorted(known, key=lambda word: (self._frequency(word), word))
        searches = (re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) for word in by_rarity)
        found = next(filter(None, searches), None)
        start = max(0, found.start() - num_chars // 4) if found else 0
        end = start + num_chars
        part = f"{'...' if start else ''}{text[start:end]}{'...' if end < len(text) else ''}"
        return f"{document.title[:num_chars]}\n{part}" if document.title else part

    def save(self, folder: Path) -> None:
        self._bm25.save(str(folder / "bm25"), show_progress=False)
        if self._dense is not None:
            np.save(folder / "vectors.npy", self._dense.matrix)

    def _frequency(self, word: str) -> int:
        """In how many documents a word of the vocabulary is."""
        starts, number = self._bm25.scores["indptr"], self._vocabulary[word]
        return int(starts[number + 1] - starts[number])


_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """What queries and documents are compared by."""
    return [match.casefold() for match in _WORD.findall(text)]


def best(scores: np.ndarray[Any, Any], k: int) -> list[int]:
    """The places of the k highest, best first, equals in their order. scores: [n] float32."""
    if k < len(scores):
        least = np.partition(scores, len(scores) - k)[len(scores) - k]
        above, equal = np.flatnonzero(scores > least), np.flatnonzero(scores == least)
        places = np.concatenate([above, equal[: k - len(above)]])
    else:
        places = np.arange(len(scores))
    order = np.lexsort((places, -scores[places]))
    return [int(place) for place in places[order]]


def fuse(rankings: Iterable[list[int]], rank_offset: int = _RANK_OFFSET) -> list[int]:
    """Reciprocal rank fusion (Cormack et al., 2009): the sum of 1 / (rank_offset + rank) over the rankings."""
    scores: dict[int, float] = {}
    for ranking in rankings:
        for rank, place in enumerate(ranking, 1):
            scores[place] = scores.get(place, 0.0) + 1 / (rank_offset + rank)
    return sorted(scores, key=lambda place: (-scores[place], place))


# --- vectors ---------------------------------------------------------------------------------------------------------


class Embedder:
    """Mean-pooled vectors of length 1, on the CPU in float32. Raises UserError when the model cannot be loaded."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModel, AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
            self._model: Any = AutoModel.from_pretrained(str(folder), local_files_only=True, dtype="float32").eval()
        except (OSError, ValueError) as error:
            where = "environment.embedding_model"
            raise UserError(f"{folder} cannot be loaded: {error}", where=where, cure="check the folder") from None
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._one_at_a_time = threading.Lock()

    def vectors(self, texts: list[str]) -> np.ndarray[Any, Any]:
        """[len(texts), h] float32, each of length 1."""
        import torch

        with self._one_at_a_time, torch.no_grad():
            inputs = self._tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=_MAX_TOKENS)
            hidden = self._model(**inputs).last_hidden_state  # [B, T, h]
            mask = inputs["attention_mask"].unsqueeze(-1)  # [B, T, 1] int64, 1 on tokens of the text
            mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
            return np.asarray(torch.nn.functional.normalize(mean, dim=1).numpy())


class Dense:
    """Documents by the cosine of their vectors with the query's. matrix: [num_documents, h] float32."""

    def __init__(self, matrix: np.ndarray[Any, Any], embedder: Embedder) -> None:
        self.matrix, self._embedder = matrix, embedder

    def search(self, query: str, k: int) -> list[int]:
        return best(self.matrix @ self._embedder.vectors([query])[0], k)


def embed_all(documents: list[Document], embedder: Embedder) -> np.ndarray[Any, Any]:
    """The matrix of the documents, with a line for every tenth of them."""
    parts, said = [], 0
    for start in range(0, len(documents), _BATCH):
        parts.append(embedder.vectors([document.whole for document in documents[start : start + _BATCH]]))
        if (tenths := 10 * (start + _BATCH) // len(documents)) > said:
            said = tenths
            logger.info("embedded %d of %d documents", min(start + _BATCH, len(documents)), len(documents))
    return np.concatenate(parts)


# --- on disk ---------------------------------------------------------------------------------------------------------


def load_or_build(source: Path, documents: list[Document], model: Path | None) -> Index:
    """The kept index of exactly these documents and this model, or a new one, kept when that took long."""
    folder = source.resolve().parent / f".{source.resolve().name}.rft-index-{digest(documents, model)}"
    embedder = Embedder(model) if model is not None else None
    index = _load(folder, documents, embedder)
    if index is None:
        started = time.monotonic()
        logger.info("indexing %d documents of %s", len(documents), source)
        index = build(documents, embedder)
        took_s = time.monotonic() - started
        logger.info("indexed in %.1f s", took_s)
        if took_s > KEEP_ABOVE_S:
            _keep(index, folder)
    return index


def digest(documents: list[Document], model: Path | None) -> str:
    """Of everything that decides the index: the format, the documents, the model's files."""
    total = hashlib.sha256(f"{FORMAT} {bm25s.__version__}".encode())
    for document in documents:
        for text in (document.id, document.title, document.text):
            data = text.encode()
            total.update(f"{len(data)}:".encode() + data)
    for path in sorted(model.iterdir()) if model is not None else ():
        if path.suffix in (".json", ".txt", ".model", ".safetensors", ".bin"):
            with path.open("rb") as file:
                total.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()[:16]


def build(documents: list[Document], embedder: Embedder | None) -> Index:
    vocabulary: dict[str, int] = {}
    corpus = [
        [vocabulary.setdefault(word, len(vocabulary)) for word in words(document.whole)] for document in documents
    ]
    bm25 = bm25s.BM25()
    with np.errstate(invalid="ignore"):  # documents without a single word have no mean length
        bm25.index((corpus, vocabulary), create_empty_token=False, show_progress=False)
    return Index(documents, bm25, Dense(embed_all(documents, embedder), embedder) if embedder is not None else None)


def _load(folder: Path, documents: list[Document], embedder: Embedder | None) -> Index | None:
    if not folder.is_dir():
        return None
    try:
        bm25 = bm25s.BM25.load(str(folder / "bm25"), mmap=True)
        matrix = np.load(folder / "vectors.npy", mmap_mode="r", allow_pickle=False) if embedder is not None else None
    except (OSError, ValueError, KeyError) as error:
        logger.warning("the index %s cannot be read and is built again: %s", folder, error)
        shutil.rmtree(folder, ignore_errors=True)
        return None
    logger.info("index %s", folder)
    return Index(documents, bm25, Dense(matrix, embedder) if embedder is not None and matrix is not None else None)


def _keep(index: Index, folder: Path) -> None:
    """Write it beside its place and rename; where that is impossible, it is built again next time."""
    try:
        with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent) as name:
            written = Path(name) / "index"
            written.mkdir()
            index.save(written)
            os.rename(written, folder)
    except OSError as error:  # also: another run was first
        logger.info("the index is not kept in %s: %s", folder, error.strerror)
