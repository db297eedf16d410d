"""Trainer, engine and tools on hosts of their own: links that are slow, lossy, cut and mended in the middle of a run.

Each host is a network namespace (network.py), each part a process that speaks HTTP. Whatever the links do, the run
goes on or ends with the cause, and no rollout is counted twice.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import network
import pytest
import yaml
from broken_runs import tool_model, tool_tree
from network import Network, Process, until

from rft import checkpoints
from rft.store import RunStore
from rft.types import Rollout, StopReason

TESTS = Path(__file__).parent
PORT = 8000  # every host has all ports to itself
STEPS, ITEMS, SIZE = 3, 2, 4
LEAST_GRADE = 0.25
DEADLINE_S = 600.0
GRADER = f"import os\ndef grade(sample, item):\n    return {LEAST_GRADE} + os.urandom(1)[0] / 512\n"

Call: TypeAlias = tuple[str, str]
"""A rollout's id and the call's."""

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(network.why_not()), reason=network.why_not())]


@dataclass(frozen=True, slots=True)
class Hosts:
    """Three hosts, an engine and a tool server that run, and a model that calls its tool once and then answers."""

    network: Network
    folder: Path
    model: Path
    engine: Process
    tools: Process

    @property
    def engine_url(self) -> str:
        return f"http://{self.network['engine'].address}:{PORT}"

    @property
    def tools_url(self) -> str:
        return f"http://{self.network['tools'].address}:{PORT}"

    def heard(self, name: str) -> list[dict[str, Any]]:
        """What came in at the engine or the tool server, whole lines."""
        return lines_of(self.log(name))

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.jsonl"

    def calls(self) -> set[Call]:
        """That the tools have heard."""
        return {(line["trace_id"], line["call_id"]) for line in self.heard("tools")}

    def num_asked(self, what: str) -> int:
        return sum(line.get("asked") == what for line in self.heard("engine"))

    def engine_command(self, port: int, log: Path) -> list[str]:
        """What starts an engine at that port of the engine's host."""
        place = [self.network["engine"].address, str(port), str(log)]
        return [sys.executable, str(TESTS / "engine_host.py"), str(self.model), *place]


def lines_of(log: Path) -> list[dict[str, Any]]:
    """The whole lines that another process has written so far."""
    whole = log.read_text().rpartition("\n")[0] if log.exists() else ""
    return [json.loads(line) for line in whole.splitlines()]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    folder = tmp_path_factory.mktemp("hosts")
    model = tool_model(folder / "model")
    with contextlib.ExitStack() as stack:
        found = stack.enter_context(network.network("trainer", "engine", "tools"))
        place = [found["engine"].address, str(PORT), str(folder / "engine.jsonl")]
        command = [sys.executable, str(TESTS / "engine_host.py"), str(model), *place]
        engine = stack.enter_context(found["engine"].running(folder / "engine.log", *command))
        place = [found["tools"].address, str(PORT), str(folder / "tools.jsonl")]
        command = [sys.executable, str(TESTS / "tool_host.py"), *place]
        tools = stack.enter_context(found["tools"].running(folder / "tools.log", *command))
        for host, process in (("engine", engine), ("tools", tools)):
            until(lambda host=host: listens(found, host), f"the {host}", process)
        yield Hosts(found, folder, model, engine, tools)


def listens(found: Network, host: str, port: int = PORT) -> bool:
    return f":{port} " in found[host].run("ss", "--listening", "--tcp", "--numeric")


@pytest.fixture(autouse=True)
def _fresh(hosts: Hosts) -> Iterator[None]:
    """All runs here have one name, and so the same rollouts: each is heard on its own."""
    for log in hosts.folder.glob("*.jsonl"):
        log.write_text("")
    yield
    for name in hosts.network.hosts:
        hosts.network.mend(name)
        hosts.network[name].link("up")


def write(hosts: Hosts, tmp_path: Path, steps: int = STEPS, **engine: Any) -> Path:
    """The config of a run of `steps` steps of `ITEMS` x `SIZE` rollouts on these hosts."""
    sections: dict[str, Any] = {
        "engine": {"type": "vllm", "url": hosts.engine_url, "max_model_len": 1024, "max_concurrent": 4} | engine,
        "grader": {"type": "python", "source": GRADER},
        "rollout": {"max_tokens_per_turn": 80, "temperature": 0.9},
        "training": {
            "steps": steps,
            "items_per_step": ITEMS,
            "base_rollouts": SIZE,
            "learning_rate": 1e-4,  # so that stale weights are seen
            "checkpoint_every": 1,
        },
    }
    tree = tool_tree(tmp_path, hosts.model, hosts.tools_url, **sections)
    tree["environment"]["tools"][0] |= {"timeout_s": 5.0}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "run.yaml"


@contextlib.contextmanager
def training(hosts: Hosts, config: Path, *options: str) -> Iterator[Process]:
    """`rft train` on the trainer's host."""
    command = [sys.executable, "-m", "rft", "train", str(config), "--run-id", "r", *options]
    with hosts.network["trainer"].running(config.parent / "train.log", *command) as process:
        yield process


