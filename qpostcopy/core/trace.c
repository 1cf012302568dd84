#include "trace.h"

#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE_BITS 48 /* of a record's location; the block is above */

_Static_assert(sizeof(struct qpc_trace_head) == 56, "as docs/trace.md has it");

/* Single writer: a load, a sum and a store are enough. The order (record first, count after) is
 * what a reader of a dead handler's file relies on. */
static void count_up(_Atomic uint64_t *counter)
{
    uint64_t now = le64toh(atomic_load_explicit(counter, memory_order_relaxed));
    atomic_store_explicit(counter, htole64(now + 1), memory_order_release);
}

static uint64_t used_bytes(const struct qpc_trace *trace)
{
    return le32toh(trace->head->records_offset) + qpc_trace_count(trace) * QPC_TRACE_RECORD_BYTES;
}

static int map_file(struct qpc_trace *trace, int fd, uint32_t records_offset,
                    struct qpc_error *error)
{
    size_t bytes = records_offset + (size_t)QPC_TRACE_RECORDS * QPC_TRACE_RECORD_BYTES;
    int failed = posix_fallocate(fd, 0, (off_t)bytes);
    if (failed)
        return qpc_fail(error, QPC_SYSTEM, failed, "allocate the trace file", 0, bytes);
    /* Populated: a fault's path takes no fault of its own, and what we hold does not grow. */
    void *mapped = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
    if (mapped == MAP_FAILED)
        return qpc_fail(error, QPC_SYSTEM, errno, "mmap of the trace file", 0, bytes);
    *trace = (struct qpc_trace){mapped, (uint8_t *)mapped + records_offset, bytes, fd};
    return QPC_OK;
}

int qpc_trace_open(struct qpc_trace *trace, const char *path, uint32_t records_offset,
                   struct qpc_error *error)
{
    int fd = open(path, O_RDWR | O_CLOEXEC | O_NOFOLLOW);
    if (fd < 0)
        return qpc_fail(error, QPC_SYSTEM, errno, "open the trace file", 0, 0);
    int code = records_offset < sizeof(struct qpc_trace_head)
                   ? qpc_fail(error, QPC_SYSTEM, EINVAL, "head of the trace file", records_offset, 0)
                   : map_file(trace, fd, records_offset, error);
    if (!code && (le32toh(trace->head->records_offset) != records_offset ||
                  qpc_trace_count(trace) > QPC_TRACE_RECORDS)) {
        munmap(trace->head, trace->mapped_bytes);
        code = qpc_fail(error, QPC_SYSTEM, EINVAL, "head of the trace file", records_offset, 0);
    }
    if (code) {
        close(fd);
        trace->head = NULL;
    }
    return code;
}

void qpc_trace_close(struct qpc_trace *trace)
{
    if (!trace->head)
        return;
    uint64_t used = used_bytes(trace);
    munmap(trace->head, trace->mapped_bytes);
    trace->head = NULL;
    (void)!ftruncate(trace->fd, (off_t)used); /* too long does no harm: readers go by the count */
    close(trace->fd);
}

void qpc_trace_begin(struct qpc_trace *trace, int64_t now_us)
{
    uint64_t unset = 0;
    if (trace->head)
        atomic_compare_exchange_strong(&trace->head->origin_us, &unset, htole64((uint64_t)now_us));
}

/* Microseconds since the commit; 0 before it. */
static uint64_t time_of(const struct qpc_trace *trace, int64_t read_us)
{
    int64_t origin_us = (int64_t)le64toh(atomic_load(&trace->head->origin_us));
    return origin_us && read_us > origin_us ? (uint64_t)(read_us - origin_us) : 0;
}

void qpc_trace_add(struct qpc_trace *trace, uint32_t block, uint64_t page, int64_t read_us)
{
    if (!trace->head)
        return;
    uint64_t count = qpc_trace_count(trace), time_us = time_of(trace, read_us);
    if (count == QPC_TRACE_RECORDS || time_us > QPC_TRACE_US) {
        count_up(&trace->head->left_out);
        return;
    }
    uint8_t *record = trace->records + count * QPC_TRACE_RECORD_BYTES;
    uint64_t location = htole64((uint64_t)block << PAGE_BITS | page);
    uint32_t time = htole32((uint32_t)time_us);
    memcpy(record, &location, sizeof location);
    memcpy(record + sizeof location, &time, sizeof time);
    count_up(&trace->head->record_count);
}

uint64_t qpc_trace_count(const struct qpc_trace *trace)
{
    return trace->head ? le64toh(atomic_load(&trace->head->record_count)) : 0;
}

uint64_t qpc_trace_left_out(const struct qpc_trace *trace)
{
    return trace->head ? le64toh(atomic_load(&trace->head->left_out)) : 0;
}
