"""What happens to a step when one tool call, a tool server or an engine fails: each fault on real sockets, as a table.

`python tests/faults.py` prints the table of CONTRIBUTING.md; tests/test_faults.py holds the table to it.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from fakes import FaultyToolServer
from scripted_engine import ScriptedEngine
from test_collect import a_collector
from test_rollout import CALL, a_workshop, an_item, say

from rft.config import RolloutConfig
from rft.engines.pool import EnginePool
from rft.envs.http import HttpEnvironment, HttpEnvironmentConfig
from rft.errors import EngineError
from rft.types import Group, Rollout
from rft.wire import RetryPolicy

NUM_ITEMS, SIZE = 2, 4


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong. `behaviour` is how the server treats the first rollout that calls it."""

    name: str
    behaviour: str = "ok"
    tool: dict[str, Any] = field(default_factory=dict)  # further settings of the tool
    row: dict[str, Any] = field(default_factory=dict)
    restarts: bool = False
    num_engines: int = 0  # of several, the first dies in the middle of a turn


FAULTS = (
    Fault("none"),
    Fault("slow tool", "slow:0.5"),
    Fault("hanging tool", "hang", {"timeout_s": 0.3}),
    Fault("400", "400"),
    Fault("404", "404"),
    Fault("413 from the server", "413"),
    Fault("2 MB answer", "too_large"),
    Fault("2 MB request", row={"filler": "x" * 2_000_000}),
    Fault("500 once", "500_once"),
    Fault("500 always", "500"),
    Fault("connection lost after the tool ran, once (delivered twice)", "drop_once"),
    Fault("socket half closed, always", "half_closed"),
    Fault("invalid JSON", "invalid_json"),
    Fault("answer to another call", "wrong_call_id"),
    Fault("redirect", "redirect"),
    Fault("tool server killed in the call and restarted", "hang", restarts=True),
    Fault("one of two engines killed in a turn", num_engines=2),
    Fault("the only engine killed in a turn", num_engines=1),
)


@dataclass(slots=True)
class Seen:
    """What happened to a step of 2 items x 4 rollouts."""

    model_saw: str
    num_deliveries: int  # of the call that the fault hit
    num_discarded: int
    num_graded: int
    ending: str
    seconds: float
    rollouts: list[Rollout]
    leaks: list[str]

    @property
    def columns(self) -> list[str]:
        """The row of the table, without the time."""
        times = {0: "no", 1: "no", 2: "once, same call_id"}
        retried = times.get(self.num_deliveries, f"{self.num_deliveries - 1} times, same call_id")
        discarded = f"{self.num_discarded}, replaced" if self.num_discarded else "no"
        return [self.model_saw, retried, discarded, self.ending]


