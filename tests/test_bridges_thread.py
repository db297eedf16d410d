"""The thread for foreign code: deadlines hold, errors stay what they are, nothing keeps the process alive."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rft.envs.bridges.thread import ForeignThread
from rft.errors import ToolError

ROOT = Path(__file__).resolve().parent.parent


def raise_timeout() -> None:
    raise TimeoutError("its own")


async def which_loop() -> int:
    return id(asyncio.get_running_loop())


def test_functions_and_coroutines_run_in_one_thread_on_one_loop() -> None:
    async def body() -> None:
        thread = ForeignThread("test")
        try:
            idents = {await thread.run("x", threading.get_ident, 10) for _ in range(3)}
            loops = {await thread.run("x", which_loop, 10) for _ in range(3)}
            assert len(idents) == len(loops) == 1
            assert threading.get_ident() not in idents and id(asyncio.get_running_loop()) not in loops
        finally:
            thread.stop()

    asyncio.run(body())


def test_an_error_is_raised_as_it_is_and_a_missed_deadline_names_what() -> None:
    async def body() -> None:
        thread, released = ForeignThread("test"), threading.Event()
        with pytest.raises(TimeoutError, match="its own"):
            await thread.run("x", raise_timeout, 10)
        assert not thread.is_stuck
        with pytest.raises(ToolError, match=r"the wait: no answer within 0\.05 s"):
            await thread.run("the wait", lambda: released.wait(10), 0.05)
        assert thread.is_stuck
        closed = threading.Event()
        await thread.end("test", closed.set)  # does not wait for what is stuck
        assert not closed.is_set()
        released.set()
        assert await asyncio.to_thread(closed.wait, 10)

    asyncio.run(body())


def test_a_close_that_fails_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    asyncio.run(ForeignThread("test").end("the world", raise_timeout))
    assert "the world did not close: TimeoutError" in caplog.text and "its own" not in caplog.text


def test_a_thread_that_hangs_does_not_keep_the_process() -> None:
    code = """
import asyncio, time
from rft.envs.bridges.thread import ForeignThread
from rft.errors import ToolError
async def main():
    try:
        await ForeignThread("x").run("x", lambda: time.sleep(600), 0.05)
    except ToolError:
        print("left")
asyncio.run(main())
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = time.monotonic()
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert result.stdout == "left\n" and time.monotonic() - started < 60
