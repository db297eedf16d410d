"""Computes the vectors of the billable descriptions once, and keeps them under the hash of what they were made from.

A computation that was stopped goes on where it was.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rft.envs.documents import Document
from rft.envs.retrieval_index import Embedder, digest
from rft.envs.tasks.icd10.table import Table
from rft.files import replace

_BATCH = 64
_NUM_IN_PART = 50 * _BATCH  # texts whose vectors are kept together while the rest is computed


def vectors_of(table: Table, model: Path, folder: Path, said: Callable[[str], None]) -> str:
    """The name of the file in `folder`, made if missing: [num_leaves, h] float16 in the order of `table.leaves`."""
    texts = [table.descriptions[code] for code in table.leaves]
    documents = [Document(code, text) for code, text in zip(table.leaves, texts, strict=True)]
    name = f"vectors-{digest(documents, model)}.npy"
    if not (folder / name).is_file():
        parts = folder / f".{name}.parts"
        parts.mkdir(exist_ok=True)
        _save(folder / name, embed(texts, Embedder(model), parts, said))
        shutil.rmtree(parts, ignore_errors=True)
    return name


def embed(texts: list[str], embedder: Embedder, parts: Path, said: Callable[[str], None]) -> np.ndarray[Any, Any]:
    """[len(texts), h] float16. Batches are of texts of one length: padding is work for nothing.

    parts: a folder for these texts and this embedder alone; what is in it is not computed again.
    """
    order = sorted(range(len(texts)), key=lambda place: (len(texts[place]), texts[place]))
    found = []
    for start in range(0, len(order), _NUM_IN_PART):
        part, places = parts / f"{start:07d}.npy", order[start : start + _NUM_IN_PART]
        if not part.is_file():
            _save(part, _embed([texts[place] for place in places], embedder))
            said(f"embedded {start + len(places):,} of {len(texts):,} descriptions")
        found.append(np.load(part))
    vectors = np.empty((len(texts), found[0].shape[1]), dtype=np.float16)
    vectors[order] = np.concatenate(found)
    return vectors


def _embed(texts: list[str], embedder: Embedder) -> np.ndarray[Any, Any]:
    batches = [texts[start : start + _BATCH] for start in range(0, len(texts), _BATCH)]
    return np.concatenate([embedder.vectors(batch).astype(np.float16) for batch in batches])


def _save(path: Path, vectors: np.ndarray[Any, Any]) -> None:
    content = io.BytesIO()
    np.save(content, vectors)
    replace(path, content.getvalue())
