#include "handler.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#define PAGE QPC_PAGE_BYTES
#define RETRY_US 2000000 /* how long an mm may be `changing` before we call it stuck */

/* --- creation ------------------------------------------------------------------------------ */

static int by_hva(const void *left, const void *right)
{
    uint64_t a = ((const struct qpc_mapping *)left)->hva;
    uint64_t b = ((const struct qpc_mapping *)right)->hva;
    return (a > b) - (a < b);
}

static bool is_covered(const struct qpc_handler *handler, uint32_t block)
{
    uint64_t reached = 0, end = handler->blocks[block].pages * PAGE;
    for (bool moved = true; moved && reached < end;) {
        moved = false;
        for (unsigned i = 0; i < handler->mapping_count; i++) {
            const struct qpc_mapping *m = &handler->mappings[i];
            if (m->block == block && m->offset_bytes <= reached &&
                m->offset_bytes + m->length_bytes > reached) {
                reached = m->offset_bytes + m->length_bytes;
                moved = true;
            }
        }
    }
    return reached == end;
}

static int init_block(struct qpc_block *block, uint64_t pages, const char *const paths[2],
                      bool fresh, struct qpc_error *error)
{
    int code;
    block->pages = pages;
    if ((code = qpc_bits_open(&block->placed, paths[0], pages, fresh, error)) ||
        (code = qpc_bits_open(&block->zero, paths[1], pages, fresh, error)) ||
        (code = qpc_bits_init(&block->claimed, pages, error)) ||
        (code = qpc_bits_init(&block->known, pages, error)) ||
        (code = qpc_bits_init(&block->requested, pages, error)))
        return code;
    return QPC_OK;
}

static int init_maps(struct qpc_handler *handler, const struct qpc_handler_config *config,
                     struct qpc_error *error)
{
    /* The counters' file is a map file by another name: sized, preallocated, shared. */
    int code = qpc_bits_open(&handler->shared_words, config->counter_path,
                             sizeof(struct qpc_handler_shared) * 8, config->fresh, error);
    if (code)
        return code;
    handler->shared = (struct qpc_handler_shared *)(void *)handler->shared_words.words;
    for (unsigned i = 0; i < handler->block_count; i++) {
        const char *const paths[2] = {config->map_paths[2 * i], config->map_paths[2 * i + 1]};
        code = init_block(&handler->blocks[i], config->block_pages[i], paths, config->fresh, error);
        if (code)
            return code;
        handler->block_pages[i] = config->block_pages[i];
        handler->total_pages += config->block_pages[i];
    }
    handler->remaining_pages = handler->total_pages;
    return QPC_OK;
}

static int init_mappings(struct qpc_handler *handler, const struct qpc_handler_config *config,
                         struct qpc_error *error)
{
    memcpy(handler->mappings, config->mappings,
           config->mapping_count * sizeof *handler->mappings);
    qsort(handler->mappings, handler->mapping_count, sizeof *handler->mappings, by_hva);
    for (uint32_t block = 0; block < handler->block_count; block++)
        if (!is_covered(handler, block))
            return qpc_fail(error, QPC_REFUSED, EINVAL, "RAM block not mapped as a whole", block,
                            handler->blocks[block].pages * PAGE);
    return QPC_OK;
}

static int init_descriptors(struct qpc_handler *handler, struct qpc_error *error)
{
    handler->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    handler->done_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (handler->stop_fd < 0 || handler->done_fd < 0)
        return qpc_fail(error, QPC_SYSTEM, errno, "eventfd", 0, 0);
    return QPC_OK;
}

