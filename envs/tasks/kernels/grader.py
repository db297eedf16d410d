"""Grade of a kernel; the text of this file is the `source` of a python grader, and of the sandbox behind the tools.

0: no code, or it does not compile; 0.25 + 0.5 x the share of hidden shapes that are right; 1 when all are, and then
+ log2(speed-up over the naive version) / 4, at most 2. It is one text because a grader is one, hence its length. What
`language` a row names is a Language; C stands here, others in languages/, joined to this text.

Three programs: the kernel is a library that RUNNER loads behind a seccomp filter (no file can be written, no process,
signal or socket made); JUDGE owns reference, inputs, comparison and clock, hands over memory, and kills the runner when
it says it is done. What it said counts for nothing: the outputs in memory do, and the CPU time the kernel accounts for.
"""

import contextlib
import ctypes
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable
from typing import Any, NamedTuple

MAX_CODE_BYTES = 8_000
COMPILE_S, JUDGE_S = 10.0, 40.0
MEMORY_BYTES = 1 << 29  # address space of a program and all that it starts
FLAGS = ["-O2", "-std=gnu11", "-fPIC", "-shared", "-nostdlib", "-w", "-fmax-errors=3", "-fdiagnostics-plain-output"]
PATH = "/usr/local/bin:/usr/bin:/bin"
CURE = "install a C compiler: apt-get install gcc libc6-dev"
FASTEST_LOG2 = 4.0  # a speed-up of 16 earns everything
NOISE_LOG2 = 0.5  # a smaller one may be the clock's noise and earns nothing

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

SHARED = r"""
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <math.h>
#include <unistd.h>
#include <errno.h>
#include <signal.h>
#include <poll.h>
#include <time.h>
#include <fcntl.h>
#include <dlfcn.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <sys/syscall.h>
#define MAX 8
#define PAGE 4096
typedef struct { int64_t size, at[MAX], end[MAX]; float f[MAX]; int n[MAX]; int num; } Head;
typedef void (*Call)(void **, const float *, const int *);
enum { MEMORY = 3, GO = 4, DONE = 5 };
"""

RUNNER = r"""
#include <stddef.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#if defined(__x86_64__)
#define MACHINE AUDIT_ARCH_X86_64
#elif defined(__aarch64__)
#define MACHINE AUDIT_ARCH_AARCH64
#else
#error "the filter of system calls is written for x86-64 and aarch64"
#endif
/* What loading a library and computing need; the rest is refused. Files can be opened for reading alone. */
static const int allowed[] = {SYS_read, SYS_write, SYS_pread64, SYS_close, SYS_fstat, SYS_newfstatat, SYS_lseek,
    SYS_mmap, SYS_mprotect, SYS_munmap, SYS_mremap, SYS_madvise, SYS_brk, SYS_futex, SYS_getrandom, SYS_exit,
    SYS_exit_group, SYS_rt_sigreturn};
#define LOAD(field) (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, field))
#define SKIP(test, value, yes, no) (struct sock_filter)BPF_JUMP(BPF_JMP | test | BPF_K, value, yes, no)
#define END(what) (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, what)
static int seal(void) {
    struct sock_filter rules[64];
    int at = 0;
    rules[at++] = LOAD(arch);
    rules[at++] = SKIP(BPF_JEQ, MACHINE, 1, 0);
    rules[at++] = END(SECCOMP_RET_KILL_PROCESS);
    rules[at++] = LOAD(nr);
    for (unsigned i = 0; i < sizeof allowed / sizeof *allowed; i++) {
        rules[at++] = SKIP(BPF_JEQ, allowed[i], 0, 1);
        rules[at++] = END(SECCOMP_RET_ALLOW);
    }
    rules[at++] = SKIP(BPF_JEQ, SYS_openat, 0, 3);
    rules[at++] = LOAD(args[2]);
    rules[at++] = SKIP(BPF_JSET, O_ACCMODE | O_CREAT | O_TRUNC, 1, 0);
    rules[at++] = END(SECCOMP_RET_ALLOW);
    rules[at++] = END(SECCOMP_RET_ERRNO | EPERM);
    struct sock_fprog program = {.len = at, .filter = rules};
    return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program);
}
int main(int argc, char **argv) {
    struct rlimit memory = {1 << 29, 1 << 29}, cpu = {20, 20};
    if (argc < 2) return seal() ? errno : 0; /* without a kernel: can it be done here? */
    off_t size = lseek(MEMORY, 0, SEEK_END);
    volatile char *base = mmap(0, size, PROT_READ | PROT_WRITE, MAP_SHARED, MEMORY, 0);
    if (base == MAP_FAILED) return 3;
    for (off_t i = 0; i < size; i += PAGE) base[i] = base[i]; /* so that no page has to be found while the clock runs */
    Head head = *(Head *)base;
    for (int i = 0; i < head.num; i++) mprotect((char *)base + head.end[i], PAGE, PROT_NONE);
    setrlimit(RLIMIT_AS, &memory);
    setrlimit(RLIMIT_CPU, &cpu);
    if (seal()) return 4;
    void *library = dlopen(argv[1], RTLD_NOW);
    Call call = library ? (Call)dlsym(library, "rft_call") : 0;
    char byte;
    if (!call || write(DONE, "r", 1) != 1 || read(GO, &byte, 1) != 1) return 5;
    void *p[MAX];
    for (int i = 0; i < head.num; i++) p[i] = (char *)base + head.at[i];
    call(p, head.f, head.n);
    (void)!write(DONE, "d", 1);
    for (;;) if (read(GO, &byte, 1) < 1) return 0;
}
"""

