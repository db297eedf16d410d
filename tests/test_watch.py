"""The watchdog: who stands still is named, an outage is patience, SIGUSR1 is answered at any time, nothing is left."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fakes import FaultyToolServer, LoopbackServer
from scripted_engine import ScriptedEngine
from test_collect import a_collector
from test_job import a_config
from test_outage import Said, a_server, an_environment
from test_rollout import CALL, RecordingEnvironment, RecordingGrader, a_workshop, an_item, say

from rft.config import RolloutConfig
from rft.engines.health import Health
from rft.engines.pool import EnginePool
from rft.errors import EngineError, NoProgressError
from rft.job import run_job
from rft.live import Live, count_stops, live_lines, waiting_for
from rft.rollout import Workshop
from rft.store import RunStore
from rft.types import Grade, Group, Item, StopReason, ToolCall
from rft.waits import Waits
from rft.watch import Watchdog

PATIENT = RolloutConfig(max_tokens_per_turn=400, time_limit_s=600, max_concurrent=4)
FOREVER_S = 1e6


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RunStore]:
    with RunStore.create(tmp_path, "run", {}) as store:
        yield store


@contextmanager
def a_watchdog(store: RunStore, tick_s: float = 0.05) -> Iterator[Watchdog]:
    loop = asyncio.Runner()
    with loop, Watchdog(loop, store, lambda: "step 1: sampling", tick_s) as watchdog:
        yield watchdog


def collect(watchdog: Watchdog, workshop: Workshop, stall_limit_s: float, num_items: int = 3) -> list[Group]:
    outages = workshop.environment.outages if workshop.environment else None
    watchdog.attach(workshop.engine, outages, stall_limit_s)
    collector, _ = a_collector(dataclasses.replace(workshop, waits=watchdog.waits))
    items = [an_item(id=f"x-{index}") for index in range(num_items)]
    return watchdog.run(collector.collect(items, "train", 1, 2))


class StuckGrader(RecordingGrader):
    async def grade(self, item: Item, sample: dict[str, Any], trace_id: str = "") -> Grade:
        await asyncio.Event().wait()
        raise AssertionError("nobody sets the event")


def stuck_in(what: str) -> Workshop:
    workshop = a_workshop(say(CALL, "I21.9"), limits=PATIENT)
    if what == "engine":
        workshop.engine.first_token_s = FOREVER_S  # type: ignore[attr-defined]
        return workshop
    if what == "grader":
        return dataclasses.replace(workshop, grader=StuckGrader())
    return dataclasses.replace(workshop, environment=RecordingEnvironment(lambda call: "x", delay_s=FOREVER_S))


@pytest.mark.parametrize("what", ["tool search", "engine", "grader"])
def test_what_a_run_stands_still_for_is_named(store: RunStore, what: str) -> None:
    workshop = stuck_in(what)
    with a_watchdog(store) as watchdog:
        with pytest.raises(NoProgressError) as caught:
            collect(watchdog, workshop, stall_limit_s=1.0)
        left = asyncio.all_tasks(watchdog._loop.get_loop())
    text = str(caught.value)
    first, second, third = text.splitlines()[:3]
    assert re.match(r"step 1: sampling: 4 rollouts are in flight and none got any further for \d+ s", first)
    assert re.search(rf"4 wait for {what} +longest [\d.]+ s, e\.g\. trace_\w{{32}} \(x-\d\)", second), "the cause first"
    assert re.search(r"2 wait for slot", third), "who only waits for others last"
    assert "--resume" in text and "rollout.stall_limit_s" in text
    assert (len(watchdog.waits), left) == (0, set())
    assert isinstance(workshop.environment, RecordingEnvironment)
    assert (workshop.environment.num_open, workshop.engine.num_running) == (0, 0)  # type: ignore[attr-defined]


STUCK_THREAD = """
import asyncio, sys, threading
from pathlib import Path
from test_rollout import a_workshop, say
from rft.engines.health import Health
from rft.engines.pool import EnginePool
from rft.errors import EngineError
from rft.errors import NoProgressError
from rft.store import RunStore
from rft.watch import Watchdog

async def call(watchdog):
    with watchdog.waits.on("trace_1", "x-1", "tool search"):
        await asyncio.to_thread(threading.Event().wait)

with RunStore.create(Path(sys.argv[1]), "run", {}) as store, asyncio.Runner() as loop:
    with Watchdog(loop, store, lambda: "") as watchdog:
        watchdog.attach(a_workshop(say()).engine, None, 0.2)
        try:
            watchdog.run(call(watchdog))
        except NoProgressError as error:
            print(error)
