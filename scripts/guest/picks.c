#define _GNU_SOURCE
#include "picks.h"

#include <fcntl.h>
#include <math.h>
#include <stdlib.h>
#include <unistd.h>

#include "console.h"
#include "pages.h"

uint64_t pick_hot(void)
{
    uint64_t hot = memory.total_pages / 20, warm = memory.total_pages / 5;
    uint64_t dice = random_below(1000);
    if (dice < 950)
        return random_below(hot);
    if (dice < 995)
        return hot + random_below(warm);
    return random_below(memory.touched_pages);
}

uint64_t pick_data(void)
{
    return random_below(memory.data_pages);
}

/* --- Zipf -------------------------------------------------------------------------------- */

/* The distribution's quantiles, as ranks in fixed point: between two of them the ranks are
 * as good as equally likely. So a pick costs two random numbers and no pow(). */
enum { QUANTILES = 4096, FRACTION_BITS = 20 };

static const double EXPONENT = 0.99;
static uint64_t quantiles[QUANTILES + 1];

static double weight(uint64_t rank)
{
    return pow((double)(rank + 1), -EXPONENT);
}

void prepare_zipf(void)
{
    double total = 0, below = 0;
    for (uint64_t rank = 0; rank < memory.touched_pages; rank++)
        total += weight(rank);
    unsigned next = 0;
    for (uint64_t rank = 0; rank < memory.touched_pages; rank++) {
        double own = weight(rank);
        for (double at; next < QUANTILES && (at = total * next / QUANTILES) < below + own; next++)
            quantiles[next] = (uint64_t)(((double)rank + (at - below) / own) * (1 << FRACTION_BITS));
        below += own;
    }
    /* The last one, and any that rounding kept from being reached. */
    for (; next <= QUANTILES; next++)
        quantiles[next] = memory.touched_pages << FRACTION_BITS;
}

uint64_t pick_zipf(void)
{
    const uint64_t *quantile = quantiles + random_below(QUANTILES);
    return (quantile[0] + random_below(quantile[1] - quantile[0])) >> FRACTION_BITS;
}

/* --- sweep ------------------------------------------------------------------------------- */

enum { FRAME_BITS = 55 }; /* of an entry of pagemap, Documentation/admin-guide/mm/pagemap.rst */

struct place {
    uint64_t frame;
    uint32_t rank;
};

static uint32_t *sweep; /* ranks */
static uint64_t sweep_at;

static uint64_t frame_of(int pagemap, const void *address)
{
    uint64_t entry;
    off_t at = (off_t)((uintptr_t)address / PAGE_BYTES * sizeof entry);
    if (pread(pagemap, &entry, sizeof entry, at) != sizeof entry)
        die("/proc/self/pagemap");
    return entry & ((1ull << FRAME_BITS) - 1);
}

static int by_frame(const void *left, const void *right)
{
    uint64_t one = ((const struct place *)left)->frame, other = ((const struct place *)right)->frame;
    return one < other ? -1 : one > other;
}

/* The kernel has laid our memory anywhere; where, it tells once. */
void prepare_sweep(void)
{
    struct place *places = malloc(memory.touched_pages * sizeof *places);
    sweep = malloc(memory.touched_pages * sizeof *sweep);
    int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    if (!places || !sweep || pagemap < 0)
        die("sweep");
    for (uint64_t rank = 0; rank < memory.touched_pages; rank++)
        places[rank] = (struct place){frame_of(pagemap, address_of(rank)), (uint32_t)rank};
    qsort(places, memory.touched_pages, sizeof *places, by_frame);
    for (uint64_t i = 0; i < memory.touched_pages; i++)
        sweep[i] = places[i].rank;
    free(places);
    close(pagemap);
}

uint64_t pick_next(void)
{
    if (sweep_at == memory.touched_pages)
        sweep_at = 0;
    return sweep[sweep_at++];
}
