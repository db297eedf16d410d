"""What the page reads, over real HTTP: runs, charts, the table, traces, tokens; good, broken and hostile folders."""

from __future__ import annotations

import http.client
import json
import math
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import pytest
from run_folders import a_rollout, a_run, an_item
from serving import served
from tiny import tiny_tokenizer

from rft.errors import UserError
from rft.metrics import rollout_metrics
from rft.percentiles import percentile
from rft.redaction import REDACTED, without_any_secret
from rft.store import RunStore
from rft.types import Grade, Group, Message, Rollout, ToolResult
from rft.ui.app import build_ui
from rft.ui.columns import Columns
from rft.ui.detokenizing import texts_of
from rft.ui.folder import FolderRuns
from rft.ui.schema import MAX_TEXT, Charts, Choices, Revision, RolloutPage, RunList, RunView, TextPart, Tokens, Trace
from rft.ui.thinning import thinned

ODD = b'{"status": {}, "step": "x", "name": [1]}'
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>\x1b[31m\u202e\x00'\""


class Reader:
    """A client of the page's routes."""

    def __init__(self, address: str) -> None:
        self._host = urlsplit(address).netloc

    def answer(self, path: str, **query: Any) -> tuple[int, Any]:
        connection = http.client.HTTPConnection(self._host, timeout=60)
        try:
            connection.request("GET", f"/ui/api{path}" + (f"?{urlencode(query)}" if query else ""))
            found = connection.getresponse()
            return found.status, json.loads(found.read())
        finally:
            connection.close()

    def get(self, path: str, **query: Any) -> Any:
        status, body = self.answer(path, **query)
        assert status == 200, body
        return body


@contextmanager
def page(runs: Path) -> Iterator[Reader]:
    with served(build_ui(runs)) as address:
        yield Reader(address)


def a_tokenizer(folder: Path) -> Path:
    """A model folder that has nothing but the tokenizer."""
    tiny_tokenizer().save_pretrained(folder)
    return folder


def change_config(store: RunStore, **changes: Any) -> None:
    path = store.path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- runs ---


def test_the_list_of_runs(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    first, second = a_run(runs, job_id="first"), a_run(runs, job_id="second", steps=2)
    for number, store in enumerate((first, second)):
        os.utime(store.path / "config.json", (1_000 + number,) * 2)
        store.write_state({"status": "succeeded", "step": 4, "steps": 4})
        store.close()
    with page(runs) as reader:
        about = reader.get("/about")
        assert (about["mode"], about["needs_key"]) == ("folder", False)
        found = RunList.model_validate(reader.get("/runs")).runs
    assert [run.id for run in found] == ["second", "first"]
    assert (found[1].status, found[1].step, found[1].steps, found[1].kind) == ("succeeded", 4, 4, "training")
    assert (found[1].split, found[1].grades) == ("validation", [0.75] * 3)
    assert found[1].started_at == 1_000.0 and found[1].problem is None and found[1].actions == []


def test_a_folder_that_is_a_run(tmp_path: Path) -> None:
    store = a_run(tmp_path)
    with page(store.path) as reader:
        assert [run["id"] for run in reader.get("/runs")["runs"]] == ["ftjob-1"]
        assert reader.get("/runs/ftjob-1/rollouts")["num_matching"] > 0


@pytest.mark.parametrize("name", ["nothing", "..", "%2e%2e", "..%2f..%2fetc", "a%00b", "x" * 5000, ".", "%2Fetc"])
def test_runs_that_are_not_there(tmp_path: Path, name: str) -> None:
    a_run(tmp_path / "runs")
    (tmp_path / "config.json").write_text("{}")
    with page(tmp_path / "runs") as reader:
        for path in ("", "/revision", "/charts", "/rollouts", "/choices", "/rollouts/x", "/rollouts/x/tokens"):
            status, body = reader.answer(f"/runs/{name}{path}")
            assert status == 404, (path, body)


def test_a_run_as_it_is(tmp_path: Path) -> None:
    store = a_run(tmp_path)
    for number in range(250):
        store.append_event("warn", f"{number} {HOSTILE}")
    store.close()
    with page(tmp_path) as reader:
        found = RunView.model_validate(reader.get("/runs/ftjob-1"))
    assert len(found.events) == 200 and found.events[-1].message == f"249 {HOSTILE}"
    assert found.problems == [] and found.doing == []
    assert found.config["training"] == {"steps": 4}


def test_a_config_says_no_secrets() -> None:
    secrets = {
        "environment": {
            "tools": [{"headers": {"authorization": "Bearer S3CRET"}, "server_url": "http://me:S3CRET@h/x?key=S3CRET"}],
            "env": {"PATH": "S3CRET"},
        },
        "engine": {"args": ["--api-key", "S3CRET", "--token=S3CRET", "--max-num-seqs", "8"]},
        "judges": {"j": {"api_key": "S3CRET", "api_key_env": "JUDGE_KEY", "url": "https://h:1/v1?sig=S3CRET"}},
        "extra": [{"hf_token": "S3CRET"}, {"password": "S3CRET", "x-api-key": "S3CRET"}],
        "rollout": {"max_tokens_per_turn": 48},
    }
    found = without_any_secret(secrets)
    assert "S3CRET" not in json.dumps(found)
    assert found["judges"]["j"]["api_key_env"] == "JUDGE_KEY"
    assert found["judges"]["j"]["url"] == "https://h:1/v1"
    assert found["engine"]["args"] == ["--api-key", REDACTED, f"--token={REDACTED}", "--max-num-seqs", "8"]
    assert found["rollout"] == {"max_tokens_per_turn": 48}


def test_only_a_run_that_is_written_can_be_paused(tmp_path: Path) -> None:
    runs, store = FolderRuns(tmp_path), RunStore.create(tmp_path, "run", {})
    store.write_state({"status": "running", "step": 1, "steps": 4})
    known = runs.get("run")
    assert runs.actions(known) == ["pause"]
    with pytest.raises(UserError, match="cancel is not possible"):
        runs.act(known, "cancel")
    runs.act(known, "pause")
    assert store.is_pause_asked and runs.actions(known) == []
    store.withdraw_pause()
    store.close()
    assert runs.actions(known) == []
    with pytest.raises(UserError, match="pause is not possible"):
        runs.act(known, "pause")


def test_the_revision_changes_with_everything(tmp_path: Path) -> None:
    store = RunStore.create(tmp_path, "run", {})
    with page(tmp_path) as reader:

        def now() -> str:
            return Revision.model_validate(reader.get("/runs/run/revision")).revision

        seen = [now()]
        for change in (
            lambda: store.write_state({"status": "running", "step": 1}),
            lambda: store.append_metrics({"step": 1, "kind": "training"}),
            lambda: store.append_rollout(a_rollout(an_item(0), "train", 1, 0, 1.0)),
            lambda: store.append_rollout(a_rollout(an_item(0), "train", 1, 1, 1.0)),
            lambda: store.append_event("info", "hello"),
            lambda: store.write_live({"time": 1}),
            store.ask_to_pause,
            store.mark_done,
            lambda: store.rewind(0),
        ):
            assert now() == seen[-1]
            change()
            seen.append(now())
    assert len(set(seen)) == len(seen)


# --- charts ---


def test_charts(tmp_path: Path) -> None:
    a_run(tmp_path, steps=4, every=2)
    with page(tmp_path) as reader:
        charts = {chart.id: chart for chart in Charts.model_validate(reader.get("/runs/ftjob-1/charts")).charts}
    train, validation = charts["grade"].series
    assert (train.split, train.x, train.y) == ("train", [1, 2, 3, 4], [0.75] * 4)
    assert (validation.split, validation.x) == ("validation", [0, 2, 4])
    assert train.low is not None and train.low == train.high == [0.75] * 4
    assert {line.name for line in charts["parts"].series} == {"exact", "judge"}
    (by_tool, *_) = charts["calls_by_tool"].series
    assert (by_tool.name, by_tool.y) == ("search", [1.0] * 4)
    (spread, *_) = charts["calls_by_tool_spread"].series
    assert (spread.name, spread.y, spread.low, spread.high) == ("search", [1.0] * 4, [1.0] * 4, [1.0] * 4)
    assert charts["phases"].kind == "stacked" and len(charts["phases"].series) == 3
    assert charts["latency"].series[0].y == [1.0] * 4
    assert charts["useful_groups"].series[0].y == [1.0] * 4
    assert {"completion_tokens", "reasoning_tokens", "stops", "tool_latency", "entropy"} <= charts.keys()
    assert "errors" not in charts and "warmup_loss" not in charts


def test_charts_of_rows_that_lack_something(tmp_path: Path) -> None:
    """Null, missing and foreign values, a step made again, a line cut off, a line being written."""
    store = RunStore.create(tmp_path, "run", {})
    store.append_metrics({"step": 1, "kind": "training", "train/grade": 0.1, "time/sampling_s": 1.0})
    store.append_metrics({"step": 2, "kind": "training", "train/grade": math.inf, "train/tool_num/a/b": 3})
    store.append_metrics({"step": 3, "kind": "training", "train/grade": 0.2, "novel": {"deep": [1]}})
    store.append_metrics({"step": 3, "kind": "training", "train/grade": 0.3})
    store.append_metrics({"step": 9, "kind": "novel", "train/grade": 0.3})
    store.append_metrics({"step": 3, "kind": "evaluation", "split": "novel", "grade": 0.3})
    store.append_metrics({"kind": "training", "train/grade": 0.3})
    store.close()
    path = store.path / "metrics.jsonl"
    with path.open("ab") as file:
        file.write(b'{"step": 4, "kind": "tra\n[1]\n' + b"[" * 100_000 + b"]" * 100_000 + b"\n")
        file.write(b'{"step": %d, "kind": "training"}\n' % 10**300)
        file.write(b'{"step": 2, "kind": "training", "train/loss": %d}\n' % 10**400)
        file.write(b'{"step": 5, "kind": "training", "train/gr')
    with page(tmp_path) as reader:
        (grade,) = reader.get("/runs/run/charts")["charts"][0]["series"]
        assert (grade["x"], grade["y"]) == ([1, 2, 3], [0.1, None, 0.3])
        assert reader.get("/runs/run")["problems"] == [
            "5 lines of metrics.jsonl cannot be read: cut off when they were written, or changed"
        ]
        with path.open("ab") as file:
            file.write(b'ade": 0.5}\n')
        (grade,) = reader.get("/runs/run/charts")["charts"][0]["series"]
        assert (grade["x"][-1], grade["y"][-1]) == (5, 0.5)
        store.rewind(1)
        store.close()
        (grade,) = reader.get("/runs/run/charts")["charts"][0]["series"]
        assert grade["x"] == [1]


def test_a_run_without_metrics_has_no_charts(tmp_path: Path) -> None:
    RunStore.create(tmp_path, "run", {})
    with page(tmp_path) as reader:
        assert reader.get("/runs/run/charts")["charts"] == []
        assert reader.answer("/runs/run/charts", points=1)[0] == 400


def test_thinning_keeps_peaks_and_gaps() -> None:
    rng = random.Random(3)
    for size, points in ((10, 100), (1_000, 100), (999, 10), (5_000, 1_000)):
        values = [rng.choice([rng.random(), math.nan]) for _ in range(size)]
        values[size // 3], values[size // 2] = 50.0, -50.0
        chosen = thinned(values, points)
        assert chosen == sorted(set(chosen)) and len(chosen) <= points
        assert {0, size - 1, size // 3, size // 2} <= set(chosen)
    assert thinned([math.nan] * 100, 10)[0] == 0


def test_columns_are_those_of_the_rows(tmp_path: Path) -> None:
    """However the file is cut into reads."""
    rng, path = random.Random(4), tmp_path / "metrics.jsonl"
    rows = [
        {"step": rng.randrange(40), "kind": "training"} | {name: rng.random() for name in rng.sample("abcdef", k=3)}
        for _ in range(60)
    ]
    data, columns = "".join(json.dumps(row) + "\n" for row in rows).encode(), Columns(path)
    for end in sorted([*rng.sample(range(len(data)), k=20), len(data)]):
        path.write_bytes(b"") if not path.exists() else None
        with path.open("ab") as file:
            file.write(data[path.stat().st_size : end])
        columns.read(lambda _: None)
    last = dict(sorted({row["step"]: row for row in rows}.items()))
    for name in "abcdef":
        steps, values = columns.read(lambda found, name=name: found.table("training").series(name))
        assert steps == list(last)
        assert [None if value != value else value for value in values] == [row.get(name) for row in last.values()]


def test_percentiles() -> None:
    assert [percentile([1, 2, 3, 4, 5], share) for share in (0.0, 0.1, 0.5, 0.9, 1.0)] == [1, 1.4, 3, 4.6, 5]
    assert percentile([7], 0.9) == 7
    item = an_item(0)
    rollouts = [a_rollout(item, "train", 1, attempt, 1.0) for attempt in range(5)]
    for seconds, rollout in enumerate(rollouts):
        rollout.duration_s = float(seconds)
        rollout.turns[0].results[0].latency_s = seconds / 10
    rollouts[0].turns[0].message.tool_calls[0].name = "made up"
    row = rollout_metrics([Group(item, 1, rollouts)])
    assert (row["duration_s_p10"], row["duration_s_p50"], row["duration_s_p90"]) == pytest.approx((0.4, 2.0, 3.6))
    assert (row["tool_calls_p10/search"], row["tool_calls_p90/search"]) == pytest.approx((0.4, 1.0))
    assert row["tool_call_s_p50/search"] == pytest.approx(0.25)
    assert not any("made up" in name for name in row)


# --- the table, traces, tokens ---


def test_the_table_over_http(tmp_path: Path) -> None:
    a_run(tmp_path, num_items=3, num_rollouts=2)
    with page(tmp_path) as reader:
        path = "/runs/ftjob-1/rollouts"
        found = RolloutPage.model_validate(reader.get(path, step=2, split="validation", sort="-grade", limit=4))
        assert [line.grade for line in found.rollouts] == [1.0, 1.0, 1.0, 0.5] and found.num_matching == 6
        rest = RolloutPage.model_validate(
            reader.get(path, step=2, split="validation", sort="-grade", limit=4, after=found.next)
        )
        assert [line.grade for line in rest.rollouts] == [0.5, 0.5] and rest.next is None
        assert Choices.model_validate(reader.get("/runs/ftjob-1/choices")).tools == ["search"]
        assert reader.get(path, step="", grade_min="", split="", tool="", text="")["num_matching"] == 42
        assert reader.answer(path, sort="nothing")[0] == 400
        assert reader.answer(path, limit=10_000)[0] == 400
        assert reader.answer(path, after="nothing")[0] == 400


def test_a_trace(tmp_path: Path) -> None:
    """The prompt by the tokenizer, the item by its file, the calls on their time line, the group."""
    store = a_run(tmp_path)
    change_config(store, model={"path": str(a_tokenizer(tmp_path / "model"))})
    tokenizer = tiny_tokenizer()
    rollout = a_rollout(an_item(1), "validation", 9, 1, 0.0)
    rollout.turns[0].input_ids = tokenizer.encode("<|im_start|>user\nGrüße 🦊")
    rollout.turns[1].message.reasoning = HOSTILE
    rollout.environment = {"won": True, "note": "Grüße"}
    with store:
        store.append_rollout(rollout)
        store.append_rollout(a_rollout(an_item(1), "validation", 9, 0, 1.0))
    with page(tmp_path) as reader:
        found = Trace.model_validate(reader.get(f"/runs/ftjob-1/rollouts/{rollout.id}"))
    assert found.rollout.id == rollout.id and found.run_id == "ftjob-1"
    assert found.prompt.text == "<|im_start|>user\nGrüße 🦊"
    assert found.item is not None and json.loads(found.item.text)["messages"][0]["content"] == "question 1"
    assert found.environment is not None and json.loads(found.environment.text) == rollout.environment
    first, last = found.turns
    (call,) = first.calls
    assert (call.name, call.arguments.text, call.started_s, call.latency_s) == ("search", '{"q": 1}', 0.25, 0.5)
    assert call.result is not None and call.result.text == "found"
    assert (first.num_output_tokens, first.num_reasoning_tokens) == (3, 1)
    assert (last.reasoning.text, last.content.text) == (HOSTILE, "yes")
    assert found.grade is not None and {part.name for part in found.grade.parts} == {"exact", "judge"}
    assert [line.attempt for line in found.group] == [0, 1]


def test_texts_of_megabytes_come_in_parts(tmp_path: Path) -> None:
    store, rollout = a_run(tmp_path), a_rollout(an_item(0), "train", 9, 0, 1.0)
    whole = "".join(random.Random(5).choices("ab<é🦊", k=5_000)) * 1_000
    rollout.turns[0].results[0].output = whole
    rollout.turns[1].replies = [Message(role="user", content=whole)]
    with store:
        store.append_rollout(rollout)
    with page(tmp_path) as reader:
        path = f"/runs/ftjob-1/rollouts/{rollout.id}"
        trace = Trace.model_validate(reader.get(path))
        result = trace.turns[0].calls[0].result
        assert result is not None
        for text in (result, trace.turns[1].replies[0].content):
            assert (text.text, text.num_chars) == (whole[:MAX_TEXT], len(whole))
            part = TextPart.model_validate(reader.get(f"{path}/texts/{text.ref}", offset=4_990_000))
            assert (part.text, part.offset, part.num_chars) == (whole[4_990_000:], 4_990_000, len(whole))
        for ref in (
            "9.content",
            "0.call.7.result",
            "0.call.0.secret",
            "-1.content",
            "nothing",
            quote("../../etc", safe=""),
        ):
            assert reader.answer(f"{path}/texts/{ref}")[0] == 404
        assert reader.answer(f"{path}/texts/0.content", offset=-1)[0] == 400


def test_rollouts_that_are_not_there(tmp_path: Path) -> None:
    a_run(tmp_path)
    with page(tmp_path) as reader:
        for rollout_id in ("trace_0", "%20", "x" * 3_000, quote(HOSTILE, safe="")):
            for path in ("", "/tokens", "/texts/0.content"):
                assert reader.answer(f"/runs/ftjob-1/rollouts/{rollout_id}{path}")[0] == 404


def test_a_rollout_is_found_before_it_is_indexed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = a_run(tmp_path)
    oldest = next(store.rollouts(0))
    monkeypatch.setattr("rft.ui.catalog._BUDGET_S", -1.0)
    monkeypatch.setattr("rft.ui.catalog.Catalog._start_thread", lambda self: None)
    with page(tmp_path) as reader:
        assert reader.get("/runs/ftjob-1/rollouts")["indexed_share"] < 1
        assert reader.get(f"/runs/ftjob-1/rollouts/{oldest.id}")["rollout"]["id"] == oldest.id


def test_tokens(tmp_path: Path) -> None:
    """All sequences one after another, what was sampled with its log-probability; the texts joined are the whole."""
    store = a_run(tmp_path)
    training = {"advantage_scale": "group", "baseline": "mean", "costs": {"tool_calls": 0.0, "above": 0.5}}
    change_config(store, model={"path": str(a_tokenizer(tmp_path / "model"))}, training=training)
    text = tiny_tokenizer().encode("Grüße 🦊!")
    rollouts = [a_rollout(an_item(0), "train", 9, attempt, score) for attempt, score in enumerate((1.0, 0.0, 0.0))]
    fork = rollouts[0].turns[1]
    fork.is_fork, fork.input_ids, fork.output_ids, fork.logprobs = True, text, text[:3], [-0.5, -1.5, -2.5]
    with store:
        for rollout in rollouts:
            store.append_rollout(rollout)
    with page(tmp_path) as reader:
        path = f"/runs/ftjob-1/rollouts/{rollouts[0].id}/tokens"
        found = Tokens.model_validate(reader.get(path))
        window = Tokens.model_validate(reader.get(path, offset=4, limit=3))
        validation = Tokens.model_validate(reader.get(f"/runs/ftjob-1/rollouts/{next(store.rollouts(0)).id}/tokens"))
    sequences = rollouts[0].sequences
    assert [token.id for token in found.tokens] == [*sequences[0].ids, *sequences[1].ids]
    assert [token.is_trained for token in found.tokens] == [*sequences[0].mask, *sequences[1].mask]
    assert [token.logprob for token in found.tokens[-3:]] == [-0.5, -1.5, -2.5]
    assert found.tokens[0].logprob is None
    assert found.sequence_starts == [0, 5] and found.num_tokens == len(found.tokens)
    assert "".join(token.text for token in found.tokens[5 : 5 + len(text)]) == "Grüße 🦊!"
    assert window.tokens == found.tokens[4:7] and window.num_tokens == found.num_tokens
    scores = [1.0, 0.5, 0.5]
    expected = (1.0 - sum(scores) / 3) / (math.sqrt(sum((s - sum(scores) / 3) ** 2 for s in scores) / 2) + 1e-4)
    assert found.advantage == pytest.approx(expected)
    assert validation.advantage is None and not any(token.is_trained for token in validation.tokens)


@pytest.mark.parametrize(
    ("training", "scores", "expected"),
    [
        ({"advantage_scale": "none"}, (1.0, 0.0), 0.25),
        ({"advantage_scale": "none", "baseline": "leave_one_out"}, (1.0, 0.0), 0.5),
        ({"advantage_scale": "group"}, (1.0, 1.0), 0.0),
        ({"advantage_scale": "none", "costs": {"seconds": 0.1}}, (1.0, 0.0), None),
        ({"advantage_scale": "none", "allocation": "adaptive"}, (1.0, 0.0), None),
        ("strange", (1.0, 0.0), None),
    ],
)
def test_advantages(tmp_path: Path, training: Any, scores: tuple[float, float], expected: float | None) -> None:
    """As trainers/objective.py; grades of the two rollouts are (score + 1) / 2."""
    store = RunStore.create(tmp_path, "run", {"training": training})
    rollouts = [a_rollout(an_item(0), "train", 1, attempt, score) for attempt, score in enumerate(scores)]
    with store:
        for rollout in rollouts:
            store.append_rollout(rollout)
    with page(tmp_path) as reader:
        found = reader.get(f"/runs/run/rollouts/{rollouts[0].id}/tokens")
    assert found["advantage"] == (None if expected is None else pytest.approx(expected))
    assert "names no model" in found["problem"]


def test_texts_of_tokens_that_split_characters() -> None:
    """Whatever ids a model samples, also bytes that are no UTF-8."""
    core, rng = tiny_tokenizer().backend_tokenizer, random.Random(6)
    for _ in range(200):
        ids = [rng.randrange(-2 + len(tiny_tokenizer()) + 10) for _ in range(rng.randrange(40))]
        parts = texts_of(core, ids)
        assert len(parts) == len(ids)
        assert "".join(parts) == core.decode(ids, skip_special_tokens=False)


def test_texts_of_tokens_of_other_tokenizers() -> None:
    """SentencePiece's way: words begin with a mark, unknown letters are bytes."""
    from tokenizers import Tokenizer, decoders, models

    vocabulary = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁the", "▁fox", "es", "▁", "a", "é"]
    core = Tokenizer(models.BPE({piece: index for index, piece in enumerate(vocabulary)}, [], byte_fallback=True))
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fox = [vocabulary.index(f"<0x{byte:02X}>") for byte in "🦊".encode()]
    ids = [256, 257, 258, *fox, 259, 260, *fox[:2], 261]
    parts = texts_of(core, ids)
    assert "".join(parts) == core.decode(ids, skip_special_tokens=False)
    assert parts[:3] == ["the", " fox", "es"] and parts[6] == "🦊"


# --- folders that are broken, old or new ---


@pytest.mark.parametrize("name", ["config.json", "state.json", "live.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"x"', b"\xff\xfe", ODD])
def test_broken_files_are_shown_as_far_as_it_goes(tmp_path: Path, name: str, content: bytes) -> None:
    store = a_run(tmp_path)
    store.write_state({"status": "running", "step": 1, "steps": 4})
    (store.path / name).write_bytes(content)
    rollout = next(store.rollouts())
    with page(tmp_path) as reader:
        (line,) = reader.get("/runs")["runs"]
        view = RunView.model_validate(reader.get("/runs/ftjob-1"))
        assert line["id"] == "ftjob-1" and len(line["grades"]) == 3
        assert view.problems or content == ODD
        assert reader.get("/runs/ftjob-1/revision")["revision"]
        assert reader.get("/runs/ftjob-1/rollouts")["num_matching"] == 42
        assert reader.get(f"/runs/ftjob-1/rollouts/{rollout.id}")["rollout"]["id"] == rollout.id
        assert reader.get(f"/runs/ftjob-1/rollouts/{rollout.id}/tokens")["num_tokens"] > 0
    store.close()


def test_rollouts_of_another_version_are_shown_and_said(tmp_path: Path) -> None:
    store = a_run(tmp_path, steps=1, every=1)
    row = a_rollout(an_item(0), "train", 7, 0, 1.0).model_dump() | {"novel": [1]}
    del row["seed"]
    store.rollout_path(7).write_text(json.dumps(row) + '\n{"id": "cut off', "utf-8")
    with page(tmp_path) as reader:
        view = reader.get("/runs/ftjob-1")
        trace = Trace.model_validate(reader.get(f"/runs/ftjob-1/rollouts/{row['id']}"))
    assert len(view["problems"]) == 1 and "another version of rft" in view["problems"][0]
    assert trace.seed == 0 and len(trace.turns) == 2


def test_half_surrogate_pairs_can_be_answered(tmp_path: Path) -> None:
    """Python writes them into JSON, UTF-8 has none."""
    store = a_run(tmp_path)
    rollout = a_rollout(an_item(0), "train", 9, 0, 1.0)
    rollout.turns[0].results = [ToolResult(call_id="call_1", output="half \ud83e pair")]
    with store:
        store.append_event("info", "half \ud83e pair")
        store.append_rollout(rollout)
    change_config(store, name="half \ud83e pair")
    with page(tmp_path) as reader:
        trace = reader.get(f"/runs/ftjob-1/rollouts/{rollout.id}")
        assert trace["turns"][0]["calls"][0]["result"]["text"] == "half ? pair"
        assert reader.get("/runs/ftjob-1")["events"][-1]["message"] == "half ? pair"
        assert reader.get("/runs")["runs"][0]["name"].startswith("half ")


def test_an_item_whose_file_is_gone(tmp_path: Path) -> None:
    store = a_run(tmp_path)
    (tmp_path / "validation.jsonl").unlink()
    rollout: Rollout = next(store.rollouts())
    with page(tmp_path) as reader:
        assert reader.get(f"/runs/ftjob-1/rollouts/{rollout.id}")["item"] is None


def test_a_step_is_seen_at_the_next_look(tmp_path: Path) -> None:
    """Nothing is held back for later: what the run has appended, the next answer has."""
    store = a_run(tmp_path)
    with page(tmp_path) as reader, store:
        reader.get("/runs/ftjob-1/rollouts")
        for step in (5, 6):
            rollout = a_rollout(an_item(0), "train", step, 0, 1.0).model_copy(update={"grade": Grade(score=0.5)})
            store.append_rollout(rollout)
            store.append_metrics({"step": step, "kind": "training", "train/grade": 0.5})
            store.write_state({"status": "running", "step": step, "steps": 9})
            started = time.monotonic()
            assert reader.get("/runs/ftjob-1/rollouts")["rollouts"][0]["step"] == step
            assert reader.get("/runs/ftjob-1/charts")["charts"][0]["series"][0]["x"][-1] == step
            assert reader.get("/runs")["runs"][0]["step"] == step
            assert time.monotonic() - started < 60
