/* Pushing: what a page server sends unasked, in the order of the schedule.
 *
 * Several lanes share one cursor. Between two runs of at most 64 pages, or
 * batches of holes, a lane yields to faults that wait, and to the limit that the plan sets. */
#include <errno.h>
#include <stdlib.h>
#include <time.h>

#include "source.h"
#include "uffd.h"

#define PAGE QPC_PAGE_BYTES
#define JUMP_PAGE_BITS 48
#define UNSENT_BYTES 262144  /* what may wait unsent in a push socket */
#define YIELD_MS 5           /* the longest that one look at waiting faults takes */
#define BURST_US 20000       /* a limited lane may catch up that much */

/* --- the cursor ---------------------------------------------------------------------------- */

struct qpc_run qpc_source_take(struct qpc_source *source, uint32_t index, uint64_t from,
                               uint64_t end)
{
    struct qpc_source_block *block = &source->blocks[index];
    uint64_t settled = atomic_load(&block->settled), known = settled < end ? settled : end;
    while (from < known && (from = qpc_bits_next_without(&block->present, &block->sent, from,
                                                         known)) < known) {
        uint64_t hole = qpc_bits_next(&block->present, from, known, false);
        struct qpc_run run = qpc_bits_claim(&block->sent, from, hole);
        if (run.count)
            return run;
        from = hole;
    }
    return qpc_bits_claim(&block->sent, from, end); /* what the scan has not seen yet */
}

/* The rest of RAM behind the last fault; false when that is done. */
static bool take_here(struct qpc_source *source, struct qpc_extent *out)
{
    uint64_t jump = atomic_exchange(&source->jump, 0);
    if (jump) {
        source->here = true;
        source->here_block = (uint32_t)(jump >> JUMP_PAGE_BITS);
        source->here_page = (jump & ((1ull << JUMP_PAGE_BITS) - 1)) - 1;
    }
    while (source->here) {
        uint64_t end = source->block_pages[source->here_block];
        struct qpc_run run = {end, 0};
        if (source->here_page < end)
            run = qpc_source_take(source, source->here_block, source->here_page, end);
        source->here_page = run.first + run.count;
        if (run.count) {
            *out = (struct qpc_extent){source->here_block, run.first, run.count};
            return true;
        }
        source->here_page = 0;
        if (++source->here_block == source->block_count)
            source->here = false;
    }
    return false;
}

static bool take_scheduled(struct qpc_source *source, struct qpc_extent *out)
{
    while (source->at_extent < source->extent_count) {
        const struct qpc_extent *extent = &source->extents[source->at_extent];
        uint64_t end = extent->first_page + extent->page_count;
        struct qpc_run run =
            qpc_source_take(source, extent->block, extent->first_page + source->at_page, end);
        if (run.count) {
            source->at_page = run.first + run.count - extent->first_page;
            *out = (struct qpc_extent){extent->block, run.first, run.count};
            return true;
        }
        source->at_extent++;
        source->at_page = 0;
    }
    return false;
}

bool qpc_source_next(struct qpc_source *source, struct qpc_extent *run)
{
    pthread_mutex_lock(&source->lock);
    bool found = take_here(source, run) || take_scheduled(source, run);
    pthread_mutex_unlock(&source->lock);
    return found;
}

/* Without the lock: a lane may be searching all of RAM under it, and this is a fault's path. */
void qpc_source_jump(struct qpc_source *source, uint32_t block, uint64_t page)
{
    if (source->push_from_fault)
        atomic_store(&source->jump, (uint64_t)block << JUMP_PAGE_BITS | (page + 1));
}

/* --- yielding ------------------------------------------------------------------------------ */

static int stopped(struct qpc_error *error)
{
    return qpc_fail(error, QPC_STOPPED, 0, "asked to stop", 0, 0);
}

static void wait_changed(struct qpc_source *source)
{
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += YIELD_MS * 1000000L;
    until.tv_sec += until.tv_nsec / 1000000000L;
    until.tv_nsec %= 1000000000L;
    pthread_cond_timedwait(&source->changed, &source->lock, &until);
}

/* A fault that waits goes first; but one that the demand lane's own peer does
 * not take off our hands must not stop the push for good. */
