"""The doctor's checks on run folders made by code: each on both sides of its threshold, and on damaged folders."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from run_folders import a_rollout, a_run, an_item
from test_cli import rft

from rft.config import validate_config
from rft.doctor import diagnose
from rft.doctor.alarm import Alarm
from rft.doctor.case import MAX_ROLLOUTS, read_case
from rft.doctor.causes import _EXPLAINS, ranked
from rft.doctor.diagnosis import CHECKS
from rft.doctor.finding import Diagnosis, Finding, Severity
from rft.doctor.graders import returns_one_value, shadow_divergence
from rft.doctor.hacking import is_repetitive
from rft.doctor.text import told
from rft.store import RunStore
from rft.types import Grade, Group, Message, Rollout, StopReason, ToolCall, ToolResult

NUM_STEPS, NUM_ITEMS, SIZE = 8, 6, 4
Rows = Callable[[int], dict[str, Any]]
Change = Callable[[Rollout], Rollout]


def a_row(step: int, **changes: Any) -> dict[str, Any]:
    """Of a healthy run: its grade rises slowly."""
    row: dict[str, Any] = {
        "step": step, "kind": "training", "groups/total": 6, "groups/no_signal": 1, "budget/rollouts": 48,
        "update/grad_norm": 0.2, "update/entropy": 1.0, "update/clip_share": 0.01, "update/is_skipped": False,
        "logprob_gap/mean": 1e-4, "probe/mean": 1e-4, "groups/stale": 0, "staleness/mean": 0.0,
        "time/sampling_s": 10.0, "time/training_s": 9.0, "time/sync_s": 1.0, "time/step_s": 20.0,
        "train/grade": 0.3 + 0.04 * step, "train/grade_ci95": 0.05, "train/valid_call_share": 0.9,
        "train/tool_calls": 1.0, "train/sampled_tokens": 60.0, "train/turns": 2.0, "train/reasoning_tokens": 0.0,
        "train/tool_latency_s": 0.1, "train/duration_s": 5.0, "train/grader/latency_s": 0.01,
        "train/stop/answered": 0.9, "train/stop/max_tokens": 0.1, "train/num_rollouts": 48, "train/num_graded": 48,
        "train/unresponsive_share": 0.0,
    }  # fmt: skip
    return row | changes


def rising(first: float, last: float) -> Callable[[int], float]:
    """From the first to the last step."""
    return lambda step: first + (last - first) * (step - 1) / (NUM_STEPS - 1)


def answered(rollout: Rollout, text: str, tokens: list[int] | None = None) -> Rollout:
    """With another answer."""
    last = rollout.turns[-1]
    ids = last.output_ids if tokens is None else tokens
    turn = last.model_copy(
        update={"message": Message(role="assistant", content=text), "output_ids": ids, "logprobs": [-0.1] * len(ids)}
    )
    return rollout.model_copy(update={"turns": [*rollout.turns[:-1], turn]})


def healthy(rollout: Rollout) -> Rollout:
    text = f"{rollout.item_id} is number {rollout.attempt * 7919 % 97}"
    return answered(rollout, text)


def graded(rollout: Rollout, score: float, **fields: Any) -> Rollout:
    return rollout.model_copy(update={"grade": Grade(score=score, **fields)})


def a_store(
    folder: Path,
    rows: Rows = lambda step: {},
    change: Change = lambda rollout: rollout,
    *,
    config: dict[str, Any] | None = None,
    state: dict[str, Any] | None = None,
    steps: int = NUM_STEPS,
    messages: tuple[str, ...] = (),
) -> RunStore:
    """A run of `steps` steps. rows: what differs from a healthy row; change: of all but the first step's rollouts."""
    settings = {"environment": {"type": "http"}, "training": {"learning_rate": 1e-4}, "model": {"lora": {"rank": 4}}}
    store = RunStore.create(folder, "run", settings | (config or {}))
    for message in messages:
        store.append_event("info", message)
    for step in range(1, steps + 1):
        if step == 1 or step > steps - 2:
            for index in range(NUM_ITEMS):
                for attempt in range(SIZE):
                    rollout = healthy(a_rollout(an_item(index), "train", step, attempt, 0.0))
                    rollout = graded(rollout, float(attempt % 2))
                    store.append_rollout(change(rollout) if step > 1 else rollout)
        store.append_metrics(a_row(step) | rows(step))
    store.write_state({"status": "succeeded", "step": steps, "steps": steps} | (state or {}))
    store.close()
    return store


def found(store: RunStore) -> dict[str, Severity]:
    return {finding.check: finding.severity for finding in diagnose(store).findings}


