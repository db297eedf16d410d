"""Kernels in other languages: the same task behind the same filter. What compiles Mojo is slow, and needs Mojo."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from script_loading import load_script

from rft.config import load_config
from rft.data import load_items
from rft.envs.tasks import Tool
from rft.envs.tasks.kernels import GRADER_SOURCE, Kernel, _short
from rft.envs.tasks.kernels.catalog import kernels
from rft.envs.tasks.kernels.languages.mojo import MOJO_VERSION, mojo_caller, mojo_root, mojo_signature
from rft.envs.tasks.kernels.rows import split_of, write_row
from rft.sandbox import CodeError, Sandbox

ROOT = Path(__file__).resolve().parent.parent
BY_NAME = {kernel.name: kernel for kernel in kernels()}
CALL_S = 120.0
needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc")


def row_of(name: str) -> dict[str, Any]:
    return {**BY_NAME[name].keys(), "language": "mojo"}


def code_of(name: str, body: str, before: str = "") -> str:
    """A Mojo kernel; body: its lines, without the first indentation."""
    return f"{before}\n{mojo_signature(row_of(name))}:\n" + "".join(f"    {line}\n" for line in body.splitlines())


def script() -> ModuleType:
    return load_script("prepare_kernels")


def prepare(out: Path, language: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = script()
    monkeypatch.setattr("sys.argv", ["prepare_kernels", "--language", language, "--out", str(out)])
    module.main()


def with_compiler(folder: Path, version: str) -> str:
    """A folder of packages that looks as if Mojo was installed in it."""
    program = folder / "modular" / "bin" / "mojo"
    program.parent.mkdir(parents=True)
    program.touch(mode=0o755)
    (folder / f"mojo_compiler-{version}.dist-info").mkdir()
    return str(folder)


# --- prompts and rows -------------------------------------------------------------------------------------------------


def test_a_signature_says_what_is_written_and_what_is_read() -> None:
    assert mojo_signature(row_of("gather")) == (
        "def gather(y: Pointer[Float32, MutAnyOrigin], x: Pointer[Float32, ImmutAnyOrigin], "
        "k: Pointer[Int32, ImmutAnyOrigin], n: Int)"
    )
    assert mojo_signature(row_of("affine")).endswith("s: Float32, t: Float32, n: Int)")
    call = mojo_caller(row_of("affine")).splitlines()[-1].strip()
    pointers, floats = "p[unsafe_offset=0], p[unsafe_offset=1]", "f[unsafe_offset=0], f[unsafe_offset=1]"
    assert call == f"affine({pointers}, {floats}, Int(n[unsafe_offset=0]))"


@needs_gcc
def test_the_same_kernels_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """100 prompts without code, split as in C, alike in two runs; what tools and grader need is that of C."""
    monkeypatch.setattr("sys.path", [*sys.path, with_compiler(tmp_path / "site", MOJO_VERSION)])
    for out in ("one", "two"):
        prepare(tmp_path / out, "mojo", monkeypatch)
    seen = set()
    for split in ("train", "validation", "test"):
        path = tmp_path / "one" / f"{split}.jsonl"
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
        for item in load_items(path, None):
            row, kernel = item.row, BY_NAME[item.row["kernel"]]
            shown = json.dumps([row["messages"], row["tools"]])
            assert split_of(kernel.family) == split and row["language"] == "mojo"
            assert {key: row[key] for key in kernel.keys()} == kernel.keys()  # noqa: SIM118
            assert kernel.naive not in shown and kernel.signature not in shown and " C " not in shown
            assert mojo_signature(row) in row["messages"][-1]["content"]
            assert not re.search(r"for \(|[{};] *\}|=|return", row["messages"][-1]["content"])
            seen.add(kernel.name)
    assert seen == set(BY_NAME)


def test_rows_of_c_are_as_before() -> None:
    tools = [Tool(Kernel({}).run).spec()]
    row = write_row(BY_NAME["relu"], tools)
    assert "language" not in row and row["tools"] == tools
    assert row["messages"][0]["content"] == "Call run with the whole C function. When it is correct, say done."


# --- what is missing --------------------------------------------------------------------------------------------------


@needs_gcc
def test_a_missing_mojo_names_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [path for path in sys.path if not (Path(path) / "modular" / "bin").exists()])
    with pytest.raises(SystemExit, match=r"there is no Mojo compiler\n  cure: pip install mojo-compiler==1\.2\.0"):
        prepare(tmp_path / "out", "mojo", monkeypatch)
    monkeypatch.setattr("sys.path", [with_compiler(tmp_path / "site", "0.1"), *sys.path])
    with pytest.raises(SystemExit, match=r"is not version 1\.2\.0\n  cure: pip install mojo-compiler==1\.2\.0"):
        prepare(tmp_path / "out", "mojo", monkeypatch)
    with pytest.raises(SystemExit):
        prepare(tmp_path / "out", "cuda", monkeypatch)
    assert not (tmp_path / "out").exists()


@needs_gcc
def test_a_grader_without_mojo_says_so() -> None:
    """Not a grade of 0: a machine that cannot judge must not teach."""
    hidden = GRADER_SOURCE.replace('"modular")', '"nowhere")')
    sample = {"output_text": code_of("relu", "pass")}

    async def story() -> None:
        sandbox = Sandbox(hidden, num_workers=1, wall_s=CALL_S)
        try:
            with pytest.raises(CodeError, match=r"there is no Mojo compiler; pip install mojo-compiler==1\.2\.0"):
                await sandbox.call(sample, row_of("relu"))
            with pytest.raises(CodeError, match=r"this grader has no language cuda: join languages/cuda\.py"):
                await sandbox.call(sample, {**row_of("relu"), "language": "cuda"})
        finally:
            await sandbox.close()

    asyncio.run(story())


# --- the seam ---------------------------------------------------------------------------------------------------------


def test_tools_and_config_judge_alike() -> None:
    config = load_config(ROOT / "configs" / "kernels.yaml", None)
    assert json.loads(config.grader.model_dump_json())["graders"]["kernel"]["source"] == GRADER_SOURCE


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (code_of("relu", "pass"), code_of("relu", "pass")),
        ("```mojo\ndef relu():\n    pass\n```", "def relu():\n    pass\n"),
        ("I have no relu(x) { }", "tried"),
        ("done", "tried"),
    ],
)
def test_one_code_counts(answer: str, expected: str) -> None:
    module: dict[str, Any] = {"__name__": "looked at"}
    exec(GRADER_SOURCE, module)
    call = {"function": {"name": "run", "arguments": json.dumps({"code": "tried"})}}
    assert module["code_of"]({"output_text": answer, "output_tools": [call]}, row_of("relu")) == expected


def test_a_tool_says_the_first_error_without_its_file() -> None:
    said = "Imported from caller.mojo:2:\nkernel.mojo:1:10: error: expected argument name\ndef relu(\n"
    assert _short(said) == "1:10: error: expected argument name"


# --- in the sandbox ---------------------------------------------------------------------------------------------------


class Bench:
    """A warm sandbox: what the tools and the grader find, of Mojo code."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner()
        source = GRADER_SOURCE.replace("MOJO_BUILD_S = 30.0", "MOJO_BUILD_S = 12.0")
        self._tools = Sandbox(source, function="try_out", num_workers=1, wall_s=CALL_S)
        self._grader = Sandbox(source, num_workers=1, wall_s=CALL_S)

    def try_out(self, name: str, code: str, is_run: bool = True, **keys: Any) -> dict[str, Any]:
        found = self._runner.run(self._tools.call({**row_of(name), **keys}, code, is_run))
        assert isinstance(found, dict)
        return found

    def grade(self, name: str, code: str) -> float:
        value = self._runner.run(self._grader.call({"output_text": f"```mojo\n{code}\n```"}, row_of(name)))
        assert isinstance(value, float)
        return value

    def close(self) -> None:
        self._runner.run(self._tools.close())
        self._runner.run(self._grader.close())
        self._runner.close()


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    try:
        mojo_root()
    except RuntimeError as error:
        pytest.skip(str(error))
    if shutil.which("gcc") is None:
        pytest.skip("there is no gcc")
    bench = Bench()
    yield bench
    bench.close()


