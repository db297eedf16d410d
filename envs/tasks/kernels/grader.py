"""Grade of a kernel; what `source` of a python grader ends with, and that of the sandbox behind the tools.

0: no code, or it does not compile; 0.25 + 0.5 x the share of hidden shapes that are right; 1 when all are, and then
+ log2(speed-up over the naive version) / 4, at most 2. Follows the texts of programs/: three programs judge, of which
the kernel is the one that is not believed.
"""

import ctypes
import json
import math
import os
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or __name__ != "source":  # in the sandbox this is one text with it
    from rft.envs.tasks.kernels.programs.compiling import (
        FLAGS,
        compiled,
        execute,
        language_of,
        library_text,
        write_program,
    )

MAX_CODE_BYTES = 8_000
JUDGE_S = 40.0
FASTEST_LOG2 = 4.0  # a speed-up of 16 earns everything
NOISE_LOG2 = 0.5  # a smaller one may be the clock's noise and earns nothing


def build(item: dict[str, Any], code: str) -> str:
    """Make kernel.so; "" or what the compiler said. The folder holds nothing else: an #include finds no reference."""
    ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: nothing that the kernel starts may read this memory
    if len(code.encode("utf-8", errors="replace")) > MAX_CODE_BYTES:
        return f"the code is longer than {MAX_CODE_BYTES:,} bytes"
    return language_of(item).build(item, code)


def request(item: dict[str, Any], cases: list[dict[str, Any]], repeats: int) -> str:
    """What the judge reads: numbers, separated by blanks."""
    numbers: list[Any] = [len(item["pointers"]), len(item["floats"]), len(item["ints"])]
    for pointer in item["pointers"]:
        numbers += [int(pointer["is_int"]), int(pointer["is_out"]), pointer["low"], pointer["high"]]
    numbers += [len(cases), repeats]
    for case in (*cases, item["timed"]):
        numbers += [case["seed"], case["scale"], *case["sizes"], *case["floats"], *case["ints"]]
    return " ".join(map(str, numbers))


def judge(item: dict[str, Any], cases: list[dict[str, Any]], repeats: int) -> dict[str, Any]:
    """Of the kernel.so that was built: {problems: per case, "" when right, kernel_ms, naive_ms: the best, or None}."""
    flags = FLAGS + language_of(item).naive_flags
    problem = compiled(flags, library_text(item, item["reference"]), "reference.so")
    if problem:
        raise RuntimeError(f"the reference of {item['kernel']} does not compile: {problem[:1000]}")
    libraries = [os.path.abspath(name) for name in ("kernel.so", "reference.so")]
    command = [write_program("judge"), write_program("runner"), *libraries]
    status, output, _ = execute(command, request(item, cases, repeats), JUDGE_S)
    lines = [json.loads(line) for line in output.splitlines()]
    if status != 0:
        raise RuntimeError(f"the judge failed ({status})")
    problems = [line["problem"] for line in lines if line["kind"] == "case"]
    problems += ["not tried"] * (len(cases) - len(problems))
    times = {line["kind"]: line["ns"] / 1e6 for line in lines if line["kind"] != "case" and not line["problem"]}
    return {"problems": problems, "kernel_ms": times.get("kernel"), "naive_ms": times.get("naive")}


def code_of(sample: dict[str, Any], item: dict[str, Any]) -> str:
    """The one kernel that counts: the answer's, else the last one that was given to a tool; "" for several blocks."""
    text = str(sample.get("output_text") or "")
    blocks = re.findall(r"```[A-Za-z+]*\n?(.*?)```", text, re.DOTALL)
    if blocks:
        return str(blocks[0]) if len(blocks) == 1 else ""
    if re.search(language_of(item).head.format(name=item["kernel"]), text, re.DOTALL):
        return text
    for call in reversed(sample.get("output_tools") or []):
        try:
            code = json.loads(call["function"]["arguments"])["code"]
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        if isinstance(code, str):
            return code
    return ""


def grade(sample: dict[str, Any], item: dict[str, Any]) -> float:
    code = code_of(sample, item)
    if not code.strip():
        return 0.0
    if build(item, code):
        return 0.0
    found = judge(item, item["hidden"], 5)
    gain = gain_of(found)
    if gain is None:
        pairs = zip(found["problems"], item["hidden"], strict=True)
        telling = [not problem for problem, case in pairs if not case["is_trivial"]]
        return 0.25 + 0.5 * sum(telling) / max(1, len(telling))
    if gain > NOISE_LOG2:  # on a busy machine even the best of five may be off: it has to be fast twice
        gain = min(gain, gain_of(judge(item, item["hidden"], 9)) or 0.0)
    return 1.0 + (min(1.0, gain / FASTEST_LOG2) if gain > NOISE_LOG2 else 0.0)


def gain_of(found: dict[str, Any]) -> float | None:
    """log2 of the speed-up of a kernel that is right everywhere, else None."""
    if any(found["problems"]) or None in (found["kernel_ms"], found["naive_ms"]):
        return None
    return math.log2(found["naive_ms"] / found["kernel_ms"])


def try_out(item: dict[str, Any], code: str, is_run: bool) -> dict[str, Any]:
    """What the tools show, {compiler: its errors, ...}: on the visible shapes, and with a quicker look at the clock."""
    problem = build(item, code)
    if problem or not is_run:
        return {"compiler": problem, "problems": [], "kernel_ms": None, "naive_ms": None}
    return {"compiler": "", **judge(item, item["visible"], 3)}