int qpc_handler_create(struct qpc_handler **out, const struct qpc_handler_config *config,
                       struct qpc_error *error)
{
    struct qpc_handler *handler = calloc(1, sizeof *handler);
    if (!handler)
        return qpc_fail(error, QPC_NO_MEMORY, ENOMEM, "handler", 0, sizeof *handler);
    handler->ops = &qpc_system_ops;
    handler->uffd = config->uffd;
    handler->stop_fd = handler->done_fd = -1;
    handler->block_count = config->block_count;
    handler->mapping_count = config->mapping_count;
    handler->ahead_pages = config->ahead_pages;
    handler->behind_pages = config->behind_pages;
    pthread_mutex_init(&handler->waiters_lock, NULL);
    handler->blocks = calloc(config->block_count, sizeof *handler->blocks);
    handler->block_pages = calloc(config->block_count, sizeof *handler->block_pages);
    handler->mappings = calloc(config->mapping_count, sizeof *handler->mappings);
    int code = QPC_OK;
    if (!handler->blocks || !handler->block_pages || !handler->mappings)
        code = qpc_fail(error, QPC_NO_MEMORY, ENOMEM, "handler", 0, 0);
    if (code || (code = init_descriptors(handler, error)) ||
        (code = init_maps(handler, config, error)) ||
        (code = init_mappings(handler, config, error))) {
        qpc_handler_destroy(handler);
        return code;
    }
    *out = handler;
    return QPC_OK;
}

void qpc_handler_destroy(struct qpc_handler *handler)
{
    for (unsigned i = 0; handler->blocks && i < handler->block_count; i++) {
        qpc_bits_deinit(&handler->blocks[i].placed);
        qpc_bits_deinit(&handler->blocks[i].zero);
        qpc_bits_deinit(&handler->blocks[i].claimed);
        qpc_bits_deinit(&handler->blocks[i].known);
        qpc_bits_deinit(&handler->blocks[i].requested);
    }
    qpc_bits_deinit(&handler->shared_words);
    qpc_trace_close(&handler->trace);
    if (handler->stop_fd >= 0)
        close(handler->stop_fd);
    if (handler->done_fd >= 0)
        close(handler->done_fd);
    pthread_mutex_destroy(&handler->waiters_lock);
    free(handler->waiters);
    free(handler->blocks);
    free(handler->block_pages);
    free(handler->mappings);
    free(handler);
}

int qpc_handler_record(struct qpc_handler *handler, const char *path, uint32_t records_offset,
                       struct qpc_error *error)
{
    return qpc_trace_open(&handler->trace, path, records_offset, error);
}

/* --- counting ------------------------------------------------------------------------------ */

void qpc_handler_count_down(struct qpc_handler *handler, uint64_t newly)
{
    if (newly && atomic_fetch_sub(&handler->remaining_pages, newly) == newly)
        eventfd_write(handler->done_fd, 1);
}

/* Pages are counted once, by the first thing that makes them known. */
static void count_known(struct qpc_handler *handler, uint64_t newly, _Atomic uint64_t *counter)
{
    atomic_fetch_add(counter, newly);
    qpc_handler_count_down(handler, newly);
}

static unsigned bucket_of(uint64_t us)
{
    if (us < 8)
        return (unsigned)us;
    unsigned exponent = 63u - (unsigned)__builtin_clzll(us);
    unsigned bucket = (exponent - 2) * 8 + (unsigned)(us >> (exponent - 3) & 7);
    return bucket < QPC_BUCKETS ? bucket : QPC_BUCKETS - 1;
}

double qpc_bucket_upper_us(unsigned bucket)
{
    if (bucket < 8)
        return bucket + 1;
    unsigned exponent = bucket / 8 + 2;
    return (double)(1ull << (exponent - 3)) * (8 + bucket % 8 + 1);
}

void qpc_handler_record_latency(struct qpc_handler *handler, int64_t read_us)
{
    int64_t waited = handler->ops->now_us() - read_us;
    uint64_t us = waited > 0 ? (uint64_t)waited : 0;
    atomic_fetch_add(&handler->shared->fault_buckets[bucket_of(us)], 1);
    uint64_t seen = atomic_load(&handler->shared->fault_max_us);
    while (us > seen && !atomic_compare_exchange_weak(&handler->shared->fault_max_us, &seen, us)) {
    }
}