def rollouts_of(run: Path) -> list[Rollout]:
    """Every line in the run folder, discarded ones too, in the order they ended."""
    found = []
    for path in sorted((run / "rollouts").glob("*.jsonl")):
        found += [Rollout.model_validate_json(line) for line in path.read_text().splitlines() if line.endswith("}")]
    return found


def steps_of(run: Path) -> list[int]:
    if not (run / "metrics.jsonl").exists():
        return []
    return [row["step"] for row in RunStore(run).metrics() if row["kind"] == "training"]


def said(run: Path, *words: str) -> list[str]:
    """The messages of the run that hold all of these words."""
    messages = [str(event["message"]) for event in RunStore(run).events()] if (run / "events.jsonl").exists() else []
    return [message for message in messages if all(word in message for word in words)]


def check_complete(hosts: Hosts, run: Path, steps: int = STEPS, lost: Set[Call] = frozenset()) -> None:
    """All steps are there, with their budget of rollouts; none is counted twice, and none pays for the network.

    lost: calls of a process that ended: it kept no rollout that was still sampled.
    """
    store = RunStore.open(run)
    assert store.read_state()["status"] == "succeeded"
    rows = [row for row in store.metrics() if row["kind"] == "training"]
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    found = rollouts_of(run)
    assert len({rollout.id for rollout in found}) == len(found), "a line for each rollout, and no second one"
    counted = [rollout for rollout in found if not rollout.stop_reason.is_discarded]
    assert Counter(rollout.step for rollout in counted) == dict.fromkeys(range(1, steps + 1), ITEMS * SIZE)
    assert Counter(Counter((r.step, r.item_id) for r in counted).values()) == {SIZE: steps * ITEMS}
    assert {rollout.stop_reason for rollout in counted} <= {StopReason.ANSWERED, StopReason.MAX_TOKENS}
    answered = [rollout for rollout in counted if rollout.stop_reason is StopReason.ANSWERED]
    assert all(r.grade is not None and r.grade.score >= LEAST_GRADE for r in answered) and len(answered) > len(rows)
    assert all(rollout.grade is None for rollout in found if rollout.stop_reason.is_discarded)
    check_calls(hosts, found, counted, lost)
    for row in rows:
        assert row["logprob_gap/mean"] < 1e-4 and row["probe/mean"] < 1e-4, "sampled from the weights that it says"
    assert all({turn.policy_version for turn in rollout.turns} == {rollout.step - 1} for rollout in counted)


def check_calls(hosts: Hosts, found: list[Rollout], counted: list[Rollout], lost: Set[Call]) -> None:
    """The tool server's own log: it was asked what the run folder says, and a call again only as the same call."""
    heard = hosts.calls()
    made = {(r.id, call.call_id) for r in found for turn in r.turns for call in turn.message.tool_calls}
    ids = {rollout.id for rollout in found}
    assert {call for call in heard - lost if call[0] in ids} <= made, "no call that the run does not know of"
    answered = {
        (rollout.id, result.call_id)
        for rollout in counted
        for turn in rollout.turns
        for result in turn.results
        if not result.is_error
    }
    assert answered <= heard and len(answered) > len(counted) / 2


@contextlib.contextmanager
def held(log: Path, what: str) -> Iterator[None]:
    """While it lasts, the host that writes this log answers no request of that kind."""
    mark = log.with_name(f"{log.name}.{what}")
    mark.touch()
    try:
        yield
    finally:
        mark.unlink()


# --- what links do ---


def test_a_run_goes_on_whatever_its_links_do(hosts: Hosts, tmp_path: Path) -> None:
    """One story: a clean step, a slow and lossy one, then three cuts, each in the middle of something."""
    run, steps, lost = tmp_path / "runs" / "r", 7, hosts.network.num_lost()
    with training(hosts, write(hosts, tmp_path, steps)) as trainer:
        until(lambda: 1 in steps_of(run), "a clean step", trainer)
        assert hosts.network.num_lost() == lost and not said(run, "is down")

        hosts.network.worsen("engine", delay_s=0.2, loss=0.05)
        until(lambda: 2 in steps_of(run), "a slow and lossy step", trainer)
        hosts.network.mend("engine")
        assert hosts.network.num_lost() > lost and not said(run, "is down")

        before, log = hosts.num_asked("completion"), hosts.log("engine")
        with held(log, "completion"):
            until(lambda: hosts.num_asked("completion") > before + 1, "completions under way", trainer)
            hosts.network.cut("engine")
        time.sleep(3.0)  # the fault itself: shorter than either side keeps a silent connection
        hosts.network.mend("engine")
        before = len(steps_of(run))
        until(lambda: len(steps_of(run)) > before, "a step after a short cut", trainer)

        before = len(hosts.heard("tools"))
        with held(hosts.log("tools"), "call"):
            until(lambda: len(hosts.heard("tools")) > before + 1, "calls under way", trainer)
            hosts.network.cut("tools")
        until(lambda: said(run, hosts.tools_url, "is down"), "the run notices that the tools are gone", trainer)
        hosts.network.mend("tools")
        until(lambda: said(run, hosts.tools_url, "is back"), "the run notices that the tools are back", trainer)

        before, outages = hosts.num_asked("load"), len(said(run, "the engine", "is down"))
        with held(log, "load"):
            until(lambda: hosts.num_asked("load") > before, "weights under way", trainer)
            hosts.network.cut("engine")
            done = steps_of(run)
        until(lambda: len(said(run, "the engine", "is down")) > outages, "the run notices a lost answer", trainer)
        assert steps_of(run) == done, "no step is told before its weights have arrived"
        hosts.network.mend("engine")
        assert trainer.wait(DEADLINE_S) == 0, trainer.words
    check_complete(hosts, run, steps)
    loaded = Counter(line["loaded"] for line in hosts.heard("engine") if "loaded" in line)
    assert loaded[f"v{len(done) + 1:06d}"] >= 2, "they are loaded again: nobody knew that they had arrived"