"""


@pytest.mark.slow
def test_a_thread_that_never_returns_does_not_hold_the_process(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", STUCK_THREAD, str(tmp_path)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "1 wait for tool search" in ended.stdout


@pytest.mark.slow
def test_slow_is_not_stuck(store: RunStore) -> None:
    """All in all longer than the limit, but something ends now and then."""
    limits = RolloutConfig(max_tokens_per_turn=400, max_concurrent=1)
    workshop = a_workshop(say("I21.9"), limits=limits)
    workshop.engine.first_token_s = 0.3  # type: ignore[attr-defined]
    with a_watchdog(store) as watchdog:
        started = time.monotonic()
        groups = collect(watchdog, workshop, stall_limit_s=2.0, num_items=5)
        assert time.monotonic() - started > 2.0
    assert [len(group.rollouts) for group in groups] == [2] * 5


def test_nobody_who_waits_is_no_stall(store: RunStore) -> None:
    """Work without rollouts (an engine that starts, a probe) has deadlines of its own."""
    with a_watchdog(store) as watchdog:
        watchdog.attach(a_workshop(say()).engine, None, stall_limit_s=0.1)
        assert watchdog.run(asyncio.sleep(0.5, "done")) == "done"


@pytest.mark.slow
def test_an_outage_is_not_a_stall(store: RunStore) -> None:
    with a_server() as server:
        port = server.port
    said = Said()

    async def story(watchdog: Watchdog) -> tuple[list[Group], list[str], FaultyToolServer]:
        environment = an_environment(port, said)
        workshop = a_workshop(say(CALL, "I21.9"), environment=environment, limits=PATIENT)
        watchdog.attach(workshop.engine, environment.outages, 1.0)
        collector, _ = a_collector(dataclasses.replace(workshop, waits=watchdog.waits))
        try:
            collecting = asyncio.create_task(collector.collect([an_item()], "train", 1, 6))
            await said.wait()
            down = []
            for _ in range(30):  # three times the limit
                await asyncio.sleep(0.1)
                down = watchdog.live(is_active=True).down
            with a_server(port) as server:
                return await collecting, down, server
        finally:
            await environment.close()

    with a_watchdog(store) as watchdog:
        groups, down, server = watchdog.run(story(watchdog))
    assert [rollout.stop_reason for rollout in groups[0].rollouts] == [StopReason.ANSWERED] * 6
    assert down == [f"http://127.0.0.1:{port}/"]
    assert len(server.requests) == 6


def test_errors_of_the_work_come_as_they_are(store: RunStore) -> None:
    async def fail() -> None:
        raise KeyError("bug")

    with a_watchdog(store) as watchdog, pytest.raises(KeyError, match="bug"):
        watchdog.run(fail())


# --- live.json ---


def test_live_json_is_whole_at_all_times(store: RunStore) -> None:
    """A reader in a thread of its own reads as fast as it can while the file is replaced every 2 ms."""
    read: list[Live] = []
    is_over = threading.Event()

    def reader() -> None:
        while not is_over.is_set():
            if live := store.read_live():
                read.append(Live.model_validate(live))

    workshop = a_workshop(say(CALL, "I21.9"), limits=PATIENT)
    workshop.engine.first_token_s = 0.05  # type: ignore[attr-defined]
    thread = threading.Thread(target=reader)
    with a_watchdog(store, tick_s=0.002) as watchdog:
        thread.start()
        collect(watchdog, workshop, stall_limit_s=60, num_items=12)
        is_over.set()
        thread.join(10)
    assert len({live.time for live in read}) > 10
    assert {live.phase for live in read} == {"step 1: sampling"}
    busy = [live for live in read if live.is_active and live.waiting]
    assert any(live.engine and live.engine["num_running"] == 4 and live.num_in_flight == 4 for live in busy)
    assert any(wait.what == "engine" for live in busy for wait in live.longest)
    last = Live.model_validate(store.read_live())
    assert (last.is_active, last.waiting, last.num_in_flight) == (False, [], 0)
    assert (last.num_finished, last.num_discarded, last.stops) == (24, 0, {"answered": 24})
    assert not list(store.path.glob(".live*"))


def test_an_engine_that_does_not_say_its_load_costs_nothing(store: RunStore) -> None:
    workshop = a_workshop(say("I21.9"), limits=PATIENT)

    async def no_answer() -> None:
        raise OSError("connection reset")

    workshop.engine.load_metrics = no_answer  # type: ignore[assignment,method-assign]
    workshop.engine.first_token_s = 0.3  # type: ignore[attr-defined]
    with a_watchdog(store) as watchdog:
        assert len(collect(watchdog, workshop, stall_limit_s=60)) == 3
    assert store.read_live()["engine"] is None


def test_names_that_a_model_chose_cannot_steer_a_terminal() -> None:
    waits = Waits()
    hostile = "tool \x1b[2J\x1b]0;owned\x07" + "y" * 500
    with waits.on("trace_1", "row\u202e-1", hostile):
        watchdog_sees = _a_live(waits)
    text = "\n".join(live_lines(watchdog_sees))
    assert "\\x1b[2J" in text and "row\\u202e-1" in text and "yyy…" in text
    assert all(letter.isprintable() or letter == "\n" for letter in text)


def _a_live(waits: Waits) -> Live:
    waiting, longest, num_in_flight = waiting_for(waits)
    return Live(
        time=0.0, pid=1, phase="p", is_active=True, num_in_flight=num_in_flight, num_finished=0, num_discarded=0,
        stops={}, still_s=0.0, down=[], waiting=waiting, longest=longest,
    )  # fmt: skip


def test_stops_are_counted_from_a_moment_on() -> None:
    before = {StopReason.ANSWERED: 2}
    assert count_stops(before, {StopReason.ANSWERED: 2, StopReason.MAX_TURNS: 1}) == {StopReason.MAX_TURNS: 1}


# --- a loop that is blocked, and signals ---


@pytest.mark.slow
def test_a_blocked_loop_is_reported_with_the_place(store: RunStore) -> None:
    def block(call: ToolCall) -> str:
        time.sleep(3.0)  # what user code should not do: three times what counts as blocked
        return "x"

    workshop = a_workshop(say(CALL, "I21.9"), environment=RecordingEnvironment(block), limits=PATIENT)
    with a_watchdog(store, tick_s=0.2) as watchdog:
        collect(watchdog, workshop, stall_limit_s=60, num_items=1)
    (event,) = [event for event in store.events() if "has not turned" in event["message"]]  # two calls, said once
    assert event["level"] == "warn"
    assert re.search(r"in .*block \(test_watch\.py:\d+\), called by", event["message"])


PROGRAM = """
import asyncio, sys
from pathlib import Path
from test_collect import a_collector
from test_rollout import CALL, RecordingEnvironment, a_workshop, an_item, say
from test_watch import PATIENT, FOREVER_S, collect
from rft.store import RunStore
from rft.watch import Watchdog
import dataclasses

