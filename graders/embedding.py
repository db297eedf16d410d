"""Text embeddings from a local model folder: the mean of the last hidden states over a text's tokens."""

from __future__ import annotations

import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

from rft.errors import GraderError

_MAX_TOKENS = 512
_NUM_REMEMBERED = 4096  # references come back with every rollout of their item


class Embedder:
    """Loads any folder that `AutoModel` accepts, on the CPU in float32. Raises GraderError when it cannot.

    Models made for embeddings name their pooling in files of their own; this one always takes the mean, which is right
    for most (all-MiniLM, e5, gte, nomic) and says so.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModel, AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
            self._model: Any = AutoModel.from_pretrained(str(folder), local_files_only=True, dtype="float32").eval()
        except (OSError, ValueError) as error:
            raise GraderError(
                f"the embedding model {folder} cannot be loaded: {error}", cure="check the folder"
            ) from None
        self._one_at_a_time = threading.Lock()
        self._embedding = lru_cache(_NUM_REMEMBERED)(self._embed)

    def cosine(self, one: str, other: str) -> float:
        """The cosine of the angle between two texts' embeddings, in [-1, 1]."""
        with self._one_at_a_time:  # calls come from threads; the model's are its own
            return float(self._embedding(one) @ self._embedding(other))

    def _embed(self, text: str) -> Any:
        """[h] float32 of length 1."""
        import torch

        inputs = self._tokenizer(text, return_tensors="pt", truncation=True, max_length=_MAX_TOKENS)
        with torch.no_grad():
            hidden = self._model(**inputs).last_hidden_state[0]  # [T, h]; one text, so no padding to mask
        return torch.nn.functional.normalize(hidden.mean(0), dim=0)
