"""JUDGE owns reference, inputs, comparison and clock. Follows runner.py, whose SHARED stands before it.

It hands over memory, and kills the runner when it says it is done. What it said counts for nothing: the outputs in
memory do, and the CPU time the kernel accounts for.
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
