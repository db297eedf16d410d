"""From texts to programs that are run with limits; what a kernel may be written in. Follows runner.py and judge.py.

What `language` a row names is a Language; C stands here, others in languages/, joined after this.
"""

import contextlib
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING or __name__ != "source":  # in the sandbox this is one text with them
    from rft.envs.tasks.kernels.programs.judge import JUDGE
    from rft.envs.tasks.kernels.programs.runner import RUNNER, SHARED

COMPILE_S = 10.0
MEMORY_BYTES = 1 << 29  # address space of a program and all that it starts
FLAGS = ["-O2", "-std=gnu11", "-fPIC", "-shared", "-nostdlib", "-w", "-fmax-errors=3", "-fdiagnostics-plain-output"]
PATH = "/usr/local/bin:/usr/bin:/bin"
CURE = "install a C compiler: apt-get install gcc libc6-dev"

HEADER = """
#include <float.h>
#include <limits.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
{signature};
void rft_call(void **p, const float *f, const int *n) {{ {name}({arguments}); }}
#line 1 "kernel.c"
"""


def execute(
    command: list[str],
    text: str,
    limit_s: float,
    memory_bytes: int = MEMORY_BYTES,
    settings: dict[str, str] | None = None,
) -> tuple[int, str, str]:
    """(exit code, output, errors) of a command with text as its input; -9 when it took too long and was killed.

    memory_bytes: address space of each process; settings: added to its environment.
    """
    with open("out", "w+b") as out, open("errors", "w+b") as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=errors,
            env={"PATH": PATH, "TMPDIR": os.getcwd(), "LC_ALL": "C", **(settings or {})},
            start_new_session=True,
            preexec_fn=lambda: set_limits(memory_bytes),
        )
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(text.encode("utf-8", errors="replace"), timeout=limit_s)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # also what a compiler left running
            process.wait()
        found = []
        for file in (out, errors):
            file.seek(0)
            found.append(file.read(20_000).decode("utf-8", errors="replace"))
    os.unlink("out")
    os.unlink("errors")
    return process.returncode, found[0], found[1]


def set_limits(memory_bytes: int) -> None:
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]  # the sandbox's own limit, which cannot be raised
    if hard != resource.RLIM_INFINITY:
        memory_bytes = min(memory_bytes, hard)
    limits = ((resource.RLIMIT_CPU, 60), (resource.RLIMIT_FSIZE, 32 << 20), (resource.RLIMIT_AS, memory_bytes))
    for kind, limit in limits:
        resource.setrlimit(kind, (limit, limit))


def compiled(flags: list[str], text: str, name: str) -> str:
    """Compile to the file `name`; "" or what the compiler said."""
    code, _, errors = execute([gcc_path(), *flags, "-x", "c", "-", "-o", name, "-lm"], text, COMPILE_S)
    if code == 0 and os.path.isfile(name):
        return ""
    return errors.strip() or "the compiler did not end in time"


def gcc_path() -> str:
    gcc = shutil.which("gcc", path=PATH) or shutil.which("cc", path=PATH)
    if gcc is None:
        raise RuntimeError(f"there is no gcc; {CURE}")
    return gcc


def programs() -> dict[str, bytes]:
    """The runner and the judge, compiled once. Raises RuntimeError naming what is missing, also seccomp."""
    found = {}
    for name, text in (("runner", RUNNER), ("judge", JUDGE)):
        problem = compiled(["-O2", "-std=gnu11", "-w"], SHARED + text, name)
        if problem:
            raise RuntimeError(f"the {name} does not compile; {CURE}\n{problem[:1000]}")
        if name == "runner" and (status := execute([os.path.abspath(name)], "", COMPILE_S)[0]):
            raise RuntimeError(f"a kernel cannot be shut in, the system refuses seccomp: {os.strerror(abs(status))}")
        with open(name, "rb") as file:
            found[name] = file.read()
        os.unlink(name)
    return found


PROGRAMS = programs() if __name__ == "source" else {}  # the name of a module in the sandbox


def write_program(name: str) -> str:
    with open(name, "wb") as file:
        file.write(PROGRAMS[name])
    os.chmod(name, 0o700)
    return os.path.abspath(name)


def library_text(item: dict[str, Any], code: str) -> str:
    """The translation unit of a kernel: what calls it comes first, out of reach of its macros."""
    pointers, floats, ints = item["pointers"], item["floats"], item["ints"]
    arguments = [f"p[{i}]" for i in range(len(pointers))] + [f"f[{i}]" for i in range(len(floats))]
    arguments += [f"n[{i}]" for i in range(len(ints))]
    return HEADER.format(signature=item["signature"], name=item["kernel"], arguments=", ".join(arguments)) + code + "\n"


class Language(NamedTuple):
    """What a kernel may be written in; the reference is C whatever the language.

    build: make kernel.so, which has rft_call (see RUNNER), of a row and the code of a model; "" or what the compiler
    said. Raises RuntimeError where the compiler is missing. head: how a kernel of `{name}` begins, in an answer without
    a block of code. naive_flags: gcc's for the reference, so that the language alone gains no speed.
    """

    build: Callable[[dict[str, Any], str], str]
    head: str
    naive_flags: list[str]


def build_c(item: dict[str, Any], code: str) -> str:
    return compiled(FLAGS, library_text(item, code), "kernel.so")


LANGUAGES = {"c": Language(build_c, r"\b{name}\s*\(.*\{{", [])}


def language_of(item: dict[str, Any]) -> Language:
    name = item.get("language", "c")
    if name not in LANGUAGES:
        raise RuntimeError(f"this grader has no language {name}: join languages/{name}.py to its source")
    return LANGUAGES[name]