def test_a_healthy_run_has_nothing_wrong(tmp_path: Path) -> None:
    diagnosis = diagnose(a_store(tmp_path))
    assert diagnosis.findings == [] and diagnosis.problems == []
    assert diagnosis.num_steps == NUM_STEPS and len(diagnosis.checks) == len(CHECKS)


def test_the_folders_of_other_tests_have_nothing_that_is_high(tmp_path: Path) -> None:
    assert "high" not in found(a_run(tmp_path)).values()


# --- from rows alone: (check, what the rows hold, what they hold below the threshold) ---

FLAT = {"train/grade": 0.3}
ROWS: list[tuple[str, Severity, Rows, Rows]] = [
    ("groups_stuck", "high", lambda s: {"groups/no_signal": 6} | FLAT, lambda s: {"groups/no_signal": 2}),
    ("stale_groups", "medium", lambda s: {"groups/stale": 1}, lambda s: {"groups/stale": s % 2}),
    ("logprob_gap", "high", lambda s: {"logprob_gap/mean": 0.12}, lambda s: {"logprob_gap/mean": 0.04}),
    ("logprob_gap", "medium", lambda s: {"probe/mean": 0.06}, lambda s: {"probe/mean": 0.04}),
    (
        *("logprob_gap", "medium"),
        lambda s: {"logprob_gap/mean": 0.03 if s > 4 else 0.001},
        lambda s: {"logprob_gap/mean": 0.019 if s > 4 else 0.001},
    ),
    ("clipping", "medium", lambda s: {"update/clip_share": 0.2}, lambda s: {"update/clip_share": 0.14}),
    ("clipping", "high", lambda s: {"update/clip_share": 0.5}, lambda s: {"update/clip_share": 0.1}),
    (
        *("entropy_collapse", "medium"),
        lambda s: {"update/entropy": 1.0 if s < 5 else 0.05},
        lambda s: {"update/entropy": 0.9**s},
    ),
    (
        *("entropy_collapse", "high"),
        lambda s: {"update/entropy": max(0.5**s, 0.02), "train/grade": 0.3 - 0.001 * s},
        lambda s: {"update/entropy": 0.8**s},
    ),
    ("entropy_rise", "medium", lambda s: {"update/entropy": 1 + s / 4}, lambda s: {"update/entropy": 1 + s / 20}),
    ("skipped_steps", "high", lambda s: {"update/is_skipped": s == 3}, lambda s: {}),
    (
        *("gradient_spikes", "medium"),
        lambda s: {"update/grad_norm": 11.0},
        lambda s: {"update/grad_norm": 9.0},
    ),
    (
        *("grade_fell", "high"),
        lambda s: {"train/grade": 0.6 if s < 5 else 0.2},
        lambda s: {"train/grade": 0.6 if s < 5 else 0.4},
    ),
    ("grade_flat", "low", lambda s: FLAT, lambda s: {"train/grade": 0.1 + 0.05 * s}),
    ("truncated_by_tokens", "medium", lambda s: {"train/stop/max_tokens": 0.4}, lambda s: {}),
    (
        *("truncated_by_turns", "high"),
        lambda s: {"train/stop/max_turns": 0.8, "groups/no_signal": 5} | FLAT,
        lambda s: {"train/stop/max_turns": 0.2},
    ),
    ("truncated_by_time", "medium", lambda s: {"train/stop/time_limit": 0.5}, lambda s: {"train/stop/time_limit": 0.1}),
    (
        *("length_growth", "low"),
        lambda s: {"train/sampled_tokens": rising(50, 300)(s)},
        lambda s: {"train/sampled_tokens": rising(50, 80)(s)},
    ),
    (
        *("length_growth", "medium"),
        lambda s: {"train/sampled_tokens": rising(50, 300)(s)} | FLAT,
        lambda s: {"train/sampled_tokens": rising(50, 80)(s)},
    ),
    ("turn_growth", "low", lambda s: {"train/turns": rising(1, 5)(s)}, lambda s: {"train/turns": rising(1, 2)(s)}),
    (
        *("reasoning_growth", "low"),
        lambda s: {"train/reasoning_tokens": rising(20, 200)(s)},
        lambda s: {"train/reasoning_tokens": rising(4, 12)(s)},
    ),
    (
        "empty_answers",
        "medium",
        lambda s: {"train/unresponsive_share": 0.4},
        lambda s: {"train/unresponsive_share": 0.2},
    ),
    ("unused_tools", "medium", lambda s: {"train/tool_calls": 0.02}, lambda s: {"train/tool_calls": 0.2}),
    ("slow_phase", "low", lambda s: {"time/sampling_s": 16.0}, lambda s: {"time/sampling_s": 14.0}),
    ("slow_phase", "low", lambda s: {"time/sync_s": 7.0}, lambda s: {"time/sync_s": 5.0}),
    ("slow_tool", "medium", lambda s: {"train/tool_latency_s": 3.0}, lambda s: {"train/tool_latency_s": 2.0}),
    ("slow_grader", "medium", lambda s: {"train/grader/latency_s": 2.0}, lambda s: {"train/grader/latency_s": 1.0}),
    (
        *("few_places", "low"),
        lambda s: {"train/num_rollouts": 256, "train/duration_s": 2.5},
        lambda s: {"train/num_rollouts": 100, "train/duration_s": 6.4},
    ),
    (
        *("learning_rate", "high"),
        lambda s: (
            {"train/grade": 0.4, "train/grade_ci95": 0.1}
            if s < 3
            else {"train/grade": 0.0, "train/grade_ci95": 0.0, "train/stop/max_tokens": 1.0, "groups/no_signal": 6}
        ),
        lambda s: {"train/stop/max_tokens": 1.0 if s > 2 else 0.1},  # the grade rises all the same
    ),
    (
        *("reward_hacking", "high"),
        lambda s: {"train/shadow/code": 0.4 if s < 5 else 0.1, "train/shadow/code_ci95": 0.02},
        lambda s: {"train/shadow/code": 0.1 if s < 5 else 0.4, "train/shadow/code_ci95": 0.02},
    ),
    (
        *("reward_hacking", "medium"),
        lambda s: {"train/grade": 0.1 * s, "train/shadow/code": 0.1, "train/shadow/code_ci95": 0.02},
        lambda s: {"train/grade": 0.1 * s, "train/shadow/code": 0.05 * s, "train/shadow/code_ci95": 0.02},
    ),
]


