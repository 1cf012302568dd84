#define _GNU_SOURCE /* SEEK_DATA */
#include "map.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define WORD_PAGES 64u

static size_t bytes_of(uint64_t pages)
{
    return (size_t)((pages + WORD_PAGES - 1) / WORD_PAGES) * sizeof(uint64_t);
}

int qpc_bits_init(struct qpc_bits *bits, uint64_t pages, struct qpc_error *error)
{
    void *words = mmap(NULL, bytes_of(pages), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
                       -1, 0);
    if (words == MAP_FAILED)
        return qpc_fail(error, QPC_NO_MEMORY, errno, "mmap of a page map", 0, bytes_of(pages));
    bits->words = words;
    bits->pages = pages;
    return QPC_OK;
}

static int size_file(int fd, size_t bytes, bool fresh, struct qpc_error *error)
{
    struct stat status;
    if (fresh) {
        int failed = posix_fallocate(fd, 0, (off_t)bytes);
        return failed ? qpc_fail(error, QPC_SYSTEM, failed, "allocate a page map file", 0, bytes)
                      : QPC_OK;
    }
    if (fstat(fd, &status))
        return qpc_fail(error, QPC_SYSTEM, errno, "fstat of a page map file", 0, 0);
    if ((size_t)status.st_size != bytes)
        return qpc_fail(error, QPC_SYSTEM, EINVAL, "size of a page map file",
                        (uint64_t)status.st_size, bytes);
    return QPC_OK;
}

int qpc_bits_open(struct qpc_bits *bits, const char *path, uint64_t pages, bool fresh,
                  struct qpc_error *error)
{
    size_t bytes = bytes_of(pages);
    int fd = open(path, O_RDWR | O_CLOEXEC | (fresh ? O_CREAT | O_EXCL : 0), 0600);
    if (fd < 0)
        return qpc_fail(error, QPC_SYSTEM, errno, "open a page map file", 0, bytes);
    int code = size_file(fd, bytes, fresh, error);
    void *words = MAP_FAILED;
    if (!code) {
        words = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (words == MAP_FAILED)
            code = qpc_fail(error, QPC_SYSTEM, errno, "mmap of a page map file", 0, bytes);
    }
    close(fd);
    if (!code) {
        bits->words = words;
        bits->pages = pages;
    }
    return code;
}

void qpc_bits_deinit(struct qpc_bits *bits)
{
    if (bits->words)
        munmap((void *)bits->words, bytes_of(bits->pages));
    bits->words = NULL;
    bits->pages = 0;
}

/* The bits of one word that lie in [first, end). */
static uint64_t mask_of(uint64_t word, uint64_t first, uint64_t end)
{
    uint64_t base = word * WORD_PAGES;
    uint64_t mask = ~0ull;
    if (first > base)
        mask &= ~0ull << (first - base);
    if (end - base < WORD_PAGES)
        mask &= ~(~0ull << (end - base));
    return mask;
}

static uint64_t count_of(uint64_t word) { return (uint64_t)__builtin_popcountll(word); }

bool qpc_bits_test(const struct qpc_bits *bits, uint64_t page)
{
    return atomic_load(&bits->words[page / WORD_PAGES]) >> (page % WORD_PAGES) & 1;
}

uint64_t qpc_bits_set(struct qpc_bits *bits, uint64_t first, uint64_t count)
{
    uint64_t end = first + count, changed = 0;
    for (uint64_t word = first / WORD_PAGES; word * WORD_PAGES < end; word++) {
        uint64_t mask = mask_of(word, first, end);
        changed += count_of(mask & ~atomic_fetch_or(&bits->words[word], mask));
    }
    return changed;
}

void qpc_bits_clear_all(struct qpc_bits *bits)
{
    memset((void *)bits->words, 0, bytes_of(bits->pages));
}

