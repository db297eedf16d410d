"""The worker: runs queued jobs, oldest first, each as a process of its own; pauses, resumes, cancels and restarts them.

Guarantees: what was asked of a job survives this server; a job that was running when a server died is queued again by
the next one and goes on after its last checkpoint; no process outlives the server. One event loop. What a run means to
the wire is follower.py's and conclusion.py's.
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial

from rft.errors import StorageError
from rft.server.jobs.store import ENDED
from rft.server.models import tuned_name
from rft.server.work import conclusion
from rft.server.work.endings import Ending, blackened
from rft.server.work.follower import Follower
from rft.server.work.process import CONFIG, JobProcess, wait_until_free
from rft.server.work.records import Ask, Parts
from rft.store import RunStore

logger = logging.getLogger("rft.server")

_POLL_S = 0.25
_DISK_RETRY_S = 5.0  # while the disk refuses what the server must write
_CLOSE_MARGIN_S = 30.0


class Worker:
    """Of one server. `start` it in the event loop that it lives in, `close` it there."""

    def __init__(self, parts: Parts) -> None:
        self._parts, self._config = parts, parts.config.worker
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._is_closing = False

    async def start(self) -> None:
        """Take up every job that an earlier server left, also those whose index was lost."""
        jobs = self._parts.jobs
        for job_id in jobs.adopt():
            await self._tell_again(job_id)
        for job in jobs.with_status("running"):
            jobs.update(job["id"], status="queued")
        for job in jobs.with_status("paused"):
            self._settle(job["id"])
        self.wake()

    def wake(self) -> None:
        """A job became queued, or a place became free."""
        if self._is_closing:
            return
        for job in self._parts.jobs.with_status("queued"):
            job_id = job["id"]
            if job_id in self._tasks or self._settle(job_id) or len(self._tasks) >= self._config.max_running:
                continue
            self._tasks[job_id] = asyncio.create_task(self._work(job_id), name=f"job {job_id}")
            self._tasks[job_id].add_done_callback(partial(self._leave, job_id))

    def ask(self, job_id: str, what: Ask) -> None:
        """Pause or cancel a job: at once when it does not run, else when its process has ended. Idempotent.

        Asking an ended job for anything, or a paused one for a pause, does nothing. Raises ApiError (404).
        """
        status, works = self._parts.jobs.get(job_id)["status"], self._parts.works
        if status in ENDED or (status == "paused" and what == "pause"):
            return
        if works.get(job_id).ask != "cancel":
            works.update(job_id, ask=what)
        if job_id not in self._tasks:
            self._settle(job_id)

    async def close(self) -> None:
        """Let every process end; the jobs stay to be continued by the next server."""
        self._is_closing = True
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=2 * self._config.stop_timeout_s + _CLOSE_MARGIN_S)
        for job in self._parts.jobs.with_status("running"):
            self._parts.jobs.update(job["id"], status="queued")

    def _leave(self, job_id: str, task: asyncio.Task[None]) -> None:
        del self._tasks[job_id]
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("job %s is left to the next start of the server: %s", job_id, error)
            return
        self.wake()

    def _settle(self, job_id: str) -> bool:
        """Do at once what was asked of a job that has no process; whether it may not run."""
        ask, status = self._parts.works.get(job_id).ask, self._parts.jobs.get(job_id)["status"]
        if ask == "cancel":
            conclusion.cancel(self._parts, job_id)
        elif ask == "pause" and status in ("queued", "running"):
            conclusion.pause(self._parts, job_id)
        is_queued: bool = self._parts.jobs.get(job_id)["status"] == "queued"
        return not is_queued

    async def _tell_again(self, job_id: str) -> None:
        """The events and names of a job whose index was lost."""
        parts = self._parts
        job = parts.jobs.get(job_id)
        await Follower(parts, job_id).look()
        if job["fine_tuned_model"] is not None:
            name, project = tuned_name(job, parts.config.organization), parts.jobs.project_of(job_id)
            parts.models.add_tuned(job, name, step=None, project=project)

    # --- one job ---

    async def _work(self, job_id: str) -> None:
        """Run a job to its end, its pause, or ours."""
        while True:
            try:
                return await self._run(job_id)
            except StorageError as error:  # nothing can be written, not even that: until somebody makes room
                logger.error("job %s waits for the disk: %s", job_id, error)
                await asyncio.sleep(_DISK_RETRY_S)
            except Exception:  # a bug in running one job must not end the others; this one says so
                logger.exception("job %s", job_id)
                message = "The server had an error while it ran this job; its log has more."
                return conclusion.fail(self._parts, job_id, {"code": "server_error", "message": message, "param": None})

    async def _run(self, job_id: str) -> None:
        while not self._is_settled(job_id):
            ending = await self._attempt(job_id)
            if ending.kind != "crashed" or not self._may_restart(job_id, ending):
                return await conclusion.conclude(self._parts, job_id, ending)

    def _is_settled(self, job_id: str) -> bool:
        """Do what was asked between two processes; whether nothing is left to run."""
        ask = self._parts.works.get(job_id).ask
        if ask == "cancel":
            conclusion.cancel(self._parts, job_id)
        elif ask == "pause":
            conclusion.pause(self._parts, job_id)
        return ask is not None

    def _may_restart(self, job_id: str, ending: Ending) -> bool:
        parts = self._parts
        work = parts.works.get(job_id)
        if work.ask is None and work.num_restarts >= self._config.max_restarts:
            return False
        if work.ask is None:
            number = work.num_restarts + 1
            why = blackened(ending.message, parts.jobs.folder(job_id) / CONFIG)
            text = f"The training process ended unexpectedly and is restarted ({number} of {self._config.max_restarts})"
            with parts.jobs.index.transaction():
                parts.works.update(job_id, num_restarts=number)
                parts.jobs.add_event(job_id, f"{text}: {why}", level="warn")
        return True

    async def _attempt(self, job_id: str) -> Ending:
        """One process, from its start to its end."""
        folder = self._parts.jobs.folder(job_id).resolve()
        if not (folder / CONFIG).is_file():
            message = f"The run folder of this job has no {CONFIG} any more: somebody deleted it."
            return Ending("failed", message, "run_folder_missing")
        await wait_until_free(folder, self._config)
        store = RunStore(folder)
        if store.is_done and store.read_state().get("status") == "succeeded":
            return Ending("succeeded")  # it ended while no server was there to see it
        store.withdraw_pause()
        method = self._parts.jobs.get(job_id)["method"] or {}
        follower, is_warmup = Follower(self._parts, job_id), method.get("type") == "supervised"
        async with JobProcess.started(folder, self._config, is_warmup=is_warmup) as process:
            ending = await self._watch(job_id, process, follower)
        if process.has_begun:
            follower.begin()
        await follower.look()
        return ending

    async def _watch(self, job_id: str, process: JobProcess, follower: Follower) -> Ending:
        """Follow a process to its end, or to where it has to be ended."""
        works, clock = self._parts.works, asyncio.get_running_loop()
        since, ran_s = clock.time(), works.get(job_id).ran_s
        try:
            while not await process.has_ended(_POLL_S):
                if process.has_begun:
                    follower.begin()
                if await follower.look():
                    works.update(job_id, ran_s=ran_s + clock.time() - since)
                if self._obey(job_id, ran_s + clock.time() - since) == "cancel":
                    return Ending("cancelled")
                if (silent_s := process.silent_s()) > self._config.heartbeat_timeout_s:
                    return Ending("crashed", f"there was no sign of life for {silent_s:.0f} s")
            return process.ending()
        finally:
            works.update(job_id, ran_s=ran_s + clock.time() - since)

    def _obey(self, job_id: str, ran_s: float) -> Ask | None:
        """What was asked of a running job, passed on to its process."""
        works, budget_s = self._parts.works, self._config.budget_s
        work = works.get(job_id)
        if work.ask is None and budget_s is not None and ran_s >= budget_s:
            work = works.update(job_id, ask="pause", why=f"it has run for its budget of {budget_s:g} s")
        if work.ask == "pause":
            store = RunStore(self._parts.jobs.folder(job_id))
            if not store.is_pause_asked:
                store.ask_to_pause()
        return work.ask
