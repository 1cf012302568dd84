/* A process to be injected into, which watches itself: whatever an injection could damage
 * (registers, vector state, the meaning of an interrupted system call, signal handlers,
 * the signal mask, open files) is checked all the time.
 *
 *   victim MODE [RESTART]              RESTART 0: its signal handlers have no SA_RESTART
 *   victim exit NANOSECONDS            exits after that time
 *   victim storm PID PAUSE_US SIGNAL...   sends the signals in turn, until SIGTERM; then
 *                                       says how many of them were queued ones (SIGRTMIN + 1)
 *
 * Says "ready" on stdout once it is in its mode; after SIGTERM one line: "ok ROUNDS SIGNALS
 * QUEUED_SIGNALS", or at once "damaged: WHAT".
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/select.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static volatile sig_atomic_t asked_to_end;
static atomic_ulong signals_seen;
static atomic_ulong queued_seen; /* of SIGRTMIN + 1, which is never merged with another */
static int restarting = 1;
static unsigned long rounds;

static void damaged(const char *what, long value)
{
    dprintf(STDOUT_FILENO, "damaged: %s (%ld, errno %d) in round %lu\n", what, value, errno,
            rounds);
    _exit(1);
}

/* A handler uses the stack and the vector registers, as any other would. */
static void on_signal(int signal, siginfo_t *info, void *context)
{
    (void)context;
    int kept = errno;
    if (info->si_code > 0) damaged("a signal that nobody sent", signal);
    if (signal == SIGRTMIN + 1) atomic_fetch_add(&queued_seen, 1);
    volatile double x = signal;
    x = x * 3.25 + 1;
    if (x != signal * 3.25 + 1) damaged("arithmetic in a handler", signal);
    atomic_fetch_add(&signals_seen, 1);
    errno = kept;
}

static void on_end(int signal)
{
    (void)signal;
    asked_to_end = 1;
}

