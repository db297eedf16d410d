"""The index of rollouts against a brute-force reading of the same folder, while that grows, breaks and is rewound."""

from __future__ import annotations

import base64
import itertools
import json
import os
import random
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from run_folders import a_rollout, a_run, an_item

from rft.errors import UserError
from rft.store import RunStore
from rft.types import Grade, Message, Rollout, StopReason, ToolCall, ToolResult
from rft.ui.catalog import Catalog, Filters, indexing
from rft.ui.catalog.location import NAME
from rft.ui.schema import MAX_TEXT, RolloutLine

ROOT = Path(__file__).resolve().parent.parent
_TIMEOUT_S = 60.0
_WORDS = [
    "Straße",
    "naïve",
    "code J42",
    "search",
    "\u202eevil",
    "<script>alert(1)</script>",
    "\x1b[31mred",
    "100%",
    "a_b",
]


def varied_rollout(rng: random.Random, step: int, attempt: int) -> Rollout:
    """Anything that a rollout can be."""
    split = rng.choice(["train", "train", "validation", "test"])
    rollout = a_rollout(an_item(rng.randrange(4)), split, step, attempt, rng.choice([0.0, 0.5, 1.0]))
    first, last = rollout.turns
    tool = rng.choice(["search", "lookup", "Ünïcode tool", "x" * 300])
    first.message.tool_calls = [
        ToolCall(id=f"fc_{n}", call_id=f"call_{n}", name=tool, arguments=rng.choice(_WORDS))
        for n in range(rng.randrange(3))
    ]
    first.results = [ToolResult(call_id=call.call_id, output=rng.choice(_WORDS)) for call in first.message.tool_calls]
    last.message = Message(role="assistant", content=" ".join(rng.choices(_WORDS, k=3)), reasoning=rng.choice(_WORDS))
    last.output_ids, last.logprobs = [1] * rng.randrange(5), []
    rollout.duration_s = rng.choice([0.5, 1.25, 2.0])
    if rng.random() < 0.2:
        rollout.stop_reason, rollout.error, rollout.grade = StopReason.TOOL_FAILED, "HTTP 503: Down_%", None
    elif rng.random() < 0.2:
        rollout.grade = Grade(score=0.25, errors={"sample_parse_error": "no JSON"}, shadow_errors={"s": "late"})
    elif rng.random() < 0.2:
        rollout.turns, rollout.stop_reason = [], StopReason.MAX_TOKENS
    return rollout


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    """Six steps of varied rollouts."""
    found, rng = RunStore.create(tmp_path, "run", {}), random.Random(7)
    for step, attempt in itertools.product(range(6), range(12)):
        found.append_rollout(varied_rollout(rng, step, attempt))
    return found


def everything(catalog: Catalog, **query: Any) -> list[RolloutLine]:
    """All pages of a question, once the index is complete."""
    deadline, lines, after = time.monotonic() + _TIMEOUT_S, list[RolloutLine](), None
    while catalog.page(Filters(**query)).indexed_share < 1:
        assert time.monotonic() < deadline, "the index was not complete in time"
    while True:
        page = catalog.page(Filters(**query, after=after))
        lines += page.rollouts
        assert page.num_matching >= len(lines)
        after = page.next
        if after is None:
            assert page.num_matching == len(lines)
            return lines


def texts(rollout: Rollout) -> list[str]:
    found: list[str] = []
    for turn in rollout.turns:
        found += [turn.message.content, turn.message.reasoning, *(result.output for result in turn.results)]
        found += [text for call in turn.message.tool_calls for text in (call.name, call.arguments)]
    return [text[:MAX_TEXT] for text in found]


def errors(rollout: Rollout) -> str:
    grade = rollout.grade
    pairs = [*grade.all_errors, *grade.shadow_errors.items()] if grade else []
    return "\n".join([rollout.error or "", *(f"{flag}: {detail}" for flag, detail in pairs)])


def has_grade(low: float, high: float) -> Callable[[Rollout], bool]:
    return lambda r: r.grade is not None and low <= r.grade.score <= high


