"""The ICD-10-CM task: search without leaks, an honest grader, a split by chapter, rows that fit the prompt."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from script_loading import load_script

from rft.config import read_tree
from rft.data import load_items, overlap
from rft.envs.tasks.icd10 import GRADER_SOURCE, TASK
from rft.envs.tasks.icd10.rows import TEST_CHAPTERS, VALIDATION_CHAPTERS
from rft.envs.tasks.icd10.search import SearchIndex, build_index, load_index, shared_index, words
from rft.envs.tasks.icd10.table import official_table, official_terms

pytestmark = pytest.mark.slow  # the whole table is loaded

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that scripts/prepare_icd10 writes; the tools of this process use its index."""
    out = tmp_path_factory.mktemp("icd10")
    script = load_script("prepare_icd10")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["prepare_icd10", "--out", str(out)])
        script.main()
        patch.setenv("RFT_ICD10_DIR", str(out))
        shared_index()
        yield out


@pytest.fixture(scope="module")
def index(prepared: Path) -> SearchIndex:
    loaded = load_index(prepared / "index")
    assert loaded is not None
    return loaded


def run(name: str, **arguments: Any) -> str:
    tool = TASK.tool(name)
    assert tool is not None
    return tool.run(json.dumps(arguments))


def test_all_billable_codes_are_there(index: SearchIndex) -> None:
    assert len(index.table.leaves) == 74_719
    assert index.table.descriptions["K35.80"] == "Unspecified acute appendicitis"
    assert index.table.chapter("K35.80") == "11"
    assert all(parent in index.table.descriptions for parent in index.table.parents.values() if parent)


def test_search_answers_lines_of_code_and_description(prepared: Path) -> None:
    lines = run("search_codes", query="acute appendicitis with generalized peritonitis", k=5).split("\n")
    assert len(lines) == 5 and lines[0].startswith("K35.2")
    assert run("search_codes", query="of the and").startswith("no code found")
    assert len(run("search_codes", query="Fracture").split("\n")) == 3
    assert len(run("search_codes", query="Fracture", k=99).split("\n")) == 10


def test_search_is_the_same_from_disk_memory_and_many_threads(index: SearchIndex) -> None:
    fresh = build_index(official_table())
    queries = [term for _, term in official_terms(index.table)[::40]]
    expected = [fresh.search(query, 10) for query in queries]
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(lambda query: index.search(query, 10), queries)) == expected
    assert all(found[:3] == index.search(query, 3) for query, found in zip(queries, expected, strict=True))


def test_search_is_fast(index: SearchIndex) -> None:
    queries = [term + " x" for _, term in official_terms(index.table)[:300]]
    started = time.monotonic()
    for query in queries:
        index.search(query, 10)
    assert (time.monotonic() - started) / len(queries) < 0.01  # measured: 0.0002


def test_nothing_but_descriptions_can_be_found(index: SearchIndex) -> None:
    """No inclusion term leaks: every result shares a word with the query through its own description."""
    known = {word for code in index.table.leaves for word in words(index.table.descriptions[code])}
    assert set(index._vocabulary) == known
    for _, term in official_terms(index.table)[::25]:
        for code in index.search(term, 10):
            assert set(words(term)) & set(words(index.table.descriptions[code]))


def test_the_index_folder_holds_codes_and_descriptions_only(prepared: Path) -> None:
    table = official_table()
    files = {path.name for path in (prepared / "index").rglob("*") if path.is_file()}
    arrays = {f"{name}.csc.index.npy" for name in ("data", "indices", "indptr")}
    assert files == {"codes.json", "format.json", "params.index.json", "vocab.index.json", *arrays}
    rows = json.loads((prepared / "index" / "codes.json").read_text(encoding="utf-8"))
    assert rows == [[code, text, table.parents[code]] for code, text in table.descriptions.items()]


def test_lookup_shows_the_neighbourhood(prepared: Path) -> None:
    lines = ["I21.9 Acute myocardial infarction, unspecified", "parent: I21 Acute myocardial infarction"]
    assert run("lookup_code", code="i219").split("\n") == lines
    assert "child: K35.8 " in run("lookup_code", code="K35")
    assert run("lookup_code", code="21").split("\n")[-1].startswith("child: ")
    assert run("lookup_code", code="X99.99").startswith("there is no code X99.99: search_codes")


