/* Placing pages when the kernel answers what it seldom answers. */
#include "fake_ram.h"

#define PAGES 256

static char directory[] = "/tmp/qpc-handler-XXXXXX";
static uint8_t data[PAGES * QPC_PAGE_BYTES];
static struct qpc_error error;

static struct qpc_handler *fresh(void)
{
    fake_init(PAGES);
    for (size_t i = 0; i < sizeof data; i++)
        data[i] = (uint8_t)(i / QPC_PAGE_BYTES * 7 + i % 251);
    return fake_handler(directory, PAGES, -1, 1);
}

static int push(struct qpc_handler *handler, uint64_t first, uint64_t count)
{
    return qpc_handler_place(handler, 0, first, count, data + first * QPC_PAGE_BYTES, QPC_BY_PUSH,
                             &error);
}

static void check_placed(struct qpc_handler *handler, uint64_t first, uint64_t count)
{
    CHECK(!memcmp(fake.bytes + first * QPC_PAGE_BYTES, data + first * QPC_PAGE_BYTES,
                  count * QPC_PAGE_BYTES));
    for (uint64_t page = first; page < first + count; page++)
        CHECK(qpc_bits_test(&handler->blocks[0].placed, page));
}

static void short_copies_and_retries_lose_nothing(void)
{
    struct qpc_handler *handler = fresh();
    fake_plan(-1);     /* one page of 64, then EAGAIN */
    fake_plan(EAGAIN); /* no progress: mm changing */
    fake_plan(EAGAIN);
    fake_plan(-13);
    CHECK(!push(handler, 3, 200));
    check_placed(handler, 3, 200);
    CHECK(handler->shared->push_pages == 200 && handler->remaining_pages == PAGES - 200);
    CHECK(fake.wakes > 0);
    qpc_handler_destroy(handler);
}

static void a_second_copy_is_dropped_and_counted(void)
{
    struct qpc_handler *handler = fresh();
    CHECK(!push(handler, 10, 20));
    memset(fake.bytes + 12 * QPC_PAGE_BYTES, 0x5a, QPC_PAGE_BYTES); /* the guest wrote meanwhile */
    CHECK(!push(handler, 0, 64));
    CHECK(handler->shared->duplicate_pages == 20);
    CHECK(fake.bytes[12 * QPC_PAGE_BYTES] == 0x5a);
    CHECK(handler->shared->push_pages == 64);
    qpc_handler_destroy(handler);
}

static void a_stray_page_is_fatal_before_the_commit_only(void)
{
    struct qpc_handler *handler = fresh();
    fake.there[5] = 1;
    CHECK(push(handler, 0, 10) == QPC_STRAY);
    CHECK(error.code == QPC_STRAY && error.address == FAKE_HVA + 5 * QPC_PAGE_BYTES);
    qpc_handler_destroy(handler);

    handler = fresh();
    fake.there[5] = 1;
    qpc_handler_commit(handler);
    CHECK(!push(handler, 0, 10));
    CHECK(handler->shared->stray_pages == 1 && handler->remaining_pages == PAGES - 10);
    qpc_handler_destroy(handler);
}

static void errors_are_told_apart(void)
{
    const int given[] = {ESRCH, ENOENT, ENOMEM, EFAULT, EINVAL};
    const int expected[] = {QPC_GONE, QPC_SYSTEM, QPC_SYSTEM, QPC_SYSTEM, QPC_SYSTEM};
    for (int i = 0; i < 5; i++) {
        struct qpc_handler *handler = fresh();
        fake_plan(given[i]);
        fake_plan(given[i]);
        CHECK(push(handler, 0, 4) == expected[i]);
        CHECK(error.error_number == given[i]);
        qpc_handler_destroy(handler);
    }
}

static void a_run_across_a_split_mapping_goes_page_by_page(void)
{
    struct qpc_handler *handler = fresh();
    fake_plan(ENOENT); /* the kernel's answer to a run that no single VMA covers */
    CHECK(!push(handler, 0, 40));
    check_placed(handler, 0, 40);
    CHECK(handler->shared->push_pages == 40);
    qpc_handler_destroy(handler);
}

static void a_failed_claim_is_free_in_the_next_session(void)
{
    struct qpc_handler *handler = fresh();
    fake_plan(-2);
    fake_plan(ENOMEM);
    CHECK(push(handler, 0, 8) == QPC_SYSTEM);
    qpc_handler_stop(handler);
    qpc_handler_reset(handler);
    CHECK(!push(handler, 0, 8));
    check_placed(handler, 0, 8);
    CHECK(handler->shared->push_pages == 8 && handler->shared->duplicate_pages == 2);
    qpc_handler_destroy(handler);
}

static void zero_pages_are_known_and_not_placed(void)
{
    struct qpc_handler *handler = fresh();
    qpc_handler_know_zero(handler, 0, 0, 100, true);
    qpc_handler_know_zero(handler, 0, 50, 100, false); /* half of it again: counted once */
    CHECK(handler->shared->hole_pages == 100 && handler->shared->zero_pages == 50);
    CHECK(handler->remaining_pages == PAGES - 150);
    for (int page = 0; page < 150; page++)
        CHECK(!fake.there[page]);
    CHECK(!qpc_handler_place(handler, 0, 7, 1, NULL, QPC_BY_ZERO, &error));
    CHECK(fake.there[7] && handler->remaining_pages == PAGES - 150);
    qpc_handler_destroy(handler);
}

