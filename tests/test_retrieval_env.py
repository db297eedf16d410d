"""Search over local documents: what is found, what a model may ask, what is kept on disk."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from tiny import tiny_model_folder

import rft.envs.retrieval_index as retrieval_index
from rft.envs import build_environment, discover_tools
from rft.envs.documents import Document, load_documents
from rft.envs.retrieval import RetrievalEnvironment, RetrievalEnvironmentConfig
from rft.envs.retrieval_index import Embedder, best, build, digest, fuse, load_or_build
from rft.errors import UserError
from rft.types import Item, Message, ToolCall, ToolResult

ROWS: list[dict[str, Any]] = [
    {"id": "whale", "title": "Moby Dick", "text": "Call me Ishmael. " + "The sea was calm. " * 40 + "A white whale!"},
    {"id": "emma", "text": "Emma Woodhouse, handsome, clever, and rich"},
    {"id": 3, "title": "Übung", "text": "Die Straße ist lang; the sea is far"},
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    return write(tmp_path / "documents.jsonl", ROWS)


def calls(documents: Path, *calls: tuple[str, dict[str, Any]], **options: Any) -> list[ToolResult]:
    async def story() -> list[ToolResult]:
        environment = RetrievalEnvironment(RetrievalEnvironmentConfig(documents=documents, **options))
        await environment.check()
        session = await environment.open(Item(id="i", row={}, messages=[Message(role="user", content="x")]), "trace")
        requests = (
            ToolCall(id="fc", call_id="call", name=name, arguments=json.dumps(arguments)) for name, arguments in calls
        )
        return [await session.call(request) for request in requests]

    return asyncio.run(story())


def ids(result: ToolResult) -> list[str]:
    return [line.removeprefix("id: ") for line in result.output.splitlines() if line.startswith("id: ")]


def test_search_and_read(documents: Path) -> None:
    search, sea, read, number = calls(
        documents,
        ("search", {"query": "WHITE whale of the sea"}),
        ("search", {"query": "sea", "top_k": 1}),
        ("read", {"id": "emma"}),
        ("read", {"id": "3"}),
    )
    assert ids(search) == ["whale", "3"]
    assert "Moby Dick\n...ea was calm." in search.output and search.output.count("A white whale!") == 1
    assert len(ids(sea)) == 1
    assert read.output == "Emma Woodhouse, handsome, clever, and rich"
    assert number.output.startswith("Übung\n\nDie Straße")


@pytest.mark.parametrize("query", ["straße", "STRASSE", "übung", "ÜBUNG"])
def test_words_of_any_language_and_case(documents: Path, query: str) -> None:
    (result,) = calls(documents, ("search", {"query": query}))
    assert ids(result) == ["3"]


@pytest.mark.parametrize(
    ("name", "arguments", "words", "is_error"),
    [
        ("read", {"id": "whales"}, "there is no document whales: search gives the ids", True),
        ("read", {"id": "x" * 5000}, "there is no document xxx", True),
        ("read", {"id": "../documents.jsonl"}, "there is no document ../documents.jsonl", True),
        ("read", {"id": "emma", "start": 999}, "has 42 characters", True),
        ("read", {}, "arguments.id: field required", True),
        ("search", {"query": "sea", "top_k": 0}, "greater than or equal to 1", True),
        ("search", {"query": "zebra"}, "no document found", False),
        ("search", {"query": ""}, "no document found", False),
        ("search", {"query": "\ud83d\0"}, "no document found", False),
        ("find", {}, "there is no tool find; the tools are: read, search", True),
    ],
)
def test_what_the_model_gets_wrong(
    documents: Path, name: str, arguments: dict[str, Any], words: str, is_error: bool
) -> None:
    (result,) = calls(documents, (name, arguments))
    assert (words in result.output, result.is_error) == (True, is_error), result.output
    assert len(result.output) < 1000


def test_limits(tmp_path: Path) -> None:
    rows = [{"id": str(number), "text": "sea " * 1000} for number in range(30)]
    documents = write(tmp_path / "many.jsonl", rows)
    options = {"max_top_k": 7, "top_k": 2, "result_chars": 50, "read_chars": 100}
    many, default, first, then = calls(
        documents,
        ("search", {"query": "sea", "top_k": 10**9}),
        ("search", {"query": "sea"}),
        ("read", {"id": "5"}),
        ("read", {"id": "5", "start": 3950}),
        **options,
    )
    assert ids(many) == [str(number) for number in range(7)], "equal scores in the documents' order"
    assert len(many.output) < 7 * 70
    assert ids(default) == ["0", "1"]
    assert first.output == "sea " * 25 + "\n\n... 3,900 more characters: read on with start=100"
    assert then.output == ("sea " * 1000)[3950:]


def test_a_folder_of_files(tmp_path: Path) -> None:
    for name, text in {"a.md": "# Whales\nbig", "deep/b.TXT": "whale", "c.py": "whale", ".git/d.md": "whale"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "e.rst").write_bytes(b"whale \xff")
    assert list(load_documents(tmp_path)) == ["a.md", "deep/b.TXT", "e.rst"]
    (found,) = calls(tmp_path, ("search", {"query": "whale"}))
    assert sorted(ids(found)) == ["deep/b.TXT", "e.rst"]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("", "holds no documents"),
        ('{"id": "a", "text": "b"}\n{', ":2: is not JSON"),
        ("[1]", ":1: is not a JSON object"),
        ('{"id": "a"}', ":1: text must be text"),
        ('{"text": "a"}', ":1: id must be text"),
        ('{"id": "", "text": "a"}', ":1: id must be text"),
        ('{"id": true, "text": "a"}', ":1: id must be text"),
        ('{"id": "a", "text": "b", "title": 5}', ":1: title must be text"),
        ('{"id": 1, "text": "b"}\n\n{"id": "1", "text": "b"}', ":3: the id 1 appears twice"),
    ],
)
def test_bad_documents_are_user_errors(tmp_path: Path, lines: str, words: str) -> None:
    (tmp_path / "bad.jsonl").write_text(lines)
    with pytest.raises(UserError, match=words) as caught:
        calls(tmp_path / "bad.jsonl")
    assert "bad.jsonl" in str(caught.value) and "cure: " in str(caught.value)


def test_missing_places_are_user_errors(documents: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no file or folder"):
        calls(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"has no config\.json"):
        calls(documents, embedding_model=tmp_path)
    with pytest.raises(ValidationError, match="more than max_top_k"):
        RetrievalEnvironmentConfig(documents=documents, top_k=30)


def test_documents_without_a_word(tmp_path: Path) -> None:
    (result,) = calls(write(tmp_path / "x.jsonl", [{"id": "a", "text": "..."}]), ("search", {"query": "a"}))
    assert result.output == "no document found: try other words"


def test_tools_are_discovered_without_reading_anything(tmp_path: Path) -> None:
    config = RetrievalEnvironmentConfig(documents=tmp_path / "nowhere", top_k=4)
    specs = asyncio.run(discover_tools(config))
    assert list(specs) == ["search", "read"] and specs["search"] is not None and specs["read"] is not None
    assert specs["search"]["function"]["parameters"]["properties"]["top_k"]["default"] == 4
    assert specs["read"]["function"]["parameters"]["properties"]["id"]["description"] == "as search gave it"
    assert isinstance(build_environment(config), RetrievalEnvironment)


def test_the_best_are_those_of_a_full_sort() -> None:
    random = np.random.default_rng(0)
    for size in (1, 5, 200):
        scores = random.integers(0, 5, size).astype(np.float32)
        expected = sorted(range(size), key=lambda place: (-scores[place], place))
        for k in (1, 3, size, size + 5):
            assert best(scores, k) == expected[:k]


def test_fusion_rewards_being_found_twice() -> None:
    assert fuse([[1, 2, 3], [4, 2]]) == [2, 1, 4, 3]


# --- vectors ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model"))


def test_padding_does_not_change_a_vector(model: Path) -> None:
    embedder = Embedder(model)
    together = embedder.vectors(["short", "a much longer text than the other one"])
    alone = embedder.vectors(["short"])
    np.testing.assert_allclose(together[0], alone[0], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)


def test_the_dense_search_finds_what_words_do_not(documents: Path, model: Path) -> None:
    """A text's nearest neighbour is itself, whatever the model; BM25 knows no word of `handsom`."""
    by_words, hybrid = (
        calls(documents, ("search", {"query": "Emma Woodhouse, handsom", "top_k": 3}), **options)[0]
        for options in ({}, {"embedding_model": model})
    )
    assert ids(by_words) == ["emma"]
    assert ids(hybrid)[0] == "emma" and len(ids(hybrid)) == 3


