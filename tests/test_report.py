"""The report: derived from the run folder alone, exact in its numbers, drawn for any run."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
from inert import HOSTILE, dangers, text_of
from rich.console import Console
from run_folders import a_run
from test_cli import rft

from rft.doctor.finding import Diagnosis, Finding
from rft.redaction import REDACTED, redacted, without_any_secret
from rft.report import final_table, mean_ci95, write_report
from rft.report.figure import binned, panels
from rft.report.page import page, write_page
from rft.store import RunStore
from rft.types import Grade, Message, Rollout, Split, StopReason, ToolCall, ToolResult, Turn, rollout_id

BEFORE, AFTER = [0.0, 0.1, 0.5], [0.3, 0.5, 0.7]  # one graded rollout for each of three items


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore.create(tmp_path, "run-001", {})


def rollout(split: Split, step: int, item: int, score: float | None) -> Rollout:
    call = ToolCall(id="fc_1", call_id="call_1", name="search", arguments="{}")
    result = ToolResult(call_id="call_1", output="", is_error=step == 0)
    message = Message(role="assistant", tool_calls=[call])
    turn = Turn(
        input_ids=[1], output_ids=[2] * 10, logprobs=[0.0] * 10, finish_reason="stop", policy_version=step,
        message=message, results=[result],
    )  # fmt: skip
    grade = None if score is None else Grade(score=score, shadow={"exact": score / 2})
    reason = StopReason.ANSWERED if grade else StopReason.TOOL_FAILED
    return Rollout(
        id=rollout_id("run", split, step, str(item), score is None), item_id=str(item), split=split, step=step,
        attempt=0, seed=0, turns=[turn], stop_reason=reason, grade=grade, started_at=0.0, duration_s=1.0,
    )  # fmt: skip


def evaluation(split: Split, step: int, scores: list[float], **more: Any) -> dict[str, Any]:
    grade, grade_ci95 = mean_ci95([[score] for score in scores])
    row = {"step": step, "kind": "evaluation", "split": split, "num_items": len(scores), "num_rollouts": len(scores)}
    row |= {"grade": grade, "grade_ci95": grade_ci95, "shadow/exact": grade / 2, "shadow/exact_ci95": grade_ci95 / 2}
    row |= {"stop/answered": 0.9, "stop/max_turns": 0.1} if step else {"stop/answered": 1.0}
    row |= {"valid_call_share": 0.5, "valid_call_share_ci95": 0.1, "tool_calls": 1.5, "sampled_tokens": 120.0}
    return {**row, "seconds": 1.0, **more}


def fill(store: RunStore, num_steps: int = 6) -> None:
    for step, scores in ((0, BEFORE), (num_steps, AFTER)):
        for split in ("validation", "test"):
            store.append_metrics(evaluation(split, step, scores))
            for item, score in enumerate(scores):
                store.append_rollout(rollout(split, step, item, score))
            store.append_rollout(rollout(split, step, 0, None))
    for step in range(1, num_steps + 1):
        row = {"train/grade": 0.1 * step, "train/shadow/exact": 0.05 * step, "train/valid_call_share": 0.9}
        row |= {"train/tool_calls": 1.2, "train/sampled_tokens": 100.0 - step, "train/grade_ci95": 0.05}
        row |= {"time/sampling_s": 2.0, "time/training_s": 3.0, "time/sync_s": 0.5, "time/step_s": 6.0}
        store.append_metrics({"step": step, "kind": "training", **row})


def test_report_says_before_after_and_change(store: RunStore) -> None:
    fill(store)
    report = write_report(store)
    assert json.loads((store.path / "report.json").read_text()) == report
    assert report["steps"] == 6
    assert report["seconds"] == {"sampling": 12.0, "training": 18.0, "sync": 3.0, "step": 36.0}
    test = report["splits"]["test"]
    assert (test["before_step"], test["after_step"], test["num_items"]) == (0, 6, 3)
    assert next(iter(test["measures"])) == "shadow/exact", "what nothing optimised comes first"
    grade = test["measures"]["grade"]
    assert grade["before"] == pytest.approx(0.2)
    assert grade["after"] == pytest.approx(0.5)
    assert grade["change"] == pytest.approx(0.3)
    assert grade["change_ci95"] == pytest.approx(mean_ci95([[0.3], [0.4], [0.2]])[1])
    assert grade["change_ci95"] < grade["before_ci95"], "paired by item"
    assert test["measures"]["valid_call_share"]["change"] == 1.0
    assert test["measures"]["sampled_tokens"]["change"] == 0.0
    assert test["stops"] == {"before": {"answered": 1.0}, "after": {"answered": 0.9, "max_turns": 0.1}}


def test_report_needs_no_lock(store: RunStore) -> None:
    fill(store)
    assert write_report(RunStore.open(store.path)) == write_report(store)


def test_figure_is_a_png(store: RunStore) -> None:
    fill(store)
    write_report(store)
    png = (store.path / "report.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n")
    width, height = struct.unpack("!II", png[16:24])
    assert (width, height) == (1500, 990)


def test_a_step_made_again_counts_once(store: RunStore) -> None:
    fill(store)
    again = {"step": 6, "kind": "training", "time/sampling_s": 4.0}
    store.append_metrics(again)
    assert write_report(store)["seconds"]["sampling"] == 14.0


def shown(report: dict[str, Any]) -> str:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(final_table(report))
    return console.export_text()


def test_final_table_shows_numbers_with_intervals(store: RunStore) -> None:
    fill(store)
    text = shown(write_report(store))
    assert "test (3 items, steps 0 and 6)" in text
    assert "exact (shadow grade)" in text
    assert "0.200 ± " in text
    assert "+0.300 ± " in text
    assert "120.0" in text
    lines = [" ".join(line.replace("│", " ").split()) for line in text.splitlines()]
    assert "ended by answered 1.000 0.900 -0.100" in lines
    assert "ended by max_turns 0.000 0.100 +0.100" in lines


@pytest.mark.parametrize("num_rows", [0, 1])
def test_runs_that_ended_early_have_a_report(store: RunStore, num_rows: int) -> None:
    for _ in range(num_rows):
        store.append_metrics(evaluation("test", 0, [0.5]))  # one item: its interval is infinite, null on disk
    report = write_report(store)
    assert len(report["splits"]) == num_rows
    assert ("no split was evaluated" in shown(report)) == (num_rows == 0)
    assert (store.path / "report.png").stat().st_size > 1000


def test_missing_rollouts_leave_only_the_change_out(store: RunStore) -> None:
    store.append_metrics(evaluation("test", 0, BEFORE))
    store.append_metrics(evaluation("test", 4, AFTER))
    grade = write_report(store)["splits"]["test"]["measures"]["grade"]
    assert "change" not in grade
    assert math.isclose(grade["after"], 0.5)


# --- the file for a colleague ---


def test_page_tells_the_run(tmp_path: Path) -> None:
    store = a_run(tmp_path, score=lambda step, attempt: 0.1 * step + 0.1 * attempt)
    html = write_page(store, tmp_path / "report.html").read_text()
    text = " ".join(text_of(html).split())
    assert dangers(html) == [] and len(html) < 3_000_000
    assert "After 4 steps the grade on the validation split went from 0.525 ± 0.000 to 0.725 ± 0.000" in text
    assert "a change of +0.200 ± 0.000 taken item by item (3 items" in text
    assert "validation: 3 items, steps 0 and 4" in text
    assert "judge (part)" in text and "ended by answered" in text
    assert "the best of validation at step 4: grade 0.75, 2 turns, 1 tool calls" in text
    assert "the worst of validation at step 4: grade 0.7" in text
    assert 'search {"q": 1}' in text and "found" in text and "part judge 0.5" in text
    assert html.count("<svg") == 7
    for title in ("grade, with 95% intervals", "shadow and part grades", "tool calls per rollout, by tool"):
        assert title in text
    assert "tokens of judges 420 read, 168 written" in text


def test_page_of_a_run_with_nothing_yet(store: RunStore) -> None:
    text = text_of(page(store))
    assert "no split was evaluated" in text and "Status: unknown" in text


def test_page_holds_no_secrets(tmp_path: Path) -> None:
    url = "https://user:hunter2@tools.test/call?key=hunter2"
    config = {
        "environment": {"tools": [{"name": "t", "server_url": url, "headers": {"authorization": "hunter2"}}]},
        "servers": [{"command": "c", "env": {"API_KEY": "hunter2"}}],
    }
    store = RunStore.create(tmp_path, "run", config)
    html = page(store)
    assert "hunter2" not in html
    assert "https://tools.test/call" in html and "API_KEY" in html


def test_redacted_values_keep_their_names() -> None:
    value = {"a": [{"headers": {"x": "1"}, "env": {"y": "2"}}], "headers": "a text", "url": "http://u:p@h/?q=1"}
    assert redacted(value) == value | {"a": [{"headers": {"x": REDACTED}, "env": {"y": "2"}}]}
    shown = without_any_secret(value)
    assert shown["a"] == [{"headers": {"x": REDACTED}, "env": {"y": REDACTED}}]
    assert shown | {"a": []} == {"a": [], "headers": "a text", "url": "http://h/"}


def test_hostile_text_in_a_report_is_inert(tmp_path: Path) -> None:
    store = RunStore.create(tmp_path, "run", {"model": {"path": HOSTILE}, HOSTILE[:99]: HOSTILE})
    long = HOSTILE + "x" * 5_000_000
    call = ToolCall(id="fc", call_id="call", name=HOSTILE, arguments=long, error=HOSTILE)
    result = ToolResult(call_id="call", output=long, is_error=True)
    message = Message(
        role="assistant",
        content=long,
        reasoning=long,
        tool_calls=[call, *[call.model_copy(update={"arguments": HOSTILE})] * 99],
    )
    turn = rollout("test", 1, 0, 0.5).turns[0].model_copy(update={"message": message, "results": [result]})
    grade = Grade(score=0.5, errors={HOSTILE: long}, parts={HOSTILE: Grade(score=1.0)}, shadow={HOSTILE: 0.25})
    bad = {"turns": [turn], "grade": grade, "item_id": HOSTILE}
    store.append_rollout(rollout("test", 1, 0, 0.5).model_copy(update=bad))
    store.append_rollout(rollout("test", 1, 1, None).model_copy(update={"error": long}))
    store.append_metrics(evaluation("test", 1, [0.5], **{f"shadow/{HOSTILE}": 0.25, f"stop/{HOSTILE}": 1.0}))
    training = {f"train/{kind}/{HOSTILE}": 0.5 for kind in ("tool_num", "stop", "shadow", "part")}
    store.append_metrics({"step": 1, "kind": "training", "train/grade": 0.5, "groups/total": 1, **training})
    store.append_event("warn", long)
    store.write_state({"status": HOSTILE, "error": long})
    html = write_page(store, tmp_path / "report.html").read_text()
    assert dangers(html) == []
    assert len(html) < 3_000_000
    assert "alert(1)" in text_of(html), "shown, not run"
    assert all(letter.isprintable() or letter == "\n" for letter in shown(write_report(store)))


def test_a_report_of_a_torn_or_newer_folder_goes_as_far_as_it_can(store: RunStore) -> None:
    fill(store)
    path = store.rollout_path(6)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps(json.loads(lines[0]) | {"mood": 1}), *lines[1:-1], lines[-1][:50]]))
    with (store.path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "evaluation"}\n{"kind": "training", "step": 7, "train/grade": "high"}\n{"kind": "evalua')
    text = " ".join(text_of(page(store)).split())
    assert "unknown field mood, left out" in text and "cut off" in text
    assert "a change of +0.300" in text
    (store.path / "config.json").write_text("{")
    assert "config.json cannot be read" in text_of(page(store))


def test_long_runs_make_small_figures() -> None:
    rows = [
        {"step": step, "kind": "training", "train/grade": step / 1e4, "train/grade_ci95": 0.1} for step in range(10_000)
    ]
    thin = binned(rows)
    assert len(thin) <= 240 and thin[-1]["step"] == 9999
    assert thin[0]["train/grade"] == pytest.approx(sum(range(42)) / 42 / 1e4)
    assert sum(len(svg) for svg in panels(rows, {})) < 200_000


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    store = a_run(tmp_path)
    result = rft("report", str(store.path))
    assert result.returncode == 0, result.stderr
    assert dangers((store.path / "report.html").read_text()) == []
    assert rft("report", str(tmp_path / "nowhere")).returncode == 2


def test_the_doctors_findings_are_told(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the doctor finds in a run is tested with the doctor: here is what the page makes of it."""
    finding = Finding(
        check="dead_tool", title=HOSTILE, severity="high", weight=1.0, evidence="search failed 9 of 9 times",
        rollout_ids=["trace_1"], cure="start the server",
    )  # fmt: skip
    found = Diagnosis(run_id="run", findings=[finding], num_steps=3, checks=["dead_tool"])
    monkeypatch.setattr("rft.report.page.diagnose", lambda store: found)
    html = page(store)
    text = " ".join(text_of(html).split())
    assert dangers(html) == []
    assert "high" in text and "search failed 9 of 9 times Cure: start the server for example trace_1" in text
    found.findings.clear()
    assert "Nothing wrong was found in 3 steps, by 1 checks." in text_of(page(store))