@pytest.mark.parametrize(("check", "severity", "ill", "well"), ROWS, ids=[f"{row[0]}-{row[1]}" for row in ROWS])
def test_rows_on_both_sides_of_a_threshold(
    tmp_path: Path, check: str, severity: Severity, ill: Rows, well: Rows
) -> None:
    store = a_store(tmp_path / "ill", ill)
    assert found(store).get(check) == severity, diagnose(store).findings
    finding = next(finding for finding in diagnose(store).findings if finding.check == check)
    assert finding.evidence and finding.cure and 0 <= finding.weight <= 1
    assert check not in found(a_store(tmp_path / "well", well))


# --- from rollouts ---


def failing_tool(rollout: Rollout) -> Rollout:
    """Of every fourth rollout: no result, no grade."""
    if rollout.attempt:
        return rollout
    cut = rollout.turns[0].model_copy(update={"results": []})
    error = "tool search: http://x/search failed 4 times: HTTP 500: \x1b[2Jboom"
    changes = {"turns": [cut], "stop_reason": StopReason.TOOL_FAILED, "grade": None, "error": error}
    return rollout.model_copy(update=changes)


def called(rollout: Rollout, *, is_error: bool = False, error: str | None = None, output: str = "no key") -> Rollout:
    call = ToolCall(id="fc_1", call_id="call_1", name="search", arguments="{}", error=error)
    result = ToolResult(call_id="call_1", output=output, is_error=is_error or error is not None)
    turn = rollout.turns[0].model_copy(
        update={"message": Message(role="assistant", tool_calls=[call]), "results": [result]}
    )
    return rollout.model_copy(update={"turns": [turn, *rollout.turns[1:]]})


def every(num: int, change: Change) -> Change:
    """Only every `num`-th attempt."""
    return lambda rollout: change(rollout) if rollout.attempt % num == 0 else rollout


def repeating(rollout: Rollout) -> Rollout:
    return graded(answered(rollout, f"{rollout.item_id} yes yes yes yes yes yes yes yes yes yes"), 1.0)


def without_call(rollout: Rollout) -> Rollout:
    return graded(rollout.model_copy(update={"turns": rollout.turns[1:]}), 1.0)


def framed(rollout: Rollout) -> Rollout:
    """A long text that is the same for all items, but for its end."""
    text = f"After a very careful search of all tables it is {rollout.item_id[-5:]}{rollout.attempt}"
    return graded(answered(rollout, text), 1.0)


