/* A memory that can tell at any time whether every page still says what it must.
 *
 *  - A data page carries words at its start, middle and end that are tied to
 *    the page and to its generation, which every write raises; the rest of the
 *    page is tied to the page. A touch checks the three words, `check_all_pages`
 *    every byte of every page.
 *  - The generation that a page must have is kept elsewhere, in a table; over
 *    the table runs a sum that every write carries on. A page that is stale
 *    contradicts the table, a table that is stale contradicts pages and sum,
 *    and all of them together going back would show on the host, where the
 *    operation counter never goes back.
 *  - A fifth of memory is zero pages that were touched (and must stay zero), a
 *    part was never touched at all.
 *
 * Memory is cut in clusters of 64 KiB, shuffled by a fixed permutation: rank in
 * the shuffle is hotness. A hot spot is so a run of pages, as an allocator
 * leaves it, and the spots lie anywhere.
 *
 *   order[]:  | hottest 5% | next 20% | rest of the data | zero pages |
 */
#ifndef PAGES_H
#define PAGES_H

#include <stdint.h>

enum {
    PAGE_BYTES = 4096,
    PAGE_WORDS = PAGE_BYTES / 8,
    MIDDLE_WORD = PAGE_WORDS / 2,
    LAST_WORD = PAGE_WORDS - 1,
    CLUSTER_PAGES = 16,
};

struct memory {
    uint64_t *pages;            /* data and zero clusters, in guest virtual order */
    uint64_t total_pages;       /* of the whole guest */
    uint64_t data_pages;        /* ranks below this are data, */
    uint64_t touched_pages;     /* ranks from there to this are zero pages */
    uint32_t *order;            /* cluster rank -> cluster */
    uint32_t *generation;       /* page -> how often written */
    uint64_t order_sum;
    uint64_t generation_sum;    /* sum of seal(page, generation) over all data pages */
    uint64_t corrupt;           /* pages found wrong, each counted once */
};

extern struct memory memory;

/* Takes nearly all the memory there is, or of the kernel word fill=MIB, and fills it. */
void fill_memory(void);

/* Where the page of that rank lies, in our address space. */
const void *address_of(uint64_t rank);

/* Checks the page of that rank; writes a new generation of it if asked to (never to zero pages). */
void touch(uint64_t rank, int write);

/* Checks every byte of every page, and the tables; calls `breathe` after each page. */
void check_all_pages(void (*breathe)(void));

uint64_t next_random(void);
uint64_t random_below(uint64_t limit);

#endif