@pytest.mark.parametrize(
    ("answer", "gold", "expected"),
    [
        ("K35.80", "K35.80", 1.0),
        ("The code is k35.80.", "K35.80", 1.0),
        ("K3580", "K35.80", 1.0),
        ("K35", "K35.80", 0.5),
        ("K35.801", "K35.80", 0.5),
        ("K35.2", "K35.80", 0.25),
        ("K36", "K35.80", 0.0),
        ("K36 or K35.80", "K35.80", 0.0),
        ("K35.80 or K36", "K35.80", 0.5),  # the first one counts, and a second one halves it
        ("K35.80, k3580 or K35.80", "K35.80", 1.0),
        (" ".join(f"K35.{n}" for n in range(80, 100)), "K35.80", 0.05),
        ("QA0.012", "QA0.012", 1.0),
        ("appendicitis", "K35.80", 0.0),
        ("", "K35.80", 0.0),
        (None, "K35.80", 0.0),
    ],
)
def test_the_grader(answer: str | None, gold: str, expected: float) -> None:
    module: dict[str, Any] = {}
    exec(GRADER_SOURCE, module)
    assert module["grade"]({"output_text": answer}, {"code": gold}) == expected


@pytest.mark.parametrize("name", ["quickstart", "quickstart_multi"])
def test_the_quickstarts_pay_for_one_answer(name: str) -> None:
    """Their shaped graders: a right code earns most, and less with every other code beside it."""
    config = read_tree(ROOT / "configs" / f"{name}.yaml", None, example="")
    spec = config["grader"] if "source" in config["grader"] else config["grader"]["graders"]["shaped"]
    assert config["shadow_graders"]["code"]["source"] == GRADER_SOURCE
    module: dict[str, Any] = {}
    exec(spec["source"], module)
    found = {"role": "tool", "content": "K35.80 Unspecified acute appendicitis\nK36 Other appendicitis"}

    def grade(text: str) -> float:
        return module["grade"]({"output_text": text, "trace": [found]}, {"code": "K35.80"})

    assert grade("The code is K35.80.") == pytest.approx(1.0)
    assert grade("K35.80 K36") == pytest.approx(0.55)
    assert grade("K36 K35.80") == pytest.approx(0.15)
    assert grade("none") == pytest.approx(0.1)


def test_the_grader_finds_every_code(index: SearchIndex) -> None:
    module: dict[str, Any] = {}
    exec(GRADER_SOURCE, module)
    assert all(module["grade"]({"output_text": code}, {"code": code}) == 1.0 for code in index.table.leaves)


def test_rows_load_and_splits_share_nothing(prepared: Path) -> None:
    splits = {name: load_items(prepared / f"{name}.jsonl", TASK.specs) for name in ("train", "validation", "test")}
    assert {name: len(items) for name, items in splits.items()} == {"train": 3850, "validation": 606, "test": 590}
    assert {item.row["chapter"] for item in splits["test"]} == TEST_CHAPTERS
    assert {item.row["chapter"] for item in splits["validation"]} == VALIDATION_CHAPTERS
    assert not {item.row["chapter"] for item in splits["train"]} & (TEST_CHAPTERS | VALIDATION_CHAPTERS)
    assert overlap(splits["train"], splits["validation"] + splits["test"]) == 0
    assert not {item.row["code"] for item in splits["train"]} & {item.row["code"] for item in splits["test"]}


def test_the_examples_in_the_prompt_are_calls_the_tool_answers(prepared: Path) -> None:
    (first, *_) = load_items(prepared / "test.jsonl", TASK.specs)
    system, *examples, question = first.messages
    assert system.role == "system" and question.content.endswith(": " + first.row["term"])
    for user, assistant in zip(examples[::2], examples[1::2], strict=True):
        call = json.loads(assistant.content.removeprefix("<tool_call>").removesuffix("</tool_call>"))
        assert user.role == "user" and not run(call["name"], **call["arguments"]).startswith("no code found")


def test_preparing_again_writes_the_same_bytes(prepared: Path) -> None:
    from rft.envs.tasks.icd10.rows import build_rows

    loaded = load_index(prepared / "index")
    assert loaded is not None
    rows = build_rows(loaded, [tool.spec() for tool in TASK.tools])
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows["test"]) + "\n"
    assert text == (prepared / "test.jsonl").read_text(encoding="utf-8")