def told():
    assert sys.stdin.readline()

async def ready(line):
    async with asyncio.timeout(30):
        while not watchdog.waits.counts().get("tool search") == 4:
            await asyncio.sleep(0.01)
    print(line, flush=True)

async def sample():
    environment = RecordingEnvironment(lambda call: "x", delay_s=FOREVER_S)
    workshop = a_workshop(say(CALL, "I21.9"), environment=environment, limits=PATIENT)
    watchdog.attach(workshop.engine, environment.outages, 600)
    collector, _ = a_collector(dataclasses.replace(workshop, waits=watchdog.waits))
    collecting = asyncio.create_task(collector.collect([an_item()], "train", 1, 6))
    await ready("sampling")
    await asyncio.to_thread(told)
    print("blocked", flush=True)
    told()
    collecting.cancel()

phase = ""
with RunStore.create(Path(sys.argv[1]), "run", {}) as store, asyncio.Runner() as loop:
    with Watchdog(loop, store, lambda: phase) as watchdog:
        phase = "step 1: sampling"
        watchdog.run(sample())
        phase = "step 1: training"
        print("training", flush=True)
        told()
print("over", flush=True)
"""


@pytest.mark.slow
def test_sigusr1_says_who_waits_for_what_in_every_phase(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    assert process.stdin and process.stdout and process.stderr
    killer = threading.Timer(150, process.kill)  # so that no read below can wait for ever
    killer.start()
    said: dict[str, str] = {}
    try:
        for phase in ("sampling", "blocked", "training"):
            assert process.stdout.readline().strip() == phase
            process.send_signal(signal.SIGUSR1)
            lines = [process.stderr.readline()]
            while lines[-1] and "open tasks" not in lines[-1]:
                lines.append(process.stderr.readline())
            said[phase] = "".join(lines)
            process.stdin.write("go on\n")
            process.stdin.flush()
        assert process.stdout.readline().strip() == "over", "it was not disturbed"
        assert process.wait(30) == 0
    finally:
        killer.cancel()
        process.kill()
        process.communicate()
    for phase in ("sampling", "blocked"):
        assert re.search(r"4 wait for tool search +longest .* s, e\.g\. trace_\w{32} \(x-1\)", said[phase])
        assert "4 in flight, 0 finished" in said[phase] and "2 wait for slot" in said[phase]
        assert "MiB in this process" in said[phase]
    assert "step 1: training (the trainer computes, nothing is sampled)" in said["training"]
    assert "nobody waits" in said["training"]
    events = [event for event in RunStore.open(tmp_path / "run").events() if "SIGUSR1" in event["message"]]
    assert [event["data"]["is_active"] for event in events] == [True, True, False]
    assert [Live.model_validate(event["data"]).num_in_flight for event in events] == [4, 4, 0]


@pytest.mark.slow
def test_a_whole_run_answers_and_goes_on(tmp_path: Path) -> None:
    """Signals all through a run of three steps: it ends as if there had been none."""
    run, is_over, num_sent = tmp_path / "runs" / "signalled", threading.Event(), 0

    def send() -> None:
        nonlocal num_sent
        while not is_over.wait(0.05):
            if (run / "live.json").exists() and not is_over.is_set():
                os.kill(os.getpid(), signal.SIGUSR1)
                num_sent += 1

    old = signal.signal(signal.SIGUSR1, lambda *_: None)
    thread = threading.Thread(target=send)
    thread.start()
    try:
        run_job(a_config(tmp_path), run_id="signalled")
    finally:
        is_over.set()
        thread.join(10)
        signal.signal(signal.SIGUSR1, old)
    store = RunStore.open(run)
    assert store.is_done
    events = [event["data"] for event in store.events() if "SIGUSR1" in event["message"]]
    assert 0 < len(events) <= num_sent
    assert all(json.dumps(event) and Live.model_validate(event) for event in events)
    assert not [thread for thread in threading.enumerate() if thread.name == "rft-lookout"]


class HangingServer(LoopbackServer):
    """Takes every request and never answers."""

    async def _respond(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()


@pytest.mark.slow
def test_a_whole_run_whose_grader_hangs_ends_with_the_cause(tmp_path: Path) -> None:
    rollout = {"max_tokens_per_turn": 12, "stall_limit_s": 3.0}
    with HangingServer() as server:
        grader = {"type": "endpoint", "name": "slow", "url": server.base_url}
        with pytest.raises(NoProgressError, match=r"step 0: evaluating validation: 3 rollouts(.|\n)*3 wait for grader"):
            run_job(a_config(tmp_path, grader=grader, rollout=rollout), run_id="stuck")
    store = RunStore.open(tmp_path / "runs" / "stuck")
    state = store.read_state()
    assert state["status"] == "failed" and "3 wait for grader" in state["error"]
    assert store.writer() is None
    assert not [thread.name for thread in threading.enumerate() if thread.name == "rft-lookout"]


def test_the_default_limit_is_longer_than_any_wait_that_is_allowed(tmp_path: Path) -> None:
    assert a_config(tmp_path).stall_limit_s == 3600 + 600
    endpoint = {"type": "endpoint", "url": "http://127.0.0.1:1/", "name": "e", "timeout_s": 3000.0}
    tree: dict[str, Any] = {"grader": endpoint, "rollout": {"time_limit_s": 9000, "max_tokens_per_turn": 12}}
    assert a_config(tmp_path, **tree).stall_limit_s >= 9000 + 4 * 3000
    tree["rollout"]["stall_limit_s"] = 5
    assert a_config(tmp_path, **tree).stall_limit_s == 5


def test_each_engine_of_several_is_told(store: RunStore) -> None:
    workshop = a_workshop(say("I21.9"))
    pool = EnginePool([workshop.engine, *(ScriptedEngine(workshop.chat, say("I21.9")) for _ in range(7))])  # type: ignore[list-item]
    for member in pool.health[1:]:
        member.state, member.failure = Health.DOWN, EngineError("the server\x1b[31m died")
    with a_watchdog(store) as watchdog:
        watchdog.attach(pool, None, FOREVER_S)
        live = watchdog.live(is_active=True)
    assert [engine.state for engine in live.engines] == ["serving"] + ["down"] * 7
    lines = [line for line in live_lines(Live.model_validate_json(live.model_dump_json())) if "engine" in line]
    assert lines[0] == "  engines: down 7, serving 1; our requests on one: 0 to 0"
    assert len(lines) == 6 and lines[1].startswith("  engine 1 is down for ") and "\x1b" not in lines[1]
    assert "  and 2 more" in live_lines(live)