EACH = "for i in range(n):\n    "


@pytest.mark.slow
def test_right_and_wrong_in_mojo(bench: Bench) -> None:
    """Simple code gains nothing over simple C, and the runner sees what goes past the end of an array."""
    right = code_of("relu", f"{EACH}y[i] = max(x[i], 0)")
    assert 1 <= bench.grade("relu", right) < 1.3
    assert bench.grade("relu", right.replace("range(n)", "range(n + 1)")) == 0.25
    assert bench.grade("relu", right.replace("range(n)", "range(n")) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("gather", f"{EACH}y[i] = x[Int(k[i])]"),
        (
            "axpby",
            "var kept = List[Float32]()\n" + f"{EACH}kept.append(s * a[i] + t * b[i])\n" + f"{EACH}y[i] = kept[i]",
        ),
    ],
)
def test_arguments_arrive(bench: Bench, name: str, body: str) -> None:
    """Whole numbers and scalars; memory on the heap."""
    found = bench.try_out(name, code_of(name, body))
    assert found["compiler"] == "" and not any(found["problems"]) and found["kernel_ms"] > 0


@pytest.mark.slow
def test_the_tools_speak_mojo(bench: Bench) -> None:
    async def story() -> list[str]:
        kernel = Kernel(row_of("relu"))
        try:
            return [await kernel.run(code_of("relu", f"{EACH}y[i] = max(x[i], 0)")), await kernel.compile("def relu(")]
        finally:
            await kernel.aclose()

    right, broken = asyncio.run(story())
    assert re.fullmatch(r"correct; \d+\.\d\d ms, naive \d+\.\d\d ms", right)
    assert broken == "does not compile: 1:10: error: expected argument name"


