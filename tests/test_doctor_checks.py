"""The doctor's checks, each on both sides of its threshold, on run folders made by code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ill_runs import (
    NUM_ITEMS,
    NUM_STEPS,
    SIZE,
    Change,
    Rows,
    a_row,
    a_store,
    answered,
    called,
    every,
    failing_tool,
    found,
    framed,
    graded,
    healthy,
    repeating,
    rising,
    without_call,
)
from run_folders import a_rollout, a_run, an_item

from rft.doctor import diagnose
from rft.doctor.diagnosis import CHECKS
from rft.doctor.finding import Severity
from rft.doctor.graders import returns_one_value, shadow_divergence
from rft.doctor.hacking import is_repetitive
from rft.store import RunStore
from rft.types import Rollout, StopReason


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


def test_one_lucky_step_is_no_height_to_fall_from(tmp_path: Path) -> None:
    lucky = a_store(tmp_path, lambda step: {"train/grade": 0.8 if step == 20 else 0.3}, steps=40)
    assert "grade_fell" not in found(lucky)


def test_a_frame_that_is_new_among_winners_is_a_sign(tmp_path: Path) -> None:
    def signs(change: Change, name: str) -> dict[str, float]:
        findings = diagnose(a_store(tmp_path / name, change=change)).findings
        return next(finding for finding in findings if finding.check == "reward_hacking").numbers

    assert signs(lambda r: without_call(framed(r)), "framed")["template_answers"] > 0.8
    assert "template_answers" not in signs(without_call, "free")
