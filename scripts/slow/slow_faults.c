/* A userfault handler that is slower on purpose: for LD_PRELOAD, to check the benchmark.
 *
 *   read(userfaultfd)   tells which pages threads wait for
 *   ioctl(userfaultfd)  the first COPY, ZEROPAGE or WAKE over a page that is waited for
 *                       is held back, in the thread that makes it, and then done
 *
 * Copies of pages that nobody waits for go on as fast as ever. A thread that has slept
 * while a fault waited does not sleep for the same time again when it comes to that
 * fault: delays of faults that wait together run side by side. (A fault whose own
 * answer came later than that sleep is then delayed by less; it takes several vCPUs.)
 *
 * QPOSTCOPY_SLOW_FAULTS_US: how much later, us. */
#include <errno.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define VARIABLE "QPOSTCOPY_SLOW_FAULTS_US"
#define WAITERS 4096 /* each is a thread that waits: a vCPU, or one of QEMU's own */
#define MOST_US 60000000

struct waiter {
    int fd;
    uint64_t hva;
    int64_t read_us;
};

/* Of the process, as what is interposed is. */
static int64_t delay_us;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct waiter waiters[WAITERS];
static size_t waiter_count;

/* When this thread was last held back. */
static _Thread_local int64_t rest_from_us, rest_to_us;

static _Noreturn void give_up(const char *why)
{
    fprintf(stderr, "slow_faults: %s\n", why);
    _exit(1);
}

__attribute__((constructor)) static void read_delay(void)
{
    const char *text = getenv(VARIABLE);
    char *end = NULL;
    delay_us = text ? strtoll(text, &end, 10) : -1;
    if (delay_us < 0 || delay_us > MOST_US || end == text || *end)
        give_up(VARIABLE " is not a number of microseconds up to a minute");
}

static int64_t now_us(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

/* --- who waits ----------------------------------------------------------------------------- */

static bool is_userfaultfd(int fd)
{
    static const char expected[] = "anon_inode:[userfaultfd]";
    char path[32], target[sizeof expected];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(path, target, sizeof target);
    return length == sizeof expected - 1 && !memcmp(target, expected, sizeof expected - 1);
}

static bool waits(int fd, uint64_t hva)
{
    for (size_t i = 0; i < waiter_count; i++)
        if (waiters[i].fd == fd && waiters[i].hva == hva)
            return true;
    return false;
}

static void add_waiter(int fd, uint64_t hva, int64_t read_us)
{
    pthread_mutex_lock(&lock);
    if (!waits(fd, hva)) { /* several threads may wait for one page */
        if (waiter_count == WAITERS)
            give_up("more threads wait than can be");
        waiters[waiter_count++] = (struct waiter){fd, hva, read_us};
    }
    pthread_mutex_unlock(&lock);
}

/* Forget those who wait within the range; when the last of them was read, 0: none waits. */
static int64_t take_waiters(int fd, uint64_t start, uint64_t length)
{
    int64_t last_us = 0;
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < waiter_count;) {
        struct waiter *waiter = &waiters[i];
        if (waiter->fd != fd || waiter->hva - start >= length) {
            i++;
            continue;
        }
        if (waiter->read_us > last_us)
            last_us = waiter->read_us;
        *waiter = waiters[--waiter_count];
    }
    pthread_mutex_unlock(&lock);
    return last_us;
}

/* --- holding back -------------------------------------------------------------------------- */

/* Timers may fire later by a thread's slack, 50 us: too much beside what is measured. */
static void sleep_until(int64_t until_us)
{
    struct timespec until = {.tv_sec = until_us / 1000000, .tv_nsec = until_us % 1000000 * 1000};
    int slack_ns = prctl(PR_GET_TIMERSLACK);
    prctl(PR_SET_TIMERSLACK, 1ul);
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL) == EINTR) {
    }
    prctl(PR_SET_TIMERSLACK, (unsigned long)slack_ns);
}

/* For a fault that has waited since `read_us`. */
static void hold_back(int64_t read_us)
{
    int64_t from_us = read_us > rest_from_us ? read_us : rest_from_us;
    int64_t slept_us = rest_to_us > from_us ? rest_to_us - from_us : 0;
    if (slept_us >= delay_us)
        return;
    int64_t start_us = now_us();
    sleep_until(start_us + delay_us - slept_us);
    rest_from_us = start_us;
    rest_to_us = now_us();
}

/* --- what is interposed -------------------------------------------------------------------- */

ssize_t read(int fd, void *buffer, size_t length)
{
    struct uffd_msg message;
    ssize_t got = syscall(SYS_read, fd, buffer, length);
    if (got <= 0 || (size_t)got % sizeof message)
        return got;
    int64_t read_us = 0;
    for (size_t at = 0; at < (size_t)got; at += sizeof message) {
        memcpy(&message, (const char *)buffer + at, sizeof message);
        if (message.event != UFFD_EVENT_PAGEFAULT)
            continue;
        if (!read_us && !is_userfaultfd(fd)) /* asked of reads alone that look like faults */
            return got;
        read_us = read_us ? read_us : now_us();
        add_waiter(fd, message.arg.pagefault.address, read_us);
    }
    return got;
}

/* The range that a request answers; length 0: it answers none. */
static struct uffdio_range answered(unsigned long request, const void *argument)
{
    const struct uffdio_copy *copy = argument;
    const struct uffdio_zeropage *zero = argument;
    switch (request) {
    case UFFDIO_COPY:
        return (struct uffdio_range){copy->dst, copy->len};
    case UFFDIO_ZEROPAGE:
        return zero->range;
    case UFFDIO_WAKE:
        return *(const struct uffdio_range *)argument;
    default:
        return (struct uffdio_range){0, 0};
    }
}

int ioctl(int fd, unsigned long request, ...)
{
    va_list more;
    va_start(more, request);
    void *argument = va_arg(more, void *);
    va_end(more);
    struct uffdio_range range = answered(request, argument);
    int64_t read_us = range.len ? take_waiters(fd, range.start, range.len) : 0;
    if (read_us)
        hold_back(read_us);
    return (int)syscall(SYS_ioctl, fd, request, argument);
}
