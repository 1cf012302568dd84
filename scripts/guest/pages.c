#define _GNU_SOURCE
#include "pages.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "console.h"

enum { CORRUPT_LINES = 16 };

static const uint64_t FILLER_STEP = 0x9E3779B97F4A7C15u;

struct memory memory;
static uint64_t random_state = 0x9E3779B97F4A7C15u;

/* splitmix64's finalizer: a cheap permutation of 64 bits that leaves no pattern. */
static uint64_t mix(uint64_t value)
{
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9u;
    value = (value ^ (value >> 27)) * 0x94D049BB133111EBu;
    return value ^ (value >> 31);
}

uint64_t next_random(void)
{
    random_state += 0x9E3779B97F4A7C15u;
    return mix(random_state);
}

uint64_t random_below(uint64_t limit)
{
    return (uint64_t)(((unsigned __int128)next_random() * limit) >> 64);
}

/* --- pages ------------------------------------------------------------------------------- */

static uint64_t seal(uint64_t page, uint32_t generation)
{
    return mix((page << 32) + generation + 1);
}

/* What the body of a page begins with; each further word adds FILLER_STEP. */
static uint64_t filler(uint64_t page)
{
    return mix(page + 1);
}

static uint64_t *words_of(uint64_t page)
{
    return memory.pages + page * PAGE_WORDS;
}

static uint64_t page_of(uint64_t rank)
{
    return (uint64_t)memory.order[rank / CLUSTER_PAGES] * CLUSTER_PAGES + rank % CLUSTER_PAGES;
}

const void *address_of(uint64_t rank)
{
    return words_of(page_of(rank));
}

static void write_seals(uint64_t page, uint32_t generation)
{
    uint64_t *words = words_of(page), value = seal(page, generation);
    words[0] = value;
    words[MIDDLE_WORD] = value + MIDDLE_WORD;
    words[LAST_WORD] = value + LAST_WORD;
}

static int seals_are_right(const uint64_t *words, uint64_t value)
{
    return words[0] == value && words[MIDDLE_WORD] == value + MIDDLE_WORD &&
           words[LAST_WORD] == value + LAST_WORD;
}

static void fill_data_page(uint64_t page)
{
    uint64_t *words = words_of(page), value = filler(page);
    for (unsigned word = 0; word < PAGE_WORDS; word++, value += FILLER_STEP)
        words[word] = value;
    write_seals(page, memory.generation[page]);
}

/* Counts the page once: it is said, and then mended. */
static void found_corrupt(uint64_t page, const char *why)
{
    if (memory.corrupt++ < CORRUPT_LINES)
        say("@c %llu %s\n", (unsigned long long)page, why);
}

static void check_zero_page(uint64_t page)
{
    uint64_t *words = words_of(page), any = 0;
    for (unsigned word = 0; word < PAGE_WORDS; word++)
        any |= words[word];
    if (any) {
        found_corrupt(page, "zero");
        memset(words, 0, PAGE_BYTES);
    }
}

static int body_is_right(const uint64_t *words, uint64_t value)
{
    uint64_t differs = 0;
    for (unsigned word = 1; word < LAST_WORD; word++) {
        value += FILLER_STEP;
        differs |= word == MIDDLE_WORD ? 0 : words[word] ^ value;
    }
    return !differs;
}

static void check_data_page(uint64_t page)
{
    const uint64_t *words = words_of(page);
    const char *why = NULL;
    if (!seals_are_right(words, seal(page, memory.generation[page])))
        why = "generation";
    else if (!body_is_right(words, filler(page)))
        why = "body";
    if (why) {
        found_corrupt(page, why);
        fill_data_page(page);
    }
}

void touch(uint64_t rank, int write)
{
    uint64_t page = page_of(rank);
    const uint64_t *words = words_of(page);
    if (rank >= memory.data_pages) {
        if (words[0] | words[MIDDLE_WORD] | words[LAST_WORD])
            check_zero_page(page);
        return;
    }
    uint32_t generation = memory.generation[page];
    uint64_t value = seal(page, generation);
    if (!seals_are_right(words, value))
        check_data_page(page);
    if (!write)
        return;
    memory.generation[page] = generation + 1;
    memory.generation_sum += seal(page, generation + 1) - value;
    write_seals(page, generation + 1);
}