NO_KEY = "there is no tool"
ROLLOUTS: list[tuple[str, Severity, Change, Change]] = [
    ("dead_tool", "high", failing_tool, lambda r: r),
    ("refused_calls", "high", lambda r: called(r, is_error=True), every(4, lambda r: called(r, is_error=True))),
    (
        *("refused_calls", "medium"),
        lambda r: called(r, is_error=r.attempt != 0, output=f"no {r.item_id} {r.attempt}"),
        every(4, lambda r: called(r, is_error=True)),
    ),
    ("malformed_calls", "high", every(2, lambda r: called(r, error="not JSON")), lambda r: r),
    ("malformed_calls", "medium", every(4, lambda r: called(r, error="not JSON")), lambda r: r),
    ("unknown_tools", "medium", every(4, lambda r: called(r, error=f'{NO_KEY} "x"')), lambda r: r),
    (
        *("discarded_by_engine", "medium"),
        every(4, lambda r: r.model_copy(update={"stop_reason": StopReason.ENGINE_FAILED, "grade": None})),
        lambda r: r,
    ),
    (
        *("discarded_by_grader", "medium"),
        every(4, lambda r: r.model_copy(update={"stop_reason": StopReason.GRADER_FAILED, "grade": None})),
        lambda r: r,
    ),
    (
        *("grader_failures", "high"),
        every(2, lambda r: graded(r, 0.0, errors={"python_grader_runtime_error": "KeyError: 'gold'"})),
        every(2, lambda r: graded(r, 0.0, errors={"sample_parse_error": "no JSON"}) if r.item_id[-1] == "1" else r),
    ),
    (
        *("unread_answers", "medium"),
        every(2, lambda r: graded(r, 0.0, errors={"sample_parse_error": "no JSON"})),
        every(4, lambda r: graded(r, 0.0, errors={"sample_parse_error": "no JSON"})),
    ),
    (
        *("reward_hacking", "high"),
        lambda r: graded(answered(r, "forty-two"), 1.0),  # one answer to all items
        lambda r: graded(answered(r, "forty-two"), 0.0),
    ),
    ("reward_hacking", "high", repeating, lambda r: graded(repeating(r), 0.0)),
    ("reward_hacking", "medium", without_call, lambda r: graded(without_call(r), 0.0)),
    ("reward_hacking", "medium", lambda r: without_call(framed(r)), framed),
    (
        *("reward_hacking", "medium"),
        lambda r: graded(
            answered(r, f"{r.item_id} {r.attempt}", list(range(20))).model_copy(
                update={"turns": _echoing(answered(r, f"{r.item_id} {r.attempt}", list(range(20))))}
            ),
            1.0,
        ),
        lambda r: graded(answered(r, f"{r.item_id} {r.attempt}", list(range(20))), 1.0),
    ),
]


def _echoing(rollout: Rollout) -> list[Any]:
    """Its turns, with the last message in the first prompt."""
    first = rollout.turns[0].model_copy(update={"input_ids": [99, *rollout.turns[-1].output_ids]})
    return [first, *rollout.turns[1:]]


@pytest.mark.parametrize(("check", "severity", "ill", "well"), ROLLOUTS, ids=[f"{row[0]}-{row[1]}" for row in ROLLOUTS])
def test_rollouts_on_both_sides(tmp_path: Path, check: str, severity: Severity, ill: Change, well: Change) -> None:
    store = a_store(tmp_path / "ill", change=ill)
    diagnosis = diagnose(store)
    assert found(store).get(check) == severity, diagnosis.findings
    finding = next(finding for finding in diagnosis.findings if finding.check == check)
    assert 0 < len(finding.rollout_ids) <= 5 and all(store.find(name) for name in finding.rollout_ids)
    assert "\x1b" not in diagnosis.model_dump_json()
    assert check not in found(a_store(tmp_path / "well", change=well))


USELESS: Rows = lambda step: {"groups/no_signal": 6, "train/grade": 0.3, "budget/rollouts": 24}  # noqa: E731


@pytest.mark.parametrize(
    ("scores", "check"),
    [
        (lambda r: 0.0, "groups_all_fail"),
        (lambda r: 1.0, "groups_all_succeed"),
        (lambda r: 0.4, "groups_stuck"),
    ],
)
def test_why_groups_teach_nothing(tmp_path: Path, scores: Callable[[Rollout], float], check: str) -> None:
    store = a_store(tmp_path, USELESS, lambda r: graded(r, scores(r)))
    findings = {finding.check: finding for finding in diagnose(store).findings}
    assert check in findings and findings[check].severity == ("medium" if "succeed" in check else "high")
    assert not {"grade_flat", "few_rollouts"} & findings.keys(), "a consequence"


@pytest.mark.parametrize(("size", "is_found"), [(4, True), (8, False)])
def test_too_few_rollouts_per_item(tmp_path: Path, size: int, is_found: bool) -> None:
    def rows(step: int) -> dict[str, Any]:
        return {"groups/no_signal": 2, "budget/rollouts": 6 * size}

    def change(rollout: Rollout) -> Rollout:
        index = int(rollout.item_id[-1])
        return rollout if index > 2 else graded(rollout, float(index - 1))

    assert ("few_rollouts" in found(a_store(tmp_path, rows, change))) is is_found


# --- the grader ---


