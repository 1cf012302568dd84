/* The page server: one stopped guest's RAM at the source.
 *
 *   source.c  the object, the demand loop
 *   push.c    the schedule's cursor, pacing, the push loop
 *   holes.c   the hole scan, and telling of holes
 *
 * RAM is read with pread, never through a mapping: reading a hole through one
 * would fill it. `present` says what is not a hole below `settled`; beyond, all
 * are taken for data (a hole reads as zeroes). `sent` says what some lane has
 * taken on itself; the bit is won before the page is read, so no two lanes send
 * it unasked. A faulted page is sent again whatever `sent` says: its copy on a
 * push lane may be far back in a queue. */
#ifndef QPC_SOURCE_H
#define QPC_SOURCE_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "error.h"
#include "lane.h"
#include "map.h"

/* cdef-begin */
struct qpc_extent {
    uint32_t block;
    uint64_t first_page;
    uint64_t page_count;
};

struct qpc_source_config {
    uint32_t block_count;
    const uint64_t *block_pages; /* copied */
    const int *ram_fds;          /* borrowed, one for each block */
    int push_from_fault;         /* 1: after a fault, push goes on from there */
    uint64_t push_bytes_per_second; /* 0: unlimited */
};

struct qpc_source_counters {
    uint64_t requests, demand_pages, around_pages, push_pages, hole_pages, zero_pages;
    uint64_t wire_bytes, push_done;
};

struct qpc_source;

int qpc_source_create(struct qpc_source **source, const struct qpc_source_config *config,
                      struct qpc_error *error);
void qpc_source_destroy(struct qpc_source *source); /* after all loops were joined */

/* The order of the push; every page at most once. Copied. Between sessions only. */
int qpc_source_set_schedule(struct qpc_source *source, const struct qpc_extent *extents,
                            uint64_t extent_count, struct qpc_error *error);

/* Block until the handler's START; what it has will not be pushed. */
int qpc_source_receive_have(struct qpc_source *source, int lane_fd, int deadline_ms,
                            struct qpc_error *error);
int qpc_source_run_demand(struct qpc_source *source, int lane_fd, struct qpc_error *error);

/* Find the holes, beside all sessions: none of their loops waits for it, nor does their end. */
int qpc_source_run_scan(struct qpc_source *source, struct qpc_error *error);
void qpc_source_stop_scan(struct qpc_source *source); /* any thread; for good */

/* Lane 0 announces the holes that are found. QPC_OK: nothing is left for this lane. */
int qpc_source_run_push(struct qpc_source *source, int lane_fd, uint32_t index,
                        struct qpc_error *error);

void qpc_source_stop(struct qpc_source *source);  /* any thread; all loops but the scan */
void qpc_source_reset(struct qpc_source *source); /* after these loops were joined */
void qpc_source_counters_read(const struct qpc_source *source,
                              struct qpc_source_counters *counters);
/* cdef-end */

struct qpc_source_block {
    int fd;
    uint64_t pages;
    struct qpc_bits present, sent;
    _Atomic uint64_t settled; /* pages below it were looked at: `present` is right */
    uint64_t announced;       /* push lane 0's: holes below it were told in this session */
};

struct qpc_source {
    unsigned block_count;
    struct qpc_source_block *blocks;
    uint64_t *block_pages;
    int stop_fd;
    _Atomic bool stopping;
    _Atomic bool scan_stopping;
    _Atomic unsigned demand_waiting; /* faults that are not answered yet: push yields */
    _Atomic uint64_t requests, demand_pages, around_pages, push_pages, hole_pages, zero_pages;
    _Atomic uint64_t wire_bytes;
    _Atomic bool push_done;

    struct qpc_lane demand; /* open from receive_have to reset */

    pthread_mutex_t lock; /* all below */
    pthread_cond_t changed; /* demand_waiting, stopping */
    struct qpc_extent *extents;
    uint64_t extent_count;
    uint64_t at_extent, at_page; /* cursor: page within that extent */
    bool push_from_fault;
    bool here; /* go on from here_block, here_page to the end of RAM, then as scheduled */
    uint32_t here_block;
    uint64_t here_page;
    _Atomic uint64_t jump; /* where the last fault says to go on: block << 48 | page + 1; 0: none */
    uint64_t push_bytes_per_second;
    int64_t push_due_us; /* pacing: no earlier than this */
};

/* For push.c and tests. */

struct qpc_sent {
    uint64_t zero_pages; /* of the pages sent */
    uint64_t bytes;      /* on the wire */
};

/* Read pages and send them as runs of DATA and ZERO frames. `buffer` has room for
 * QPC_FRAME_PAGES_MAX pages. */
int qpc_source_send(struct qpc_source *source, struct qpc_lane *lane, uint32_t block,
                    uint64_t first, uint64_t count, uint8_t *buffer, struct qpc_sent *sent,
                    struct qpc_error *error);
bool qpc_page_is_zero(const uint8_t *page);

/* The first run of pages in [from, end) that are not known to be holes and that nobody
 * has sent, taken: its `sent` bits are won. Count 0: none. */
struct qpc_run qpc_source_take(struct qpc_source *source, uint32_t block, uint64_t from,
                               uint64_t end);

/* The next run to push, taken as above; false: nothing is left. */
bool qpc_source_next(struct qpc_source *source, struct qpc_extent *run);
/* Tell of holes that this session was not told of, one batch at most; *bytes 0: of all found. */
int qpc_source_announce_holes(struct qpc_source *source, struct qpc_lane *lane, uint64_t *bytes,
                              struct qpc_error *error);
void qpc_source_jump(struct qpc_source *source, uint32_t block, uint64_t page);

#endif
