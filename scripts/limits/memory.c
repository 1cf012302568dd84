/* A userfaultfd of this process over memory like QEMU's RAM: a shared mapping of a memfd that
 * nothing has populated. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "limits.h"

/* Between two faults: long enough that the handler waits again when the next one comes. */
enum { PAUSE_NS = 100000 };

struct ram {
    uint8_t *at;
    uint64_t bytes;
    int uffd;
};

static uint8_t *map_memfd(uint64_t bytes)
{
    int fd = memfd_create("limits", MFD_CLOEXEC);
    if (fd < 0)
        fail(errno, "memfd_create");
    if (ftruncate(fd, (off_t)bytes))
        fail(errno, "ftruncate");
    uint8_t *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (at == MAP_FAILED)
        fail(errno, "mmap of the memfd");
    close(fd);
    return at;
}

static struct ram ram_create(uint64_t bytes)
{
    struct ram ram = {.at = map_memfd(bytes), .bytes = bytes};
    /* All that touches this memory is user code: no right is needed. */
    ram.uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
    if (ram.uffd < 0)
        fail(errno, "userfaultfd");
    struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_MISSING_SHMEM};
    if (ioctl(ram.uffd, UFFDIO_API, &api))
        fail(errno, "UFFDIO_API");
    struct uffdio_register range = {.range = {.start = (uintptr_t)ram.at, .len = bytes},
                                    .mode = UFFDIO_REGISTER_MODE_MISSING};
    if (ioctl(ram.uffd, UFFDIO_REGISTER, &range))
        fail(errno, "UFFDIO_REGISTER");
    return ram;
}

static void ram_destroy(struct ram *ram)
{
    munmap(ram->at, ram->bytes);
    close(ram->uffd);
}

/* `mode`: 0 wakes who waits there, UFFDIO_COPY_MODE_DONTWAKE does not. */
static void copy_to(const struct ram *ram, uint64_t offset, const uint8_t *data, uint64_t bytes,
                    uint64_t mode)
{
    struct uffdio_copy copy = {.dst = (uintptr_t)ram->at + offset,
                               .src = (uintptr_t)data,
                               .len = bytes,
                               .mode = mode};
    if (ioctl(ram->uffd, UFFDIO_COPY, &copy))
        fail(errno, "UFFDIO_COPY");
}

/* --- socket to UFFDIO_COPY ---------------------------------------------------------------- */

/* Every byte is where it belongs. Unregistered first: a page that is missing reads as zeroes
 * then, instead of never. */
static void check(const struct ram *ram)
{
    struct uffdio_range range = {.start = (uintptr_t)ram->at, .len = ram->bytes};
    uint8_t *expected = frame_create();
    if (ioctl(ram->uffd, UFFDIO_UNREGISTER, &range))
        fail(errno, "UFFDIO_UNREGISTER");
    for (uint64_t offset = 0; offset < ram->bytes; offset += PAGE_BYTES) {
        stamp(expected, offset, PAGE_BYTES);
        if (memcmp(ram->at + offset, expected, PAGE_BYTES))
            fail(0, "place: wrong content in page %llu",
                 (unsigned long long)(offset / PAGE_BYTES));
    }
}

void measure_place(const char *address, const char *port, uint64_t bytes)
{
    uint8_t *frame = frame_create();
    struct ram ram = ram_create(bytes);
    int server = connect_to(address, port);
    uint64_t start_ns = now_ns();
    ask(server, bytes);
    for (uint64_t offset = 0; offset < bytes; offset += FRAME_BYTES) {
        uint64_t left = bytes - offset, size = left < FRAME_BYTES ? left : FRAME_BYTES;
        receive(server, frame, size);
        copy_to(&ram, offset, frame, size, UFFDIO_COPY_MODE_DONTWAKE);
    }
    uint64_t spent_ns = now_ns() - start_ns;
    close(server);
    check(&ram);
    print_transfer(bytes, spent_ns);
    ram_destroy(&ram);
}

/* --- a fault ------------------------------------------------------------------------------ */

struct toucher {
    const struct ram *ram;
    uint64_t *spent_ns; /* from touch to return, of each page */
};

static void pause_awake(void)
{
    for (uint64_t start_ns = now_ns(); now_ns() - start_ns < PAUSE_NS;) {
    }
}

static void *touch_all(void *argument)
{
    const struct toucher *toucher = argument;
    uint64_t pages = toucher->ram->bytes / PAGE_BYTES;
    for (uint64_t page = 0; page < pages; page++) {
        const volatile uint8_t *at = toucher->ram->at + page * PAGE_BYTES;
        pause_awake();
        uint64_t start_ns = now_ns();
        int right = at[PAGE_BYTES - 1] == 0xA5;
        toucher->spent_ns[page] = now_ns() - start_ns;
        if (!right)
            fail(0, "fault: wrong content in page %llu", (unsigned long long)page);
    }
    return NULL;
}

/* Waits for the next fault; its page's offset. */
static uint64_t next_fault(const struct ram *ram, enum waiting waiting)
{
    struct uffd_msg message;
    struct pollfd fault = {.fd = ram->uffd, .events = POLLIN};
    uint64_t deadline_ns = now_ns() + DEADLINE_S * NS_PER_S;
    for (;;) {
        if (waiting != WAIT_SPIN && poll(&fault, 1, DEADLINE_S * 1000) < 0)
            fail(errno, "poll");
        ssize_t got = read(ram->uffd, &message, sizeof message);
        if (got == sizeof message)
            break;
        if (got >= 0 || errno != EAGAIN)
            fail(errno, "read of a fault");
        if (now_ns() > deadline_ns)
            fail(ETIMEDOUT, "wait for a fault");
    }
    if (message.event != UFFD_EVENT_PAGEFAULT)
        fail(0, "read of a fault: event %d", message.event);
    return (message.arg.pagefault.address - (uintptr_t)ram->at) / PAGE_BYTES * PAGE_BYTES;
}

static void join(pthread_t thread)
{
    struct timespec deadline;
    clock_gettime(CLOCK_MONOTONIC, &deadline);
    deadline.tv_sec += DEADLINE_S;
    int code = pthread_clockjoin_np(thread, NULL, CLOCK_MONOTONIC, &deadline);
    if (code)
        fail(code, "wait for the last fault to end");
}

/* Threads that are made later stay here, too. */
static void stay_on_this_core(void)
{
    cpu_set_t here;
    int core = sched_getcpu();
    if (core < 0)
        fail(errno, "sched_getcpu");
    CPU_ZERO(&here);
    CPU_SET((size_t)core, &here);
    if (sched_setaffinity(0, sizeof here, &here))
        fail(errno, "sched_setaffinity");
}

void measure_fault(enum waiting waiting, uint64_t count)
{
    if (waiting == WAIT_SAME_CORE)
        stay_on_this_core();
    uint8_t *page = frame_create();
    struct ram ram = ram_create(count * PAGE_BYTES);
    struct toucher toucher = {&ram, calloc(count, sizeof *toucher.spent_ns)};
    pthread_t thread;
    if (!toucher.spent_ns)
        fail(errno, "calloc");
    int code = pthread_create(&thread, NULL, touch_all, &toucher);
    if (code)
        fail(code, "pthread_create");
    for (uint64_t i = 0; i < count; i++)
        copy_to(&ram, next_fault(&ram, waiting), page, PAGE_BYTES, 0);
    join(thread);
    print_latencies(toucher.spent_ns, count);
    free(toucher.spent_ns);
    ram_destroy(&ram);
}
