"""RUNNER loads a kernel behind a seccomp filter, calls it once and waits for its end. Comes first in a `source`.

No file can be written, no process, signal or socket made. What it shares with the judge is SHARED: the headers, and the
head of the memory that both see.
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
