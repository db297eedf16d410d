"""rft show: what a run folder says, readable, harmless and honest about what is old."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_cli import rft
from tiny import tiny_tokenizer

from rft.curves import curve_lines, sparkline, thinned
from rft.errors import StorageError, UserError
from rft.live import Live
from rft.plain import plain
from rft.show import find_rollout, live_view, open_run, overview, summary
from rft.store import RunStore
from rft.transcript import as_text, prompt_of, transcript
from rft.types import Grade, Message, Rollout, StopReason, ToolCall, ToolResult, Turn

HOSTILE = "\x1b[2J\x1b]0;owned\x07\r\x9b31mred \u202eright to left\u2066 \ud800 \x00end\nturn 9: forged"


def a_rollout(number: int, stop_reason: StopReason = StopReason.ANSWERED, **changes: Any) -> Rollout:
    call = ToolCall(id="fc_1", call_id="call_1", name="search" + HOSTILE, arguments=HOSTILE)
    result = ToolResult(call_id="call_1", output=HOSTILE, is_error=True, latency_s=0.25, num_attempts=2)
    prompt = tiny_tokenizer().encode("<|im_start|>user\nHeart attack<|im_end|>\n")
    turns = [
        Turn(
            input_ids=prompt, output_ids=[1, 2, 3], logprobs=[-0.5] * 3, finish_reason="stop", policy_version=4,
            message=Message(role="assistant", content=HOSTILE, tool_calls=[call]), results=[result], sampled_s=0.5,
        ),
        Turn(
            input_ids=[5], output_ids=[6], logprobs=[-0.5], finish_reason="length", policy_version=4,
            message=Message(role="assistant", content="I21.9"),
        ),
    ]  # fmt: skip
    parts = {"exact": Grade(score=1.0, is_cached=True), "close": Grade(score=0.25, errors={"other_error": HOSTILE})}
    grade = None if stop_reason.is_discarded else Grade(score=0.75, parts=parts, shadow={"code": 0.5})
    fields: dict[str, Any] = {
        "id": f"trace_{number:032x}", "item_id": "rows-1", "split": "train", "step": 5, "attempt": number, "seed": 0,
        "turns": turns, "stop_reason": stop_reason, "grade": grade, "started_at": 0.0, "duration_s": 1.5,
    }  # fmt: skip
    return Rollout(**fields | changes)


def a_live(**changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "time": time.time(), "pid": 4711, "phase": "step 6: sampling", "is_active": True, "num_in_flight": 4,
        "num_finished": 8, "num_discarded": 1, "stops": {"answered": 8, "tool_failed": 1}, "still_s": 2.0, "down": [],
    }  # fmt: skip
    return Live(**fields | changes).model_dump()


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    """A run after five steps, in the middle of its sixth, with rows as a run writes them."""
    model = tmp_path / "model"
    model.mkdir()
    tiny_tokenizer().save_pretrained(model)
    store = RunStore.create(tmp_path / "runs", "run-001", {"model": {"path": str(model)}})
    for step in range(1, 6):
        row = {"step": step, "kind": "training", "train/grade": 0.1 * step, "train/grade_ci95": 0.05}
        row |= {"train/stop/answered": 0.75, "train/stop/max_tokens": 0.25, "groups/total": 6, "groups/no_signal": 2}
        row |= {"train/tool_calls": 1.25, "train/sampled_tokens": 50.6}
        store.append_metrics(row | {"time/step_s": 40.0, "logprob_gap/mean": 0.00001})
    store.append_metrics(
        {"step": 4, "kind": "evaluation", "split": "test", "grade": 0.3, "num_items": 96, "stop/answered": 1.0}
    )
    for number in range(6):
        store.append_rollout(a_rollout(number))
    store.append_rollout(a_rollout(6, StopReason.MAX_TURNS))
    for number in (7, 8):
        store.append_rollout(a_rollout(number, StopReason.TOOL_FAILED, error=f"search: {HOSTILE}"))
    store.append_event("warn", f"http://127.0.0.1:1/ is down {HOSTILE}")
    store.write_state({"status": "running", "step": 5, "steps": 12})
    return store


def shown(renderable: Any) -> str:
    console = Console(width=200, record=True, file=open(os.devnull, "w"), soft_wrap=True)  # noqa: SIM115
    console.print(renderable)
    return console.export_text()


def is_harmless(text: str) -> bool:
    return all(letter.isprintable() or letter == "\n" for letter in text)


def test_overview_says_how_the_run_is(store: RunStore) -> None:
    text = shown(overview(store))
    assert f"run-001: running by process {os.getpid()}, step 5 of 12 done" in text
    rows = [" ".join(re.sub("[│┃]", " ", line).split()) for line in text.splitlines()]
    assert "5 0.500 ± 0.050 - 1.25 51 4/6 0.00001 40.0 answered 0.75, max_tokens 0.25" in rows
    assert "test 4 0.300 - - - 96 answered 1.00" in rows
    assert "step 5, train rollouts ended by: answered 6, tool_failed 2, max_turns 1" in rows
    assert re.search(r"2 discarded, tool_failed: search: \\x1b.* \(e\.g\. trace_0+7\)", text)
    assert "127.0.0.1:1/ is down" in text
    assert "      turn 9: forged" in text and "\nturn 9" not in text
    assert is_harmless(text)


def test_piped_tables_have_no_boxes(store: RunStore) -> None:
    text = shown(overview(store, is_boxed=False))
    assert not re.search("[│┃━─┏└]", text)
    assert re.search(r"^ *5  0\.500 ± 0\.050 +- +1\.25 +51 +4/6", text, re.MULTILINE)


def test_grades_are_drawn_as_lines(store: RunStore) -> None:
    store.append_metrics({"step": 5, "kind": "evaluation", "split": "validation", "grade": 0.6, "num_items": 9})
    text = shown(overview(store))
    assert "grade, train:      ▁▂▄▅▇  0.100 → 0.500" in text
    assert "grade, validation: █  0.600 → 0.600" in text
    assert list(curve_lines({})) == []


def test_a_sparkline_spans_its_range() -> None:
    assert sparkline([0.0, 0.5, 1.0], 0.0, 1.0) == "▁▅█"
    assert sparkline([2.0, 2.0], 2.0, 2.0) == "▄▄"
    many = thinned([float(number) for number in range(1000)])
    assert len(many) <= 48 and (many[0], many[-1]) == (0.0, 999.0) and many == sorted(many)


def test_a_folder_of_another_version_or_cut_off_is_shown_as_far_as_it_goes(store: RunStore) -> None:
    path = store.rollout_path(5)
    newer, *others = [json.loads(line) for line in path.read_text().splitlines()]
    newer["mood"] = HOSTILE
    del others[0]["attempt"]
    lines = [json.dumps(row) for row in (newer, *others)]
    path.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:99])
    with (store.path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "training"}\n{"kind": "evaluation", "split": 3, "step": 1}\n{"kind": "train')
    text = shown(overview(store))
    assert "not all could be read: 1 x in step_000005.jsonl: unknown field mood, left out" in text
    assert "attempt is missing or wrong" in text and "cut off" in text
    assert "step 5, train rollouts ended by: answered 5, max_turns 1, tool_failed 1" in text
    assert find_rollout(store, newer["id"]).item_id == "rows-1"
    with pytest.raises(StorageError, match="not what this version"):
        find_rollout(store, others[0]["id"])
    (store.path / "state.json").write_text("{")
    assert "state.json cannot be read" in shown(overview(store))


def test_a_transcript_on_a_terminal_says_the_same_in_colour(store: RunStore) -> None:
    lines = list(transcript(a_rollout(0), "prompt"))
    text = as_text(lines)
    assert text.plain == "\n".join(lines) + "\n"
    quoted = text.plain.index("    | prompt")
    assert all(not span.start <= quoted < span.end for span in text.spans), "only headings are coloured"


def test_summary_is_one_object(store: RunStore) -> None:
    store.write_live(a_live())
    known = json.loads(json.dumps(summary(store)))
    assert (known["status"], known["writer_pid"], known["last_step"]) == ("running", os.getpid(), 5)
    assert known["stops"] == {"train": {"answered": 6, "tool_failed": 2, "max_turns": 1}}
    assert [cause["num"] for cause in known["discards"]] == [2]
    assert [row["step"] for row in known["training"]] == [1, 2, 3, 4, 5]
    assert known["live"]["num_in_flight"] == 4


def test_a_run_that_has_only_begun_can_be_shown(tmp_path: Path) -> None:
    store = RunStore.create(tmp_path, "new", {})
    store.write_state({"status": "starting"})
    assert "new: starting" in shown(overview(store))
    assert "nothing was sampled yet" in live_view(store).plain
    assert summary(store)["stops"] == {}


def test_a_rollout_is_readable_and_harmless(store: RunStore) -> None:
    rollout = find_rollout(RunStore.open(store.path), "trace_" + "0" * 32)
    prompt = prompt_of(rollout, store, store.config())
    lines = list(transcript(rollout, prompt))
    text = "\n".join(lines)
    assert "ended by answered after 2 turns, 1 calls, 4 sampled tokens, 1.50 s" in text
    assert "    | <|im_start|>user\n    | Heart attack<|im_end|>" in text
    assert "turn 1: 3 tokens in 0.50 s, policy version 4" in text
    assert "cut off by its limit" in text
    assert "  error after 0.250 s, 2 attempts" in text
    assert [line.strip() for line in lines if "grade" in line or "part" in line or "shadow" in line] == [
        "grade 0.75, 0.000 s",
        "part exact 1, from the cache",
        "part close 0.25, 0.000 s",
        "shadow code 0.5",
    ]
    assert is_harmless(text)
    assert "\\x1b[2J" in text and "\\u202e" in text and "\\ud800" in text and "\\x9b31m" in text
    assert not [line for line in lines if line.startswith("turn 9")], "hostile text cannot imitate a headline"


def test_a_prompt_without_its_tokenizer_is_counted(store: RunStore) -> None:
    assert re.match(
        r"\(\d+ tokens; .*nowhere.* cannot be read",
        prompt_of(a_rollout(0), store, {"model": {"path": "nowhere"}}),
    )


def test_a_discarded_rollout_says_why(store: RunStore) -> None:
    text = "\n".join(transcript(find_rollout(store, f"trace_{7:032x}"), ""))
    assert "ended by tool_failed" in text and "no grade" in text
    assert "    | search: \\x1b[2J" in text


@pytest.mark.parametrize(
    ("name", "rollout_id", "message"),
    [
        ("run-001", "trace_none", r"trace_none: there is no such rollout(.|\n)*cure: an id looks like trace_0"),
        ("run-001", "\x1b[2J", r"\\x1b\[2J: there is no such rollout"),
        ("", "x", r"this is a folder of runs(.|\n)*name one: run-001"),
        ("nothing", "x", r"there is no run here"),
    ],
)
def test_bad_paths_and_ids_are_named(store: RunStore, name: str, rollout_id: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_rollout(open_run(store.path.parent / name), rollout_id)


@pytest.mark.parametrize("letter", ["\x1b", "\x7f", "\x85", "\u2028", "\u200f", "\ud800", "\U000e0041"])
def test_plain_shows_what_has_no_glyph(letter: str) -> None:
    assert plain(f"a{letter}b").isprintable()
    assert plain("ä漢😀 b") == "ä漢😀 b"
    assert plain("a\nb", keep="\n") == "a\nb"
    assert plain("a" * 9, max_chars=5) == "aaaa…"


# --- live ---


def test_live_says_what_goes_on(store: RunStore) -> None:
    store.write_live(a_live())
    text = live_view(store).plain
    assert "rft process 4711" in text and "step 6: sampling" in text
    assert "4 in flight, 8 finished, 1 discarded; ended: answered 8, tool_failed 1" in text
    assert " old" not in text and "gone" not in text


def test_live_says_when_it_is_old(store: RunStore) -> None:
    store.write_live(a_live(time=time.time() - 100))
    assert "this is 100 s old" in live_view(store).plain and "kill -USR1 4711" in live_view(store).plain
    store.write_live(a_live(time=time.time() - 100, is_active=False))
    assert "for 100 s it has not sampled" in live_view(store).plain


def test_live_says_when_its_writer_is_gone(store: RunStore) -> None:
    store.write_live(a_live(phase=HOSTILE))
    store.close()  # as when it was killed: the lock is free, the state still says running
    text = live_view(RunStore.open(store.path)).plain
    assert "run-001: killed" in text and "is gone" in text
    assert is_harmless(text)
    assert "continue with `rft train CONFIG --resume`" in shown(overview(store))
    store.write_state({"status": "failed", "step": 5, "steps": 12, "error": "search was down for 600 s"})
    assert "it is over" in live_view(store).plain
    assert "search was down for 600 s" in shown(overview(store))


def test_a_live_file_of_another_version_is_an_error(store: RunStore) -> None:
    store.write_live({"time": 0.0})
    with pytest.raises(StorageError, match=r"live\.json is not what this version"):
        live_view(store)


# --- the command ---


@pytest.mark.slow
def test_the_command(store: RunStore) -> None:
    store.write_live(a_live())
    run = str(store.path)
    plainly, once, as_json = rft("show", run), rft("show", run, "--live"), rft("show", run, "--json")
    assert (plainly.returncode, once.returncode, as_json.returncode) == (0, 0, 0), plainly.stderr + once.stderr
    assert "run-001: running" in plainly.stdout and is_harmless(plainly.stdout)
    assert "step 6: sampling" in once.stdout, "one snapshot where the output is no terminal"
    assert json.loads(as_json.stdout)["writer_pid"] == os.getpid()
    one = rft("show", run, "--rollout", "trace_" + "0" * 32)
    assert "Heart attack" in one.stdout and is_harmless(one.stdout)
    assert json.loads(rft("show", run, "--rollout", "trace_" + "0" * 32, "--json").stdout)["stop_reason"] == "answered"
    assert rft("show", run, "trace_" + "0" * 32).stdout == one.stdout
    assert rft("show", run, "x", "--rollout", "y").returncode == 2
    missing = rft("show", run, "--rollout", "x")
    assert missing.returncode == 2 and "cure: an id looks like" in missing.stderr
    assert rft("show", run, "--rollout", "x", "--live").returncode == 2


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["interrupt", "done"])
def test_live_on_a_terminal_follows_until_the_end(store: RunStore, ending: str) -> None:
    store.write_live(a_live())
    leader, follower = pty.openpty()
    listening = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
    process = subprocess.Popen(
        [sys.executable, "-c", listening + "from rft.cli import main; main()", "show", str(store.path), "--live"],
        stdout=follower, stderr=subprocess.PIPE, env=os.environ | {"TERM": "xterm", "COLUMNS": "100", "LINES": "40"},
    )  # fmt: skip
    os.close(follower)
    try:
        seen = _read_until(leader, b"8 finished")
        store.write_live(a_live(num_finished=9, stops={"answered": 9}))
        seen += _read_until(leader, b"9 finished")
        if ending == "interrupt":
            process.send_signal(signal.SIGINT)
        else:
            store.write_state({"status": "succeeded", "step": 12, "steps": 12})
            seen += _read_until(leader, b"it is over")
        assert process.wait(30) == 0
        assert process.stderr is not None
        assert process.stderr.read() == b""
    finally:
        process.kill()
        process.communicate()
        os.close(leader)


def _read_until(fd: int, text: bytes) -> bytes:
    os.set_blocking(fd, False)
    seen, deadline = b"", time.monotonic() + 30
    while text not in seen:
        assert time.monotonic() < deadline, seen
        try:
            seen += os.read(fd, 65536)
        except BlockingIOError:
            time.sleep(0.02)
    return seen