static int yield_to_faults(struct qpc_source *source, struct qpc_error *error)
{
    if (atomic_load(&source->demand_waiting)) {
        pthread_mutex_lock(&source->lock);
        if (atomic_load(&source->demand_waiting) && !atomic_load(&source->stopping))
            wait_changed(source);
        pthread_mutex_unlock(&source->lock);
    }
    return atomic_load(&source->stopping) ? stopped(error) : QPC_OK;
}

/* Book what was sent on the limit that all lanes share. */
static void book(struct qpc_source *source, uint64_t bytes)
{
    if (!source->push_bytes_per_second)
        return;
    int64_t earliest_us = qpc_system_ops.now_us() - BURST_US;
    pthread_mutex_lock(&source->lock);
    if (source->push_due_us < earliest_us)
        source->push_due_us = earliest_us;
    source->push_due_us += (int64_t)(bytes * 1000000 / source->push_bytes_per_second);
    pthread_mutex_unlock(&source->lock);
}

/* Wait until the limit lets the next run go. */
static int pace(struct qpc_source *source, struct qpc_lane *lane, struct qpc_error *error)
{
    if (!source->push_bytes_per_second)
        return QPC_OK;
    pthread_mutex_lock(&source->lock);
    int64_t wait_us = source->push_due_us - qpc_system_ops.now_us();
    pthread_mutex_unlock(&source->lock);
    if (wait_us <= 0)
        return QPC_OK;
    struct pollfd watch = {lane->stop_fd, POLLIN, 0};
    return poll(&watch, 1, (int)(wait_us / 1000 + 1)) > 0 ? stopped(error) : QPC_OK;
}

/* --- the loop ------------------------------------------------------------------------------ */

static int push_run(struct qpc_source *source, struct qpc_lane *lane, const struct qpc_extent *run,
                    uint8_t *buffer, struct qpc_error *error)
{
    struct qpc_sent sent;
    int code = qpc_source_send(source, lane, run->block, run->first_page, run->page_count, buffer,
                               &sent, error);
    if (code)
        return code;
    book(source, sent.bytes);
    atomic_fetch_add(&source->zero_pages, sent.zero_pages);
    atomic_fetch_add(&source->push_pages, run->page_count - sent.zero_pages);
    return QPC_OK;
}

/* A batch of holes and a run of pages by turns: a backlog of holes is millions of frames.
 * The run is taken first: at the end, what was passed over as holes is told to the last. */
static int push_all(struct qpc_source *source, struct qpc_lane *lane, bool tells_holes,
                    uint8_t *buffer, struct qpc_error *error)
{
    struct qpc_extent run;
    uint64_t hole_bytes = 0;
    bool found = true;
    int code = QPC_OK;
    while (!code && (found || hole_bytes) && !(code = pace(source, lane, error)) &&
           !(code = yield_to_faults(source, error))) {
        found = qpc_source_next(source, &run);
        if (tells_holes)
            code = qpc_source_announce_holes(source, lane, &hole_bytes, error);
        book(source, hole_bytes);
        if (!code && found)
            code = push_run(source, lane, &run, buffer, error);
    }
    return code;
}

int qpc_source_run_push(struct qpc_source *source, int lane_fd, uint32_t index,
                        struct qpc_error *error)
{
    struct qpc_lane lane;
    uint8_t *buffer = malloc((size_t)QPC_FRAME_PAGES_MAX * PAGE);
    int code = qpc_lane_init(&lane, lane_fd, source->stop_fd, source->block_pages,
                             source->block_count, error);
    if (!code && !buffer)
        code = qpc_fail(error, QPC_NO_MEMORY, ENOMEM, "page buffer", 0, 0);
    qpc_lane_limit_unsent(&lane, UNSENT_BYTES);
    if (!code)
        code = push_all(source, &lane, index == 0, buffer, error);
    if (!code)
        code = qpc_lane_write_frame(&lane, &(struct qpc_frame){.type = QPC_FRAME_END}, error);
    if (!code)
        atomic_store(&source->push_done, true);
    free(buffer);
    qpc_lane_deinit(&lane);
    return code;
}
