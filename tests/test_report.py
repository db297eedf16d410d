"""The report: derived from the run folder alone, exact in its numbers, drawn for any run."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rft.report import final_table, mean_ci95, write_report
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
