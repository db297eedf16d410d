"""Computes the vectors of the billable descriptions once, and keeps them under the hash of what they were made from."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rft.envs.documents import Document
from rft.envs.retrieval_index import Embedder, digest
from rft.envs.tasks.icd10.table import Table

_BATCH = 64


def vectors_of(table: Table, model: Path, folder: Path, said: Callable[[str], None]) -> str:
    """The name of the file in `folder`, made if missing: [num_leaves, h] float16 in the order of `table.leaves`."""
    texts = [table.descriptions[code] for code in table.leaves]
    documents = [Document(code, text) for code, text in zip(table.leaves, texts, strict=True)]
    name = f"vectors-{digest(documents, model)}.npy"
    if not (folder / name).is_file():
        scratch = folder / f".{os.getpid()}-{name}"
        np.save(scratch, embed(texts, Embedder(model), said))
        os.replace(scratch, folder / name)
    return name


def embed(texts: list[str], embedder: Embedder, said: Callable[[str], None]) -> np.ndarray[Any, Any]:
    """[len(texts), h] float16. Batches are of texts of one length: padding is work for nothing."""
    order = sorted(range(len(texts)), key=lambda place: (len(texts[place]), texts[place]))
    parts = []
    for start in range(0, len(order), _BATCH):
        parts.append(embedder.vectors([texts[place] for place in order[start : start + _BATCH]]).astype(np.float16))
        if start // _BATCH % 50 == 49:
            said(f"embedded {start + _BATCH:,} of {len(texts):,} descriptions")
    found = np.empty((len(texts), parts[0].shape[1]), dtype=np.float16)
    found[order] = np.concatenate(parts)
    return found
