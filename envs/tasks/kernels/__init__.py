"""Kernels: write or repair a function in C, or in Mojo, correct first, then fast.

`Kernel` is a class for `environment: {type: functions}`: its methods `compile` and `run` are the tools of one rollout,
and the rollout's row says which kernel it is about. Whatever the model wrote is compiled and executed in the sandbox
alone, behind the seccomp filter of programs/runner.py; the row's reference and hidden shapes are never shown. A row's
`language` is c or one of languages/.
The dataset is written by scripts/prepare_kernels.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from rft.envs.tasks import ArgumentError
from rft.errors import ToolError
from rft.sandbox import CodeError, Sandbox, SandboxError

TEXTS = ("programs/runner.py", "programs/judge.py", "programs/compiling.py", "languages/mojo.py", "grader.py")
"""What a grader's `source` joins, in this order, as configs/kernels.yaml does."""

GRADER_SOURCE = "\n".join((Path(__file__).parent / name).read_text(encoding="utf-8") for name in TEXTS)
_MAX_CHARS = 240  # of what a compiler says; the first line is what helps
_CALL_S = 90.0  # a little more than all that the grader's limits permit
_CURE = "Linux with namespaces and seccomp; a C compiler: apt-get install gcc libc6-dev; for Mojo also mojo-compiler"
_num_users = 0
_pool: Sandbox | None = None


class Kernel:
    """The tools of one rollout. All rollouts share warm workers, which end with the last of them."""

    def __init__(self, item: dict[str, Any]) -> None:
        self._item, self._has_pool = item, False

    async def compile(self, code: str) -> str:
        """Compile C code."""
        found = await self._try_out(code, is_run=False)
        return f"does not compile: {_short(found['compiler'])}" if found["compiler"] else "compiles"

    async def run(self, code: str) -> str:
        """Compile and test C code."""
        found = await self._try_out(code, is_run=True)
        if found["compiler"]:
            return f"does not compile: {_short(found['compiler'])}"
        for problem, case in zip(found["problems"], self._item["visible"], strict=False):
            if problem:
                shape = ", ".join(f"{name} = {n}" for name, n in zip(self._item["ints"], case["ints"], strict=True))
                return f"wrong for {shape}: {problem}"
        if None in (found["kernel_ms"], found["naive_ms"]):
            return "wrong: takes too long, or is wrong for large sizes"
        return f"correct; {found['kernel_ms']:.2f} ms, naive {found['naive_ms']:.2f} ms"

    async def aclose(self) -> None:
        """Let go of the workers."""
        global _num_users, _pool
        if not self._has_pool:
            return
        self._has_pool = False
        _num_users -= 1
        if _num_users == 0 and _pool is not None:
            pool, _pool = _pool, None
            await pool.close()

    async def _try_out(self, code: str, is_run: bool) -> dict[str, Any]:
        """What grader.py's `try_out` finds.

        Raises ArgumentError when code met a limit of the sandbox, ToolError when the sandbox failed or lacks something.
        """
        try:
            found = await self._sandbox().call(self._item, code, is_run)
        except CodeError as error:
            said = error.detail.strip().splitlines()[-1]
            if said.startswith(("MemoryError", "TimeoutError")):
                raise ArgumentError(f"the code was ended: {said}") from None
            raise ToolError(f"kernels: {error.detail.strip()}", cure=_CURE) from None
        except SandboxError as error:
            raise ToolError(f"kernels: {error}") from None
        assert isinstance(found, dict)
        return found

    def _sandbox(self) -> Sandbox:
        global _num_users, _pool
        if not self._has_pool:
            self._has_pool = True
            _num_users += 1
        if _pool is None:
            _pool = Sandbox(GRADER_SOURCE, function="try_out", num_workers=os.cpu_count() or 1, wall_s=_CALL_S)
        return _pool


def _short(said: str) -> str:
    """The first error alone, without the name of the file."""
    lines = [line for line in said.splitlines() if "error" in line] or [said]
    return re.sub(r"^kernel\.\w+:", "", lines[0])[:_MAX_CHARS]