@pytest.mark.parametrize(
    ("score", "source", "shadow", "is_found"),
    [
        (0.5, "", False, True),
        (0.0, "", False, False),  # perhaps the model never succeeds
        (0.0, "def grade(sample, item):\n    return 0.0\n", False, True),
        (0.0, "", True, True),
    ],
)
def test_a_grader_that_gives_one_grade(tmp_path: Path, score: float, source: str, shadow: bool, is_found: bool) -> None:
    store = RunStore.create(tmp_path, "run", {"grader": {"type": "python", "source": source}})
    for step in (1, 2):
        for index in range(NUM_ITEMS):
            for attempt in range(SIZE):
                rollout = healthy(a_rollout(an_item(index), "train", step, attempt, 0.0))
                store.append_rollout(graded(rollout, score, shadow={"code": float(attempt)} if shadow else {}))
        store.append_metrics(a_row(step, **{"train/grade": score, "train/grade_ci95": 0.0, "groups/no_signal": 6}))
    store.close()
    checks = found(store)
    assert ("constant_grader" in checks) is is_found
    assert ("groups_all_fail" in checks) is not is_found


def test_what_a_grader_can_return() -> None:
    assert returns_one_value("def grade(sample, item):\n    x = 1\n    return 0.5\n")
    assert not returns_one_value("def grade(sample, item):\n    return 1.0 if item else 0.0\n")
    assert not returns_one_value("def grade(sample, item):\n    if item:\n        return 1.0\n    return 0.0\n")
    assert not returns_one_value("not python (") and not returns_one_value(None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("eeeeeeee", True),
        ("the code is I21.9, acute myocardial infarction, unspecified", False),
        ("yes " * 12, True),
        ("I21.9", False),
        ("", False),
        ("I think that it is so. " * 12, True),
    ],
)
def test_texts_that_repeat_themselves(text: str, expected: bool) -> None:
    assert is_repetitive(text) is expected


def steps(grades: list[float], shadows: list[float], ci95: float = 0.02) -> list[dict[str, float]]:
    return [
        {"train/grade": grade, "train/grade_ci95": ci95, "train/shadow/code": shadow, "train/shadow/code_ci95": ci95}
        for grade, shadow in zip(grades, shadows, strict=True)
    ]


@pytest.mark.parametrize(
    ("grades", "shadows", "ci95", "warns"),
    [
        ([0.2] * 4 + [0.5] * 4, [0.4] * 4 + [0.1] * 4, 0.02, True),
        ([0.2] * 4 + [0.5] * 4, [0.1] * 4 + [0.4] * 4, 0.02, False),  # both rise
        ([0.5] * 4 + [0.2] * 4, [0.4] * 4 + [0.1] * 4, 0.02, False),  # both fall
        ([0.2] * 4 + [0.5] * 4, [0.4] * 4 + [0.1] * 4, 0.5, False),  # within the noise
        ([0.2] * 3 + [0.5] * 4, [0.4] * 3 + [0.1] * 4, 0.02, False),  # too few steps
    ],
)
def test_a_grade_that_rises_while_its_shadow_falls(
    grades: list[float], shadows: list[float], ci95: float, warns: bool
) -> None:
    divergence = shadow_divergence(steps(grades, shadows, ci95))
    assert (divergence is not None) == warns
    if divergence is not None:
        assert "rose by 0.300" in divergence.told and "code fell by 0.300" in divergence.told


@pytest.mark.parametrize(
    ("last_shadow", "worthless", "severity"),
    [
        (0.2, lambda rollout: rollout.attempt == 3, "high"),  # left behind, and half of the winners get nothing from it
        (0.5, lambda rollout: rollout.attempt == 3, "medium"),
        (0.2, lambda rollout: rollout.attempt == 3 and rollout.item_id.endswith("1"), "medium"),
        (0.5, lambda rollout: rollout.attempt == 3 and rollout.item_id.endswith("1"), None),
    ],
)
def test_a_shadow_grader_that_sees_less_than_the_grade(
    tmp_path: Path, last_shadow: float, worthless: Callable[[Rollout], bool], severity: Severity | None
) -> None:
    grade, shadow = rising(0.2, 0.8), rising(0.1, last_shadow)

    def rows(step: int) -> dict[str, Any]:
        return {"train/grade": grade(step), "train/shadow/code": shadow(step), "train/shadow/code_ci95": 0.01}

    def change(rollout: Rollout) -> Rollout:
        return graded(rollout, float(rollout.attempt % 2), shadow={"code": 0.0 if worthless(rollout) else 0.7})

    assert found(a_store(tmp_path, rows, change)).get("reward_hacking") == severity


