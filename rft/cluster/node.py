"""What one node of a submitted run does, from its first word to its last: the callable that Slurm starts there.

Guarantees: all nodes are found to fit each other before anything is loaded; what this task started is gone when it
ends, also when its supervisor is killed; a run that is ended early is asked to save first and queued again where Slurm
does not do that itself. Signals: USR2 comes some time before the time limit, SIGTERM when Slurm takes the nodes back.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
import traceback
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rft.cluster import queue
from rft.cluster.allocation import Allocation
from rft.cluster.attempt import BEAT_S, NONCE, Announcement, Attempt
from rft.cluster.commands import ENDING, Kind, Rendezvous, launch_command, launch_env, run_command
from rft.cluster.machine import Place, check_equal, describe, missing
from rft.engines.launch import ServerProcess, launch, make_scratch
from rft.errors import ClusterError, EngineError, RftError, StorageError
from rft.files import read_json
from rft.store import RunStore

_CHECK_S = 30.0  # for all nodes to announce themselves
_LOST_S = 60.0  # without a sign of life
_POLL_S = 0.2
_GRACE_S = 5.0  # for the run to end after SIGTERM
_MARGIN_S = 4.0
_FAREWELL_S = 15.0  # for the processes of other nodes to end by themselves once node 0 has
_INTERRUPTED = 75  # EX_TEMPFAIL: the run can go on
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class NodeTask:
    """What travels to the nodes, pickled. run, cwd: absolute paths; nonce: what the run folder must hold."""

    run: str
    cwd: str
    nonce: str
    allocation: dict[str, Any]
    kind: Kind

    def __call__(self) -> None:
        """Ends the process with the exit code of this node's part."""
        if sys.platform == "linux":  # Slurm's own supervisor of this task was killed: end as if it had asked for it
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        sys.exit(asyncio.run(Node(self, _place()).live()))


def _place() -> Place:
    from submitit import JobEnvironment

    job = JobEnvironment()
    restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    return Place(job.global_rank, tuple(job.hostnames), job.raw_job_id, restart)


class Interrupted(Exception):
    """Slurm takes the nodes back, or a node is lost: the run goes on in another attempt."""


