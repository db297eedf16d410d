"""The task of ICD-10-CM notes: honest graders, notes without codes, splits by chapter, a search of two rankings."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.machinery
import importlib.util
import json
import random
import sqlite3
import time
import zipfile
from collections.abc import Iterator
from contextlib import closing
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tiny
from script_loading import load_script

from rft.config import load_config
from rft.data import load_items, overlap
from rft.envs.retrieval_index import Embedder
from rft.envs.tasks import ArgumentError, Task, load_task
from rft.envs.tasks.icd10.search import build_index
from rft.envs.tasks.icd10.table import Table
from rft.envs.tasks.icd10_notes import rows as rows_module
from rft.envs.tasks.icd10_notes import search, vectors
from rft.envs.tasks.icd10_notes.grader import CODE
from rft.envs.tasks.icd10_notes.notes import FRAMES, UNSEEN_FRAMES, Diagnosis, is_plain
from rft.envs.tasks.icd10_notes.rows import build_rows, split_diagnoses
from rft.envs.tasks.icd10_notes.search import load_code_index, write_manifest
from rft.envs.tasks.icd10_notes.table import read_table
from rft.envs.tasks.icd10_notes.vectors import vectors_of
from rft.errors import UserError
from rft.grader_cases import load_cases
from rft.grader_cases import test_cases as run_cases
from rft.grader_probes import probe
from rft.graders import GraderTools, build_grader

ROOT = Path(__file__).resolve().parent.parent
PREPARED = ROOT / "data" / "icd10_notes"
CONFIG = ROOT / "configs" / "icd10_notes.yaml"
CODES = {
    "K35": "Acute appendicitis",
    "K35.8": "Other and unspecified acute appendicitis",
    "K35.80": "Unspecified acute appendicitis",
    "K35.89": "Other acute appendicitis",
    "K36": "Other appendicitis",
    "J45.909": "Unspecified asthma, uncomplicated",
    "G43.909": "Migraine, unspecified, not intractable, without status migrainosus",
}
needs_data = pytest.mark.skipif(
    not (PREPARED / "search.json").is_file(), reason="needs data/icd10_notes: run scripts/prepare_icd10_notes"
)


# --- graders ---


@cache
def grader_of(name: str) -> Any:
    module: dict[str, Any] = {}
    exec((ROOT / "envs/tasks/icd10_notes" / name).read_text(encoding="utf-8"), module)
    return module["grade"]


def graded(name: str, answer: Any, codes: list[str], *results: str) -> float:
    trace = [{"role": "tool", "content": result, "is_error": False} for result in results]
    return float(grader_of(name)({"output_text": answer, "trace": trace}, {"codes": codes}))


@pytest.mark.parametrize(
    ("answer", "codes", "soft", "exact"),
    [
        ("K35.80", ["K35.80"], 1, 1),
        ("The codes are k3580 and J45.909.", ["K35.80", "J45.909"], 1, 1),
        ("J45.909\nK35.80", ["K35.80", "J45.909"], 1, 1),  # a set: any order
        ("K35", ["K35.80"], 0.5, 0),
        ("K35.801", ["K35.80"], 0.5, 0),
        ("K35.2", ["K35.80"], 0.25, 0),
        ("K35.80", ["K35.80", "J45.909"], 2 / 3, 2 / 3),
        ("K35.80 K35.80 k3580", ["K35.80", "J45.909"], 2 / 3, 2 / 3),  # said often, counted once
        ("K35.80 K35.2 K35.3", ["K35.80"], 0.5, 0.5),
        ("K35.2 K35.89", ["K35.80", "K35.89"], 0.625, 0.5),  # best matching: the equal pair first
        ("K35.2 K36 J45.90", ["K35.80", "J45.909"], 2 * 0.75 / 5, 0),
        ("K35.80 A00 A01 A02 A03", ["K35.80"], 1 / 3, 1 / 3),
        ("K35.80 A00 A01 A02 A03 A04", ["K35.80"], 0, 0),  # more than five
        ("", ["K35.80"], 0, 0),
        (None, ["K35.80"], 0, 0),
        ("appendicitis", ["K35.80"], 0, 0),
    ],
)
def test_the_grades_of_a_set(answer: Any, codes: list[str], soft: float, exact: float) -> None:
    assert graded("grader.py", answer, codes) == pytest.approx(soft)
    assert graded("exact_f1.py", answer, codes) == pytest.approx(exact)


def test_no_list_beats_the_right_set() -> None:
    """Random lists around the right codes: nothing but the set itself earns everything, one more always costs."""
    chance, known = random.Random(0), ["K35.80", "K35.89", "K35.2", "K36", "J45.909", "J45.20", "G43.909", "A00.0"]
    for _ in range(200):
        codes = chance.sample(known, chance.randint(1, 3))
        answer = chance.sample(known, chance.randint(1, 5))
        score = graded("grader.py", " ".join(answer), codes)
        assert graded("exact_f1.py", " ".join(answer), codes) <= score <= 1
        assert (score == 1) == (set(answer) == set(codes))
    assert graded("grader.py", "K35.80 K35.2", ["K35.80"]) < graded("grader.py", "K35.80", ["K35.80"])


def test_support_is_for_codes_that_search_offered() -> None:
    found = "K35.80 Unspecified acute appendicitis\nK36 Other appendicitis"
    assert graded("support.py", "K35.80", ["G43.909"], found) == 1
    assert graded("support.py", "K35.80 J45.909", ["G43.909"], found) == 0.75
    assert graded("support.py", "", ["K35.80"], found) == 0.5
    assert graded("support.py", "K35.80", ["K35.80"]) == 0
    assert graded("support.py", "K35.80", ["K35.80"], "no code found for K35.80") == 0.5, "a repeated query"
    assert graded("support.py", "A00 A01 A02 A03 A04 A05", ["A00"], "A00 x\nA01\nA02\nA03\nA04\nA05") == 0.5
    refused = {"role": "tool", "content": "K35.80 x", "is_error": True}
    assert grader_of("support.py")({"output_text": "K35.80", "trace": [refused]}, {"codes": ["K35.80"]}) == 0


def test_the_grader_is_quick_on_hostile_answers() -> None:
    started = time.monotonic()
    for answer in (
        "K35.80 " * 20_000,
        "K35." * 50_000,
        "\u0130" * 100_000,
        " ".join(f"A{n % 100:02}" for n in range(9999)),
    ):
        graded("grader.py", answer, ["K35.80", "J45.909", "G43.909"])
    assert time.monotonic() - started < 2


@pytest.mark.slow
def test_cases_and_probes_pass_in_the_sandbox(tmp_path: Path) -> None:
    config = load_config(CONFIG)
    codes = [["K35.80"], ["K21.9", "B37.2"], ["L50.9", "J45.909", "G43.909"]] * 7
    lines = [{"messages": [{"role": "user", "content": f"Note: {n}."}], "codes": c} for n, c in enumerate(codes)]

    async def story(path: Path) -> None:
        grader = build_grader(config.grader, GraderTools())
        await grader.start()
        try:
            results = await run_cases(grader, load_cases(ROOT / "configs/cases/icd10_notes.jsonl"), 1)
            assert [result.problem for result in results if not result.passed] == []
            assert [p.probe for p in await probe(grader, load_items(path, None), "", 0.5) if p.too_high] == []
        finally:
            await grader.close()

    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    asyncio.run(story(tmp_path / "rows.jsonl"))


def test_the_config_names_the_task() -> None:
    config = load_config(CONFIG)
    assert set(config.shadow_graders) == {"f1", "soft_f1"} and config.training.costs.seconds > 0
    assert load_task("icd10_notes").tool_names == {"search_codes"}


# --- rows ---


def diagnoses(letter: str, num: int) -> list[Diagnosis]:
    return [Diagnosis(f"{letter}{n:02}.1", f"{letter}-disease {chr(97 + n)}") for n in range(num)]


@pytest.fixture(scope="module")
def small_rows() -> dict[Any, list[dict[str, Any]]]:
    found = {"train": diagnoses("J", 20), "validation": diagnoses("G", 12), "test": diagnoses("K", 12)}
    return build_rows(found, [])  # type: ignore[arg-type]


def test_rows_are_the_same_every_time(small_rows: dict[Any, list[dict[str, Any]]]) -> None:
    found = {"train": diagnoses("J", 20), "validation": diagnoses("G", 12), "test": diagnoses("K", 12)}
    assert build_rows(found, []) == small_rows  # type: ignore[arg-type]
    assert {split: len(rows) for split, rows in small_rows.items()} == rows_module.NUM_NOTES


def test_a_note_says_its_diagnoses_and_no_code(small_rows: dict[Any, list[dict[str, Any]]]) -> None:
    for row in (row for rows in small_rows.values() for row in rows):
        note = row["messages"][-1]["content"]
        assert all(term in note for term in row["terms"]) and 1 <= len(row["codes"]) == len(row["terms"]) <= 3
        assert len({code[:3] for code in [*row["codes"], row["distractor"] or "none"]}) == len(row["codes"]) + 1
        assert not CODE.search("".join(message["content"] for message in row["messages"]))


def test_distractors_are_rare_and_only_beside_several(small_rows: dict[Any, list[dict[str, Any]]]) -> None:
    rows = small_rows["train"]
    distracted = [row for row in rows if row["distractor"]]
    assert 0 < len(distracted) < 0.15 * len(rows) and all(len(row["codes"]) > 1 for row in distracted)
    assert all(row["distractor"] not in row["codes"] for row in distracted)


def test_some_frames_are_for_held_out_notes_alone(small_rows: dict[Any, list[dict[str, Any]]]) -> None:
    openings = [frame.split("{")[0] for frame in UNSEEN_FRAMES]
    for split, rows in small_rows.items():
        held = any(opening in row["messages"][-1]["content"] for opening in openings for row in rows)
        assert held == (split != "train")
    assert not set(FRAMES) & set(UNSEEN_FRAMES)


def test_diagnoses_are_split_by_chapter() -> None:
    chapters = {"J": "10", "G": "6", "M": "13", "K": "11", "R": "18", "Z": "21"}
    every = [one for letter in chapters for one in diagnoses(letter, 2)]
    found = split_diagnoses(every, lambda code: chapters[code[0]])
    letters = {split: {one.code[0] for one in ones} for split, ones in found.items()}
    assert letters == {"train": {"J"}, "validation": {"G", "M"}, "test": {"K"}}  # symptoms and reasons for visits: none


@pytest.mark.parametrize(
    ("term", "expected"),
    [
        ("Hay fever", True),
        ("Crohn's disease", True),
        ("Scurvy and rickets", False),
        ("Hernia, inguinal", False),
        ("Bronchitis (acute)", False),
        ("Asthma without status", False),
        ("x" * 46, False),
        ("Type 2", False),
    ],
)
def test_terms_that_a_note_can_hold(term: str, expected: bool) -> None:
    assert is_plain(term) == expected


# --- search ---


def database(path: Path, codes: dict[str, str]) -> Path:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE cm_codes (code TEXT, code_dot TEXT, long_name TEXT)")
        lines = [(code.replace(".", ""), code, name) for code, name in codes.items()]
        connection.executemany("INSERT INTO cm_codes VALUES (?, ?, ?)", lines)
        connection.commit()
    return path


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    return read_table(database(tmp_path_factory.mktemp("table") / "codes.db", CODES))


@pytest.fixture(scope="module")
def prepared(table: Table, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the script writes it, with a tiny model for vectors."""
    folder = tmp_path_factory.mktemp("prepared")
    build_index(table).save(folder / "index")
    tiny.tiny_model_folder(folder / "model")
    write_manifest(folder, vectors_of(table, folder / "model", folder, lambda line: None), "model")
    return folder