def test_training_grades_that_validation_does_not_follow(tmp_path: Path) -> None:
    def run(name: str, last: float) -> RunStore:
        store = a_store(tmp_path / name, lambda step: {"train/grade": 0.1 * step})
        with store:
            for step, grade in ((0, 0.1), (NUM_STEPS, last)):
                row = {"step": step, "kind": "evaluation", "split": "validation", "grade": grade, "grade_ci95": 0.05}
                store.append_metrics(row | {"seconds": 1.0})
        return store

    assert found(run("ill", 0.15))["train_validation_gap"] == "medium"
    assert "train_validation_gap" not in found(run("well", 0.6))


def test_evaluation_that_takes_most_of_the_time(tmp_path: Path) -> None:
    def run(name: str, seconds: float) -> RunStore:
        store = a_store(tmp_path / name)
        with store:
            store.append_metrics({"step": 0, "kind": "evaluation", "split": "test", "seconds": seconds})
        return store

    assert "slow_evaluation" in found(run("ill", 150.0))
    assert "slow_evaluation" not in found(run("well", 50.0))


def test_one_rollout_that_holds_up_its_step(tmp_path: Path) -> None:
    def held(seconds: float) -> Change:
        return lambda r: r.model_copy(update={"duration_s": seconds}) if (r.attempt, r.item_id[-1]) == (3, "6") else r

    assert "straggler" in found(a_store(tmp_path / "ill", change=held(9.0)))
    assert "straggler" not in found(a_store(tmp_path / "well", change=held(2.5)))


# --- causes and consequences ---


def test_a_dead_tool_takes_its_consequences(tmp_path: Path) -> None:
    def rows(step: int) -> dict[str, Any]:
        return {"train/stop/tool_failed": 0.3, "groups/no_signal": 6, "train/grade": 0.3, "time/sampling_s": 18.0}

    down = "http://x/search is down: sampling pauses until it is back, at most 600 s"
    error = "9 rollouts of step 9 were discarded; the last ended with tool_failed: tool search: HTTP 500"
    state = {"status": "failed", "error": error}
    back = "http://x/search is back after 40 s: sampling goes on"
    (finding,) = diagnose(a_store(tmp_path, rows, failing_tool, state=state, messages=(down, back))).findings
    assert (finding.check, finding.severity, finding.weight) == ("dead_tool", "high", 1.0)
    assert "was down 1 times, 40 s in all" in finding.evidence and finding.numbers["down_s"] == 40
    assert "It also explains: " in finding.evidence and "the tools ended the run" in finding.evidence


def test_a_mild_cause_explains_no_severe_consequence() -> None:
    def a_finding(check: str, severity: Severity, weight: float = 0.5) -> Finding:
        return Finding(check=check, title=check, severity=severity, weight=weight, evidence="e", cure="c")

    tool, groups = a_finding("dead_tool", "medium"), a_finding("groups_all_fail", "high")
    assert ranked([tool, groups]) == [groups, tool]
    mild = a_finding("groups_all_fail", "medium")
    assert [finding.check for finding in ranked([mild, tool])] == ["dead_tool"]
    heavy = a_finding("clipping", "medium", 0.9)
    assert [finding.check for finding in ranked([tool, heavy])] == ["clipping", "dead_tool"]


def test_no_cause_explains_itself() -> None:
    assert all(cause not in consequences for cause, consequences in _EXPLAINS.items())


# --- how a run ended ---


@pytest.mark.parametrize(
    ("error", "check"),
    [
        ("9 rollouts of step 3 were discarded; the last ended with tool_failed: x", "dead_tool"),
        ("http://x was down for 600 s: y\n  cure: or raise environment.outage_limit_s", "dead_tool"),
        ("the grader failed on 9 rollouts of step 0, for example:\nKeyError", "run_failed_by_grader"),
        ("the loss or its gradient was not finite in 3 steps in a row", "run_failed_by_numbers"),
        ("KeyError: 'a bug'", "run_failed"),
    ],
)
def test_a_run_that_failed_says_so_first(tmp_path: Path, error: str, check: str) -> None:
    store = a_store(tmp_path, state={"status": "failed", "error": error + "\x1b[2J"})
    finding = diagnose(store).findings[0]
    assert (finding.check, finding.severity) == (check, "high")
    assert error.split()[0] in finding.evidence and "\x1b" not in finding.evidence


def test_a_run_whose_process_is_gone(tmp_path: Path) -> None:
    assert next(iter(found(a_store(tmp_path, state={"status": "running"})))) == "run_killed"


# --- folders that are damaged, old, new, large ---


