/* The fault recorder: bounded, in order, and whole after a death at any point. */
#include <endian.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "fake_ram.h"

#define PAGES 256
#define OFFSET 64

static char directory[] = "/tmp/qpc-trace-XXXXXX";
static char path[300];
static struct qpc_error error;

static void fresh_file(void)
{
    struct qpc_trace_head head = {.version = htole16(1), .records_offset = htole32(OFFSET)};
    unlink(path);
    int fd = open(path, O_CREAT | O_EXCL | O_WRONLY, 0600);
    CHECK(write(fd, &head, sizeof head) == sizeof head);
    close(fd);
}

static struct qpc_trace opened(void)
{
    struct qpc_trace trace = {0};
    CHECK(!qpc_trace_open(&trace, path, OFFSET, &error));
    return trace;
}

static off_t file_bytes(void)
{
    struct stat status;
    CHECK(!stat(path, &status));
    return status.st_size;
}

static void check_record(const struct qpc_trace *trace, uint64_t index, uint32_t block,
                         uint64_t page, uint32_t time_us)
{
    uint64_t location;
    uint32_t time;
    memcpy(&location, trace->records + index * QPC_TRACE_RECORD_BYTES, sizeof location);
    memcpy(&time, trace->records + index * QPC_TRACE_RECORD_BYTES + sizeof location, sizeof time);
    CHECK(le64toh(location) == ((uint64_t)block << 48 | page));
    CHECK(le32toh(time) == time_us);
}

static void time_counts_from_the_commit(void)
{
    fresh_file();
    struct qpc_trace trace = opened();
    qpc_trace_add(&trace, 0, 7, 900); /* while the device state is loaded */
    qpc_trace_begin(&trace, 1000);
    qpc_trace_begin(&trace, 5000); /* by a handler that has taken over: it stays as it was */
    qpc_trace_add(&trace, 1, 9, 999); /* read before, looked at after */
    qpc_trace_add(&trace, 65535, (1ull << 36) - 1, 1000 + QPC_TRACE_US);
    CHECK(qpc_trace_count(&trace) == 3 && qpc_trace_left_out(&trace) == 0);
    check_record(&trace, 0, 0, 7, 0);
    check_record(&trace, 1, 1, 9, 0);
    check_record(&trace, 2, 65535, (1ull << 36) - 1, QPC_TRACE_US);
    qpc_trace_close(&trace);
}

static void a_late_fault_is_left_out_and_counted(void)
{
    fresh_file();
    struct qpc_trace trace = opened();
    qpc_trace_begin(&trace, 1);
    qpc_trace_add(&trace, 0, 1, 2 + QPC_TRACE_US);
    CHECK(qpc_trace_count(&trace) == 0 && qpc_trace_left_out(&trace) == 1);
    qpc_trace_close(&trace);
    CHECK(file_bytes() == OFFSET);
}

static void a_full_trace_stays_as_it_is(void)
{
    fresh_file();
    struct qpc_trace trace = opened();
    qpc_trace_begin(&trace, 1);
    for (uint64_t i = 0; i < QPC_TRACE_RECORDS + 3; i++)
        qpc_trace_add(&trace, 0, i, 1 + (int64_t)(i / 100));
    CHECK(qpc_trace_count(&trace) == QPC_TRACE_RECORDS && qpc_trace_left_out(&trace) == 3);
    check_record(&trace, QPC_TRACE_RECORDS - 1, 0, QPC_TRACE_RECORDS - 1,
                 (QPC_TRACE_RECORDS - 1) / 100);
    qpc_trace_close(&trace);
    CHECK(file_bytes() == OFFSET + (off_t)QPC_TRACE_RECORDS * QPC_TRACE_RECORD_BYTES);
}

static void a_successor_goes_on_where_the_dead_one_was(void)
{
    fresh_file();
    struct qpc_trace dead = opened();
    qpc_trace_begin(&dead, 100);
    qpc_trace_add(&dead, 0, 1, 110); /* and SIGKILL: nothing is closed */
    struct qpc_trace trace = opened();
    qpc_trace_begin(&trace, 70000);
    qpc_trace_add(&trace, 0, 2, 120);
    check_record(&trace, 0, 0, 1, 10);
    check_record(&trace, 1, 0, 2, 20);
    qpc_trace_close(&trace);
    CHECK(file_bytes() == OFFSET + 2 * QPC_TRACE_RECORD_BYTES);

    trace = opened(); /* one that was finished can be gone on with, too */
    qpc_trace_add(&trace, 0, 3, 130);
    check_record(&trace, 1, 0, 2, 20);
    check_record(&trace, 2, 0, 3, 30);
    qpc_trace_close(&trace);
    munmap(dead.head, dead.mapped_bytes);
    close(dead.fd);
}