void qpc_handler_counters_read(const struct qpc_handler *handler, struct qpc_handler_counters *out)
{
    const struct qpc_handler_shared *in = handler->shared;
    *out = (struct qpc_handler_counters){
        .total_pages = handler->total_pages,
        .remaining_pages = handler->remaining_pages,
        .hole_pages = in->hole_pages,
        .zero_pages = in->zero_pages,
        .push_pages = in->push_pages,
        .demand_pages = in->demand_pages,
        .around_pages = in->around_pages,
        .duplicate_pages = in->duplicate_pages,
        .discarded_pages = in->discarded_pages,
        .stray_pages = in->stray_pages,
        .push_bytes = in->push_bytes,
        .demand_bytes = in->demand_bytes,
        .wire_bytes = in->wire_bytes,
        .faults = in->faults,
        .local_faults = in->local_faults,
        .fault_max_us = in->fault_max_us,
        .traced_faults = qpc_trace_count(&handler->trace),
        .untraced_faults = qpc_trace_left_out(&handler->trace),
    };
    for (unsigned i = 0; i < QPC_BUCKETS; i++)
        out->fault_buckets[i] = in->fault_buckets[i];
}

/* --- who waits ----------------------------------------------------------------------------- */

int qpc_handler_add_waiter(struct qpc_handler *handler, struct qpc_waiter waiter,
                           struct qpc_error *error)
{
    int code = QPC_OK;
    pthread_mutex_lock(&handler->waiters_lock);
    if (handler->waiter_count == handler->waiter_room) {
        size_t room = handler->waiter_room ? 2 * handler->waiter_room : 256;
        void *grown = realloc(handler->waiters, room * sizeof *handler->waiters);
        if (grown) {
            handler->waiters = grown;
            handler->waiter_room = room;
        } else {
            code = qpc_fail(error, QPC_NO_MEMORY, ENOMEM, "waiters", 0, room);
        }
    }
    if (!code)
        handler->waiters[handler->waiter_count++] = waiter;
    pthread_mutex_unlock(&handler->waiters_lock);
    return code;
}

/* A waiter for each fault read and not answered: about one a vCPU, some more where KVM
 * faults asynchronously. A scan is cheaper than a table. */
void qpc_handler_settle_waiters(struct qpc_handler *handler, uint32_t block, uint64_t first,
                                uint64_t count)
{
    pthread_mutex_lock(&handler->waiters_lock);
    for (size_t i = 0; i < handler->waiter_count;) {
        struct qpc_waiter *waiter = &handler->waiters[i];
        if (waiter->block == block && waiter->page - first < count) {
            qpc_handler_record_latency(handler, waiter->read_us);
            *waiter = handler->waiters[--handler->waiter_count];
        } else {
            i++;
        }
    }
    pthread_mutex_unlock(&handler->waiters_lock);
}

int64_t qpc_handler_oldest_waiter_us(struct qpc_handler *handler)
{
    int64_t oldest_us = 0;
    pthread_mutex_lock(&handler->waiters_lock);
    for (size_t i = 0; i < handler->waiter_count; i++)
        if (!oldest_us || handler->waiters[i].read_us < oldest_us)
            oldest_us = handler->waiters[i].read_us;
    pthread_mutex_unlock(&handler->waiters_lock);
    return oldest_us;
}

/* --- mappings ------------------------------------------------------------------------------ */

const struct qpc_mapping *qpc_handler_find(const struct qpc_handler *handler, uint64_t address)
{
    size_t low = 0, high = handler->mapping_count;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        const struct qpc_mapping *m = &handler->mappings[middle];
        if (address < m->hva)
            high = middle;
        else if (address - m->hva >= m->length_bytes)
            low = middle + 1;
        else
            return m;
    }
    return NULL;
}

/* The part of [first, first + count) that `mapping` maps; count 0: none. */
static struct qpc_run within(const struct qpc_mapping *mapping, uint32_t block, uint64_t first,
                             uint64_t count)
{
    uint64_t low = mapping->offset_bytes / PAGE, high = low + mapping->length_bytes / PAGE;
    if (mapping->block != block || first >= high || first + count <= low)
        return (struct qpc_run){first, 0};
    uint64_t from = first > low ? first : low;
    uint64_t end = first + count < high ? first + count : high;
    return (struct qpc_run){from, end - from};
}

