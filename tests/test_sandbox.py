"""Accidents: however the code ends, every call ends, the next one works, and no worker is left."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from attacks import failure, in_sandbox, is_alive

from rft.sandbox import CodeError, Sandbox, SandboxError
from rft.sandbox.worker import POLL_S


def test_values_travel_both_ways() -> None:
    value = {"a": [1, 2.5, None, True, "ü\ud800 }}"], "b": {"c": []}}
    assert in_sandbox(lambda sandbox: sandbox.call("echo", value)) == value


def test_calls_see_nothing_of_each_other() -> None:
    async def story(sandbox: Sandbox) -> list[int]:
        return [await sandbox.call("count") for _ in range(3)]

    assert in_sandbox(story) == [1, 1, 1]


@pytest.mark.parametrize(
    ("attack", "kind", "text"),
    [
        (["allocate"], "exception", "MemoryError"),
        (["recurse"], "exception", "RecursionError"),
        (["overflow_c_stack"], "exit", "SIGSEGV"),
        (["leave", 3], "exit", "exit code 3"),
        (["leave", 0], "exit", "exit code 0"),
        (["leave_politely"], "exception", "SystemExit"),
        (["kill_itself", 15], "exit", "SIGTERM"),
        (["no_json"], "exception", "set has no JSON form"),
        (["large"], "exception", "larger than"),
        (["unknown"], "exception", "KeyError"),
        (["write_everywhere"], "exception", "larger than"),
        (["fill", 2**30], "exception", "File too large"),
    ],
)
def test_code_that_fails(attack: list[Any], kind: str, text: str) -> None:
    error = in_sandbox(lambda sandbox: failure(sandbox, *attack))
    assert (error.kind, text in error.detail) == (kind, True), error.detail


def test_traceback_is_short_and_shows_the_line() -> None:
    error = in_sandbox(lambda sandbox: failure(sandbox, "recurse"))
    assert "def recurse(): return recurse()" in error.detail
    assert "worker.py" not in error.detail
    assert len(error.detail) <= 2000


@pytest.mark.parametrize("attack", ["loop", "close_everything"])
def test_timeout_ends_the_call_and_keeps_the_worker(attack: str) -> None:
    async def story(sandbox: Sandbox) -> tuple[CodeError, float]:
        await sandbox.call("echo", 1)
        started = time.monotonic()
        return await failure(sandbox, attack), time.monotonic() - started

    error, duration_s = in_sandbox(story, wall_s=0.5)
    assert error.kind == "timeout"
    assert 0.5 <= duration_s < 3


@pytest.mark.parametrize("attack", [["kill_itself", 9], ["kill_everybody"]])
def test_a_kill_is_not_the_codes_failure(attack: list[Any]) -> None:
    async def story(sandbox: Sandbox) -> Any:
        with pytest.raises(SandboxError) as caught:
            await sandbox.call(*attack)
        assert caught.value.retryable
        return await sandbox.call("echo", 7)

    assert in_sandbox(story) == 7


def test_a_killed_worker_is_replaced() -> None:
    async def story(sandbox: Sandbox) -> Any:
        await sandbox.call("echo", 1)
        (worker,) = sandbox._live
        os.killpg(worker.process.pid, 9)
        with pytest.raises(SandboxError):
            await sandbox.call("echo", 2)
        return await sandbox.call("echo", 3)

    assert in_sandbox(story) == 3


def test_output_is_dropped() -> None:
    assert in_sandbox(lambda sandbox: sandbox.call("shout")) == 1


def test_imports_only_what_the_source_imports() -> None:
    assert in_sandbox(lambda sandbox: sandbox.call("loaded", "numpy")) is False


def test_numpy_scalars_are_numbers() -> None:
    source = "import numpy\ndef grade(x):\n    return [numpy.float32(x), numpy.int64(2), numpy.bool_(True)]"
    assert in_sandbox(lambda sandbox: sandbox.call(0.5), source) == [0.5, 2, True]


@pytest.mark.parametrize(
    ("source", "kind", "text"),
    [
        ("1 / 0", "exception", "ZeroDivisionError"),
        ("import no_such_package", "exception", "ModuleNotFoundError"),
        ("x = 1", "exception", "KeyError: 'grade'"),
        ("import os; os._exit(5)", "exit", "while it was loaded"),
        ("import sys; sys.exit(0)", "exception", "SystemExit"),
    ],
)
def test_source_that_does_not_load_fails_every_call(source: str, kind: str, text: str) -> None:
    async def story(sandbox: Sandbox) -> list[CodeError]:
        errors = []
        for _ in range(2):
            with pytest.raises(CodeError) as caught:
                await sandbox.call()
            errors.append(caught.value)
        return errors

    for error in in_sandbox(story, source):
        assert (error.kind, text in error.detail) == (kind, True), error.detail


def test_calls_run_in_parallel_up_to_the_number_of_workers() -> None:
    source = """if True:
        import time
        def grade():
            started = time.monotonic()
            time.sleep(0.2)
            return started, time.monotonic()
    """

    async def story(sandbox: Sandbox) -> list[list[float]]:
        return list(await asyncio.gather(*(sandbox.call() for _ in range(4))))

    spans = in_sandbox(story, source, num_workers=2)
    at_once = [sum(start <= moment < end for start, end in spans) for moment, _ in spans]
    assert max(at_once) == 2


def test_replies_between_two_looks_of_the_worker_are_not_lost() -> None:
    source = f"import time\ndef grade(delay_s):\n    time.sleep({POLL_S} + delay_s)\n    return 1"

    async def story(sandbox: Sandbox) -> list[int]:
        return list(await asyncio.gather(*(sandbox.call((number - 30) * 2e-5) for number in range(60))))

    assert in_sandbox(story, source, num_workers=8) == [1] * 60


def test_cancelling_a_call_frees_its_slot() -> None:
    async def story(sandbox: Sandbox) -> Any:
        await sandbox.call("echo", 1)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await sandbox.call("loop")
        return await sandbox.call("echo", 2)

    assert in_sandbox(story) == 2


def test_closing_ends_calls_in_flight() -> None:
    async def story(sandbox: Sandbox) -> None:
        await sandbox.call("echo", 1)
        call = asyncio.create_task(sandbox.call("loop"))
        await asyncio.sleep(0)
        await sandbox.close()
        with pytest.raises(SandboxError):
            await call
        with pytest.raises(SandboxError, match="closed"):
            await sandbox.call("echo", 1)

    in_sandbox(story)


def test_workers_die_with_rft(tmp_path: Path) -> None:
    program = textwrap.dedent("""
        import asyncio, os, sys
        from rft.sandbox import Sandbox
        async def main():
            sandbox = Sandbox("import os\\ndef grade(loop):\\n    while loop: pass\\n    return 1")
            await sandbox.call(False)
            print(*(worker.process.pid for worker in sandbox._live), flush=True)
            await sandbox.call(True)
        asyncio.run(main())
    """)
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    worker_pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait(10)
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while is_alive(worker_pid):
        assert time.monotonic() < deadline, "the worker outlived rft"
        time.sleep(0.01)  # the kernel delivers the signal in its own time


@pytest.mark.slow
def test_rate_of_small_calls() -> None:
    async def story(sandbox: Sandbox) -> float:
        await asyncio.gather(*(sandbox.call("echo", 1) for _ in range(2)))
        started = time.monotonic()
        await asyncio.gather(*(sandbox.call("echo", 1) for _ in range(600)))
        return 600 / (time.monotonic() - started)

    rate = in_sandbox(story, num_workers=2)
    assert rate > 60, f"{rate:.0f} calls a second: far below the 300 and more of an idle machine"
