/* The page maps against one byte a page, and the claims under threads. */
#include <pthread.h>
#include <string.h>
#include <unistd.h>

#include "check.h"
#include "map.h"

#define PAGES 517 /* no multiple of 64 */

static unsigned seed = 1;

static unsigned rnd(unsigned below)
{
    seed = seed * 1103515245u + 12345u;
    return (seed >> 8) % below;
}

static uint64_t model_set(uint8_t *model, uint64_t first, uint64_t count)
{
    uint64_t changed = 0;
    for (uint64_t page = first; page < first + count; page++) {
        changed += !model[page];
        model[page] = 1;
    }
    return changed;
}

static uint64_t count_of(const struct qpc_bits *bits)
{
    uint64_t count = 0;
    for (uint64_t page = 0; page < bits->pages; page++)
        count += qpc_bits_test(bits, page);
    return count;
}

static uint64_t model_next(const uint8_t *model, uint64_t from, uint64_t end, bool value)
{
    while (from < end && model[from] != value)
        from++;
    return from;
}

static void ranges_agree_with_a_model(void)
{
    struct qpc_bits bits;
    struct qpc_error error;
    uint8_t model[PAGES] = {0};
    CHECK(!qpc_bits_init(&bits, PAGES, &error));
    for (int round = 0; round < 100000; round++) {
        uint64_t first = rnd(PAGES), count = rnd((unsigned)(PAGES - first)) % 40 + 1;
        if (round % 50 == 0) {
            qpc_bits_clear_all(&bits);
            memset(model, 0, sizeof model);
        }
        switch (rnd(4)) {
        case 0:
            CHECK(qpc_bits_set(&bits, first, count) == model_set(model, first, count));
            break;
        case 2:
            CHECK(qpc_bits_test(&bits, first) == model[first]);
            break;
        case 3: {
            bool value = rnd(2);
            CHECK(qpc_bits_next(&bits, first, first + count, value) ==
                  model_next(model, first, first + count, value));
            break;
        }
        default: {
            struct qpc_run run = qpc_bits_claim(&bits, first, first + count);
            uint64_t expected = model_next(model, first, first + count, 0);
            CHECK(run.first == expected);
            if (expected == first + count)
                CHECK(run.count == 0);
            else
                CHECK(run.count > 0 && run.first + run.count <= first + count);
            CHECK(model_set(model, run.first, run.count) == run.count);
        }
        }
    }
    for (unsigned page = 0; page < PAGES; page++)
        CHECK(qpc_bits_test(&bits, page) == model[page]);
    qpc_bits_deinit(&bits);
}

static void next_without_is_the_difference(void)
{
    struct qpc_bits bits, without;
    struct qpc_error error;
    CHECK(!qpc_bits_init(&bits, PAGES, &error) && !qpc_bits_init(&without, PAGES, &error));
    qpc_bits_set(&bits, 10, 400);
    qpc_bits_set(&without, 10, 190);
    CHECK(qpc_bits_next_without(&bits, &without, 0, PAGES) == 200);
    CHECK(qpc_bits_next_without(&bits, &without, 0, 150) == 150);
    CHECK(qpc_bits_next_without(&bits, &without, 410, PAGES) == PAGES);
    qpc_bits_deinit(&bits);
    qpc_bits_deinit(&without);
}

#define RACERS 4
#define RACE_PAGES 200000
static struct qpc_bits raced;
static uint8_t owner[RACE_PAGES];

static void *race(void *name)
{
    uint64_t at = 0;
    while (at < RACE_PAGES) {
        struct qpc_run run = qpc_bits_claim(&raced, at, RACE_PAGES);
        for (uint64_t page = run.first; page < run.first + run.count; page++)
            owner[page]++; /* TSan and the count below: nobody else has it */
        at = run.first + (run.count > 3 ? 3 : run.count);
        if (!run.count)
            break;
    }
    return name;
}

static void a_page_is_won_once(void)
{
    struct qpc_error error;
    pthread_t racers[RACERS];
    CHECK(!qpc_bits_init(&raced, RACE_PAGES, &error));
    for (int i = 0; i < RACERS; i++)
        CHECK(!pthread_create(&racers[i], NULL, race, NULL));
    for (int i = 0; i < RACERS; i++)
        pthread_join(racers[i], NULL);
    for (int page = 0; page < RACE_PAGES; page++)
        CHECK(owner[page] == 1);
    qpc_bits_deinit(&raced);
}

static void files_survive_and_are_checked(void)
{
    struct qpc_bits bits;
    struct qpc_error error;
    char path[] = "/tmp/qpc-map-XXXXXX";
    int fd = mkstemp(path);
    CHECK(fd >= 0);
    close(fd);
    CHECK(qpc_bits_open(&bits, path, PAGES, true, &error) == QPC_SYSTEM); /* there already */
    unlink(path);
    CHECK(qpc_bits_open(&bits, path, PAGES, false, &error) == QPC_SYSTEM); /* not there */
    CHECK(!qpc_bits_open(&bits, path, PAGES, true, &error));
    qpc_bits_set(&bits, 500, 17);
    qpc_bits_deinit(&bits);
    CHECK(qpc_bits_open(&bits, path, PAGES + 64, false, &error) == QPC_SYSTEM); /* other size */
    CHECK(!qpc_bits_open(&bits, path, PAGES, false, &error));
    CHECK(count_of(&bits) == 17 && qpc_bits_test(&bits, 516));
    qpc_bits_deinit(&bits);
    unlink(path);
}

static void data_beyond_the_block_is_passed_over(void)
{
    struct qpc_bits bits;
    struct qpc_error error;
    FILE *file = tmpfile();
    int fd = fileno(file);
    const uint64_t written[] = {0, 63, 99, 100, 5000};
    CHECK(!qpc_bits_init(&bits, 100, &error));
    for (size_t i = 0; i < sizeof written / sizeof *written; i++)
        CHECK(pwrite(fd, "x", 1, (off_t)(written[i] * QPC_PAGE_BYTES)) == 1);
    CHECK(!qpc_bits_set_data(&bits, fd, &error));
    CHECK(count_of(&bits) == 3 && qpc_bits_test(&bits, 0) && qpc_bits_test(&bits, 63) &&
          qpc_bits_test(&bits, 99));
    CHECK(qpc_bits_set_data(&bits, -1, &error) == QPC_SYSTEM); /* no answer is not a hole */
    fclose(file);
    qpc_bits_deinit(&bits);
}

int main(void)
{
    RUN(data_beyond_the_block_is_passed_over);
    RUN(ranges_agree_with_a_model);
    RUN(next_without_is_the_difference);
    RUN(a_page_is_won_once);
    RUN(files_survive_and_are_checked);
    return 0;
}
