/* The bare guest's memory: as in ../pages.h, every page can tell whether it is right.
 *
 * What differs is the price of an instruction: some machines' KVM emulates each
 * one of this guest, about a million a second. So whole pages are filled and
 * compared by one string instruction, against a table of random words: the body
 * of a page is that table from the word on that the page's number says. The
 * three seals are as over there, of 32 bits.
 *
 * RAM from `first_page` up is cut in clusters of 64 KiB; of each 20, in a fixed
 * pattern, 13 are data, 4 are zero pages that were touched, 3 are never touched.
 */
#ifndef PAGES_H
#define PAGES_H

#include <stdint.h>

enum {
    PAGE_BYTES = 4096,
    PAGE_WORDS = PAGE_BYTES / 4,
    MIDDLE_WORD = PAGE_WORDS / 2,
    LAST_WORD = PAGE_WORDS - 1,
    CLUSTER_PAGES = 16,
};

struct memory {
    uint32_t first_page, end_page; /* guest physical, in whole patterns of clusters */
    uint32_t data_pages, zero_pages;
    uint32_t total_pages;          /* of the whole guest */
    uint32_t *generation;          /* page - first_page -> how often written */
    uint32_t generation_sum;       /* sum of seal(page, generation) over all data pages */
    uint32_t corrupt;              /* pages found wrong, each counted once */
};

extern struct memory memory;

/* Fills the RAM between our image and `end`, both bytes of guest physical memory. */
void fill_memory(uint32_t end);

/* Checks a random page that is in use; perhaps writes a new generation of it. */
void touch_any(void);

/* Checks every byte of every page in use, and the table; calls `breathe` after each page. */
void check_all_pages(void (*breathe)(void));

#endif