static void what_is_no_trace_is_refused(void)
{
    struct qpc_trace trace = {0};
    unlink(path);
    CHECK(qpc_trace_open(&trace, path, OFFSET, &error) == QPC_SYSTEM);
    CHECK(error.error_number == ENOENT && !trace.head);
    fresh_file();
    CHECK(qpc_trace_open(&trace, path, OFFSET + 8, &error) == QPC_SYSTEM && !trace.head);
    CHECK(qpc_trace_open(&trace, path, 8, &error) == QPC_SYSTEM && !trace.head);
    uint64_t too_many = htole64(QPC_TRACE_RECORDS + 1ull);
    int fd = open(path, O_WRONLY);
    CHECK(pwrite(fd, &too_many, sizeof too_many, 24) == sizeof too_many);
    close(fd);
    CHECK(qpc_trace_open(&trace, path, OFFSET, &error) == QPC_SYSTEM && !trace.head);
    qpc_trace_add(&trace, 0, 1, 1); /* without a file nothing happens */
    CHECK(!qpc_trace_count(&trace) && !qpc_trace_left_out(&trace));
    qpc_trace_close(&trace);
}

/* A userfaultfd that has one batch of faults to tell, and then the loop's stop. */
static const uint64_t *told;
static size_t told_count;
static struct qpc_handler *telling;

static ssize_t tell(int fd, void *buffer, size_t length)
{
    (void)fd;
    struct uffd_msg *messages = buffer;
    CHECK(told_count * sizeof *messages <= length);
    memset(messages, 0, told_count * sizeof *messages);
    for (size_t i = 0; i < told_count; i++) {
        messages[i].event = UFFD_EVENT_PAGEFAULT;
        messages[i].arg.pagefault.address = FAKE_HVA + told[i] * QPC_PAGE_BYTES;
    }
    qpc_handler_stop(telling);
    return (ssize_t)(told_count * sizeof *messages);
}

static void only_missing_pages_are_recorded(void)
{
    static uint8_t data[QPC_PAGE_BYTES];
    const uint64_t pages[] = {9, 3, 5, 200, 9};
    fake_init(PAGES);
    struct qpc_handler *handler = fake_handler(directory, PAGES, -1, 1);
    fresh_file();
    CHECK(!qpc_handler_record(handler, path, OFFSET, &error));
    struct qpc_ops ops = {fake_ioctl, tell, qpc_system_ops.now_us};
    handler->ops = &ops;
    CHECK(!qpc_handler_place(handler, 0, 3, 1, data, QPC_BY_PUSH, &error)); /* here already */
    qpc_handler_know_zero(handler, 0, 5, 1, true);                          /* known, not here */
    qpc_bits_set(&handler->blocks[0].requested, 200, 1);                    /* asked for already */
    told = pages;
    told_count = 5;
    telling = handler;
    qpc_handler_commit(handler);
    CHECK(qpc_handler_run_local(handler, &error) == QPC_STOPPED);
    struct qpc_handler_counters counters;
    qpc_handler_counters_read(handler, &counters);
    /* 9 twice: without lanes nothing is asked for, and the next session raises it again */
    CHECK(counters.traced_faults == 3 && counters.untraced_faults == 0 && counters.faults == 5);
    CHECK(handler->trace.records[0] == 9 && handler->trace.records[QPC_TRACE_RECORD_BYTES] == 5);
    qpc_handler_destroy(handler);
    CHECK(file_bytes() == OFFSET + 3 * QPC_TRACE_RECORD_BYTES);
}

int main(void)
{
    CHECK(mkdtemp(directory));
    snprintf(path, sizeof path, "%s/trace", directory);
    RUN(time_counts_from_the_commit);
    RUN(a_late_fault_is_left_out_and_counted);
    RUN(a_full_trace_stays_as_it_is);
    RUN(a_successor_goes_on_where_the_dead_one_was);
    RUN(what_is_no_trace_is_refused);
    RUN(only_missing_pages_are_recorded);
    char file[300];
    const char *names[] = {"placed", "zero", "counters", "trace"};
    for (int i = 0; i < 4; i++) {
        snprintf(file, sizeof file, "%s/%s", directory, names[i]);
        unlink(file);
    }
    free(fake.bytes);
    free(fake.there);
    return rmdir(directory);
}