class VictimServer(FaultyToolServer):
    """Misbehaves for the first rollout that calls it, and serves all others."""

    victim = ""

    def __init__(self, behaviours: dict[str, str]) -> None:
        super().__init__(behaviours)
        self.is_called = threading.Event()

    async def _respond(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        self.victim = self.victim or body["trace_id"]
        self.is_called.set()
        if body["trace_id"] == self.victim:
            await super()._respond(body, writer)
        else:
            await self._behave("ok", False, body, writer)


class DyingEngine(ScriptedEngine):
    """Dies at its third request: that one and all later ones fail for good."""

    async def generate(self, *arguments: Any) -> Any:
        completion = await super().generate(*arguments)
        if len(self.requests) >= 3:
            raise EngineError("the vLLM server died", cure="continue with --resume")
        return completion


def observe(fault: Fault) -> Seen:
    """Sample one step under the fault, and look what is left afterwards."""
    return asyncio.run(_observe(fault))


async def _observe(fault: Fault) -> Seen:
    before = asyncio.all_tasks()
    server = VictimServer({"search": fault.behaviour})
    sockets = _sockets()
    with server:
        tool = {"name": "search", "server_url": server.base_url, "timeout_s": 5.0, **fault.tool}
        config = HttpEnvironmentConfig.model_validate({"tools": [tool]})
        environment = HttpEnvironment(config, retry=RetryPolicy(first_wait_s=0.05))
        environment.outages.on_change = lambda line: None
        shop = a_workshop(say(CALL, "I21.9"), environment=environment, limits=RolloutConfig(max_tokens_per_turn=400))
        shop = replace(shop, engine=_engine(fault, shop.engine)) if fault.num_engines else shop
        collector, seen = a_collector(shop)
        items = [an_item(id=f"x-{index}", row={"code": "I21", **fault.row}) for index in range(NUM_ITEMS)]
        groups, ending, started = [], "goes on", time.perf_counter()
        restarted = asyncio.create_task(_restart(server, environment)) if fault.restarts else None
        try:
            groups = await asyncio.wait_for(collector.collect(items, "train", 1, SIZE), 60)
        except EngineError as error:
            ending = f"ends: {error.problem}"
        seconds = time.perf_counter() - started
        servers = [server, *([await restarted] if restarted else [])]
        await environment.close()
        if isinstance(shop.engine, EnginePool):
            await shop.engine.close()
        for each in servers[1:]:
            each.__exit__()
    return _seen(servers, seen, groups, ending, seconds, await _leaks(before, sockets))


def _engine(fault: Fault, engine: ScriptedEngine) -> EnginePool | ScriptedEngine:
    engines: list[ScriptedEngine] = [DyingEngine(engine.chat, _by_prompt, first_token_s=0.01)]
    engines += [ScriptedEngine(engine.chat, _by_prompt, first_token_s=0.01) for _ in range(fault.num_engines - 1)]
    return EnginePool(engines) if len(engines) > 1 else engines[0]


def _by_prompt(prompt: str, rollout_id: str, turn: int) -> str:
    return "I21.9" if "</tool_call>" in prompt.rpartition("Heart attack")[2] else CALL


async def _restart(server: VictimServer, environment: HttpEnvironment) -> VictimServer:
    """End the server in the middle of its first call, and start another on its port when the run has noticed."""
    noticed = asyncio.Event()
    environment.outages.on_change = lambda line: noticed.set()
    await asyncio.to_thread(server.is_called.wait, 20)
    await asyncio.to_thread(server.__exit__)
    async with asyncio.timeout(20):
        await noticed.wait()
    second = VictimServer({"search": "ok"})
    second.port = server.port
    await asyncio.to_thread(second.__enter__)
    return second


def _seen(
    servers: list[VictimServer],
    rollouts: list[Rollout],
    groups: list[Group],
    ending: str,
    seconds: float,
    leaks: list[str],
) -> Seen:
    requests = [request for server in servers for request in server.requests]
    victim = next((server.victim for server in servers if server.victim), "")
    calls = Counter(request["call_id"] for request in requests if request["trace_id"] == victim)
    hit = next((rollout for rollout in rollouts if rollout.id == victim), rollouts[0] if rollouts else None)
    outputs = [result.output for turn in hit.turns for result in turn.results] if hit else []
    return Seen(
        model_saw=_shortened(outputs[0]) if outputs else "nothing",
        num_deliveries=max(calls.values(), default=0),
        num_discarded=sum(group.num_discarded for group in groups),
        num_graded=sum(len(group.rollouts) for group in groups),
        ending=ending,
        seconds=seconds,
        rollouts=rollouts,
        leaks=leaks,
    )


def _shortened(text: str) -> str:
    return "the tool's answer" if text.startswith('{"query"') else f"`{text[:60]}`"


def _sockets() -> set[str]:
    """The sockets this process has open."""
    found: set[str] = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the listing's own
            continue
        if target.startswith("socket:"):
            found.add(target)
    return found


async def _leaks(tasks_before: set[Any], sockets_before: set[str]) -> list[str]:
    """Tasks and sockets that the step left behind."""
    await asyncio.sleep(0)  # transports close in the next round of the loop
    await asyncio.sleep(0)
    tasks = [str(task.get_coro()) for task in asyncio.all_tasks() - tasks_before]
    return [*tasks, *(_sockets() - sockets_before)]


def table(measure: Callable[[Fault], Seen] = observe) -> str:
    """The table as Markdown."""
    lines = ["| fault | the model sees | retried | discarded | the step | took |", "|---|---|---|---|---|---|"]
    for fault in FAULTS:
        seen = measure(fault)
        lines.append(f"| {fault.name} | {' | '.join(seen.columns)} | {seen.seconds:.1f} s |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