FILTERS: list[tuple[dict[str, Any], Callable[[Rollout], bool]]] = [
    ({}, lambda r: True),
    ({"step": 3}, lambda r: r.step == 3),
    ({"step_from": 2, "step_to": 4}, lambda r: 2 <= r.step <= 4),
    ({"step": 2, "step_from": 3}, lambda r: False),
    ({"step_from": -5, "step_to": 10**30}, lambda r: True),
    ({"split": "validation"}, lambda r: r.split == "validation"),
    ({"item": "validation-00002"}, lambda r: r.item_id == "validation-00002"),
    ({"grade_min": 0.5, "grade_max": 0.8}, has_grade(0.5, 0.8)),
    ({"stop": "tool_failed"}, lambda r: r.stop_reason == "tool_failed"),
    ({"tool": "Ünïcode tool"}, lambda r: any(call.name == "Ünïcode tool" for call, _ in r.tool_calls)),
    ({"tool": "x" * 100}, lambda r: any(call.name == "x" * 300 for call, _ in r.tool_calls)),
    ({"error": "http 503: down_%"}, lambda r: "HTTP 503: Down_%" in errors(r)),
    ({"error": "no json"}, lambda r: "no JSON" in errors(r)),
    ({"error": "'; DROP TABLE rollouts; --"}, lambda r: False),
    *(({"text": word}, lambda r, word=word: any(word in text for text in texts(r))) for word in _WORDS),
    ({"text": "STRASSE"}, lambda r: any("Straße" in text for text in texts(r))),
    (
        {"text": "search", "split": "train", "step_to": 3},
        lambda r: r.step <= 3 and r.split == "train" and any("search" in text for text in texts(r)),
    ),
]


@pytest.mark.parametrize(("query", "matches"), FILTERS, ids=[ascii(query) for query, _ in FILTERS])
def test_filters_are_those_of_a_reading(
    store: RunStore, query: dict[str, Any], matches: Callable[[Rollout], bool]
) -> None:
    expected = [rollout.id for rollout in store.rollouts() if matches(rollout)]
    assert [line.id for line in everything(Catalog(store), **query, sort="step")] == expected


KEYS: dict[str, Callable[[Rollout], Any]] = {
    "id": lambda r: r.id,
    "split": lambda r: r.split,
    "item_id": lambda r: r.item_id,
    "attempt": lambda r: r.attempt,
    "grade": lambda r: r.grade.score if r.grade else None,
    "stop_reason": lambda r: r.stop_reason.value,
    "num_turns": lambda r: len(r.turns),
    "tools": lambda r: len(r.tool_calls),
    "num_tokens": lambda r: r.num_sampled_tokens,
    "num_reasoning_tokens": lambda r: sum(turn.reasoning_tokens for turn in r.turns),
    "duration_s": lambda r: r.duration_s,
    "started_at": lambda r: r.started_at,
}


@pytest.mark.parametrize("name", KEYS)
@pytest.mark.parametrize("is_descending", [False, True])
def test_sorts_page_by_page(store: RunStore, name: str, is_descending: bool) -> None:
    """Rows without a value come last; of equal ones the newest first."""
    newest_first = list(store.rollouts())[::-1]
    known = [rollout for rollout in newest_first if KEYS[name](rollout) is not None]
    unknown = [rollout for rollout in newest_first if KEYS[name](rollout) is None]
    expected = [*sorted(known, key=KEYS[name], reverse=is_descending), *unknown]
    if is_descending:  # reversed sorts of Python keep the order of equal ones
        expected = [*sorted(known[::-1], key=KEYS[name])[::-1], *unknown]
    sort = f"-{name}" if is_descending else name
    assert [line.id for line in everything(Catalog(store), sort=sort, limit=7)] == [r.id for r in expected]


def test_newest_first_without_asking(store: RunStore) -> None:
    lines = everything(Catalog(store), limit=10)
    assert [line.id for line in lines] == [rollout.id for rollout in store.rollouts()][::-1]


def test_a_line_says_what_the_rollout_was(store: RunStore) -> None:
    rollouts = {rollout.id: rollout for rollout in store.rollouts()}
    for line in everything(Catalog(store)):
        rollout = rollouts[line.id]
        assert (line.step, line.split, line.item_id, line.attempt) == (
            rollout.step, rollout.split, rollout.item_id, rollout.attempt,
        )  # fmt: skip
        assert line.grade == (rollout.grade.score if rollout.grade else None)
        assert line.num_tokens == rollout.num_sampled_tokens and line.num_turns == len(rollout.turns)
        assert sum(line.tools.values()) == len(rollout.tool_calls)
        assert (line.error is None) == (errors(rollout) == "")
        assert (line.started_at, line.duration_s) == (rollout.started_at, rollout.duration_s)