def test_a_folder_that_is_torn_and_of_other_versions(tmp_path: Path) -> None:
    store = a_store(tmp_path, change=failing_tool)
    path = store.rollout_path(NUM_STEPS)
    lines = path.read_text().splitlines()
    newer, unknown = json.loads(lines[0]), json.loads(lines[1])
    newer["colour"] = newer["turns"][0]["mood"] = 1
    unknown["stop_reason"] = "bored"
    torn = [json.dumps(newer), json.dumps(unknown), lines[2][:50], *lines[3:]]
    path.write_text("\n".join(torn) + "\n" + lines[0][:40])
    with (store.path / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 9, "kind": "training", "groups/to')
    (store.path / "state.json").write_text("{")
    diagnosis = diagnose(store)
    assert diagnosis.num_steps == NUM_STEPS and diagnosis.findings[0].check == "dead_tool"
    assert sorted(problem.partition(" cannot")[0] for problem in diagnosis.problems if "rollouts of" in problem) == [
        "1 rollouts of step_000008.jsonl",
        "1 rollouts of step_000008.jsonl",
    ]
    assert any("state.json" in problem for problem in diagnosis.problems)


@pytest.mark.parametrize("rows", [[], [{"step": 1, "kind": "training"}], [{"kind": "training"}, {"step": "x"}]])
def test_rows_of_an_older_version_and_no_rows_at_all(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    with RunStore.create(tmp_path, "run", {}) as store:
        for row in rows:
            store.append_metrics(row)
    assert diagnose(store).findings == []


def test_every_key_may_be_missing_or_null(tmp_path: Path) -> None:
    """No check dies of it, whichever key it is."""
    for index, key in enumerate(sorted(a_row(1))):
        if key not in ("step", "kind"):
            with RunStore.create(tmp_path, f"run-{index}", {"environment": {}}) as store:
                for step in range(1, 9):
                    store.append_metrics({**a_row(step), key: None})
                    store.append_metrics({name: value for name, value in a_row(step + 8).items() if name != key})
            assert diagnose(store).num_steps >= 8


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, 0.0])
def test_no_number_of_a_row_ends_the_training(tmp_path: Path, value: float | None) -> None:
    with RunStore.create(tmp_path, "run", {}) as store:
        for key in sorted(a_row(1).keys() - {"step", "kind"}):
            alarm = Alarm(a_run_config(tmp_path), store)
            for step in range(1, 12):
                for finding in alarm.look(a_row(step, **({key: value} if step > 4 else {})), []):
                    assert Finding.model_validate_json(finding.model_dump_json()) == finding


def test_a_run_that_only_samples(tmp_path: Path) -> None:
    store = a_store(tmp_path, lambda step: {"kind": "sampling", "groups/no_signal": 6}, lambda r: graded(r, 0.0))
    assert diagnose(store).findings[0].check == "groups_all_fail"


def test_a_large_run_is_read_in_part(tmp_path: Path) -> None:
    store = RunStore.create(tmp_path, "run", {})
    line = json.dumps(a_rollout(an_item(0), "train", 1, 0, 0.0).model_dump())
    for step in range(1, 21):
        rows = [
            line.replace("trace_", f"trace_{step}_{n}_").replace('"step": 1', f'"step": {step}') for n in range(500)
        ]
        store.rollout_path(step).write_text("\n".join(rows) + "\n")
    store.close()
    with (store.path / "metrics.jsonl").open("w") as metrics:
        metrics.writelines(json.dumps(a_row(step)) + "\n" for step in range(1, 2001))
    case = read_case(store)
    assert len(case.rollouts) == MAX_ROLLOUTS and case.rollouts[0].step == 20 and case.first[0].step == 1
    assert len(case.training) == 2000 and case.window == 16
    assert diagnose(store).num_steps == 2000


# --- as warnings during training ---


def a_run_config(tmp_path: Path) -> Any:
    tree = {
        "model": {"path": str(tmp_path)},
        "data": {"train": "x.jsonl"},
        "grader": {"type": "python", "source": "def grade(sample, item):\n    return len(item)\n"},
        "training": {"steps": 9},
    }
    return validate_config(tree, "test")


def groups_of(step: int, change: Change = lambda rollout: rollout) -> list[Group]:
    groups = []
    for index in range(NUM_ITEMS):
        item = an_item(index)
        rollouts = [healthy(a_rollout(item, "train", step, attempt, 0.0)) for attempt in range(SIZE)]
        groups.append(Group(item, step, [change(graded(r, float(r.attempt % 2))) for r in rollouts]))
    return groups


def test_a_warning_comes_once_and_again_when_it_got_much_worse(tmp_path: Path) -> None:
    with RunStore.create(tmp_path, "run", {}) as store:
        alarm = Alarm(a_run_config(tmp_path), store)
        shares = [0.35, 0.4, 0.45, 0.45, 0.9, 0.9, 0.9, 0.9, 0.9]
        news = [
            [finding.check for finding in alarm.look(a_row(step, **{"train/stop/max_tokens": share}), groups_of(step))]
            for step, share in enumerate(shares, 1)
        ]
    assert [step for step, checks in enumerate(news, 1) if checks] == [2, 6]
    assert {check for checks in news for check in checks} == {"truncated_by_tokens"}


