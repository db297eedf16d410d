"""The doctor: causes and consequences, endings, damaged folders, warnings during training, what a person reads."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from ill_runs import (
    NUM_ITEMS,
    NUM_STEPS,
    SIZE,
    Change,
    a_row,
    a_store,
    called,
    failing_tool,
    found,
    graded,
    healthy,
)
from rich.console import Console
from run_folders import a_rollout, an_item
from test_cli import rft

from rft.config import validate_config
from rft.doctor import diagnose
from rft.doctor.alarm import Alarm
from rft.doctor.case import MAX_ROLLOUTS, read_case
from rft.doctor.causes import _EXPLAINS, ranked
from rft.doctor.finding import Diagnosis, Finding, Severity
from rft.doctor.text import told
from rft.store import RunStore
from rft.types import Group

# --- causes and consequences ---


def test_a_dead_tool_takes_its_consequences(tmp_path: Path) -> None:
    def rows(step: int) -> dict[str, Any]:
        return {"train/stop/tool_failed": 0.3, "groups/no_signal": 6, "train/grade": 0.3, "time/sampling_s": 18.0}

    down = "http://x/search is down: sampling pauses until it is back, at most 600 s"
    error = "9 rollouts of step 9 were discarded; the last ended with tool_failed: tool search: HTTP 500"
    state = {"status": "failed", "error": error}
    back = "http://x/search is back after 40 s: sampling goes on"
    engine = [text.replace("http://x/search", "the engine http://x").replace("40", "99") for text in (down, back)]
    messages = (down, back, *engine)  # that of an engine is none of a tool
    (finding,) = diagnose(a_store(tmp_path, rows, failing_tool, state=state, messages=messages)).findings
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


@pytest.mark.slow
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