/* --- memory ------------------------------------------------------------------------------ */

static uint64_t meminfo_pages(const char *field)
{
    char line[128];
    unsigned long long kib = 0;
    FILE *file = fopen("/proc/meminfo", "r");
    if (!file)
        die("/proc/meminfo");
    while (fgets(line, sizeof line, file))
        if (!strncmp(line, field, strlen(field)))
            kib = strtoull(line + strlen(field), NULL, 10);
    fclose(file);
    return kib * 1024 / PAGE_BYTES;
}

static void *take(uint64_t bytes)
{
    void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                    -1, 0);
    if (at == MAP_FAILED)
        die("mmap");
    return at;
}

static void shuffle_clusters(uint64_t clusters)
{
    for (uint64_t i = 0; i < clusters; i++)
        memory.order[i] = (uint32_t)i;
    for (uint64_t i = clusters - 1; i > 0; i--) {
        uint64_t j = random_below(i + 1);
        uint32_t kept = memory.order[i];
        memory.order[i] = memory.order[j];
        memory.order[j] = kept;
    }
}

static uint64_t sum_of_order(void)
{
    uint64_t sum = 0;
    for (uint64_t i = 0; i < memory.touched_pages / CLUSTER_PAGES; i++)
        sum += mix((i << 32) + memory.order[i] + 1);
    return sum;
}

static uint64_t at_most(uint64_t pages, uint64_t limit)
{
    return pages < limit ? pages : limit;
}

/* An eighth of memory stays untouched, beside what the kernel needs to breathe. */
static void plan_memory(void)
{
    const char *fill_mib = getenv("fill");
    uint64_t limit = fill_mib ? strtoull(fill_mib, NULL, 10) * ((1 << 20) / PAGE_BYTES) : UINT64_MAX;
    uint64_t total = at_most(meminfo_pages("MemTotal:"), limit);
    uint64_t available = at_most(meminfo_pages("MemAvailable:"), limit);
    uint64_t spared = total / 8 + total / 64 + (12u << 20) / PAGE_BYTES;
    if (available <= spared + total / 5)
        die("too little memory");
    memory.total_pages = total;
    memory.touched_pages = (available - spared) / CLUSTER_PAGES * CLUSTER_PAGES;
    memory.data_pages = (memory.touched_pages - total / 5) / CLUSTER_PAGES * CLUSTER_PAGES;
    if (memory.data_pages < total / 4 + CLUSTER_PAGES)
        die("too little memory");
}

void fill_memory(void)
{
    plan_memory();
    memory.pages = take(memory.touched_pages * PAGE_BYTES);
    memory.generation = take(memory.touched_pages * sizeof *memory.generation);
    memory.order = take(memory.touched_pages / CLUSTER_PAGES * sizeof *memory.order);
    shuffle_clusters(memory.touched_pages / CLUSTER_PAGES);
    memory.order_sum = sum_of_order();
    for (uint64_t rank = 0; rank < memory.touched_pages; rank++) {
        uint64_t page = page_of(rank);
        if (rank < memory.data_pages) {
            fill_data_page(page);
            memory.generation_sum += seal(page, 0);
        } else {
            *(volatile uint64_t *)words_of(page) = 0;
        }
    }
}

void check_all_pages(void (*breathe)(void))
{
    uint64_t sum = 0;
    for (uint64_t rank = 0; rank < memory.touched_pages; rank++) {
        uint64_t page = page_of(rank);
        if (rank < memory.data_pages) {
            check_data_page(page);
            sum += seal(page, memory.generation[page]);
        } else {
            check_zero_page(page);
        }
        breathe();
    }
    if (sum != memory.generation_sum)
        found_corrupt(0, "generation-table");
    if (sum_of_order() != memory.order_sum)
        found_corrupt(0, "order-table");
}
