"""What a search engine makes of the task without a model: BM25 over the files of a tree, the best as the answer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from rft.envs.tasks.file_planning.grader import grade
from rft.envs.tasks.file_planning.rows import Hits, words

_WORD = re.compile(r"[a-z][a-z0-9]+")


def bm25_f1(rows: Sequence[dict[str, Any]], files: Mapping[str, bytes]) -> float:
    """The mean F1 of answering each row of one tree with the best file for its text. Rows must not be empty."""
    import bm25s

    paths, vocabulary = list(files), dict[str, int]()
    corpus = [
        [vocabulary.setdefault(word, len(vocabulary)) for word in _words(f"{path} {data.decode(errors='replace')}")]
        for path, data in files.items()
    ]
    index = bm25s.BM25()
    index.index((corpus, vocabulary), create_empty_token=False, show_progress=False)

    def best(text: str) -> str:
        ids = [vocabulary[word] for word in _words(text) if word in vocabulary]
        return paths[int(index.get_scores_from_ids(ids).argmax())] if ids else ""

    return fmean(grade({"output_text": best(row["text"])}, row) for row in rows)


def grep_f1(rows: Sequence[dict[str, Any]], hits: Hits) -> tuple[float, float]:
    """The same for a search as the demonstrations make it, its first line as the answer: on average over the words of
    the text, which is where training starts, and for the first identifier, which is simple to learn.
    """

    def score(row: dict[str, Any], word: str) -> float:
        return grade({"output_text": next((path for path, _ in hits.best(word)), "")}, row)

    any_word = fmean(fmean(score(row, word) for word in words(row["text"])) for row in rows)
    return any_word, fmean(score(row, (row["identifiers"] or words(row["text"]))[0]) for row in rows)


def _words(text: str) -> list[str]:
    return _WORD.findall(re.sub(r"([a-z])([A-Z])", r"\1 \2", text).lower())