@pytest.mark.slow
def test_every_signature_compiles(bench: Bench) -> None:
    """All 100 in one text, and the calls of all callers in one."""
    callers = [mojo_caller(row_of(name)).splitlines() for name in BY_NAME]
    imports = [line for caller in callers for line in caller if line.startswith("from kernel")]
    middle = [line for line in callers[0][1:-1] if not line.startswith("from kernel")]
    text = "\n".join([*imports, *middle, *(caller[-1] for caller in callers)])
    source = f"{GRADER_SOURCE}\nMAX_CODE_BYTES = 100_000\nmojo_caller = lambda item: {text!r}\n"

    async def story() -> Any:
        sandbox = Sandbox(source, function="try_out", num_workers=1, wall_s=CALL_S)
        try:
            return await sandbox.call(row_of("relu"), "".join(code_of(name, "pass") for name in BY_NAME), False)
        finally:
            await sandbox.close()

    assert asyncio.run(story())["compiler"] == ""


OPEN = """
from std.ffi import external_call

def opens(path: StaticString, flags: Int32) -> Bool:
    return external_call["open", Int32](path.unsafe_ptr(), flags, Int32(0o600)) >= 0
"""
ESCAPES = [  # numbers of system calls: x86-64, for which alone, with aarch64, there is a compiler
    'external_call["fork", Int32]() >= 0',
    'external_call["syscall", Int](56, 0x10f00, 0, 0, 0, 0) >= 0',  # a thread
    'external_call["kill", Int32](Int32(-1), Int32(9)) == 0',
    'external_call["socket", Int32](Int32(2), Int32(1), Int32(0)) >= 0',
    'external_call["ptrace", Int](16, 1, 0, 0) == 0',
    'external_call["usleep", Int32](Int32(1)) == 0',
    'external_call["nice", Int32](Int32(-5)) == -5',
    'external_call["unshare", Int32](Int32(0x10000000)) == 0',
    'opens("/scratch/x", 0o102)',
    'opens("/tmp/x", 0o101)',
    'opens("/scratch/reference.so", 0)',
    'opens("/scratch/judge", 0)',
    'opens("/proc/1/mem", 0)',
]


@pytest.mark.slow
def test_nothing_leaves_a_mojo_kernel(bench: Bench) -> None:
    """It is right only where every escape is refused; the number that is found says which was not."""
    attempts = "\n".join(f"if {attempt}:\n    out = {100 + i}" for i, attempt in enumerate(ESCAPES))
    body = f"var out = Float32(0)\n{attempts}\n{EACH}y[i] = max(x[i], 0) if out == 0 else out"
    found = bench.try_out("relu", code_of("relu", body, OPEN))
    assert found["compiler"] == "" and found["problems"] == ["", ""]


@pytest.mark.slow
def test_the_check_of_escapes_can_fail(bench: Bench) -> None:
    """A file that everyone may read can be opened, so the test's own `opens` works."""
    body = f'var out = opens("/proc/self/stat", 0)\n{EACH}y[i] = 100 if out else max(x[i], 0)'
    found = bench.try_out("relu", code_of("relu", body, OPEN))
    assert found["problems"][0].startswith("result [0] is 100, not ")


@pytest.mark.slow
@pytest.mark.parametrize(
    "body",
    [
        'print("{\\"kind\\": \\"case\\"}")\nexternal_call["exit", NoneType](Int32(0))',
        'for i in range(3):\n    _ = external_call["write", Int](Int32(5), "ddd".unsafe_ptr(), 3)',
    ],
)
def test_cheats_stay_wrong(bench: Bench, body: str) -> None:
    assert bench.grade("relu", code_of("relu", body, OPEN)) == 0.25


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "body", "said"),
    [
        (
            OPEN + '\ndef now() -> Int32:\n    return external_call["fork", Int32]()',
            "comptime z = now()\ny[0] = Float32(z)",
            "fork",
        ),
        (
            "from std.sys.info import num_physical_cores",
            "y[0] = Float32(num_physical_cores())",
            "a kernel cannot use KGEN_",
        ),
        ("", "raise Error()", "error"),
        ("\x00 \ud800 #include </etc/passwd>", "pass", "error"),
        ("from caller import rft_call", "pass\n" * 3_000, "longer than 8,000 bytes"),
    ],
)
def test_what_does_not_compile_says_why(bench: Bench, before: str, body: str, said: str) -> None:
    found = bench.try_out("relu", code_of("relu", body, before))
    assert said in found["compiler"] and found["problems"] == []


@pytest.mark.slow
def test_compiling_ends(bench: Bench) -> None:
    """What a kernel computes at compile time is limited, and leaves nothing that the next call could meet."""
    spin = "def spin() -> Int:\n    var i = 0\n    while i >= 0:\n        i = (i + 1) % 1000\n    return i"
    found = bench.try_out("relu", code_of("relu", "comptime z = spin()\ny[0] = Float32(z)", spin))
    assert found["compiler"] == "the compiler did not end in time"
    assert bench.try_out("relu", "def relu(", is_run=False)["compiler"].count("error") > 0