@pytest.fixture
def task(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Task]:
    monkeypatch.setenv("RFT_ICD10_NOTES_DIR", str(prepared))
    search._shared_index.cache_clear()
    yield load_task("icd10_notes")
    search._shared_index.cache_clear()


def run(task: Task, **arguments: Any) -> str:
    tool = task.tool("search_codes")
    assert tool is not None
    return str(tool.run(json.dumps(arguments)))


def test_codes_without_children_may_be_billed(table: Table) -> None:
    assert table.leaves == ["K35.80", "K35.89", "K36", "J45.909", "G43.909"]
    assert (table.parents["K35.80"], table.parents["K35.8"], table.parents["K35"]) == ("K35.8", "K35", "")


def test_both_rankings_are_fused(prepared: Path, table: Table) -> None:
    index = load_code_index(prepared)
    for code in table.leaves:  # a text is nearest to itself, whatever the model
        assert index.by_meaning(table.descriptions[code], 1) == (code,)
        assert index.search(table.descriptions[code], 1) == (code,)
    assert index.by_words("uncomplicat", 3) == () and len(index.search("uncomplicat", 3)) == 3
    assert set(index.search("appendicitis", 5)) == set(table.leaves)


def test_without_vectors_words_alone_are_searched(prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "index").symlink_to(prepared / "index")
    write_manifest(tmp_path, None, None)
    index = load_code_index(tmp_path)
    assert not index.has_vectors and index.by_meaning("appendicitis", 3) == ()
    assert index.search("acute appendicitis", 9) == index.by_words("acute appendicitis", 9)
    assert index.search("uncomplicat", 3) == ()