def test_an_engine_that_is_started_anew_gets_its_weights_again(hosts: Hosts, tmp_path: Path) -> None:
    """Killed in the middle of a step and started again, with the weights that it had at first."""
    run, log = tmp_path / "runs" / "r", tmp_path / "second.jsonl"
    second = hosts.engine_command(PORT + 1, log)
    config = write(hosts, tmp_path, url=f"http://{hosts.network['engine'].address}:{PORT + 1}")
    with contextlib.ExitStack() as stack:
        engine = stack.enter_context(hosts.network["engine"].running(tmp_path / "engine.log", *second))
        until(lambda: listens(hosts.network, "engine", PORT + 1), "the engine", engine)
        trainer = stack.enter_context(training(hosts, config))
        until(lambda: 1 in steps_of(run), "the first step", trainer, engine)
        before = len(lines_of(log))
        with held(log, "completion"):
            until(lambda: len(lines_of(log)) > before + 1, "a step samples", trainer, engine)
            engine.end()
        until(lambda: said(run, "the engine", "is down"), "the run notices", trainer)
        stack.enter_context(hosts.network["engine"].running(tmp_path / "engine.log", *second))
        assert trainer.wait(DEADLINE_S) == 0, trainer.words
    assert said(run, "the engine", "is back")
    check_complete(hosts, run)
    loaded = Counter(line["loaded"] for line in lines_of(log) if "loaded" in line)
    assert sorted(loaded) == [f"v{version:06d}" for version in range(STEPS + 1)]
    assert loaded.total() == STEPS + 2, "one version a second time, by the engine that was started anew"


def test_an_engine_that_stays_away_ends_the_run_which_goes_on_with_resume(hosts: Hosts, tmp_path: Path) -> None:
    run, config = tmp_path / "runs" / "r", write(hosts, tmp_path, outage_limit_s=2.0)
    with training(hosts, config) as trainer:
        until(lambda: 1 in steps_of(run), "the first step", trainer)
        before = hosts.num_asked("completion")
        with held(hosts.log("engine"), "completion"):
            until(lambda: hosts.num_asked("completion") > before + 1, "a step samples", trainer)
            hosts.network.cut("engine")
            done = steps_of(run)
        assert trainer.wait(DEADLINE_S) == 1, trainer.words
        words = trainer.words
    assert f"the engine {hosts.engine_url} was down for 2 s: " in words, words
    assert "cure: start it, then continue with --resume; or raise engine.outage_limit_s" in words
    assert RunStore(run).read_state()["status"] == "failed" and steps_of(run) == done
    latest = checkpoints.latest(run / "checkpoints")
    assert latest is not None and latest.name == f"step_{len(done):06d}"
    checkpoints.verify(latest)
    hosts.network.mend("engine")
    lost = hosts.calls()
    with training(hosts, config, "--resume") as trainer:
        assert trainer.wait(DEADLINE_S) == 0, trainer.words
    check_complete(hosts, run, lost=lost)


# --- what only seems to be shared ---


def test_an_engine_that_does_not_see_the_run_folder_is_named_before_anything_is_sampled(
    hosts: Hosts, tmp_path: Path
) -> None:
    port, log, runs = PORT + 2, tmp_path / "third.jsonl", tmp_path / "runs"
    runs.mkdir()
    url = f"http://{hosts.network['engine'].address}:{port}"
    config, command = write(hosts, tmp_path, url=url), hosts.engine_command(port, log)
    with hosts.network["engine"].running(tmp_path / "engine.log", *command, hidden=runs) as engine:
        until(lambda: listens(hosts.network, "engine", port), "the engine", engine)
        with training(hosts, config) as trainer:
            assert trainer.wait(DEADLINE_S) == 1
            assert f"the weights did not arrive: {url}" in trainer.words
            assert f"cure: {runs}/r/weights must be there on the server's machine too" in trainer.words, trainer.words
    assert not any(line.get("asked") == "completion" for line in lines_of(log)) and not rollouts_of(runs / "r")
