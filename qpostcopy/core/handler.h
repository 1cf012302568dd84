/* The userfault handler: one guest's RAM at the destination.
 *
 *   handler.c  the object, placing pages, counting them
 *   session.c  taking over from a dead handler, and from one session to the next
 *   fault.c    the two blocking loops: faults + demand lane, and push lanes
 *
 * One thread runs the fault loop and one more each push lane; the page maps
 * decide between them who places a page, so no lock is held around an ioctl.
 * The object outlives its lanes: when they are lost the loops return, the next
 * session starts with qpc_handler_wake_all, which makes the kernel raise every
 * unanswered fault again. The same mechanism takes over from a killed handler. */
#ifndef QPC_HANDLER_H
#define QPC_HANDLER_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "error.h"
#include "lane.h"
#include "map.h"
#include "trace.h"
#include "uffd.h"

/* cdef-begin */
/* Latency buckets: 8 to a power of two, in microseconds; see qpc_bucket_upper_us. */
#define QPC_BUCKETS 256

/* One VMA of a RAM block in QEMU. */
struct qpc_mapping {
    uint32_t block;
    uint64_t hva;
    uint64_t length_bytes;
    uint64_t offset_bytes; /* within the block */
};

struct qpc_handler_config {
    int uffd; /* borrowed */
    uint32_t block_count;
    const uint64_t *block_pages;  /* copied */
    const char *const *map_paths; /* 2 * block_count: placed and zero of each block; copied */
    const char *counter_path;
    uint32_t mapping_count;
    const struct qpc_mapping *mappings; /* copied */
    uint64_t ahead_pages;
    uint64_t behind_pages;
    int fresh; /* 1: files are made; 0: a dead handler's files are taken over */
};

struct qpc_handler_counters {
    uint64_t total_pages, remaining_pages;
    uint64_t hole_pages, zero_pages, push_pages, demand_pages, around_pages;
    uint64_t duplicate_pages, discarded_pages, stray_pages;
    uint64_t push_bytes, demand_bytes, wire_bytes;
    uint64_t faults, local_faults, fault_max_us;
    uint64_t traced_faults, untraced_faults; /* untraced: a bound has left them out */
    uint64_t fault_buckets[256];
};

struct qpc_handler;

int qpc_handler_create(struct qpc_handler **handler, const struct qpc_handler_config *config,
                       struct qpc_error *error);
void qpc_handler_destroy(struct qpc_handler *handler); /* after all loops were joined */

/* From now on faults go to this trace file; see trace.h. Before any loop runs. */
int qpc_handler_record(struct qpc_handler *handler, const char *path, uint32_t records_offset,
                       struct qpc_error *error);

/* What the destination's RAM file holds was placed by somebody before us (SEEK_DATA). */
int qpc_handler_adopt(struct qpc_handler *handler, const int *ram_fds, struct qpc_error *error);
void qpc_handler_commit(struct qpc_handler *handler);

int qpc_handler_send_have(struct qpc_handler *handler, int lane_fd, struct qpc_error *error);
int qpc_handler_run_demand(struct qpc_handler *handler, int lane_fd, struct qpc_error *error);
int qpc_handler_run_push(struct qpc_handler *handler, int lane_fd, struct qpc_error *error);

/* While there are no lanes: answer the faults that need none, and leave the others to
 * the next session, which wakes them. Until stopped. */
int qpc_handler_run_local(struct qpc_handler *handler, struct qpc_error *error);
int qpc_handler_wake_all(struct qpc_handler *handler, struct qpc_error *error);

void qpc_handler_stop(struct qpc_handler *handler);  /* any thread */
void qpc_handler_reset(struct qpc_handler *handler); /* after all loops were joined */
int qpc_handler_done_fd(const struct qpc_handler *handler);
void qpc_handler_counters_read(const struct qpc_handler *handler,
                               struct qpc_handler_counters *counters);
double qpc_bucket_upper_us(unsigned bucket);
/* cdef-end */

/* How a page came to be known. */
enum qpc_source_kind { QPC_BY_PUSH = 1, QPC_BY_DEMAND, QPC_BY_ZERO };

struct qpc_block {
    uint64_t pages;
    struct qpc_bits placed, zero, claimed, known, requested; /* see map.h */
};

struct qpc_waiter {
    uint32_t block;
    uint64_t page;
    int64_t read_us;
};

/* All counters live in a shared file: they survive a kill with the maps. */
struct qpc_handler_shared {
    _Atomic uint64_t hole_pages, zero_pages, push_pages, demand_pages, around_pages;
    _Atomic uint64_t duplicate_pages, discarded_pages, stray_pages;
    _Atomic uint64_t push_bytes, demand_bytes, wire_bytes;
    _Atomic uint64_t faults, local_faults, fault_max_us;
    _Atomic uint64_t fault_buckets[QPC_BUCKETS];
};

struct qpc_handler {
    const struct qpc_ops *ops;
    int uffd, stop_fd, done_fd;
    unsigned block_count, mapping_count;
    struct qpc_block *blocks;
    uint64_t *block_pages;
    struct qpc_mapping *mappings; /* sorted by hva */
    uint64_t ahead_pages, behind_pages;
    uint64_t total_pages;
    _Atomic uint64_t remaining_pages;
    _Atomic bool committed, stopping;
    _Atomic bool heard; /* the page server has said something in this session */
    struct qpc_bits shared_words; /* the file under `shared` */
    struct qpc_handler_shared *shared;
    struct qpc_trace trace;
    pthread_mutex_t waiters_lock;
    struct qpc_waiter *waiters;
    size_t waiter_count, waiter_room;
};

/* For fault.c, session.c and tests. */

/* So many more pages are known; tells when they were the last. */
void qpc_handler_count_down(struct qpc_handler *handler, uint64_t newly);

/* Place pages from `source`; NULL: zero pages. Pages that another thread has, or
 * had, are dropped as duplicates. Wakes whoever waits for what it placed. */
int qpc_handler_place(struct qpc_handler *handler, uint32_t block, uint64_t first, uint64_t count,
                      const uint8_t *source, enum qpc_source_kind kind, struct qpc_error *error);

/* The source says these pages are zero: they are known from now on, not placed. */
void qpc_handler_know_zero(struct qpc_handler *handler, uint32_t block, uint64_t first,
                           uint64_t count, bool hole);

/* A page that was placed and faults again was discarded since, or the fault is
 * stale: zeroes if it is a hole now, a wake in any case. */
int qpc_handler_place_again(struct qpc_handler *handler, uint32_t block, uint64_t page,
                            struct qpc_error *error);

int qpc_handler_wake(struct qpc_handler *handler, uint32_t block, uint64_t first, uint64_t count,
                     struct qpc_error *error);
void qpc_handler_record_latency(struct qpc_handler *handler, int64_t read_us);
void qpc_handler_settle_waiters(struct qpc_handler *handler, uint32_t block, uint64_t first,
                                uint64_t count);
int qpc_handler_add_waiter(struct qpc_handler *handler, struct qpc_waiter waiter,
                           struct qpc_error *error);
int64_t qpc_handler_oldest_waiter_us(struct qpc_handler *handler); /* 0: nobody waits */
const struct qpc_mapping *qpc_handler_find(const struct qpc_handler *handler, uint64_t address);

#endif