def test_a_resumed_run_does_not_warn_again(tmp_path: Path) -> None:
    with RunStore.create(tmp_path, "run", {}) as store:
        for step in (1, 2):
            store.append_metrics(a_row(step, **{"train/stop/max_tokens": 0.5}))
        store.append_event("warn", "warned", {"check": "truncated_by_tokens", "weight": 0.5})
        alarm = Alarm(a_run_config(tmp_path), store)
        assert alarm.look(a_row(3, **{"train/stop/max_tokens": 0.5}), groups_of(3)) == []
        assert [f.check for f in alarm.look(a_row(4, **{"update/clip_share": 0.9}), groups_of(4))] == ["clipping"]


def test_warnings_see_the_answers_of_the_step(tmp_path: Path) -> None:
    with RunStore.create(tmp_path, "run", {}) as store:
        alarm = Alarm(a_run_config(tmp_path), store)
        assert alarm.look(a_row(1), groups_of(1)) == []
        bad = groups_of(2, lambda r: called(r, error="not JSON"))
        assert [finding.check for finding in alarm.look(a_row(2), bad)] == ["malformed_calls"]


def test_a_warning_names_the_tool_that_fails(tmp_path: Path) -> None:
    with RunStore.create(tmp_path, "run", {}) as store:
        alarm = Alarm(a_run_config(tmp_path), store)
        assert alarm.look(a_row(1), groups_of(1)) == []
        for group in groups_of(2, failing_tool):
            for rollout in group.rollouts:
                other = rollout.model_copy(update={"error": (rollout.error or "").replace("search", "browse")})
                store.append_rollout(other)
        (finding,) = alarm.look(a_row(2, **{"train/stop/tool_failed": 0.25}), groups_of(2))
    assert finding.title == "the tool browse fails" and finding.severity == "high"


def test_looking_at_a_step_costs_little(tmp_path: Path) -> None:
    """Of 256 rollouts: it is compared with a tenth of a second, 1% of a short step of such a size."""
    groups = [group for _ in range(11) for group in groups_of(1)]
    with RunStore.create(tmp_path, "run", {}) as store:
        alarm = Alarm(a_run_config(tmp_path), store)
        for step in range(1, 60):
            alarm.look(a_row(step), [])
        started = time.process_time()
        for step in range(60, 70):
            alarm.look(a_row(step), groups)
        assert (time.process_time() - started) / 10 < 0.1


# --- as a person reads it ---


def test_the_command(tmp_path: Path) -> None:
    ill, well = a_store(tmp_path / "ill", change=failing_tool), a_store(tmp_path / "well")
    done = rft("doctor", str(ill.path))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "run: 1 finding, the worst first (8 steps)"
    assert lines[1].startswith("1. [high] the tool search fails (dead_tool")
    assert any(line.strip().startswith("cure: ") for line in lines)
    rollout_id = lines[-1].rpartition(" ")[2]
    assert ill.find(rollout_id) is not None
    done = rft("doctor", str(well.path))
    assert (
        done.returncode == 0 and "nothing wrong found" in done.stdout and "checked: ending, dead tools" in done.stdout
    )
    done = rft("doctor", str(ill.path), "--json")
    diagnosis = Diagnosis.model_validate_json(done.stdout)
    assert diagnosis.findings[0].rollout_ids and "\x1b" not in done.stdout
    assert rft("doctor", str(tmp_path / "nowhere")).returncode == 2


def test_what_was_not_read_is_said(tmp_path: Path) -> None:
    diagnosis = Diagnosis(run_id="r\x1b[2J", findings=[], num_steps=0, checks=["a_b"], problems=["x\x07"])
    console = Console(width=200)
    with console.capture() as capture:
        console.print(told(diagnosis, tmp_path))
    assert "not read: x\\x07" in capture.get() and "\x1b" not in capture.get() and "checked: a b" in capture.get()


def test_one_lucky_step_is_no_height_to_fall_from(tmp_path: Path) -> None:
    lucky = a_store(tmp_path, lambda step: {"train/grade": 0.8 if step == 20 else 0.3}, steps=40)
    assert "grade_fell" not in found(lucky)


def test_a_frame_that_is_new_among_winners_is_a_sign(tmp_path: Path) -> None:
    def signs(change: Change, name: str) -> dict[str, float]:
        findings = diagnose(a_store(tmp_path / name, change=change)).findings
        return next(finding for finding in findings if finding.check == "reward_hacking").numbers

    assert signs(lambda r: without_call(framed(r)), "framed")["template_answers"] > 0.8
    assert "template_answers" not in signs(without_call, "free")