static uint64_t hva_of(const struct qpc_mapping *mapping, uint64_t page)
{
    return mapping->hva + (page * PAGE - mapping->offset_bytes);
}

int qpc_handler_wake(struct qpc_handler *handler, uint32_t block, uint64_t first, uint64_t count,
                     struct qpc_error *error)
{
    int code = QPC_OK;
    for (unsigned i = 0; i < handler->mapping_count && !code; i++) {
        struct qpc_run run = within(&handler->mappings[i], block, first, count);
        if (run.count)
            code = qpc_uffd_wake_by(handler->ops, handler->uffd,
                                    hva_of(&handler->mappings[i], run.first), run.count * PAGE,
                                    error);
    }
    return code;
}

int qpc_handler_wake_all(struct qpc_handler *handler, struct qpc_error *error)
{
    int code = QPC_OK;
    for (unsigned i = 0; i < handler->mapping_count && !code; i++)
        code = qpc_uffd_wake_by(handler->ops, handler->uffd, handler->mappings[i].hva,
                                handler->mappings[i].length_bytes, error);
    return code;
}

/* --- placing ------------------------------------------------------------------------------- */

/* Bits first, wake afterwards: a page that its guest can use is on record. */
static void note_placed(struct qpc_handler *handler, uint32_t index, uint64_t first, uint64_t count,
                        enum qpc_source_kind kind)
{
    struct qpc_block *block = &handler->blocks[index];
    struct qpc_handler_shared *shared = handler->shared;
    qpc_bits_set(&block->placed, first, count);
    if (kind == QPC_BY_DEMAND) {
        for (uint64_t page = first; page < first + count; page++) {
            uint64_t newly = qpc_bits_set(&block->known, page, 1);
            bool asked = qpc_bits_test(&block->requested, page);
            count_known(handler, newly, asked ? &shared->demand_pages : &shared->around_pages);
        }
    } else {
        uint64_t newly = qpc_bits_set(&block->known, first, count);
        count_known(handler, newly, kind == QPC_BY_PUSH ? &shared->push_pages : &shared->zero_pages);
    }
}

/* EEXIST on a page that nobody of ours has placed. */
static int meet_stray(struct qpc_handler *handler, uint32_t block, uint64_t page, uint64_t hva,
                      struct qpc_error *error)
{
    atomic_fetch_add(&handler->shared->stray_pages, 1);
    if (!atomic_load(&handler->committed))
        return qpc_fail(error, QPC_STRAY, EEXIST, "page was written by somebody else", hva,
                        page);
    note_placed(handler, block, page, 1, QPC_BY_PUSH);
    return QPC_OK;
}

/* Place one run within one mapping, whatever number of ioctls that takes. */
static int place_mapped(struct qpc_handler *handler, const struct qpc_mapping *mapping,
                        struct qpc_run run, const uint8_t *source, enum qpc_source_kind kind,
                        struct qpc_error *error)
{
    int64_t give_up_us = 0;
    bool singly = false;
    while (run.count) {
        uint64_t hva = hva_of(mapping, run.first), done_bytes;
        uint64_t length = singly ? PAGE : run.count * PAGE;
        enum qpc_result result =
            source ? qpc_uffd_copy(handler->ops, handler->uffd, hva, source, length, &done_bytes)
                   : qpc_uffd_zero(handler->ops, handler->uffd, hva, length, &done_bytes);
        int failure = errno, code = QPC_OK;
        uint64_t done = done_bytes / PAGE;
        switch (result) {
        case QPC_PLACED:
        case QPC_PARTIAL:
            note_placed(handler, mapping->block, run.first, done, kind);
            break;
        case QPC_ALREADY:
            code = meet_stray(handler, mapping->block, run.first, hva, error);
            done = 1;
            break;
        case QPC_RETRY:
            if (!give_up_us)
                give_up_us = handler->ops->now_us() + RETRY_US;
            else if (handler->ops->now_us() > give_up_us)
                code = qpc_fail(error, QPC_SYSTEM, failure, "address space keeps changing", hva,
                                length);
            sched_yield();
            break;
        case QPC_SPACE_GONE:
            code = qpc_fail(error, QPC_GONE, failure, "place a page", hva, length);
            break;
        case QPC_FAILED:
            /* ENOENT is also the answer to a run across two mappings: QEMU may have
             * split one since (an mprotect, a madvise). Each page lies in one. */
            if (failure == ENOENT && length > PAGE)
                singly = true;
            else
                code = qpc_fail(error, QPC_SYSTEM, failure, "place a page", hva, length);
            break;
        }
        if (code)
            return code;
        run.first += done;
        run.count -= done;
        if (source)
            source += done * PAGE;
    }
    return QPC_OK;
}