static int64_t now_us(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

/* An interrupted call is right only if a signal of ours can have interrupted it. */
static int excused(unsigned long signals_before)
{
    return errno == EINTR && (asked_to_end || atomic_load(&signals_seen) != signals_before);
}

/* Every general register and some vector registers live across a loop without calls. */
static void spin(void)
{
    uint64_t a = rounds, b = 2, c = 3, d = 4, e = 5, f = 6, g = 7, h = 8, i = 9, j = 10;
    const uint64_t turns = 20000;
    double x = 1, y = 2, z = 3;
    for (uint64_t n = 0; n < turns; n++) {
        __asm__ volatile("" : "+r"(a), "+r"(b), "+r"(c), "+r"(d), "+r"(e), "+r"(f), "+r"(g),
                         "+r"(h), "+r"(i), "+r"(j), "+x"(x), "+x"(y), "+x"(z));
        a += 1; b += 2; c += 3; d += 4; e += 5; f += 6; g += 7; h += 8; i += 9; j += 10;
        x += 1; y += 2; z += 3;
    }
    if (a != rounds + turns || b != 2 + 2 * turns || c != 3 + 3 * turns || d != 4 + 4 * turns ||
        e != 5 + 5 * turns || f != 6 + 6 * turns || g != 7 + 7 * turns || h != 8 + 8 * turns ||
        i != 9 + 9 * turns || j != 10 + 10 * turns)
        damaged("general registers", (long)a);
    if (x != 1 + (double)turns || y != 2 + 2 * (double)turns || z != 3 + 3 * (double)turns)
        damaged("vector registers", (long)x);
}

/* Must sleep its whole time, in one call unless a handler ran. */
static void sleep_nanosleep(void)
{
    struct timespec left = {.tv_nsec = 30000000};
    int64_t start_us = now_us();
    for (;;) {
        unsigned long before = atomic_load(&signals_seen);
        if (!nanosleep(&left, &left)) break;
        if (!excused(before)) damaged("nanosleep ended early", 0);
        if (asked_to_end) return;
    }
    if (now_us() - start_us < 30000) damaged("nanosleep was short", now_us() - start_us);
}

static void sleep_poll(void)
{
    static int pipe_ends[2];
    if (!pipe_ends[1] && pipe(pipe_ends)) abort();
    struct pollfd one = {.fd = pipe_ends[0], .events = POLLIN};
    int64_t start_us = now_us();
    unsigned long before = atomic_load(&signals_seen);
    int ready = poll(&one, 1, 30);
    if (ready < 0 && excused(before)) return;
    if (ready || now_us() - start_us < 29900) damaged("poll", now_us() - start_us);
}

/* ppoll as QEMU's main loop uses it; its mask lets through a signal that is blocked outside. */
static void sleep_ppoll(void)
{
    sigset_t none, usr2, now;
    sigemptyset(&none);
    sigemptyset(&usr2);
    sigaddset(&usr2, SIGUSR2);
    sigprocmask(SIG_SETMASK, &usr2, NULL);
    struct timespec left = {.tv_nsec = 30000000};
    int64_t start_us = now_us();
    unsigned long before = atomic_load(&signals_seen);
    int ready = ppoll(NULL, 0, &left, &none);
    int kept = errno;
    sigprocmask(SIG_SETMASK, NULL, &now);
    if (sigismember(&now, SIGUSR2) != 1 || sigismember(&now, SIGUSR1)) damaged("signal mask", 0);
    errno = kept;
    if (ready < 0 && excused(before)) return;
    if (ready || now_us() - start_us < 29900) damaged("ppoll", now_us() - start_us);
}

static void sleep_futex(void)
{
    static uint32_t word = 1;
    struct timespec left = {.tv_nsec = 30000000};
    int64_t start_us = now_us();
    unsigned long before = atomic_load(&signals_seen);
    long woken = syscall(SYS_futex, &word, FUTEX_WAIT, 1, &left, NULL, 0);
    if (woken < 0 && excused(before)) return;
    if (woken != -1 || errno != ETIMEDOUT || now_us() - start_us < 29900) damaged("futex", woken);
}

static int numbers[2];

static void *write_numbers(void *unused)
{
    (void)unused;
    for (unsigned char n = 0;; n++) {
        nanosleep(&(struct timespec){.tv_nsec = 3000000}, NULL);
        if (write(numbers[1], &n, 1) != 1) return NULL;
    }
}

/* Every byte of the sequence comes once, in order, whatever interrupts the read. */
static void sleep_read(void)
{
    static unsigned char expected;
    unsigned char got;
    unsigned long before = atomic_load(&signals_seen);
    ssize_t count = read(numbers[0], &got, 1);
    if (count < 0 && (asked_to_end || !restarting) && excused(before)) return;
    if (count != 1 || got != expected++) damaged("read", count < 0 ? -1 : got);
}

static void *sleep_on(void *unused)
{
    (void)unused;
    for (;;) pause();
    return NULL;
}

/* A vfork parent sleeps where only SIGKILL reaches it. The child ends by the pipe's end. */
static void sleep_vfork(void)
{
    pid_t child = vfork();
    if (!child) {
        char byte;
        if (read(STDIN_FILENO, &byte, 1)) _exit(1);
        _exit(0);
    }
    waitpid(child, NULL, 0);
    asked_to_end = 1;
}

static void start_thread(void *(*body)(void *))
{
    /* signals are the main thread's */
    pthread_t thread;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    if (pthread_create(&thread, NULL, body, NULL)) abort();
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static void catch_signals(void)
{
    struct sigaction action = {.sa_sigaction = on_signal,
                               .sa_flags = SA_SIGINFO | (restarting ? SA_RESTART : 0)};
    const int stormed[] = {SIGUSR1, SIGUSR2, SIGALRM, SIGHUP, SIGTRAP, SIGCONT};
    for (size_t i = 0; i < sizeof stormed / sizeof *stormed; i++)
        sigaction(stormed[i], &action, NULL);
    sigaction(SIGRTMIN + 1, &action, NULL);
    action = (struct sigaction){.sa_handler = on_end};
    sigaction(SIGTERM, &action, NULL);
}

static void check_handlers(void)
{
    struct sigaction now;
    sigaction(SIGTRAP, NULL, &now);
    if (now.sa_sigaction != on_signal) damaged("the handler of SIGTRAP", 0);
}

static int storm(int count, char **arguments)
{
    pid_t target = atoi(arguments[0]);
    struct timespec pause = {.tv_nsec = atol(arguments[1]) * 1000};
    unsigned long queued = 0;
    for (unsigned long n = 0; !asked_to_end; n++) {
        int number = atoi(arguments[2 + n % (unsigned)(count - 2)]);
        if (kill(target, number)) return 1;
        queued += number == SIGRTMIN + 1;
        if (pause.tv_nsec) nanosleep(&pause, NULL);
    }
    dprintf(STDOUT_FILENO, "%lu\n", queued);
    return 0;
}

int main(int argc, char **argv)
{
    static const struct { const char *name; void (*round)(void); } modes[] = {
        {"spin", spin},         {"nanosleep", sleep_nanosleep},
        {"poll", sleep_poll},   {"ppoll", sleep_ppoll},
        {"futex", sleep_futex}, {"read", sleep_read},
        {"vfork", sleep_vfork}, {"vfork-alone", sleep_vfork},
    };
    const char *mode = argc > 1 ? argv[1] : "";
    restarting = argc < 3 || atoi(argv[2]);
    catch_signals();
    if (!strcmp(mode, "storm") && argc > 4) return storm(argc - 2, argv + 2);
    if (!strcmp(mode, "read") && !pipe(numbers)) start_thread(write_numbers);
    if (!strcmp(mode, "vfork") || !strcmp(mode, "leader-gone")) start_thread(sleep_on);
    dprintf(STDOUT_FILENO, "ready\n");
    if (!strcmp(mode, "leader-gone")) pthread_exit(NULL);
    if (!strcmp(mode, "exit")) {
        nanosleep(&(struct timespec){.tv_nsec = argc > 2 ? atol(argv[2]) : 0}, NULL);
        _exit(42);
    }
    for (size_t i = 0; i < sizeof modes / sizeof *modes; i++)
        for (; !strcmp(mode, modes[i].name) && !asked_to_end; rounds++) {
            modes[i].round();
            check_handlers();
        }
    dprintf(STDOUT_FILENO, "ok %lu %lu %lu\n", rounds, atomic_load(&signals_seen),
            atomic_load(&queued_seen));
    return 0;
}
