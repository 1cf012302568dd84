/* A guest's RAM without a guest: ops that place pages in plain memory.
 *
 * For results that no real kernel gives on demand (EAGAIN, short copies, EEXIST,
 * ESRCH), and for the loops under TSan. tests/core and tests/vm have the real thing. */
#ifndef FAKE_RAM_H
#define FAKE_RAM_H

#include <errno.h>
#include <sys/ioctl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <string.h>

#include <unistd.h>

#include "check.h"
#include "handler.h"

#define FAKE_HVA 0x7f0000000000ull

struct fake_ram {
    uint8_t *bytes, *there; /* pages, and a flag for each */
    uint64_t pages;
    int plan[64];           /* what the next ioctls do: 0 right, n > 0 fail with errno n,
                               n < 0 place -n pages and report EAGAIN */
    unsigned planned, used;
    unsigned wakes;
    pthread_mutex_t lock;
};

static struct fake_ram fake = {.lock = PTHREAD_MUTEX_INITIALIZER};

static void fake_init(uint64_t pages)
{
    free(fake.bytes);
    free(fake.there);
    fake.bytes = calloc(pages, QPC_PAGE_BYTES);
    fake.there = calloc(pages, 1);
    fake.pages = pages;
    fake.planned = fake.used = fake.wakes = 0;
}

static inline void fake_plan(int what) { fake.plan[fake.planned++] = what; }

static int64_t fake_place(uint64_t hva, const void *source, uint64_t length)
{
    uint64_t first = (hva - FAKE_HVA) / QPC_PAGE_BYTES, count = length / QPC_PAGE_BYTES;
    int what = fake.used < fake.planned ? fake.plan[fake.used++] : 0;
    uint64_t most = what < 0 ? (uint64_t)-what : count;
    if (what > 0)
        return -what;
    for (uint64_t i = 0; i < count && i < most; i++) {
        if (fake.there[first + i])
            return i ? (int64_t)(i * QPC_PAGE_BYTES) : -EEXIST;
        fake.there[first + i] = 1;
        if (source)
            memcpy(fake.bytes + (first + i) * QPC_PAGE_BYTES,
                   (const uint8_t *)source + i * QPC_PAGE_BYTES, QPC_PAGE_BYTES);
    }
    return (int64_t)((most < count ? most : count) * QPC_PAGE_BYTES);
}

/* As the kernel answers: the field, and -1 with EAGAIN for a short copy. */
static int fake_answer(int64_t done, uint64_t length, int64_t *field)
{
    *field = done;
    if (done == (int64_t)length)
        return 0;
    errno = done < 0 ? (int)-done : EAGAIN;
    return -1;
}

static int fake_ioctl(int fd, unsigned long request, void *argument)
{
    (void)fd;
    int result = 0;
    pthread_mutex_lock(&fake.lock);
    if (request == UFFDIO_COPY) {
        struct uffdio_copy *copy = argument;
        const void *source = (const void *)(uintptr_t)copy->src;
        int64_t done = fake_place(copy->dst, source, copy->len), field;
        result = fake_answer(done, copy->len, &field);
        copy->copy = field;
    } else if (request == UFFDIO_ZEROPAGE) {
        struct uffdio_zeropage *zero = argument;
        int64_t done = fake_place(zero->range.start, NULL, zero->range.len), field;
        result = fake_answer(done, zero->range.len, &field);
        zero->zeropage = field;
    }
    if (request == UFFDIO_WAKE)
        fake.wakes++;
    pthread_mutex_unlock(&fake.lock);
    return result;
}

static struct qpc_ops fake_ops; /* set up by fake_handler: the clock and read are the real ones */

/* A handler over the fake RAM, one block of `pages`, its files below `directory`. */
static struct qpc_handler *fake_handler(const char *directory, uint64_t pages, int uffd, int fresh)
{
    char paths[3][300];
    const char *maps[2] = {paths[0], paths[1]};
    struct qpc_mapping mapping = {0, FAKE_HVA, pages * QPC_PAGE_BYTES, 0};
    struct qpc_handler *handler;
    struct qpc_error error;
    snprintf(paths[0], sizeof paths[0], "%s/placed", directory);
    snprintf(paths[1], sizeof paths[1], "%s/zero", directory);
    snprintf(paths[2], sizeof paths[2], "%s/counters", directory);
    struct qpc_handler_config config = {.uffd = uffd,
                                        .block_count = 1,
                                        .block_pages = &pages,
                                        .map_paths = maps,
                                        .counter_path = paths[2],
                                        .mapping_count = 1,
                                        .mappings = &mapping,
                                        .ahead_pages = 2,
                                        .behind_pages = 1,
                                        .fresh = fresh};
    if (fresh)
        for (int i = 0; i < 3; i++)
            unlink(paths[i]);
    CHECK(!qpc_handler_create(&handler, &config, &error));
    fake_ops = (struct qpc_ops){fake_ioctl, qpc_system_ops.read, qpc_system_ops.now_us};
    handler->ops = &fake_ops;
    return handler;
}

#endif