static int place_run(struct qpc_handler *handler, uint32_t block, struct qpc_run run,
                     const uint8_t *source, enum qpc_source_kind kind, struct qpc_error *error)
{
    uint64_t from = run.first, end = run.first + run.count;
    for (unsigned i = 0; i < handler->mapping_count && from < end;) {
        struct qpc_run part = within(&handler->mappings[i], block, from, end - from);
        if (!part.count || part.first != from) {
            i++;
            continue;
        }
        int code = place_mapped(handler, &handler->mappings[i], part,
                                source ? source + (from - run.first) * PAGE : NULL, kind, error);
        if (code)
            return code;
        from += part.count;
        i = 0; /* mappings are in order of HVA, not of offset */
    }
    int code = qpc_handler_wake(handler, block, run.first, run.count, error);
    qpc_handler_settle_waiters(handler, block, run.first, run.count);
    return code;
}

int qpc_handler_place(struct qpc_handler *handler, uint32_t index, uint64_t first, uint64_t count,
                      const uint8_t *source, enum qpc_source_kind kind, struct qpc_error *error)
{
    struct qpc_block *block = &handler->blocks[index];
    uint64_t at = first, end = first + count, won = 0;
    while (at < end) {
        struct qpc_run run = qpc_bits_claim(&block->claimed, at, end);
        if (!run.count)
            break;
        int code = place_run(handler, index, run, source ? source + (run.first - first) * PAGE : NULL,
                             kind, error);
        if (code)
            return code;
        won += run.count;
        at = run.first + run.count;
    }
    if (source)
        atomic_fetch_add(&handler->shared->duplicate_pages, count - won);
    return QPC_OK;
}

void qpc_handler_know_zero(struct qpc_handler *handler, uint32_t index, uint64_t first,
                           uint64_t count, bool hole)
{
    struct qpc_block *block = &handler->blocks[index];
    struct qpc_handler_shared *shared = handler->shared;
    qpc_bits_set(&block->zero, first, count);
    uint64_t newly = qpc_bits_set(&block->known, first, count);
    count_known(handler, newly, hole ? &shared->hole_pages : &shared->zero_pages);
}

int qpc_handler_place_again(struct qpc_handler *handler, uint32_t index, uint64_t page,
                            struct qpc_error *error)
{
    for (unsigned i = 0; i < handler->mapping_count; i++) {
        uint64_t done_bytes;
        struct qpc_run run = within(&handler->mappings[i], index, page, 1);
        if (!run.count)
            continue;
        uint64_t hva = hva_of(&handler->mappings[i], page);
        enum qpc_result result =
            qpc_uffd_zero(handler->ops, handler->uffd, hva, PAGE, &done_bytes);
        if (result == QPC_PLACED)
            atomic_fetch_add(&handler->shared->discarded_pages, 1);
        else if (result == QPC_SPACE_GONE)
            return qpc_fail(error, QPC_GONE, errno, "place a discarded page", hva, PAGE);
        else if (result == QPC_FAILED)
            return qpc_fail(error, QPC_SYSTEM, errno, "place a discarded page", hva, PAGE);
        break; /* EEXIST: it is there. EAGAIN: the wake makes the thread fault again. */
    }
    return qpc_handler_wake(handler, index, page, 1, error);
}