JUDGE = r"""
#define OUTSIDE "writes outside of its arrays"
#define SLOW "takes too long"
#define GUARD 64 /* elements before an array: NaN before inputs; after an array comes a page that nobody may touch */
typedef struct { int is_int, is_out; double low, high; } Pointer;
typedef struct { uint64_t seed; double scale; int64_t sizes[MAX]; float f[MAX]; int n[MAX]; } Case;
static Pointer pointers[MAX];
static int num_pointers, num_floats, num_ints, memory;
static char *base, *before, *want;
static int64_t size_bytes;
static const char *runner;
static uint64_t state;
static double uniform(void) { /* splitmix64, Steele et al. 2014 */
    uint64_t z = state += 0x9E3779B97F4A7C15ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return ((z ^ (z >> 31)) >> 11) * 0x1p-53;
}
static void lay_out(const Case *c, Head *head) {
    memset(head, 0, sizeof *head);
    head->num = num_pointers;
    memcpy(head->f, c->f, sizeof head->f);
    memcpy(head->n, c->n, sizeof head->n);
    int64_t at = PAGE;
    for (int i = 0; i < num_pointers; i++) {
        head->end[i] = at + (4 * (c->sizes[i] + GUARD) + PAGE - 1) / PAGE * PAGE;
        head->at[i] = head->end[i] - 4 * c->sizes[i];
        at = head->end[i] + PAGE;
    }
    head->size = at;
}
static void fill(const Case *c, const Head *head) {
    state = c->seed;
    uint32_t nan = 0x7fc0dead;
    for (int64_t i = PAGE; i < head->size; i += 4) memcpy(base + i, &nan, 4);
    for (int i = 0; i < num_pointers; i++) {
        if (pointers[i].is_out) continue;
        double low = pointers[i].low, high = pointers[i].high;
        for (int64_t j = 0; j < c->sizes[i]; j++) {
            double value = low + (high - low) * uniform();
            if (pointers[i].is_int) ((int *)(base + head->at[i]))[j] = (int)floor(value);
            else ((float *)(base + head->at[i]))[j] = (float)(value * c->scale);
        }
    }
    memcpy(base, head, sizeof *head);
    memcpy(before, base, head->size);
}
static void expect(Call reference, const Head *head) {
    memcpy(want, before, head->size);
    void *p[MAX];
    for (int i = 0; i < head->num; i++) p[i] = want + head->at[i];
    reference(p, head->f, head->n);
}
/* "" when the memory is as the reference leaves it: outputs within tolerance, everything else untouched. */
static const char *compare(const Case *c, const Head *head) {
    static char text[160];
    for (int i = 0; i < num_pointers; i++) {
        const char *got = base + head->at[i], *right = want + head->at[i];
        int64_t size = c->sizes[i];
        double largest = 0;
        if (memcmp(got - 4 * GUARD, right - 4 * GUARD, 4 * GUARD)) return OUTSIDE;
        if (!pointers[i].is_out) {
            if (memcmp(got, right, 4 * size)) return "changes its input";
            continue;
        }
        for (int64_t j = 0; j < size && !pointers[i].is_int; j++) {
            double value = fabs((double)((const float *)right)[j]);
            if (isfinite(value) && value > largest) largest = value;
        }
        for (int64_t j = 0; j < size; j++) {
            double g, r;
            if (pointers[i].is_int) { g = ((const int *)got)[j]; r = ((const int *)right)[j]; }
            else { g = ((const float *)got)[j]; r = ((const float *)right)[j]; }
            int is_same = g == r || (isnan(g) && isnan(r));
            if (!is_same && (pointers[i].is_int || !(fabs(g - r) <= 1e-3 * largest + 1e-7) || isinf(r))) {
                snprintf(text, sizeof text, "result [%lld] is %.6g, not %.6g", (long long)j, g, r);
                return text;
            }
        }
    }
    return "";
}
static int64_t cpu_ns(pid_t pid) {
    clockid_t clock;
    struct timespec now = {0, 0};
    if (clock_getcpuclockid(pid, &clock) || clock_gettime(clock, &now)) return -1;
    return now.tv_sec * 1000000000ll + now.tv_nsec;
}
static char hear(int fd, int limit_ms) {
    struct pollfd waiting = {.fd = fd, .events = POLLIN};
    char byte = 0;
    int found = poll(&waiting, 1, limit_ms);
    return found == 0 ? 't' : found == 1 && read(fd, &byte, 1) == 1 ? byte : 'c';
}
/* The same within a second of the process's time: the machine may be busy with others, so the clock says little. */
static char hear_from(pid_t pid, int fd, int64_t started) {
    char said = 't';
    for (int i = 0; i < 20 && said == 't' && cpu_ns(pid) - started < 1000000000ll; i++) said = hear(fd, 250);
    return said;
}
/* Run a library once on a case. "" or what went wrong; nanoseconds of CPU time between go and its death. */
static const char *run(const char *library, const Case *c, Call reference, int64_t *ns) {
    Head head;
    int go[2], done[2];
    lay_out(c, &head);
    memcpy(base, &head, sizeof head);
    if (pipe2(go, O_CLOEXEC) || pipe2(done, O_CLOEXEC)) exit(6);
    pid_t pid = fork();
    if (pid < 0) exit(6);
    if (pid == 0) {
        int nothing = open("/dev/null", O_RDWR), fds[3] = {fcntl(memory, F_DUPFD, 32), fcntl(go[0], F_DUPFD, 32),
            fcntl(done[1], F_DUPFD, 32)};
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        for (int i = 0; i < 3; i++) dup2(nothing, i), dup2(fds[i], MEMORY + i);
        syscall(SYS_close_range, 6, ~0u, 0);
        char *const arguments[] = {(char *)runner, (char *)library, 0}, *const nobody[] = {0};
        execve(runner, arguments, nobody);
        _exit(7);
    }
    close(go[0]);
    close(done[1]);
    char said = hear_from(pid, done[0], 0);
    const char *problem = said == 'r' ? "" : "cannot be loaded";
    int64_t started = 0;
    if (!*problem) {
        fill(c, &head);
        expect(reference, &head);
        started = cpu_ns(pid);
        (void)!write(go[1], "g", 1);
        said = hear_from(pid, done[0], started);
        problem = said == 'd' ? "" : said == 't' ? SLOW : "crashes, or leaves its arrays";
    }
    kill(pid, SIGKILL);
    struct rusage used;
    wait4(pid, 0, 0, &used);
    close(go[1]);
    close(done[0]);
    *ns = (used.ru_utime.tv_sec + used.ru_stime.tv_sec) * 1000000000ll
        + (used.ru_utime.tv_usec + used.ru_stime.tv_usec) * 1000ll - started;
    if (*ns < 1000) *ns = 1000;
    return *problem ? problem : compare(c, &head);
}
static void say(const char *kind, const char *problem, int64_t ns) {
    printf("{\"kind\": \"%s\", \"problem\": \"%s\", \"ns\": %lld}\n", kind, problem, (long long)ns);
    fflush(stdout);
}
static void get(Case *c) {
    if (scanf("%lu %lf", &c->seed, &c->scale) != 2) exit(8);
    for (int i = 0; i < num_pointers; i++) if (scanf("%ld", &c->sizes[i]) != 1) exit(8);
    for (int i = 0; i < num_floats; i++) if (scanf("%f", &c->f[i]) != 1) exit(8);
    for (int i = 0; i < num_ints; i++) if (scanf("%d", &c->n[i]) != 1) exit(8);
    Head head;
    lay_out(c, &head);
    if (head.size > size_bytes) size_bytes = head.size;
}
/* judge RUNNER KERNEL REFERENCE, the request on its input: see `request` in the grader. */
int main(int argc, char **argv) {
    prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
    signal(SIGPIPE, SIG_IGN);
    void *library = argc == 4 ? dlopen(argv[3], RTLD_NOW) : 0;
    Call reference = library ? (Call)dlsym(library, "rft_call") : 0;
    static Case cases[16], timed;
    int num_cases, repeats;
    int64_t ns;
    runner = argv[1];
    unlink(argv[0]);
    if (!reference || scanf("%d %d %d", &num_pointers, &num_floats, &num_ints) != 3) return 8;
    for (int i = 0; i < num_pointers; i++)
        if (scanf("%d %d %lf %lf", &pointers[i].is_int, &pointers[i].is_out, &pointers[i].low, &pointers[i].high) != 4)
            return 8;
    if (scanf("%d %d", &num_cases, &repeats) != 2 || num_cases > 16) return 8;
    for (int i = 0; i < num_cases; i++) get(&cases[i]);
    get(&timed);
    memory = memfd_create("memory", MFD_CLOEXEC);
    if (memory < 0 || ftruncate(memory, size_bytes)) return 9;
    base = mmap(0, size_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0);
    before = malloc(size_bytes);
    want = malloc(size_bytes);
    if (base == MAP_FAILED || !before || !want) return 9;
    /* the reference has no file while the kernel runs */
    static char bytes[1 << 20];
    int file = open(argv[3], O_RDONLY | O_CLOEXEC);
    ssize_t num_bytes = read(file, bytes, sizeof bytes);
    close(file);
    unlink(argv[3]);
    const char *problem = "";
    int is_right = 1;
    for (int i = 0; i < num_cases && strcmp(problem, SLOW); i++) {
        problem = run(argv[2], &cases[i], reference, &ns);
        is_right &= !*problem;
        say("case", problem, ns);
    }
    if (!is_right) return 0;
    int64_t best[2] = {INT64_MAX, INT64_MAX};
    for (int i = 0; i < 2 * repeats && !*problem; i++) { /* in turn, new values each time: nothing can be remembered */
        Case c = timed;
        c.seed += i;
        if (i % 2) {
            file = open(argv[3], O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0700);
            if (write(file, bytes, num_bytes) != num_bytes) return 9;
            close(file);
        }
        problem = run(argv[i % 2 ? 3 : 2], &c, reference, &ns);
        unlink(i % 2 ? argv[3] : "");
        if (ns < best[i % 2]) best[i % 2] = ns;
    }
    say("kernel", problem, best[0]);
    say("naive", problem, best[1]);
}
"""


# --- programs ---------------------------------------------------------------------------------------------------------


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


def request(item: dict[str, Any], cases: list[dict[str, Any]], repeats: int) -> str:
    """What the judge reads: numbers, separated by blanks."""
    numbers: list[Any] = [len(item["pointers"]), len(item["floats"]), len(item["ints"])]
    for pointer in item["pointers"]:
        numbers += [int(pointer["is_int"]), int(pointer["is_out"]), pointer["low"], pointer["high"]]
    numbers += [len(cases), repeats]
    for case in (*cases, item["timed"]):
        numbers += [case["seed"], case["scale"], *case["sizes"], *case["floats"], *case["ints"]]
    return " ".join(map(str, numbers))


# --- grading ----------------------------------------------------------------------------------------------------------


def build(item: dict[str, Any], code: str) -> str:
    """Make kernel.so; "" or what the compiler said. The folder holds nothing else: an #include finds no reference."""
    ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: nothing that the kernel starts may read this memory
    if len(code.encode("utf-8", errors="replace")) > MAX_CODE_BYTES:
        return f"the code is longer than {MAX_CODE_BYTES:,} bytes"
    return language_of(item).build(item, code)


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
