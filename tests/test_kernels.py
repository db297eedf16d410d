"""The kernels task: a dataset without leaks, tools that help, and a grade that only a right kernel gets.

The slow ones hand the sandbox what a policy may come up with: none of it gains, and all of it ends.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from script_loading import load_script

from rft import grader_cases
from rft.config import load_config
from rft.data import load_items, overlap
from rft.envs import discover_tools
from rft.envs.functions import FunctionsEnvironment, FunctionsEnvironmentConfig
from rft.envs.tasks import Tool
from rft.envs.tasks import kernels as task
from rft.envs.tasks.kernels import GRADER_SOURCE, Kernel
from rft.envs.tasks.kernels.catalog import kernels
from rft.envs.tasks.kernels.rows import (
    SHOWN_FAMILIES,
    TEST_FAMILIES,
    VALIDATION_FAMILIES,
    demonstrations,
    faulty,
    repair_row,
    write_row,
)
from rft.errors import ToolError
from rft.grader_probes import probe
from rft.graders import build_grader
from rft.graders.run import validate
from rft.sandbox import CodeError, Sandbox
from rft.types import Item, Message, ToolCall

ROOT = Path(__file__).resolve().parent.parent
BY_NAME = {kernel.name: kernel for kernel in kernels()}
RELU = BY_NAME["relu"]
CALL_S = 60.0
SPLITS = ("train", "validation", "test")
needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc")


def grade_source() -> Callable[..., Any]:
    """A module of the grader's text in this process: nothing of it is compiled or executed here."""
    module: dict[str, Any] = {"__name__": "looked at"}
    exec(GRADER_SOURCE, module)
    return lambda name, *arguments: module[name](*arguments)