def test_vectors_are_computed_once(
    documents: Path, model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(retrieval_index, "KEEP_ABOVE_S", 0.0)
    query = ("search", {"query": "sea"})
    built = calls(documents, query, embedding_model=model)
    assert "embedded 3 of 3 documents" in caplog.text
    caplog.clear()
    assert calls(documents, query, embedding_model=model)[0].output == built[0].output
    assert "embedded" not in caplog.text and "indexing" not in caplog.text


# --- on disk ---------------------------------------------------------------------------------------------------------


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if "rft-index" in path.name)


def test_a_quick_index_leaves_no_files(documents: Path) -> None:
    calls(documents, ("search", {"query": "sea"}))
    assert kept(documents.parent) == []


def test_an_index_is_kept_by_content(documents: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval_index, "KEEP_ABOVE_S", 0.0)
    query = ("search", {"query": "sea"})
    (built,), (loaded,) = calls(documents, query), calls(documents, query)
    assert built.output == loaded.output
    (first,) = kept(documents.parent)
    write(documents, [*ROWS, {"id": "new", "text": "sea sea sea"}])
    assert "new" in ids(calls(documents, query)[0])
    assert len(kept(documents.parent)) == 2 and first in kept(documents.parent)


def test_a_broken_index_is_built_again(
    documents: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(retrieval_index, "KEEP_ABOVE_S", 0.0)
    query = ("search", {"query": "sea"})
    (built,) = calls(documents, query)
    (name,) = kept(documents.parent)
    for path in (documents.parent / name / "bm25").iterdir():
        path.write_bytes(b"")
    (again,) = calls(documents, query)
    assert again.output == built.output and "is built again" in caplog.text
    assert kept(documents.parent) == [name]


def test_a_folder_that_cannot_be_written_is_no_problem(documents: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval_index, "KEEP_ABOVE_S", 0.0)
    parsed = list(load_documents(documents).values())
    index = load_or_build(documents.parent / "gone" / "documents.jsonl", parsed, None)
    assert index.search("whale", 1) == ("whale",)


def test_the_digest_tells_documents_and_models_apart(model: Path, tmp_path: Path) -> None:
    other = tiny_model_folder(tmp_path, hidden_size=32)
    one, two = [Document("a", "bc")], [Document("ab", "c")]
    digests = {digest(one, None), digest(two, None), digest(one, model), digest(one, other)}
    assert len(digests) == 4 and digest(one, None) in digests


def test_many_rollouts_build_one_index(documents: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        environment = RetrievalEnvironment(RetrievalEnvironmentConfig(documents=documents))
        item = Item(id="i", row={}, messages=[Message(role="user", content="x")])
        await asyncio.gather(*(environment.open(item, str(number)) for number in range(20)))

    caplog.set_level(logging.INFO)
    asyncio.run(story())
    assert caplog.text.count("indexing 3 documents") == 1


@pytest.mark.slow
def test_a_hundred_thousand_documents() -> None:
    random = np.random.default_rng(0)
    vocabulary = [f"w{number}" for number in range(20_000)]
    texts = random.zipf(1.3, (100_000, 40)) % len(vocabulary)
    documents = [Document(str(number), " ".join(vocabulary[word] for word in row)) for number, row in enumerate(texts)]
    started = time.monotonic()
    index = build(documents, None)
    assert time.monotonic() - started < 120, "far above the 10 s of an idle machine"
    started = time.monotonic()
    for number in range(100):
        index.search(f"w{number} w{number + 7} w19000", 20)
    assert (time.monotonic() - started) / 100 < 0.2, "far above the milliseconds of an idle machine"
