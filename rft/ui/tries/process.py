"""One try: a child process that gets a request, may ask judges through us, and answers; gone at its deadline.

Guarantees: nothing of the child outlives the call or us; the child gets no keys and no other environment values; it
can make us hold at most MAX_LINE_BYTES. The lines between the two are JSON objects, one each.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
import sys
from asyncio.subprocess import PIPE, Process
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rft.engines.launch import make_scratch
from rft.errors import GraderError, WorldError
from rft.graders.judge import Judges, SamplingParams
from rft.supervise import supervised
from rft.ui.tries.relay import MAX_LINE_BYTES

logger = logging.getLogger("rft.ui")
_GRACE_S = 0.5  # between SIGTERM and SIGKILL
_CLOSE_S = 4.0
_KEPT = ("HF_HUB_OFFLINE", "LD_LIBRARY_PATH", "OPENBLAS_CORETYPE", "PATH", "VIRTUAL_ENV")
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


class TryError(WorldError):
    """The try has no result: it took too long, or its process died."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A judgement that the child asks us for."""

    id: int
    judge: str
    messages: list[dict[str, Any]]
    schema: dict[str, Any]
    params: dict[str, Any]


async def run_apart(
    story: str, request: dict[str, Any], *, deadline_s: float, judges: Judges | None = None
) -> dict[str, Any]:
    """What the story answers. Raises TryError when it does not within `deadline_s`."""
    scratch = make_scratch()
    try:
        process = await _start(story, scratch)
        try:
            async with asyncio.timeout(deadline_s):
                return await _converse(process, request, judges or Judges())
        except TimeoutError:
            raise TryError(f"there was no result within {deadline_s:g} s, and the try was ended") from None
        except (OSError, ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            raise TryError("the process of the try ended without a result; the server's log may say why") from None
        finally:
            await asyncio.shield(_end(process))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


async def _start(story: str, scratch: Path) -> Process:
    """With our own import path, and not that of the working directory (`-P`)."""
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    places = {"HOME": str(scratch), "TMPDIR": str(scratch), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return await asyncio.create_subprocess_exec(
        *supervised([sys.executable, "-P", "-m", "rft.ui.tries", story], scratch, "parent", _GRACE_S),
        stdin=PIPE,
        stdout=PIPE,
        env={"LANG": "C.UTF-8", **_ONE_THREAD, **kept, **places},
        start_new_session=True,  # a Ctrl-C in the terminal is ours to handle
        limit=MAX_LINE_BYTES,
    )


async def _converse(process: Process, request: dict[str, Any], judges: Judges) -> dict[str, Any]:
    """Send the request, answer what is asked, return what is answered."""
    assert process.stdin is not None and process.stdout is not None
    await _send(process.stdin, request)
    asked: set[asyncio.Task[None]] = set()
    try:
        while True:
            line = json.loads(await process.stdout.readuntil(b"\n"))
            if "answer" in line:
                answer: dict[str, Any] = line["answer"]
                return answer
            asked.add(asyncio.create_task(_judge(process.stdin, Ask(**line["ask"]), judges)))
    finally:
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)


async def _judge(stdin: asyncio.StreamWriter, ask: Ask, judges: Judges) -> None:
    """One judgement, and the child's answer."""
    try:
        verdict = await judges[ask.judge].ask(ask.messages, ask.schema, SamplingParams.model_validate(ask.params))
    except GraderError as error:
        reply: dict[str, Any] = {"problem": error.problem, "flag": error.flag, "cure": error.cure}
    except Exception:  # a bug: the child must not wait for an answer that never comes
        logger.exception("the judge of a try could not be asked")
        reply = {"problem": "the server had an error while it asked the judge", "flag": "other_error", "cure": ""}
    else:
        reply = {"answer": verdict.answer, "usage": verdict.usage.model_dump(), "errors": verdict.errors}
    with contextlib.suppress(ConnectionError):  # the child has ended: nobody waits for the answer
        await _send(stdin, {"id": ask.id, **reply})


async def _send(stdin: asyncio.StreamWriter, value: dict[str, Any]) -> None:
    stdin.write(json.dumps(value).encode() + b"\n")
    await stdin.drain()


async def _end(process: Process) -> None:
    """End the child and all it started."""
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        async with asyncio.timeout(2 * _GRACE_S + _CLOSE_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