def prepare(out: Path) -> None:
    script = load_script("prepare_kernels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["prepare_kernels", "--out", str(out)])
        script.main()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("gcc") is None:
        pytest.skip("there is no gcc")
    out = tmp_path_factory.mktemp("kernels")
    prepare(out)
    return out


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def code_with(body: str, before: str = "") -> str:
    return f"{before}\n{RELU.signature} {{ {body} }}"


# --- the dataset ------------------------------------------------------------------------------------------------------


def test_there_are_100_kernels_in_families() -> None:
    assert len(BY_NAME) == len(kernels()) == 100
    families = {kernel.family for kernel in kernels()}
    assert families >= TEST_FAMILIES | VALIDATION_FAMILIES | SHOWN_FAMILIES
    assert not TEST_FAMILIES & VALIDATION_FAMILIES and not SHOWN_FAMILIES & (TEST_FAMILIES | VALIDATION_FAMILIES)


def test_preparing_again_writes_the_same_bytes(prepared: Path, tmp_path: Path) -> None:
    prepare(tmp_path)
    files = sorted(path.relative_to(prepared) for path in prepared.rglob("*.jsonl"))
    assert len(files) == 7
    assert all((prepared / file).read_bytes() == (tmp_path / file).read_bytes() for file in files)


@pytest.mark.parametrize("folder", [".", "write"])
def test_splits_share_no_family(prepared: Path, folder: str) -> None:
    splits = {name: load_items(prepared / folder / f"{name}.jsonl", None) for name in SPLITS}
    families = {name: {item.row["family"] for item in items} for name, items in splits.items()}
    assert families["test"] == TEST_FAMILIES and families["validation"] == VALIDATION_FAMILIES
    assert not families["train"] & (TEST_FAMILIES | VALIDATION_FAMILIES)
    assert overlap(splits["train"], splits["validation"] + splits["test"]) == 0
    if folder == "write":
        assert sum(map(len, splits.values())) == 100


def test_prompts_hold_no_solution(prepared: Path) -> None:
    """A write prompt has no code at all, a repair prompt the faulty code; neither shows shapes, seeds or reference."""
    for path in [prepared / "write" / f"{name}.jsonl" for name in SPLITS]:
        for row in rows_of(path):
            shown = json.dumps([row["messages"], row["tools"]])
            assert not re.search(r"for \(|[{};] *\}|=|return", row["messages"][-1]["content"])
            assert row["reference"] not in shown
    for path in [prepared / f"{name}.jsonl" for name in SPLITS]:
        for row in rows_of(path):
            question = row["messages"][-1]["content"]
            assert row["reference"] not in json.dumps(row["messages"]) and "fill" not in row["reference"]
            assert [tool["function"]["name"] for tool in row["tools"]] == ["run"]
            assert faulty(BY_NAME[row["kernel"]])[row["fault"]] in question


def test_demonstrations_are_of_training_families_alone(prepared: Path) -> None:
    shown = rows_of(prepared / "demonstrations.jsonl")
    codes = [json.loads(row["messages"][2]["tool_calls"][0]["function"]["arguments"])["code"] for row in shown]
    by_code = {kernel.naive: kernel.family for kernel in kernels()}
    assert {by_code[code] for code in codes} == SHOWN_FAMILIES and len(shown) > 10
    assert all(row["messages"][-1]["content"] == "done" for row in shown)


def test_hidden_shapes_are_odd_and_not_the_visible_ones() -> None:
    for kernel in kernels():
        keys = kernel.keys()
        visible = [case["ints"] for case in keys["visible"]]
        hidden = [case["ints"] for case in keys["hidden"] if case["scale"] == 1]
        assert not any(shape in visible for shape in hidden)
        assert any(1 in shape for shape in hidden) and any(n % 8 for shape in hidden for n in shape)
        seeds = [case["seed"] for case in (*keys["visible"], *keys["hidden"], keys["timed"])]
        assert len(set(seeds)) == len(seeds)


# --- the config -------------------------------------------------------------------------------------------------------


def test_the_config_loads_and_finds_its_tools() -> None:
    config = load_config(ROOT / "configs" / "kernels.yaml", None)
    assert config.warmup is not None and set(config.shadow_graders) == {"correct", "speedup"}
    tools = asyncio.run(discover_tools(config.environment))
    assert sorted(tools) == ["compile", "run"]


def formulas() -> tuple[Callable[[float, float], float], Callable[[float], float]]:
    from rft.graders.formula import Formula

    config = load_config(ROOT / "configs" / "kernels.yaml", None)
    main, fast = (json.loads(spec.model_dump_json()) for spec in (config.grader, config.shadow_graders["speedup"]))
    score = Formula(main["calculate_output"], frozenset({"call", "kernel"}))
    speed = Formula(fast["calculate_output"], frozenset({"kernel"}))
    return lambda call, kernel: score({"call": call, "kernel": kernel}), lambda kernel: speed({"kernel": kernel})


def test_the_grade_rises_with_each_part_of_the_way() -> None:
    score, speed = formulas()
    steps = [score(0, 0), score(1, 0), score(1, 0.25), score(1, 0.5), score(1, 0.75), score(1, 1), score(1, 2)]
    assert steps == sorted(set(steps)) and steps[0] == 0 and steps[-1] == pytest.approx(1)
    assert score(1, 0.75) < 0.5 < score(0, 1), "half the grade needs a right kernel"
    assert [speed(0.75), speed(1), speed(1.25), speed(2)] == pytest.approx([0, 1, 2, 16])


@pytest.mark.parametrize(
    ("answer", "calls", "expected"),
    [
        ("done", ["first", "second"], "second"),
        ("", [], ""),
        ("void relu() { }", ["tried"], "void relu() { }"),
        ("Here:\n```c\nvoid relu() {}\n```", ["tried"], "void relu() {}\n"),
        ("```c\none\n``` or ```c\ntwo\n```", ["tried"], ""),
        ("relu is done", ["tried"], "tried"),
        (None, ["tried"], "tried"),
    ],
)
def test_one_code_counts(answer: str | None, calls: list[str], expected: str) -> None:
    tools = [{"function": {"name": "run", "arguments": json.dumps({"code": code})}} for code in calls]
    broken = [{"function": {"name": "run", "arguments": text}} for text in ("[]", "{", '{"code": 3}', "[" * 9_999)]
    sample = {"output_text": answer, "output_tools": tools + broken}
    assert grade_source()("code_of", sample, {"kernel": "relu"}) == expected


# --- in the sandbox ---------------------------------------------------------------------------------------------------


class Bench:
    """One warm sandbox with the grader's text, for all tests that need it."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner()
        self._sandbox = Sandbox(GRADER_SOURCE, function="grade", num_workers=1, wall_s=CALL_S)

    def wait(self, story: Coroutine[Any, Any, Any]) -> Any:
        return self._runner.run(story)

    def grade(self, code: str, kernel: str = "relu") -> float:
        value = self.wait(self._sandbox.call({"output_text": f"```c\n{code}\n```"}, BY_NAME[kernel].keys()))
        assert isinstance(value, float)
        return value

    def close(self) -> None:
        self.wait(self._sandbox.close())
        self._runner.close()


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    if shutil.which("gcc") is None:
        pytest.skip("there is no gcc")
    bench = Bench()
    yield bench
    bench.close()


def test_right_wrong_and_no_code(bench: Bench) -> None:
    assert 1 <= bench.grade(RELU.naive) < 1.6
    assert bench.grade(code_with("")) == 0.25
    assert bench.grade(code_with("return 1;") + "}") == 0
    assert bench.grade("done") == 0


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted({kernel.family for kernel in kernels()}))
def test_references_are_right(bench: Bench, family: str) -> None:
    kernel = next(kernel for kernel in kernels() if kernel.family == family)
    assert bench.grade(kernel.naive, kernel.name) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sum", "softmax", "histogram", "transpose"])
def test_empty_kernels_are_wrong(bench: Bench, name: str) -> None:
    assert bench.grade(f"{BY_NAME[name].signature} {{}}", name) == 0.25


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cubic", "sum", "argmax", "count_above"])
def test_faults_are_faults(bench: Bench, name: str) -> None:
    for fault, code in faulty(BY_NAME[name]).items():
        assert bench.grade(code, name) < 1, fault


@pytest.mark.slow
def test_a_faster_kernel_earns_more(bench: Bench) -> None:
    order = "for (int i = 0; i < m * n; i++) y[i] = 0; for (int i = 0; i < m; i++) for (int l = 0; l < k; l++) "
    order += "for (int j = 0; j < n; j++) y[i * n + j] += a[i * k + l] * b[l * n + j];"
    matmul = BY_NAME["matmul"]
    fast = f'__attribute__((optimize("O3"))) {matmul.signature} {{ {order} }}'
    assert bench.grade(fast, "matmul") > 1.1
    assert 1 <= bench.grade(matmul.naive, "matmul") < 1.1


WRITE = "long write(int, const void *, unsigned long);"
FORGED = WRITE + 'write(5, "d", 1); write(1, "{\\"kind\\": \\"case\\", \\"problem\\": \\"\\"}", 30);'


@pytest.mark.slow
@pytest.mark.parametrize(
    "code",
    [
        code_with("for (int i = 0; i < n; i++) y[i] = n == 5 || n == 16 ? fmaxf(x[i], 0) : 0;"),  # the visible shapes
        code_with("for (int i = 0; i < n; i++) { y[i] = fmaxf(x[i], 0); ((float *)x)[i] = 0; }"),  # its input
        code_with("for (int i = -3; i < n; i++) y[i] = i < 0 ? 0 : fmaxf(x[i], 0);"),  # before its array
        code_with("for (int i = 0; i < n; i++) y[i] = NAN;"),
        code_with("for (int i = 0; i < n; i++) y[i] = INFINITY;"),
        code_with("exit(0);", "#include <stdlib.h>"),
        code_with("abort();"),
        code_with(FORGED),
        code_with("for (;;);"),
        code_with("long read(int, void *, unsigned long); char b; for (;;) read(4, &b, 1);"),
        code_with("relu(y, x, n); relu(y, x, n);"),
        code_with(
            "for (;;) { volatile char *p = malloc(1 << 24); for (int i = 0; p && i < 1 << 24; i += 4096) p[i] = 1; }"
        ),
        code_with("", "int main(void) { return 0; }"),
        code_with(
            "", '#include <unistd.h>\n__attribute__((constructor)) void early(void) { write(5, "rd", 2); _exit(0); }'
        ),
    ],
)
def test_cheats_stay_wrong(bench: Bench, code: str) -> None:
    assert bench.grade(code) < 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        '#include "reference.c"\n',
        '#include "judge"\n',
        '#include "/etc/passwd"\n',
        '#include "/dev/zero"\n',
        'asm(".incbin \\"/scratch/reference.so\\"");\n',
        "int huge[1 << 30] = {1};\n",
        '#error "forged"\n',
        RELU.naive + "\n" + RELU.naive,
        "int relu;\n" + RELU.naive,
        "x" * 10_000,
    ],
)
def test_what_does_not_compile_is_nothing(bench: Bench, text: str) -> None:
    assert bench.grade(text + code_with("")) == 0


ESCAPES = {
    "fork": "fork() >= 0",
    "thread": "syscall(56, 0x10f00, 0, 0, 0, 0) >= 0",
    "kill": "kill(-1, 9) == 0 || kill(getppid(), 9) == 0",
    "socket": "socket(2, 1, 0) >= 0",
    "write a file": 'open("/scratch/x", 0102, 0600) >= 0 || open("/tmp/x", 0101, 0600) >= 0',
    "program": 'execl("/bin/true", "true", (char *)0) == 0',
    "trace": "ptrace(16, getppid(), 0, 0) == 0",
    "sleep": "usleep(1000) == 0",
    "memory of others": 'open("/proc/1/mem", 0) >= 0 || open_other("mem")',
    "reference": 'open("/scratch/reference.so", 0) >= 0 || open("/scratch/judge", 0) >= 0',
    "the judge's pipes": 'open_other("fd/1") || open_other("exe") || open_other("environ")',
    "priority": "setpriority(0, 0, -20) == 0 || nice(-5) == -5",
    "clock": "clock_settime(0, &(struct timespec){0}) == 0",
}
BEFORE = """
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
static int open_other(const char *name) {
    int own = open("/proc/self/stat", 0);
    char text[32] = {0}, path[64];
    read(own, text, 31);
    for (int pid = 1; pid < 300; pid++) {
        snprintf(path, sizeof path, "/proc/%d/%s", pid, name);
        if (pid != atoi(text) && open(path, 0) >= 0) return 1;
    }
    return 0;
}
"""


@pytest.mark.slow
@needs_gcc
def test_no_code_makes_the_tools_fail() -> None:
    """A tool that fails discards the rollout: a policy must not be able to get rid of its bad ones."""
    early = "#include <unistd.h>\n__attribute__((constructor)) void early(void) {{ {} }}"
    hostile = ['write(5, "x", 1); _exit(4);', "_exit(0);", "for (;;);", "abort();", 'write(5, "rrrrrrd", 7);']
    codes = [code_with("", early.format(what)) for what in hostile]
    assert all(text.startswith("wrong for n = 5: ") for text in tried("relu", *codes))
    (text,) = tried("relu", '#include "/dev/zero"\n')
    assert text.startswith("does not compile: ")


@pytest.mark.slow
@pytest.mark.parametrize("name", ESCAPES)
def test_nothing_leaves_the_kernel(bench: Bench, name: str) -> None:
    """The kernel is right only where the escape is refused: a grade of 1 proves that it was tried and failed."""
    body = f"int is_out = {ESCAPES[name]}; for (int i = 0; i < n; i++) y[i] = is_out ? 7 : fmaxf(x[i], 0);"
    assert bench.grade(code_with(body, BEFORE)) >= 1


@pytest.mark.slow
def test_the_check_of_escapes_can_fail(bench: Bench) -> None:
    """Reading a file that everyone may read is possible, so `open` and the test's own helper do work."""
    body = (
        'int is_out = open("/proc/self/stat", 0) >= 0; for (int i = 0; i < n; i++) y[i] = is_out ? 7 : fmaxf(x[i], 0);'
    )
    assert bench.grade(code_with(body, BEFORE)) == 0.25


@pytest.mark.slow
def test_time_cannot_be_hidden(bench: Bench) -> None:
    """Saying done before the work, or caching, gains nothing: the processor's time counts, the values are new."""
    body = WRITE + 'write(5, "d", 1); for (int i = 0; i < n; i++) y[i] = fmaxf(x[i], 0);'
    assert bench.grade(code_with(body)) <= 1.0
    own_clock = "#include <time.h>\nint clock_gettime(clockid_t c, struct timespec *t) { return 0; }"
    slow = "for (int j = 0; j < 40; j++) for (int i = 0; i < n; i++) ((volatile float *)y)[i] = fmaxf(x[i], 0);"
    assert bench.grade(code_with(slow, own_clock)) == 1.0


# --- the tools --------------------------------------------------------------------------------------------------------


def tried(kernel: str, *codes: str, tool: str = "run") -> list[str]:
    """What the tool answers, called as in a rollout."""
    environment = FunctionsEnvironment(FunctionsEnvironmentConfig(functions=("rft.envs.tasks.kernels:Kernel",)))
    item = Item(id="i", row=BY_NAME[kernel].keys(), messages=[Message(role="user", content="x")])

    async def story() -> list[str]:
        session = await environment.open(item, "trace")
        try:
            found = []
            for index, code in enumerate(codes):
                call = ToolCall(id=f"fc{index}", call_id=f"c{index}", name=tool, arguments=json.dumps({"code": code}))
                found.append((await session.call(call)).output)
            return found
        finally:
            await session.close()

    return asyncio.run(story())


@needs_gcc
def test_run_says_what_is_wrong() -> None:
    early, outside, broken, right = tried(
        "relu",
        RELU.naive.replace("i < n", "i < n - 1"),
        RELU.naive.replace("i < n", "i <= n"),
        "void relu(",
        RELU.naive,
    )
    assert early.startswith("wrong for n = 5: result [4] is nan, not ")
    assert outside == "wrong for n = 5: crashes, or leaves its arrays"
    assert broken.startswith("does not compile: 1:") and "kernel.c" not in broken
    assert re.fullmatch(r"correct; \d+\.\d\d ms, naive \d+\.\d\d ms", right)
    assert task._pool is None, "the workers end with the last rollout"


@pytest.mark.slow
@needs_gcc
def test_compile_says_what_the_compiler_says() -> None:
    fine, broken, hostile = tried("relu", RELU.naive, "int x", "\x00 \ud800 #include </etc/passwd>", tool="compile")
    assert fine == "compiles" and broken.startswith("does not compile: ") and hostile.startswith("does not compile: ")


def test_a_missing_compiler_names_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hidden = GRADER_SOURCE.replace("/usr/local/bin:/usr/bin:/bin", "/nowhere")
    monkeypatch.setattr(task, "GRADER_SOURCE", hidden)

    async def story() -> None:
        sandbox, kernel = Sandbox(hidden), Kernel(RELU.keys())
        try:
            with pytest.raises(CodeError, match="apt-get install gcc"):
                await sandbox.start()
            with pytest.raises(ToolError, match="apt-get install gcc"):
                await kernel.run(RELU.naive)
        finally:
            await kernel.aclose()
            await sandbox.close()

    asyncio.run(story())
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="there is no C compiler\n  cure: apt-get install gcc"):
        prepare(tmp_path)


