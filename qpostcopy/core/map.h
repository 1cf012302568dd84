/* Bitmaps with one bit a page, shared by threads without a lock.
 *
 * A page of the destination goes wanted -> claimed -> placed; a bitmap holds
 * each fact, and a page is in the hands of the one thread that won its claim:
 *
 *   claimed    some thread is placing it, or has        (memory)
 *   placed     it was placed once; stays set for ever    (file, survives SIGKILL)
 *   zero       the source says it is all zeroes          (file)
 *   known      placed or zero: counted, nothing to send  (memory)
 *   requested  asked for on the present demand lane      (memory)
 *
 * Ranges are given as first page and count; callers have checked them against
 * the size of the map. */
#ifndef QPC_MAP_H
#define QPC_MAP_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "error.h"
#include "wire.h"

struct qpc_bits {
    _Atomic uint64_t *words;
    uint64_t pages;
};

/* Anonymous and empty. */
int qpc_bits_init(struct qpc_bits *bits, uint64_t pages, struct qpc_error *error);

/* Over a file, all of it allocated now so that a full file system cannot become
 * a SIGBUS later. `fresh`: the file must not exist; else it must, with this size. */
int qpc_bits_open(struct qpc_bits *bits, const char *path, uint64_t pages, bool fresh,
                  struct qpc_error *error);
void qpc_bits_deinit(struct qpc_bits *bits);

bool qpc_bits_test(const struct qpc_bits *bits, uint64_t page);

/* Set a range; how many of its bits were clear. */
uint64_t qpc_bits_set(struct qpc_bits *bits, uint64_t first, uint64_t count);
void qpc_bits_clear_all(struct qpc_bits *bits);
void qpc_bits_copy(struct qpc_bits *to, const struct qpc_bits *from); /* of the same size */

/* The first page in [from, end) whose bit is `value`, or `end`. */
uint64_t qpc_bits_next(const struct qpc_bits *bits, uint64_t from, uint64_t end, bool value);

/* The first page in [from, end) set in `bits` and not set in `without`, or `end`. */
uint64_t qpc_bits_next_without(const struct qpc_bits *bits, const struct qpc_bits *without,
                               uint64_t from, uint64_t end);

struct qpc_run {
    uint64_t first;
    uint64_t count;
};

/* Win the first run of clear pages in [from, end): set them, and no other thread
 * did. A run ends at a multiple of 64 pages at the latest. Count 0: none left. */
struct qpc_run qpc_bits_claim(struct qpc_bits *bits, uint64_t from, uint64_t end);

/* The first run of pages in [from, end) that are data in the file, or (end, 0). Asks SEEK_HOLE,
 * which cannot be told where to stop: a long run takes long (10 ms a GiB). */
int qpc_next_data(int fd, uint64_t from, uint64_t end, struct qpc_run *run,
                  struct qpc_error *error);

/* Set the bits of all pages that are data in the file (SEEK_DATA): written once, swapped out or
 * not. What the file has beyond the map is passed over. */
int qpc_bits_set_data(struct qpc_bits *bits, int fd, struct qpc_error *error);

#endif
