/* scripts/slow/slow_faults.c, linked in instead of preloaded, on a userfaultfd of our own.
 *
 * Its delay is so long that what is late by it and what is not cannot be mixed up. */
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "check.h"

#define PAGE 4096ul
#define PAGES 512ul
#define THREADS 4
#define DELAY_US 600000 /* as the test sets QPOSTCOPY_SLOW_FAULTS_US */

static int uffd;
static char *memory, *content;

static int64_t now_us(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

static uint64_t hva_of(uint64_t page)
{
    return (uintptr_t)memory + page * PAGE;
}

static void set_up(void)
{
    struct uffdio_api api = {.api = UFFD_API};
    uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
    memory = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    content = malloc(PAGES * PAGE);
    CHECK(uffd >= 0 && memory != MAP_FAILED && content);
    memset(content, 7, PAGES * PAGE);
    CHECK(ioctl(uffd, UFFDIO_API, &api) == 0);
    struct uffdio_register range = {.range = {(uintptr_t)memory, PAGES * PAGE},
                                    .mode = UFFDIO_REGISTER_MODE_MISSING};
    CHECK(ioctl(uffd, UFFDIO_REGISTER, &range) == 0);
}

static void tear_down(void)
{
    close(uffd);
    munmap(memory, PAGES * PAGE);
    free(content);
}

/* --- what a handler does ------------------------------------------------------------------- */

/* How long it took. */
static int64_t copy(uint64_t page, uint64_t count)
{
    struct uffdio_copy copy = {.dst = hva_of(page),
                               .src = (uintptr_t)content,
                               .len = count * PAGE,
                               .mode = UFFDIO_COPY_MODE_DONTWAKE};
    int64_t start_us = now_us();
    CHECK(ioctl(uffd, UFFDIO_COPY, &copy) == 0);
    return now_us() - start_us;
}

static int64_t zero(uint64_t page)
{
    struct uffdio_zeropage zero = {.range = {hva_of(page), PAGE},
                                   .mode = UFFDIO_ZEROPAGE_MODE_DONTWAKE};
    int64_t start_us = now_us();
    CHECK(ioctl(uffd, UFFDIO_ZEROPAGE, &zero) == 0);
    return now_us() - start_us;
}

static int64_t wake(uint64_t page, uint64_t count)
{
    struct uffdio_range range = {hva_of(page), count * PAGE};
    int64_t start_us = now_us();
    CHECK(ioctl(uffd, UFFDIO_WAKE, &range) == 0);
    return now_us() - start_us;
}

/* --- threads that fault -------------------------------------------------------------------- */

struct toucher {
    pthread_t thread;
    uint64_t page;
    char seen;
};

static void *touch(void *argument)
{
    struct toucher *toucher = argument;
    toucher->seen = *(volatile char *)(memory + toucher->page * PAGE);
    return NULL;
}

/* Every 64th page is touched; returns when all those faults have been read. */
static void start_touching(struct toucher *touchers, size_t count)
{
    struct uffd_msg message;
    for (size_t i = 0; i < count; i++) {
        touchers[i] = (struct toucher){.page = 64 * i};
        CHECK(!pthread_create(&touchers[i].thread, NULL, touch, &touchers[i]));
    }
    for (size_t i = 0; i < count; i++)
        CHECK(read(uffd, &message, sizeof message) == sizeof message);
}

static void expect_touched(struct toucher *touchers, size_t count, char seen)
{
    for (size_t i = 0; i < count; i++) {
        CHECK(!pthread_join(touchers[i].thread, NULL));
        CHECK(touchers[i].seen == seen);
    }
}

static bool is_late(int64_t took_us)
{
    return took_us >= DELAY_US;
}

static bool is_prompt(int64_t took_us)
{
    return took_us < DELAY_US / 2;
}

/* --- tests --------------------------------------------------------------------------------- */

static void test_the_copy_that_answers_is_late_and_its_wake_is_not(void)
{
    struct toucher toucher;
    set_up();
    start_touching(&toucher, 1);
    CHECK(is_late(copy(0, 1)));
    CHECK(is_prompt(wake(0, 1)));
    expect_touched(&toucher, 1, 7);
    tear_down();
}

static void test_zeroes_are_late(void)
{
    struct toucher toucher;
    set_up();
    start_touching(&toucher, 1);
    CHECK(is_late(zero(0)));
    CHECK(is_prompt(wake(0, 1)));
    expect_touched(&toucher, 1, 0);
    tear_down();
}

/* The page was on its way when its fault was read. */
static void test_a_wake_alone_is_late(void)
{
    struct toucher toucher;
    set_up();
    start_touching(&toucher, 1);
    content[0] = 8;
    struct uffdio_copy unseen = {.dst = hva_of(0),
                                 .src = (uintptr_t)content,
                                 .len = PAGE,
                                 .mode = UFFDIO_COPY_MODE_DONTWAKE};
    CHECK(syscall(SYS_ioctl, uffd, UFFDIO_COPY, &unseen) == 0);
    CHECK(is_late(wake(0, PAGES)));
    expect_touched(&toucher, 1, 8);
    tear_down();
}

static void test_bulk_copies_are_as_fast_as_they_are(void)
{
    struct toucher toucher;
    int64_t took_us = 0;
    set_up();
    start_touching(&toucher, 1);
    for (uint64_t page = 1; page + 7 < PAGES; page += 7)
        took_us += copy(page, 7) + wake(page, 7);
    CHECK(is_prompt(took_us));
    CHECK(is_late(copy(0, 1)));
    wake(0, 1);
    expect_touched(&toucher, 1, 7);
    tear_down();
}

static void test_one_copy_over_several_that_wait_is_late_once(void)
{
    struct toucher touchers[THREADS];
    set_up();
    start_touching(touchers, THREADS);
    int64_t took_us = copy(0, PAGES);
    CHECK(is_late(took_us) && took_us < 2 * DELAY_US);
    CHECK(is_prompt(wake(0, PAGES)));
    expect_touched(touchers, THREADS, 7);
    tear_down();
}

static void test_delays_of_faults_that_wait_together_do_not_add_up(void)
{
    struct toucher touchers[THREADS];
    set_up();
    start_touching(touchers, THREADS);
    int64_t took_us = 0;
    for (uint64_t i = 0; i < THREADS; i++)
        took_us += copy(64 * i, 1);
    CHECK(is_late(took_us) && took_us < 2 * DELAY_US);
    CHECK(is_prompt(wake(0, PAGES)));
    expect_touched(touchers, THREADS, 7);
    tear_down();
}

static void test_a_fault_that_comes_later_waits_as_long(void)
{
    struct toucher first;
    for (int round = 0; round < 2; round++) {
        set_up();
        start_touching(&first, 1);
        CHECK(is_late(copy(0, 1)));
        wake(0, 1);
        expect_touched(&first, 1, 7);
        tear_down();
    }
}

/* What reads like a fault is none if it does not come from a userfaultfd. */
static void test_other_descriptors_are_left_alone(void)
{
    struct uffd_msg message = {.event = UFFD_EVENT_PAGEFAULT}, got;
    int ends[2];
    CHECK(pipe(ends) == 0);
    message.arg.pagefault.address = PAGE;
    CHECK(write(ends[1], &message, sizeof message) == sizeof message);
    CHECK(read(ends[0], &got, sizeof got) == sizeof got);
    CHECK(!memcmp(&message, &got, sizeof got));
    struct uffdio_range range = {PAGE, PAGE};
    int64_t start_us = now_us();
    CHECK(ioctl(ends[0], UFFDIO_WAKE, &range) == -1);
    CHECK(is_prompt(now_us() - start_us));
    close(ends[0]);
    close(ends[1]);
}

int main(void)
{
    RUN(test_the_copy_that_answers_is_late_and_its_wake_is_not);
    RUN(test_zeroes_are_late);
    RUN(test_a_wake_alone_is_late);
    RUN(test_bulk_copies_are_as_fast_as_they_are);
    RUN(test_one_copy_over_several_that_wait_is_late_once);
    RUN(test_delays_of_faults_that_wait_together_do_not_add_up);
    RUN(test_a_fault_that_comes_later_waits_as_long);
    RUN(test_other_descriptors_are_left_alone);
    return 0;
}