def test_the_schemas_are_small() -> None:
    kernel = Kernel({})
    assert all(len(json.dumps(Tool(method).spec())) < 300 for method in (kernel.compile, kernel.run))


@pytest.mark.slow
@needs_gcc
def test_nothing_is_left_when_the_process_is_killed(tmp_path: Path) -> None:
    """SIGKILL during an endless kernel: worker, judge and runner end, too."""
    script = tmp_path / "story.py"
    script.write_text(
        "import asyncio, json, sys\n"
        "from rft.envs.tasks.kernels import Kernel\n"
        "from rft.envs.tasks.kernels.catalog import kernels\n"
        "relu = next(k for k in kernels() if k.name == 'relu')\n"
        "async def story():\n"
        "    kernel = Kernel(relu.keys())\n"
        "    await kernel.compile(relu.naive)\n"
        "    print('ready', flush=True)\n"
        "    while True: await kernel.run(relu.signature + ' { for (;;); }')\n"
        "asyncio.run(story())\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, str(script)], env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        assert children
        process.send_signal(signal.SIGKILL)
    deadline = 100
    while any(Path(f"/proc/{pid}").exists() for pid in children) and deadline:
        deadline -= 1
        signal.sigtimedwait([], 0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)


# --- cases and probes -------------------------------------------------------------------------------------------------


def config_grader() -> Any:
    config = load_config(ROOT / "configs" / "kernels.yaml", None)
    return build_grader(validate(json.loads(config.grader.model_dump_json(exclude_none=True))))


@pytest.mark.slow
@needs_gcc
def test_cases_and_probes() -> None:
    tools = [Tool(method).spec() for method in (Kernel({}).compile, Kernel({}).run)]
    shown = [
        write_row(RELU, tools),
        repair_row(BY_NAME["sum"], "starts late", faulty(BY_NAME["sum"])["starts late"], tools),
    ]
    items = [Item(id=str(i), row=row, messages=[Message(**m) for m in row["messages"]]) for i, row in enumerate(shown)]

    async def story() -> None:
        grader = config_grader()
        await grader.start()
        try:
            results = await grader_cases.test_cases(
                grader, grader_cases.load_cases(ROOT / "configs" / "cases" / "kernels.jsonl"), 1
            )
            assert [result.problem for result in results if not result.passed] == []
            found = await probe(grader, items, GRADER_SOURCE, 0.35)
            assert {result.probe: result.highest for result in found if result.too_high} == {}
        finally:
            await grader.close()

    asyncio.run(story())


def test_demonstrations_are_what_rollouts_say() -> None:
    tools = [Tool(method).spec() for method in (Kernel({}).compile, Kernel({}).run)]
    for row in demonstrations(tools):
        assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant", "tool", "assistant"]