static void done_is_told_once_all_is_known(void)
{
    struct qpc_handler *handler = fresh();
    uint64_t value;
    qpc_handler_know_zero(handler, 0, 0, 100, true);
    CHECK(!push(handler, 0, PAGES - 1));
    CHECK(read(handler->done_fd, &value, sizeof value) < 0);
    CHECK(!push(handler, PAGES - 1, 1));
    CHECK(read(handler->done_fd, &value, sizeof value) == sizeof value && value == 1);
    qpc_handler_destroy(handler);
}

static void a_discarded_page_comes_back_as_zeroes(void)
{
    struct qpc_handler *handler = fresh();
    CHECK(!push(handler, 0, 4));
    fake.there[2] = 0; /* the balloon took it */
    memset(fake.bytes + 2 * QPC_PAGE_BYTES, 0, QPC_PAGE_BYTES);
    unsigned wakes = fake.wakes;
    CHECK(!qpc_handler_place_again(handler, 0, 2, &error));
    CHECK(fake.there[2] && fake.bytes[2 * QPC_PAGE_BYTES] == 0);
    CHECK(handler->shared->discarded_pages == 1 && fake.wakes == wakes + 1);
    CHECK(!qpc_handler_place_again(handler, 0, 3, &error)); /* stale fault: only a wake */
    CHECK(handler->shared->discarded_pages == 1 && fake.wakes == wakes + 2);
    qpc_handler_destroy(handler);
}

static void a_successor_knows_what_was_placed(void)
{
    struct qpc_handler *handler = fresh();
    int ram_fd = fileno(tmpfile());
    CHECK(!ftruncate(ram_fd, PAGES * QPC_PAGE_BYTES));
    CHECK(!push(handler, 0, 4));
    qpc_handler_know_zero(handler, 0, 100, 10, true);
    qpc_handler_destroy(handler); /* as good as SIGKILL: nothing is written at the end */

    handler = fake_handler(directory, PAGES, -1, 0);
    /* placed by the dead one between its ioctl and its bit */
    CHECK(pwrite(ram_fd, data, QPC_PAGE_BYTES, 40 * QPC_PAGE_BYTES) == QPC_PAGE_BYTES);
    fake.there[40] = 1;
    CHECK(!qpc_handler_adopt(handler, &ram_fd, &error));
    CHECK(handler->remaining_pages == PAGES - 4 - 10 - 1);
    CHECK(handler->shared->push_pages == 5 && handler->shared->hole_pages == 10);
    CHECK(!push(handler, 0, PAGES));
    CHECK(handler->shared->duplicate_pages == 5 && handler->shared->stray_pages == 0);
    CHECK(handler->remaining_pages == 0);
    close(ram_fd);
    qpc_handler_destroy(handler);
}

static void latency_buckets_are_in_order(void)
{
    double last = 0;
    for (unsigned bucket = 0; bucket < QPC_BUCKETS; bucket++) {
        CHECK(qpc_bucket_upper_us(bucket) > last);
        last = qpc_bucket_upper_us(bucket);
    }
    struct qpc_handler *handler = fresh();
    int64_t now_us = qpc_system_ops.now_us();
    qpc_handler_record_latency(handler, now_us - 1000);
    for (unsigned bucket = 0; bucket < QPC_BUCKETS; bucket++)
        if (handler->shared->fault_buckets[bucket])
            CHECK(qpc_bucket_upper_us(bucket) > 1000 && qpc_bucket_upper_us(bucket) < 100000);
    CHECK(handler->shared->fault_max_us >= 1000);
    qpc_handler_destroy(handler);
}

static void unmapped_blocks_are_refused(void)
{
    uint64_t pages = PAGES;
    struct qpc_mapping gap[] = {{0, FAKE_HVA, 100 * QPC_PAGE_BYTES, 0},
                                {0, FAKE_HVA + (1 << 30), 100 * QPC_PAGE_BYTES,
                                 101 * QPC_PAGE_BYTES}};
    char paths[3][300];
    const char *maps[2] = {paths[0], paths[1]};
    struct qpc_handler *handler;
    for (int i = 0; i < 3; i++)
        snprintf(paths[i], sizeof paths[i], "%s/gap%d", directory, i);
    struct qpc_handler_config config = {.uffd = -1, .block_count = 1, .block_pages = &pages,
                                        .map_paths = maps, .counter_path = paths[2],
                                        .mapping_count = 2, .mappings = gap, .fresh = 1};
    CHECK(qpc_handler_create(&handler, &config, &error) == QPC_REFUSED);
    for (int i = 0; i < 3; i++)
        unlink(paths[i]);
}

int main(void)
{
    CHECK(mkdtemp(directory));
    RUN(short_copies_and_retries_lose_nothing);
    RUN(a_second_copy_is_dropped_and_counted);
    RUN(a_stray_page_is_fatal_before_the_commit_only);
    RUN(errors_are_told_apart);
    RUN(a_run_across_a_split_mapping_goes_page_by_page);
    RUN(a_failed_claim_is_free_in_the_next_session);
    RUN(zero_pages_are_known_and_not_placed);
    RUN(done_is_told_once_all_is_known);
    RUN(a_discarded_page_comes_back_as_zeroes);
    RUN(a_successor_knows_what_was_placed);
    RUN(latency_buckets_are_in_order);
    RUN(unmapped_blocks_are_refused);
    char path[300];
    const char *names[] = {"placed", "zero", "counters"};
    for (int i = 0; i < 3; i++) {
        snprintf(path, sizeof path, "%s/%s", directory, names[i]);
        unlink(path);
    }
    return rmdir(directory);
}