def test_vectors_are_kept_by_content(prepared: Path, table: Table, tmp_path: Path) -> None:
    (name,) = [path.name for path in prepared.glob("vectors-*.npy")]
    written = (prepared / name).stat().st_mtime_ns
    assert vectors_of(table, prepared / "model", prepared, lambda line: None) == name
    assert (prepared / name).stat().st_mtime_ns == written, "computed once"
    matrix = np.load(prepared / name)
    assert matrix.dtype == np.float16 and matrix.shape[0] == len(table.leaves)
    changed = Table(table.descriptions | {"K36": "Something else"}, table.parents)
    assert vectors_of(changed, prepared / "model", tmp_path, lambda line: None) != name


def test_vectors_are_in_the_order_of_the_texts_and_none_is_computed_twice(
    prepared: Path, table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vectors, "_BATCH", 2)
    monkeypatch.setattr(vectors, "_NUM_IN_PART", 2)
    embedder, texts = Embedder(prepared / "model"), list(table.descriptions.values())
    expected = np.concatenate([embedder.vectors([text]) for text in texts])
    num_parts, said = -(-len(texts) // 2), list[str]()

    def stop_at_the_second(line: str) -> None:
        said.append(line)
        if len(said) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        vectors.embed(texts, embedder, tmp_path, stop_at_the_second)
    assert num_parts > 2 and len(list(tmp_path.iterdir())) == 2
    np.testing.assert_allclose(vectors.embed(texts, embedder, tmp_path, said.append), expected, atol=2e-3)
    assert len(said) == num_parts, "each part once"
    assert said[-1] == f"embedded {len(texts)} of {len(texts)} descriptions"


def test_searching_leaves_the_processs_threads_alone(prepared: Path) -> None:
    import torch

    before = torch.get_num_threads()
    load_code_index(prepared).search("appendicitis", 3)
    assert torch.get_num_threads() == before


def test_the_tool_answers_lines_that_begin_with_codes(task: Task) -> None:
    lines = run(task, query="acute appendicitis").split("\n")
    assert len(lines) == 3 and all(line.split(" ", 1)[1] == CODES[line.split(" ")[0]] for line in lines)


@pytest.mark.parametrize("query", ["", " \n", "?!", "\x00", "K35.80 " * 5000, "{}", "'; DROP TABLE", "\u202e\ud83d"])
def test_hostile_queries_are_answered(task: Task, query: str) -> None:
    assert all(
        line.split(" ")[0] in CODES or line.startswith("no code found") for line in run(task, query=query).split("\n")
    )


def test_wrong_arguments_are_told(task: Task) -> None:
    for arguments in ({}, {"query": 5}, {"query": "x", "k": 3}, {"query": None}):
        with pytest.raises(ArgumentError, match="arguments"):
            run(task, **arguments)


def test_missing_data_names_the_cure(tmp_path: Path, prepared: Path) -> None:
    with pytest.raises(UserError, match="run scripts/prepare_icd10_notes"):
        load_code_index(tmp_path)
    (tmp_path / "index").symlink_to(prepared / "index")
    write_manifest(tmp_path, "vectors-gone.npy", "model")
    with pytest.raises(UserError, match="run scripts/prepare_icd10_notes"):
        load_code_index(tmp_path)


# --- the script ---


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """scripts/prepare_icd10_notes, whose packages are kept in tmp_path/packages."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    module = load_script("prepare_icd10_notes")
    (tmp_path / "packages").mkdir()
    monkeypatch.setattr(importlib.import_module("preparation"), "PACKAGES", tmp_path / "packages")
    return module


def keep_wheel(folder: Path, name: str, files: dict[str, Path]) -> str:
    """A small stand-in for a package; its checksum."""
    with zipfile.ZipFile(folder / name, "w") as wheel:
        for inside, path in files.items():
            wheel.write(path, inside)
    return hashlib.sha256((folder / name).read_bytes()).hexdigest()


def keep_table(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codes: dict[str, str]) -> None:
    path = database(tmp_path / "codes.db", codes)
    digest = keep_wheel(tmp_path / "packages", "table.whl", {script.TABLE_FILE: path})
    monkeypatch.setattr(script, "TABLE", ("table==1", digest))


def test_the_table_is_read_from_its_package(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_table(script, tmp_path, monkeypatch, CODES)
    assert script.unpack_table().descriptions == CODES


def test_a_package_without_the_table_is_named(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = keep_wheel(tmp_path / "packages", "other.whl", {"README": ROOT / "README.md"})
    monkeypatch.setattr(script, "TABLE", ("table==1", digest))
    with pytest.raises(SystemExit, match=r"(?s)other\.whl holds no table of codes.*cure"):
        script.unpack_table()


@pytest.mark.slow
def test_preparing_twice_writes_the_same_rows(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the real inclusion terms, a part of the table and a tiny model."""
    from rft.envs.tasks.icd10.table import official_table

    official = official_table()
    kept = {code: text for code, text in official.descriptions.items() if code[0] in "JGK" and code[1:3].isalnum()}
    kept = {code: text for code, text in kept.items() if "-" not in code}
    keep_table(script, tmp_path, monkeypatch, kept)
    model = tiny.tiny_model_folder(tmp_path / "model", num_hidden_layers=1)
    monkeypatch.setattr(script, "MODEL_FILES", tuple(sorted(path.name for path in model.iterdir())))
    files = {script.MODEL_FOLDER + name: model / name for name in script.MODEL_FILES}
    monkeypatch.setattr(script, "MODEL", ("model==1", keep_wheel(tmp_path / "packages", "model.whl", files)))
    for folder, options in (("a", []), ("b", ["--no-embeddings"])):
        monkeypatch.setattr("sys.argv", ["prepare_icd10_notes", "--out", str(tmp_path / folder), *options])
        script.main()
    for split in ("train", "validation", "test"):
        assert (tmp_path / "a" / f"{split}.jsonl").read_bytes() == (tmp_path / "b" / f"{split}.jsonl").read_bytes()
    said = capsys.readouterr().out
    assert said.count("recall@1") == 4 and "  meaning:" in said and "  both:" in said
    assert load_code_index(tmp_path / "a").has_vectors and not load_code_index(tmp_path / "b").has_vectors
    _look_at(tmp_path / "a")


@needs_data
def test_the_prepared_rows() -> None:
    _look_at(PREPARED)


@needs_data
@pytest.mark.slow
def test_a_query_of_the_whole_table_is_quick() -> None:
    index = load_code_index(PREPARED)
    queries = [row["terms"][0] for row in map(json.loads, (PREPARED / "test.jsonl").read_text().splitlines()[:40])]
    index.search("fracture", 3)
    seconds = []  # of this thread's own work, on which a busy machine has less influence
    for query in queries:
        started = time.thread_time()
        index.search(query + " x", 3)
        seconds.append(time.thread_time() - started)
    assert sorted(seconds)[len(seconds) // 2] < 0.05


def _look_at(folder: Path) -> None:
    """Splits share no category and no prompt, and no prompt holds a code."""
    splits = {
        name: load_items(folder / f"{name}.jsonl", load_task("icd10_notes").specs) for name in rows_module.NUM_NOTES
    }
    codes = {name: {code for item in items for code in item.row["codes"]} for name, items in splits.items()}
    assert {code[0] for code in codes["test"]} == {"K"} and {code[0] for code in codes["validation"]} <= {"G", "M"}
    categories = {name: {code[:3] for code in found} for name, found in codes.items()}
    assert not categories["train"] & (categories["validation"] | categories["test"])
    assert not categories["validation"] & categories["test"]
    assert overlap(splits["train"], splits["validation"] + splits["test"]) == 0
    for item in (item for items in splits.values() for item in items):
        assert not CODE.search(" ".join(message.content for message in item.messages))