void qpc_bits_copy(struct qpc_bits *to, const struct qpc_bits *from)
{
    memcpy((void *)to->words, (const void *)from->words, bytes_of(from->pages));
}

/* The first page in [from, end) whose bit is set in what `value` gives for its word. */
#define NEXT_WHERE(value)                                                  \
    for (uint64_t word = from / WORD_PAGES; word * WORD_PAGES < end; word++) { \
        uint64_t hits = (value) & mask_of(word, from, end);                \
        if (hits)                                                          \
            return word * WORD_PAGES + (uint64_t)__builtin_ctzll(hits);    \
    }                                                                      \
    return end

uint64_t qpc_bits_next(const struct qpc_bits *bits, uint64_t from, uint64_t end, bool value)
{
    uint64_t flip = value ? 0 : ~0ull;
    NEXT_WHERE(atomic_load_explicit(&bits->words[word], memory_order_relaxed) ^ flip);
}

uint64_t qpc_bits_next_without(const struct qpc_bits *bits, const struct qpc_bits *without,
                               uint64_t from, uint64_t end)
{
    NEXT_WHERE(atomic_load_explicit(&bits->words[word], memory_order_relaxed) &
               ~atomic_load_explicit(&without->words[word], memory_order_relaxed));
}

/* Win what is clear of `mask` up to the first bit that is set; the bits won. */
static uint64_t claim_in_word(_Atomic uint64_t *word, uint64_t mask)
{
    uint64_t old = atomic_load(word);
    for (;;) {
        uint64_t clear = mask & ~old;
        if (!clear)
            return 0;
        /* the lowest run of clear bits within the mask: adding its lowest bit
         * carries through the run and stops at the first bit not in it */
        uint64_t lowest = clear & -clear;
        uint64_t run = clear & ~(clear + lowest);
        if (atomic_compare_exchange_weak(word, &old, old | run))
            return run;
    }
}

struct qpc_run qpc_bits_claim(struct qpc_bits *bits, uint64_t from, uint64_t end)
{
    for (uint64_t word = from / WORD_PAGES; word * WORD_PAGES < end; word++) {
        uint64_t won = claim_in_word(&bits->words[word], mask_of(word, from, end));
        if (won)
            return (struct qpc_run){word * WORD_PAGES + (uint64_t)__builtin_ctzll(won),
                                    count_of(won)};
    }
    return (struct qpc_run){end, 0};
}

int qpc_next_data(int fd, uint64_t from, uint64_t end, struct qpc_run *run,
                  struct qpc_error *error)
{
    off_t end_bytes = (off_t)(end * QPC_PAGE_BYTES);
    off_t data = lseek(fd, (off_t)(from * QPC_PAGE_BYTES), SEEK_DATA), hole = -1;
    *run = (struct qpc_run){end, 0};
    if (data >= end_bytes || (data < 0 && errno == ENXIO)) /* ENXIO: no data beyond here */
        return QPC_OK;
    if (data >= 0)
        hole = lseek(fd, data, SEEK_HOLE);
    if (hole < 0)
        return qpc_fail(error, QPC_SYSTEM, errno, "SEEK_DATA in a RAM file", from * QPC_PAGE_BYTES,
                        0);
    if (hole > end_bytes) /* a file may be longer than its block */
        hole = end_bytes;
    run->first = (uint64_t)data / QPC_PAGE_BYTES;
    run->count = ((uint64_t)hole + QPC_PAGE_BYTES - 1) / QPC_PAGE_BYTES - run->first;
    return QPC_OK;
}

int qpc_bits_set_data(struct qpc_bits *bits, int fd, struct qpc_error *error)
{
    struct qpc_run run;
    for (uint64_t from = 0; from < bits->pages; from = run.first + run.count) {
        int code = qpc_next_data(fd, from, bits->pages, &run, error);
        if (code)
            return code;
        if (run.count)
            qpc_bits_set(bits, run.first, run.count);
    }
    return QPC_OK;
}