def test_choices(store: RunStore) -> None:
    found = Catalog(store).choices()
    assert found.steps == (0, 5) and found.splits == ["train", "validation", "test"]
    assert set(found.tools) == {"search", "lookup", "Ünïcode tool", "x" * 100}
    assert found.stop_reasons == ["answered", "max_tokens", "tool_failed"]
    assert (found.num_rollouts, found.indexed_share) == (72, 1.0)


def test_the_group_of_a_rollout(tmp_path: Path) -> None:
    run = a_run(tmp_path, num_rollouts=3)
    group = Catalog(run).group(2, "train", "validation-00002")
    assert [(line.item_id, line.step, line.split, line.attempt) for line in group] == [
        ("validation-00002", 2, "train", attempt) for attempt in range(3)
    ]


@pytest.mark.parametrize(
    "query",
    [
        {"sort": "place"},
        {"sort": "-rowid; DROP TABLE rollouts"},
        {"limit": 501},
        {"limit": 0},
        {"grade_min": "nan"},
        {"no": 1},
    ],
)
def test_questions_that_are_refused(query: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Filters(**query)


TOO_LARGE = [
    base64.urlsafe_b64encode(json.dumps(["-grade", *place]).encode()).decode() for place in ([1, 10**30], [10**30, 1])
]


@pytest.mark.parametrize("after", ["x", "!!!", "e30=", "W10=", "WyItZ3JhZGUiLHt9LDFd", "=" * 9, *TOO_LARGE])
def test_a_place_that_is_none(store: RunStore, after: str) -> None:
    with pytest.raises(UserError, match="no place in the table"):
        Catalog(store).page(Filters(sort="-grade", after=after))


def test_a_place_of_another_sort(store: RunStore) -> None:
    catalog = Catalog(store)
    following = catalog.page(Filters(sort="-grade", limit=5)).next
    with pytest.raises(UserError, match="no place in the table"):
        catalog.page(Filters(sort="grade", after=following))


# --- a run that grows, breaks, and goes back ---


def test_what_is_appended_is_seen_and_nothing_twice(store: RunStore) -> None:
    catalog, rng = Catalog(store), random.Random(8)
    everything(catalog)
    for step, attempt in itertools.product((2, 6, 7), range(12, 15)):
        store.append_rollout(varied_rollout(rng, step, attempt))
        assert [line.id for line in everything(catalog, sort="step")] == [rollout.id for rollout in store.rollouts()]


def test_a_line_that_is_being_written(store: RunStore) -> None:
    """Half a line is waited for; a line that stays cut off is counted, and the rest shown."""
    catalog, path = Catalog(store), store.rollout_path(5)
    whole = json.dumps(varied_rollout(random.Random(9), 5, 50).model_dump()).encode() + b"\n"
    with path.open("ab") as file:
        file.write(whole[:700])
    assert len(everything(catalog)) == 72 and catalog.unreadable() == {}
    with path.open("ab") as file:
        file.write(whole[700:])
    assert len(everything(catalog)) == 73
    with path.open("ab") as file:
        file.write(whole[:700] + b"\n" + b"[1, 2]\n" + b"null\n\n" + whole.replace(b'"attempt": 50', b'"attempt": 51'))
    assert catalog.unreadable() == {5: 3}
    last = everything(catalog)[0]
    assert last.attempt == 51  # the same id: the row that was written last
    assert len(everything(catalog)) == 73


def test_a_row_made_again_counts_as_made_last(store: RunStore) -> None:
    catalog = Catalog(store)
    old = next(rollout for rollout in store.rollouts(3) if rollout.grade is not None)
    assert len(everything(catalog)) == 72
    store.append_rollout(old.model_copy(update={"grade": Grade(score=0.99), "attempt": 77}))
    lines = [line for line in everything(catalog) if line.id == old.id]
    assert [(line.grade, line.attempt) for line in lines] == [(0.99, 77)]
    assert len(everything(catalog)) == 72
    assert old.id in [line.id for line in everything(catalog, grade_min=0.98)]
    store.append_rollout(old.model_copy(update={"attempt": 78}))
    place = catalog.find(old.id)
    assert place is not None and place.step == 3
    assert json.loads(store.rollout_path(3).read_bytes()[place.offset :].splitlines()[0])["attempt"] == 78


def test_a_rewound_run(store: RunStore) -> None:
    """Files moved aside and files of which some rows are left."""
    catalog = Catalog(store)
    assert len(everything(catalog)) == 72
    store.rewind(3, lambda rollout: rollout.step == 4 and rollout.attempt % 3 == 0)
    expected = [rollout.id for rollout in store.rollouts()]
    assert len(expected) == 52
    assert [line.id for line in everything(catalog, sort="step")] == expected
    assert {line.id for line in everything(catalog, text="search")} <= set(expected)
    for attempt in range(3):
        store.append_rollout(varied_rollout(random.Random(attempt), 4, attempt))
    assert sorted(line.id for line in everything(catalog)) == sorted(rollout.id for rollout in store.rollouts())


def test_a_run_without_rollouts(tmp_path: Path) -> None:
    catalog = Catalog(RunStore.create(tmp_path, "run", {}))
    page, choices = catalog.page(Filters()), catalog.choices()
    assert (page.rollouts, page.next, page.num_matching, page.indexed_share) == ([], None, 0, 1.0)
    assert (choices.steps, choices.tools) == (None, [])
    assert catalog.find("trace_1") is None


def _deleted(path: Path) -> None:
    path.unlink()


def _garbage(path: Path) -> None:
    path.write_bytes(os.urandom(10_000))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _emptied(path: Path) -> None:
    path.write_bytes(b"")


def _changed(path: Path, statement: str) -> None:
    with sqlite3.connect(path) as database:
        database.execute(statement)
    database.close()


def _of_another_version(path: Path) -> None:
    _changed(path, "PRAGMA user_version = 99")


def _before_a_restart(path: Path) -> None:
    _changed(path, "UPDATE writer SET boot = 'another'")


def _without_a_table(path: Path) -> None:
    _changed(path, "DROP TABLE rollouts")


BREAKS = [_deleted, _garbage, _cut, _emptied, _of_another_version, _before_a_restart, _without_a_table]


@pytest.mark.parametrize("break_it", BREAKS)
@pytest.mark.parametrize("is_same_process", [True, False])
def test_a_broken_index_is_made_anew(store: RunStore, break_it: Callable[[Path], None], is_same_process: bool) -> None:
    catalog = Catalog(store)
    before = everything(catalog)
    break_it(store.path / NAME)
    assert everything(catalog if is_same_process else Catalog(store)) == before


def test_nobody_else_may_read_it(store: RunStore) -> None:
    everything(Catalog(store))
    assert stat.S_IMODE((store.path / NAME).stat().st_mode) == 0o600


@pytest.mark.parametrize("kind", ["folder", "link", "readable by others"])
def test_elsewhere_when_it_cannot_be_beside_the_run(
    store: RunStore, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    place, elsewhere = store.path / NAME, tmp_path / "victim"
    if kind == "folder":
        place.mkdir()
    elif kind == "link":
        place.symlink_to(elsewhere)
    else:
        place.touch(0o644)
    assert len(everything(Catalog(store))) == 72
    assert not elsewhere.exists()
    (made,) = (tmp_path / "cache" / "rft" / "catalogs").glob("*.sqlite")
    assert stat.S_IMODE(made.stat().st_mode) == 0o600 and stat.S_IMODE(made.parent.stat().st_mode) == 0o700


def test_a_budget_that_is_too_small(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first answer has the newest step, a thread reads the rest, and every answer in between is a part of it."""
    monkeypatch.setattr("rft.ui.catalog._BUDGET_S", 0.0)
    monkeypatch.setattr("rft.ui.catalog._CHUNK_S", 0.0)
    monkeypatch.setattr(indexing, "_EVERY", 3)
    catalog, deadline = Catalog(store), time.monotonic() + _TIMEOUT_S
    page = catalog.page(Filters())
    assert 0 < page.indexed_share < 1
    assert {line.step for line in page.rollouts} == {5}
    ids = {rollout.id for rollout in store.rollouts()}
    while page.indexed_share < 1:
        assert time.monotonic() < deadline
        assert {line.id for line in page.rollouts} <= ids
        page = catalog.page(Filters())
    assert len(everything(catalog)) == 72
    catalog.close()


def test_many_readers_while_a_run_writes(store: RunStore) -> None:
    """Threads of this process and another process ask while rollouts are appended: nobody fails, nothing is lost."""
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from rft.store import RunStore\nfrom rft.ui.catalog import Catalog, Filters\n"
        "catalog = Catalog(RunStore(Path(sys.argv[1])))\nprint('ready', flush=True)\n"
        "while True:\n    catalog.page(Filters(text='search'))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(store.path)]
    failures: list[BaseException] = []
    is_over = threading.Event()

    def read() -> None:
        catalog = Catalog(store)
        try:
            while not is_over.is_set():
                catalog.page(Filters(sort="-grade"))
        except BaseException as error:
            failures.append(error)
        finally:
            catalog.close()

    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None and other.stdout.readline() == "ready\n"
            threads = [threading.Thread(target=read) for _ in range(3)]
            for thread in threads:
                thread.start()
            rng = random.Random(10)
            for attempt in range(200):
                store.append_rollout(varied_rollout(rng, 6 + attempt % 3, attempt))
            is_over.set()
            for thread in threads:
                thread.join(_TIMEOUT_S)
            assert other.poll() is None
        finally:
            other.kill()
    assert not failures
    lines = everything(Catalog(store), sort="step", limit=500)
    assert [line.id for line in lines] == [rollout.id for rollout in store.rollouts()]


def test_killed_while_it_reads(tmp_path: Path) -> None:
    """Whoever reads may be killed at any moment: the next one goes on, nothing is lost or twice."""
    store, rng = RunStore.create(tmp_path, "run", {}), random.Random(11)
    for step, attempt in itertools.product(range(40), range(10)):
        store.append_rollout(varied_rollout(rng, step, attempt))
    code = (
        "import sys\nfrom pathlib import Path\nfrom rft.store import RunStore\nimport rft.ui.catalog as catalog\n"
        "catalog._BUDGET_S = catalog._CHUNK_S = 0.0\n"
        "index = catalog.Catalog(RunStore(Path(sys.argv[1])))\n"
        "while True:\n    print(index.page(catalog.Filters()).num_matching, flush=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(store.path)]
    for num_answers in (1, 3, 5):
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as reader:
            try:
                assert reader.stdout is not None
                assert all(reader.stdout.readline().strip() for _ in range(num_answers))
            finally:
                reader.kill()
    expected = [rollout.id for rollout in store.rollouts()]
    assert [line.id for line in everything(Catalog(store), sort="step", limit=500)] == expected


# --- other versions, hostile rows ---


def _append_row(store: RunStore, step: int, row: dict[str, Any]) -> None:
    with store.rollout_path(step).open("a") as file:
        file.write(json.dumps(row) + "\n")


def test_rows_of_other_versions(store: RunStore) -> None:
    """Unknown and missing keys; not finite numbers and half surrogate pairs, as Python's JSON has them."""
    row = varied_rollout(random.Random(1), 6, 0).model_dump()
    old = {"id": "old", "turns": [{"message": {"role": "assistant", "content": "short and old"}, "output_ids": [1, 2]}]}
    new = row | {"id": "new", "novel": {"deep": [1]}, "stop_reason": "bored", "grade": {"score": 1, "novel": 2}}
    odd = row | {"id": "odd", "grade": {"score": float("nan")}, "error": "half \ud800 pair", "duration_s": float("inf")}
    for found in (old, new, odd | {"duration_s": 1.0}, row | {"id": "wrong", "turns": "none"}):
        _append_row(store, 6, found)
    _append_row(store, 6, row | {"id": "huge", "attempt": 10**30})
    with store.rollout_path(6).open("a") as file:
        file.write('{"id": "deep", "environment": ' + '{"a":[' * 50_000 + "]}" * 50_000 + "}\n")
    catalog = Catalog(store)
    lines = {line.id: line for line in everything(catalog, step=6)}
    assert set(lines) == {"old", "new", "odd"} and catalog.unreadable() == {6: 3}
    assert (lines["old"].opening, lines["old"].num_tokens, lines["old"].grade) == ("short and old", 2, None)
    assert (lines["new"].stop_reason, lines["new"].grade) == ("bored", 1.0)
    assert (lines["odd"].grade, lines["odd"].error) == (None, "half ? pair")


def test_hostile_rollouts_stay_small(store: RunStore) -> None:
    """Names and texts of megabytes are cut in lines and found by their beginnings."""
    rollout = a_rollout(an_item(0), "train", 6, 0, 1.0)
    rollout.turns[1].message.content = "needle " + "y" * 5_000_000
    rollout.error = "z" * 5_000_000
    rollout.turns[0].message.tool_calls = [
        ToolCall(id="f", call_id=f"c{index}", name=f"tool {index} " + "n" * 10_000, arguments="{}")
        for index in range(80)
    ]
    store.append_rollout(rollout)
    (line,) = everything(Catalog(store), text="needle")
    assert line.id == rollout.id and len(line.model_dump_json()) < 20_000
    assert len(line.opening) <= 200 and len(line.tools) == 50
    assert line.opening.startswith("needle yyy") and line.error == "z" * 200