class Node:
    """One node in one attempt."""

    def __init__(self, task: NodeTask, place: Place) -> None:
        self.task, self.place = task, place
        self.run, self.allocation = Path(task.run), Allocation.model_validate(task.allocation)
        self.attempt = Attempt(self.run, place.job_id, place.restart)
        self._asked: signal.Signals | None = None  # which signal came first
        self._deadline = 0.0  # of saving, by the loop's clock

    async def live(self) -> int:
        """The exit code; what went wrong is printed and written into the attempt's folder."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
            loop.add_signal_handler(number, self._ask, number)
        loop.add_signal_handler(signal.SIGCONT, lambda: None)
        try:
            code, why = await self._work(), ""
        except Interrupted as error:
            code, why = _INTERRUPTED, str(error)
        except RftError as error:
            code, why = error.exit_code, str(error)
        except Exception:  # a bug in one node: the others must hear that it ended
            code, why = 1, traceback.format_exc()
        return self._end(code, why)

    def _ask(self, number: signal.Signals) -> None:
        if self._asked is None:
            print(f"{self.place.name}: {number.name}, saving", flush=True)
            kill_s = self.allocation.notice_s if number == signal.SIGUSR2 else queue.kill_wait_s()
            self._deadline = asyncio.get_running_loop().time() + max(0.0, kill_s - _GRACE_S - _MARGIN_S)
            self._asked = number

    async def _work(self) -> int:
        self._check_folder()
        with contextlib.chdir(self.task.cwd):
            beating = asyncio.create_task(self._beat())
            try:
                nodes = await self._meet()
                if self.allocation.is_engine(self.place.node):
                    return await self._sample(nodes[self.place.node])
                return await self._train(nodes[0])
            finally:
                beating.cancel()

    def _check_folder(self) -> None:
        """The folder is the one that `rft submit` wrote into, not another one of the same name."""
        try:
            nonce = (self.run / NONCE).read_text("ascii")
        except OSError:
            nonce = ""
        if nonce != self.task.nonce:
            cure = "set runs_dir to a folder of the shared file system"
            raise ClusterError(f"{self.run} is not shared between the login node and {self.place.name}", cure=cure)
        if not Path(self.task.cwd).is_dir():
            cure = "call rft submit in a folder of the shared file system"
            raise ClusterError(f"{self.task.cwd}, where the run was submitted, is not on {self.place.name}", cure=cure)
        self.attempt.open()

    async def _beat(self) -> None:
        while True:
            with contextlib.suppress(StorageError):  # the run meets the same disk, and says so
                self.attempt.beat(self.place.node)
            await asyncio.sleep(BEAT_S)

    # --- who is there ---

    async def _meet(self) -> list[Announcement]:
        """All nodes, which fit each other. Raises ClusterError within `_CHECK_S`."""
        self.attempt.announce(await asyncio.to_thread(describe, self.place, self.allocation))
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _CHECK_S
        while True:
            found = [self.attempt.announced(node) for node in range(self.allocation.nodes)]
            here = [one for one in found if one is not None]
            check_equal(here)
            if len(here) == len(found):
                return here
            self._raise_if_over()
            if loop.time() > deadline:
                raise missing(self.place, [node for node, one in enumerate(found) if one is None], _CHECK_S)
            await asyncio.sleep(_POLL_S)

    def _raise_if_over(self) -> None:
        """While nothing of ours has to be saved: another node has ended, or Slurm takes ours back."""
        if self._asked is not None:
            raise Interrupted(f"{self._asked.name} before the run began")
        for node in range(self.allocation.nodes):
            end = self.attempt.ended(node) if node != self.place.node else None
            if end is not None:
                raise ClusterError(f"{self.place.name_of(node)} ended with code {end.code}: {end.why}")

    def _raise_if_lost(self, nodes: range) -> None:
        """Where one of the nodes has not been heard of, and has not ended."""
        for node in nodes:
            is_other = node != self.place.node
            if is_other and self.attempt.silent_s(node) > _LOST_S and self.attempt.ended(node) is None:
                raise Interrupted(f"{self.place.name_of(node)} was lost")

    # --- nodes that train ---

    async def _train(self, master: Announcement) -> int:
        if self.place.node == 0:
            (self.run / ENDING).unlink(missing_ok=True)
        urls = await self._engine_urls()
        run = run_command(self.run, self.task.kind, urls)
        command = launch_command(self.allocation, self.place.node, Rendezvous(master.address, master.port), run)
        log = self.attempt.log(f"node-{self.place.node}")
        env = launch_env(self.allocation, self.run, self.place.node)
        process = await launch(command, env, make_scratch(), log, _GRACE_S)
        try:
            await self._follow(process)
        finally:
            await process.close()
        if self.place.node == 0 and process.exit_code and _told(self.run) in ("", EngineError.__name__):
            await self._wait_for_losses()
        return self._judged(process)

    async def _engine_urls(self) -> list[str]:
        """Where all servers answer. They have deadlines of their own; a node that ends without them ends us."""
        urls: list[str] = []
        for node in range(self.allocation.num_trainers, self.allocation.nodes):
            while (found := self.attempt.engines(node)) is None:
                self._raise_if_over()
                self._raise_if_lost(range(node, node + 1))
                await asyncio.sleep(_POLL_S)
            urls += found
        return urls

    async def _follow(self, process: ServerProcess) -> None:
        """Until the process has ended, or has to be ended."""
        has_asked, loop = False, asyncio.get_running_loop()
        while not await process.has_ended(_POLL_S):
            if self._asked is not None:
                if self.place.node == 0 and not has_asked:
                    RunStore(self.run).ask_to_pause()
                    has_asked = True
                if loop.time() > self._deadline:
                    return
            if self.place.node != 0 and self.attempt.ended(0) is not None:
                await process.has_ended(_FAREWELL_S)
                return
            self._raise_if_lost(range(self.allocation.num_trainers))

    async def _wait_for_losses(self) -> None:
        """A run that fails because another node is gone fails before that node counts as lost.

        Raises Interrupted once it does; returns when the others have ended by themselves, or live on.
        """
        others = range(1, self.allocation.num_trainers)
        if _told(self.run) == EngineError.__name__:
            others = range(self.allocation.num_trainers, self.allocation.nodes)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _LOST_S + 2 * BEAT_S
        while loop.time() < deadline and self._asked is None and not all(map(self.attempt.ended, others)):
            self._raise_if_lost(others)
            await asyncio.sleep(_POLL_S)

    def _judged(self, process: ServerProcess) -> int:
        """The exit code of the run; Interrupted where it was ended before its end."""
        state = RunStore(self.run).read_state()
        status = state.get("status")
        # servers may be ended by the same signal, a moment earlier
        has_spoken = status == "succeeded" or (status == "failed" and _told(self.run) != EngineError.__name__)
        if self._asked is not None and self.place.node == 0 and not has_spoken:
            raise Interrupted(f"{self._asked.name}: the run goes on after step {state.get('step', 0)}")
        return process.exit_code

    # --- nodes that sample ---

    async def _sample(self, me: Announcement) -> int:
        from rft.cluster.servers import all_served

        async with AsyncExitStack() as stack:
            servers = await all_served(self.attempt, me, self.allocation, self.run, stack, self._raise_if_over)
            while not any([await server.has_ended(_POLL_S) for server in servers]):
                if self.attempt.ended(0) is not None:
                    return 0
                self._raise_if_lost(range(1))
                if self._asked is not None and asyncio.get_running_loop().time() > self._deadline:
                    return 0
            return 0 if self.attempt.ended(0) is not None else _server_died(servers)

    # --- the end ---

    def _end(self, code: int, why: str) -> int:
        if why:
            print(f"{self.place.name}: {why}", file=sys.stderr, flush=True)
        if not self.attempt.path.is_dir():  # the run folder is not here: nobody can be told
            return code
        self.attempt.end(self.place.node, code, why)
        if self.place.node == 0 and code == _INTERRUPTED:
            self.attempt.end(0, code, f"{why}; {self._requeue()}")
        return code

    def _requeue(self) -> str:
        """Queue the job again, unless Slurm does that by itself or it was cancelled; what was done."""
        try:
            job = queue.ask(self.place.job_id)
            if job is None or job.state != "RUNNING":
                return "Slurm decides what follows"
            with contextlib.suppress(RftError), RunStore(self.run) as store:
                store.write_state({**store.read_state(), "status": "queued", "error": None})
            queue.requeue(self.place.job_id)
        except ClusterError as error:
            return f"not queued again: {error}\n  cure: rft submit {self.run}/job_config.yaml --resume"
        return "queued again"


def _told(run: Path) -> str:
    """The kind of error that the run ended with, "" where it named none."""
    return str(read_json(run / ENDING).get("kind")) if (run / ENDING).is_file() else ""


def _server_died(servers: list[ServerProcess]) -> int:
    from rft.engines.vllm_server import server_error

    dead = next(server for server in servers if not server.is_alive)
    raise server_error(dead, "a vLLM server ended")
