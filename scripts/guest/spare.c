#define _GNU_SOURCE
#include "spare.h"

#include <stddef.h>
#include <sys/mman.h>
#include <unistd.h>

#include "console.h"
#include "pages.h"

enum { PAUSE_US = 1200000 }; /* in between it is free: to be reported, to be ballooned */

static const uint64_t MARK = 0xD15CA2D5EA7ED000u;

static uint64_t *held;
static uint64_t held_bytes;
static int go_fd = -1;

static uint64_t *map(uint64_t bytes)
{
    uint64_t *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED)
        die("mmap of spare memory");
    return at;
}

/* Every word tied to page and round. */
static uint64_t mark_of(uint64_t page, uint64_t round)
{
    return MARK + (page << 20) + round;
}

static void write_page(uint64_t *words, uint64_t mark)
{
    for (unsigned word = 0; word < PAGE_WORDS; word++)
        words[word] = mark;
}

static int page_is(const uint64_t *words, uint64_t value)
{
    uint64_t differs = 0;
    for (unsigned word = 0; word < PAGE_WORDS; word++)
        differs |= words[word] ^ value;
    return !differs;
}

static uint64_t use_once(uint64_t bytes, uint64_t round)
{
    uint64_t *at = map(bytes), wrong = 0;
    for (uint64_t page = 0; page < bytes / PAGE_BYTES; page++) {
        uint64_t *words = at + page * PAGE_WORDS;
        words[0] = 1; /* a read would be given the one page that is zero for everybody */
        words[0] = 0;
        wrong += !page_is(words, 0);
        write_page(words, mark_of(page, round));
    }
    for (uint64_t page = 0; page < bytes / PAGE_BYTES; page++)
        wrong += !page_is(at + page * PAGE_WORDS, mark_of(page, round));
    munmap(at, bytes);
    return wrong;
}

/* Begins when the parent closes its end of the pipe. Forked before the workload has its
 * memory: what both had would be copied whenever one of them writes. */
static void fork_freeing(uint64_t bytes)
{
    int ends[2];
    char none;
    if (pipe(ends))
        die("pipe");
    go_fd = ends[1];
    if (fork())
        return;
    close(ends[1]);
    while (read(ends[0], &none, 1) > 0) {
    }
    uint64_t wrong = 0;
    for (uint64_t round = 1;; round++) {
        wrong += use_once(bytes, round);
        say("@f %llu %llu\n", (unsigned long long)round, (unsigned long long)wrong);
        usleep(PAUSE_US);
    }
}

void hold_spare(uint64_t bytes, uint64_t freeing_bytes)
{
    if (freeing_bytes)
        fork_freeing(freeing_bytes);
    held = map(bytes);
    held_bytes = bytes;
    for (uint64_t page = 0; page < bytes / PAGE_BYTES; page++)
        write_page(held + page * PAGE_WORDS, mark_of(page, 0));
}

void free_spare(void)
{
    munmap(held, held_bytes);
    close(go_fd);
}
