"""rft compare: exact numbers, honest intervals, items that are the same, folders that are cut off, hostile text."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from inert import HOSTILE, dangers, text_of
from rich.console import Console
from run_folders import a_rollout, a_run, an_item, write_data
from test_cli import rft

from rft.compare.bootstrap import ItemMean, Quantile, intervals, once
from rft.compare.comparison import compare
from rft.compare.figure import draw_svgs
from rft.compare.measures import pass_at_k
from rft.compare.page import page, write_comparison
from rft.compare.result import Change, Comparison, MeasureLine
from rft.compare.sides import find_sides
from rft.compare.tables import tables, verdict
from rft.errors import UserError
from rft.metrics import rollout_metrics
from rft.report.numbers import report_of
from rft.report.page import page as report_page
from rft.show import overview
from rft.store import RunStore
from rft.types import Grade, Group, Rollout, StopReason

Scores = Sequence[Sequence[float | None]]  # by item and attempt; None was discarded


def attempt(item: int, number: int, score: float | None, **changes: Any) -> Rollout:
    made = a_rollout(an_item(item), "test", 0, number, 0.0)
    if score is None:
        changes |= {"stop_reason": StopReason.TOOL_FAILED, "grade": None, "error": "down"}
    else:
        changes |= {"grade": Grade(score=score)}
    return made.model_copy(update=changes)


def folder(runs: Path, name: str, scores: Scores, config: dict[str, Any] | None = None, **changes: Any) -> RunStore:
    """An evaluation as `rft eval` writes it."""
    store = RunStore.create(runs, name, config or {})
    groups = []
    for item, of_item in enumerate(scores):
        rollouts = [attempt(item, number, score, **changes) for number, score in enumerate(of_item)]
        for rollout in rollouts:
            store.append_rollout(rollout)
        groups.append(Group(an_item(item), 0, [rollout for rollout in rollouts if rollout.grade]))
    row = {"step": 0, "kind": "evaluation", "split": "test", **rollout_metrics(groups), "seconds": 1.0}
    store.append_metrics(row)
    store.write_state({"status": "succeeded", "kind": "evaluation", "label": name, "split": "test"})
    store.close()
    return store


def compared(*stores: RunStore, **options: Any) -> Comparison:
    return compare(find_sides([str(store.path) for store in stores]), **options)


def line(comparison: Comparison, name: str) -> MeasureLine:
    return next(line for line in comparison.measures if line.name == name)


# --- numbers ---


def test_numbers_by_hand(tmp_path: Path) -> None:
    first = folder(tmp_path, "base", [[0.0, 0.5], [1.0, 1.0], [0.25, 0.25]], duration_s=1.0)
    other = folder(tmp_path, "tuned", [[1.0, 1.0], [0.5, 0.0], [0.25, 0.25]], duration_s=3.0)
    found = compared(first, other, slow_s=2.0)
    assert [side.label for side in found.sides] == ["base", "tuned"]
    assert [(side.num_items, side.num_rollouts, side.num_discarded) for side in found.sides] == [(3, 6, 0)] * 2

    grade = line(found, "grade")
    assert [value.mean for value in grade.sides] == pytest.approx([0.5, 0.5])
    assert grade.changes[0].mean == pytest.approx(0.0)
    assert (grade.changes[0].num_items, grade.changes[0].is_paired) == (3, True)
    # draws of the changes (0.75, -0.75, 0): in a tenth of them or more the mean is at least 0.5 away from 0
    assert (grade.changes[0].low, grade.changes[0].high) == pytest.approx((-0.75, 0.75))

    passes = line(found, "pass_share")
    assert [value.mean for value in passes.sides] == pytest.approx([(0.5 + 1 + 0) / 3, (1 + 0.5 + 0) / 3])
    assert [value.mean for value in line(found, "pass@2").sides] == pytest.approx([2 / 3, 2 / 3])
    assert line(found, "slow_share").changes[0].mean == 1.0
    assert line(found, "seconds_p50").changes[0].mean == pytest.approx(2.0)
    assert [value.mean for value in line(found, "tool_calls/search").sides] == [1.0, 1.0]
    assert [value.mean for value in line(found, "sampled_tokens").sides] == [6.0, 6.0]
    assert [value.mean for value in line(found, "reasoning_tokens").sides] == [1.0, 1.0]

    (pairing,) = found.pairings
    assert (pairing.wins, pairing.losses, pairing.ties, pairing.num_shared) == (1, 1, 1, 3)
    outcomes = {item.item_id: item.outcome for item in pairing.items}
    assert outcomes == {"validation-00001": "win", "validation-00002": "loss", "validation-00003": "tie"}
    assert pairing.items[0].first.rollout_ids == [attempt(0, 0, 0.0).id, attempt(0, 1, 0.0).id]


def test_discarded_rollouts_count_in_their_shares_only(tmp_path: Path) -> None:
    first = folder(tmp_path, "base", [[1.0, None], [1.0, 0.0]])
    other = folder(tmp_path, "tuned", [[1.0, 0.0], [None, None]])
    found = compared(first, other)
    assert [value.mean for value in line(found, "grade").sides] == [0.75, 0.5]
    assert [value.num_items for value in line(found, "grade").sides] == [2, 1]
    change = line(found, "grade").changes[0]
    assert (change.mean, change.num_items) == (-0.5, 1), "only the item that both have a grade of"
    assert [value.mean for value in line(found, "discarded_share").sides] == [0.25, 0.5]
    assert line(found, "discarded_share/tool_failed").changes[0].mean == pytest.approx(0.25)
    assert [pair.item_id for pair in found.pairings[0].items] == ["validation-00001"]


@pytest.mark.parametrize("num", [1, 4, 6])
def test_pass_at_k_is_the_share_of_draws_that_hold_a_pass(num: int) -> None:
    for num_passed in range(num + 1):
        outcomes = [True] * num_passed + [False] * (num - num_passed)
        for k in range(1, num + 1):
            drawn = [any(draw) for draw in combinations(outcomes, k)]
            assert pass_at_k(num, num_passed, k) == pytest.approx(fmean(drawn))


def test_pass_at_says_where_it_is_from(tmp_path: Path) -> None:
    plain = folder(tmp_path, "plain", [[0.3, 0.6], [0.1, 0.2]])
    strict = folder(tmp_path, "strict", [[0.3, 0.6], [0.1, 0.2]], {"grader": {"pass_threshold": 0.25}})
    found = compared(plain, strict)
    assert (found.pass_at, found.pass_at_source) == (0.5, "the grader has no pass_threshold")
    found = compared(strict, plain)
    assert (found.pass_at, found.pass_at_source) == (0.25, "the grader's pass_threshold")
    assert line(found, "pass_share").sides[0].mean == 0.5
    assert compared(strict, plain, pass_at=0.2).pass_at_source == "as asked for"
    assert found.slow_s == 1.0 and "95th percentile of strict" in found.slow_s_source


# --- intervals ---


def paired(first: Any, other: Any, *, is_paired: bool = True) -> tuple[float, float]:
    one, two = ItemMean(np.array(first, dtype=float)), ItemMean(np.array(other, dtype=float))
    (found,) = intervals(
        [lambda firsts, others: two.at(others) - one.at(firsts)], (len(first), len(other)), is_paired=is_paired
    )
    assert found is not None
    return found


def test_95_percent_intervals_hold_the_truth_in_about_95_percent() -> None:
    random, hits, num = np.random.default_rng(0), 0, 200
    for _ in range(num):
        easiness = random.normal(0, 1, 40)
        first, other = (easiness + random.normal(mean, 0.3, 40) for mean in (0.0, 0.2))
        low, high = paired(first, other)
        hits += low <= 0.2 <= high
    assert 0.90 <= hits / num <= 0.985


def test_pairing_cancels_what_items_have_in_common_and_is_repeatable() -> None:
    random = np.random.default_rng(1)
    easiness = random.normal(0, 1, 60)
    first, other = easiness, easiness + 0.2 + random.normal(0, 0.05, 60)
    low, high = paired(first, other)
    apart = paired(first, other, is_paired=False)
    assert low > 0, "sure, paired"
    assert apart[0] < 0 < apart[1], "not sure, unpaired"
    assert (low, high) == paired(first, other)


def test_items_without_a_value_are_left_out() -> None:
    assert ItemMean(np.array([1.0, np.nan, 3.0])).at(np.array([[1.0, 5.0, 1.0], [0.0, 1.0, 0.0]]))[0] == 2.0
    assert np.isnan(ItemMean(np.array([1.0, np.nan])).at(np.array([[0.0, 1.0]]))[0])
    assert intervals([lambda first, _: first.sum(axis=1)], (1, 1), is_paired=True) == [None]


def test_a_quantile_of_a_resample_is_that_of_the_repeated_values() -> None:
    random = np.random.default_rng(2)
    values, items = np.sort(random.normal(size=30)), random.integers(0, 8, 30)
    for q in (0.5, 0.95):
        statistic = Quantile(q, values, items)
        counts = random.multinomial(8, [1 / 8] * 8, 20).astype(float)
        for row, found in zip(counts, statistic.at(counts), strict=True):
            repeated = sorted(v for v, item in zip(values, items, strict=True) for _ in range(int(row[item])))
            assert found == repeated[int(np.ceil(q * len(repeated))) - 1] if repeated else np.isnan(found)
    assert np.isnan(Quantile(0.5, np.array([]), np.array([], dtype=np.intp)).at(once(3))[0])


def test_a_verdict_needs_an_interval_without_0() -> None:
    measure = MeasureLine(name="x", label="x", section="s", better="lower", sides=[], changes=[])
    assert verdict(measure, Change(mean=-1.0, low=-2.0, high=-0.5)) == "better"
    assert verdict(measure, Change(mean=1.0, low=0.5, high=2.0)) == "worse"
    assert verdict(measure, Change(mean=1.0, low=-0.5, high=2.0)) == ""
    assert verdict(measure, Change(mean=1.0)) == ""
    assert verdict(measure.model_copy(update={"better": None}), Change(mean=1.0, low=0.5, high=2.0)) == ""


# --- which items are the same ---


def test_sides_without_a_common_item_are_compared_unpaired(tmp_path: Path) -> None:
    first = folder(tmp_path, "base", [[0.0, 0.5]] * 3)
    other = folder(tmp_path, "tuned", [[1.0, 1.0]] * 4, item_id="elsewhere")
    found = compared(first, other)
    (pairing,) = found.pairings
    assert not pairing.is_paired and pairing.items == []
    assert "no item is on both sides" in pairing.notes[0]
    change = line(found, "grade").changes[0]
    assert (change.mean, change.is_paired) == (0.75, False)
    assert "unpaired" in page(found)
    assert "tuned against base on test, 0 items in common" in shown(found)


def test_items_that_only_share_an_id_are_not_paired(tmp_path: Path) -> None:
    def with_data(name: str, question: str) -> RunStore:
        data = tmp_path / name / "validation.jsonl"
        data.parent.mkdir()
        texts = ["same", question, question]
        rows = [{"messages": [{"role": "user", "content": text}]} for text in texts]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.utime(data, (0, 0))
        turns = [turn.model_copy(update={"input_ids": []}) for turn in attempt(0, 0, 0.0).turns]
        return folder(tmp_path / "runs", name, [[0.0], [0.5], [1.0]], {"data": {"test": str(data)}}, turns=turns)

    first, other = with_data("one", "What is 1 + 1?"), with_data("two", "Who wrote Faust?")
    (pairing,) = compared(first, other).pairings
    assert [item.item_id for item in pairing.items] == ["validation-00001"]
    assert pairing.items[0].text == "same"
    assert "2 items have the same id and different texts" in pairing.notes[0]
    (again,) = compared(first, with_data("three", "What is 1 + 1?")).pairings
    assert (again.num_shared, again.notes) == (3, [])


def test_prompts_of_one_model_tell_items_apart_and_nothing_is_said(tmp_path: Path) -> None:
    config = {"model": {"path": "m"}}
    turns = [attempt(0, 0, 0.0).turns[0].model_copy(update={"input_ids": [9]})]
    first = folder(tmp_path, "one", [[0.0], [0.5]], config)
    assert compared(first, folder(tmp_path, "same", [[0.0], [0.5]], config)).pairings[0].notes == []
    assert not compared(first, folder(tmp_path, "other", [[0.0], [0.5]], config, turns=turns)).pairings[0].is_paired
    unknown = compared(first, folder(tmp_path, "elsewhere", [[0.0], [0.5]], {"model": {"path": "n"}}, turns=turns))
    assert "paired by id alone" in unknown.pairings[0].notes[0]


def test_a_data_file_changed_after_the_run_says_nothing(tmp_path: Path) -> None:
    data = write_data(tmp_path / "validation.jsonl", 2)
    store = folder(tmp_path, "one", [[0.0], [0.5]], {"data": {"test": str(data)}})
    os.utime(data, (2_000_000_000, 2_000_000_000))
    (side, _) = find_sides([str(store.path), str(folder(tmp_path, "two", [[0.0], [0.5]]).path)])
    assert all(text.messages is None for text in side.texts.values())


# --- which side is meant ---


@pytest.fixture
def run(tmp_path: Path) -> RunStore:
    """Validated at steps 0, 2 and 4; step 2 is the best."""
    return a_run(tmp_path, score=lambda step, attempt: {0: 0.0, 2: 1.0, 4: 0.5}.get(step, 0.0))


@pytest.mark.parametrize(
    ("sides", "steps"),
    [
        (["{run}"], [0, 4]),
        (["{run}@0", "{run}@2", "{run}"], [0, 2, 4]),
        (["{run}@first", "{run}@best", "{run}@last"], [0, 2, 4]),
    ],
)
def test_sides_are_found_by_what_a_person_writes(run: RunStore, sides: list[str], steps: list[int]) -> None:
    found = find_sides([side.format(run=run.path) for side in sides])
    assert [(side.step, side.split) for side in found] == [(step, "validation") for step in steps]
    assert [side.label for side in found] == [f"step {step}" for step in steps]


def test_a_folder_whose_name_has_an_at_sign_is_a_folder(tmp_path: Path) -> None:
    first, other = folder(tmp_path, "base", [[0.0]] * 2), folder(tmp_path, "new", [[1.0]] * 2)
    os.rename(other.path, tmp_path / "new@2")
    assert [side.label for side in find_sides([str(first.path), str(tmp_path / "new@2")])] == ["base", "new"]


def test_training_rollouts_are_compared_only_when_asked_for(run: RunStore) -> None:
    found = find_sides([f"{run.path}@1", f"{run.path}@3"], "train")
    assert [(side.step, side.split) for side in found] == [(1, "train"), (3, "train")]


@pytest.mark.parametrize(
    ("sides", "split", "message"),
    [
        (["{run}@7", "{run}"], None, r"no two evaluations of one split(.|\n)*has validation at 0, 2, 4"),
        (["{run}"], "test", r"not all were evaluated on test"),
        (["{run}@worst", "{run}"], None, r"no such evaluation(.|\n)*RUN@best"),
        (["{run}@0"], None, r"cannot be compared with itself"),
        (["{run}@0", "{run}@0"], None, r"no two evaluations"),
        (["nowhere", "{run}"], None, r"there is no run here"),
        (["{run}/..", "{run}"], None, r"this is a folder of runs"),
    ],
)
def test_what_cannot_be_compared_is_named(run: RunStore, sides: list[str], split: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_sides([side.format(run=run.path) for side in sides], split)


# --- folders that are cut off, or of another version ---


def test_a_torn_folder_is_compared_as_far_as_it_goes(tmp_path: Path) -> None:
    first, other = (folder(tmp_path, name, [[0.0, 0.5], [1.0, 1.0], [0.0, 0.0]]) for name in ("base", "tuned"))
    path = other.rollout_path(0)
    lines = path.read_text().splitlines()
    newer = json.loads(lines[0]) | {"mood": "good"}
    newer["turns"][0]["message"]["smell"] = 1
    older = json.loads(lines[1])
    del older["stop_reason"]
    path.write_text("\n".join([json.dumps(newer), json.dumps(older), *lines[2:5], lines[5][: len(lines[5]) // 2]]))
    (other.path / "metrics.jsonl").write_text('{"step": 0, "kind": "evalu')
    found = compared(first, other)
    assert found.sides[1].num_rollouts == 4
    told = " ".join(found.sides[1].problems)
    assert "unknown field mood" in told and "turns.message.smell" in told
    assert "stop_reason is missing or wrong" in told and "cut off" in told
    assert "the evaluation has not ended" in told
    assert found.pairings[0].num_shared == 3
    assert "stop_reason is missing" in text_of(page(found))


def test_an_evaluation_without_any_grade_is_refused(tmp_path: Path) -> None:
    first, other = folder(tmp_path, "base", [[1.0]]), folder(tmp_path, "tuned", [[None]])
    with pytest.raises(UserError, match="no rollout with a grade"):
        compared(first, other)


# --- what people see ---


def shown(comparison: Comparison) -> str:
    with open(os.devnull, "w") as nowhere:
        console = Console(width=220, record=True, file=nowhere)
        for part in tables(comparison, is_boxed=False):
            console.print(part)
        return console.export_text()


def test_three_sides_in_every_form(tmp_path: Path) -> None:
    stores = [folder(tmp_path, name, [[low, 1.0]] * 3) for name, low in (("a", 0.0), ("b", 0.5), ("c", 1.0))]
    found = compared(*stores)
    assert [change.mean for change in line(found, "grade").changes] == [0.25, 0.5]
    text = shown(found)
    assert "b, c against a on test, 3 items" in text
    assert re.search(r"grade +0\.500 +0\.750 +\+0\.250 +\[\+0\.250, \+0\.250\] +better +1\.000 +\+0\.500", text)
    assert "c against a: 3 items won, 0 lost, 0 tied" in text
    out = tmp_path / "out"
    assert [path.name for path in write_comparison(found, out)] == ["compare.json", "compare.png", "compare.html"]
    assert Comparison.model_validate_json((out / "compare.json").read_text()) == found
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    html = (out / "compare.html").read_text()
    assert dangers(html) == []
    assert f"rft show {stores[2].path} --rollout {attempt(0, 0, 1.0).id}" in text_of(html)
    assert "better with fewer calls" in html and "prefers-color-scheme: dark" in html
    links = re.findall(r'<a href="#([^"]+)"', html)
    assert len(links) == 12, "of 3 items won by each of two sides, one rollout of both"
    assert all(html.count(f'id="{link}"') == 1 for link in links)


def test_hostile_text_is_inert_everywhere(tmp_path: Path) -> None:
    long = HOSTILE + "x" * 5_000_000
    call = attempt(0, 0, 0.0).turns[0].message.tool_calls[0].model_copy(update={"name": HOSTILE, "arguments": long})
    turn = attempt(0, 0, 0.0).turns[0]
    turn = turn.model_copy(update={"message": turn.message.model_copy(update={"tool_calls": [call], "content": long})})
    data = tmp_path / "validation.jsonl"
    data.write_text((json.dumps({"messages": [{"role": "user", "content": long}]}) + "\n") * 3)
    os.utime(data, (0, 0))
    stores = []
    for number in (0, 1):
        changes = {"turns": [turn], "item_id": f"validation-{number * 2 + 1:05d}", "error": long}
        store = folder(tmp_path, f"side{number}", [[0.5, 1.0], [0.0, 0.0]], {"data": {"test": str(data)}}, **changes)
        hostile = attempt(0, 9, 0.25 + number / 2, turns=[turn], item_id=HOSTILE)
        assert hostile.grade is not None
        grade = hostile.grade.model_copy(update={"shadow": {HOSTILE: 1.0}, "parts": {HOSTILE: Grade(score=0.5)}})
        store.append_rollout(hostile.model_copy(update={"grade": grade}))
        store.write_state({"kind": "evaluation", "label": HOSTILE * 9})
        store.close()
        stores.append(store)
    found = compared(*stores)
    out = tmp_path / "out"
    write_comparison(found, out)
    html = (out / "compare.html").read_text()
    assert dangers(html) == []
    assert "alert(1)" in text_of(html), "shown, not run"
    assert all(path.stat().st_size < 500_000 for path in out.iterdir())
    assert all(letter.isprintable() or letter == "\n" for letter in shown(found))


def test_figures_follow_the_page(tmp_path: Path) -> None:
    first, other = folder(tmp_path, "a", [[0.0]] * 2), folder(tmp_path, "b", [[1.0]] * 2)
    first.write_state({"kind": "evaluation", "label": "$\\frac{a$"})
    found = compared(first, other)
    svgs = draw_svgs(found)
    assert len(svgs) == 3
    for svg in svgs:
        assert svg.startswith('<svg role="img" aria-label="') and "currentColor" in svg and "viewBox" in svg
        assert "#24292f" not in svg.lower(), "the ink is the page's"
    ids = [re.findall(r'id="([^"]*)"', svg) for svg in svgs]
    assert not set(ids[0]) & set(ids[1]), "ids of figures in one page differ"
    assert svgs == draw_svgs(found), "the same comparison is the same file"


@pytest.mark.slow
def test_the_command(run: RunStore, tmp_path: Path) -> None:
    out = tmp_path / "out"
    plainly = rft("compare", str(run.path), "--out", str(out))
    assert plainly.returncode == 0, plainly.stderr
    assert "step 4 against step 0 on validation, 3 items" in plainly.stdout and "\x1b" not in plainly.stdout
    assert {path.name for path in out.iterdir()} == {"compare.json", "compare.png", "compare.html"}
    as_json = rft("compare", f"{run.path}@best", str(run.path), "--json", "--pass-at", "0.9")
    assert Comparison.model_validate_json(as_json.stdout).pass_at == 0.9
    wrong = rft("compare", str(run.path), "--split", "test")
    assert wrong.returncode == 2 and "has validation at 0, 2, 4" in wrong.stderr


ODD = ["text", None, [], {}, -1, 1e308, float("nan"), float("inf"), True, HOSTILE]


def damaged(path: Path, random: np.random.Generator) -> None:
    """Cut the file somewhere, or put something odd for a value of one of its rows."""
    text = path.read_text()
    if random.random() < 0.3 or not text.strip():
        path.write_text(text[: int(len(text) * random.random())])
        return
    lines = [text] if path.suffix == ".json" else text.splitlines()
    number = int(random.integers(len(lines)))
    row = json.loads(lines[number])
    for _ in range(3):
        place: Any = row
        while (keys := list(place)) and random.random() < 0.7:
            key = keys[int(random.integers(len(keys)))]
            if not isinstance(place[key], dict) or not place[key]:
                break
            place = place[key]
        if place:
            place[list(place)[int(random.integers(len(place)))]] = ODD[int(random.integers(len(ODD)))]
    lines[number] = json.dumps(row)
    path.write_text("\n".join(lines))


@pytest.mark.parametrize("seed", range(20))
def test_every_reader_survives_what_is_damaged(tmp_path: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    store = a_run(tmp_path, steps=2, every=1, num_items=2)
    store.append_event("warn", "slow")
    store.write_state({"status": "running", "step": 2, "steps": 2})
    store.close()
    files = ["config.json", "state.json", "events.jsonl", "metrics.jsonl", "rollouts/step_000002.jsonl"]
    for name in random.choice(files, 2, replace=False):
        damaged(store.path / str(name), random)
    text = shown_overview(store)
    assert "ftjob-1" in text
    report_of(store)
    if seed % 10 == 0:
        assert dangers(report_page(store)) == []
    with contextlib.suppress(UserError):  # nothing is left to compare, and it says what there is
        compare(find_sides([str(store.path)]))


def shown_overview(store: RunStore) -> str:
    with open(os.devnull, "w") as nowhere:
        console = Console(width=220, record=True, file=nowhere)
        console.print(overview(store))
        return console.export_text()
