#include "source.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#define PAGE QPC_PAGE_BYTES
#define AROUND_QUEUE 256 /* extents; beyond it the oldest is left to the push lanes */
#define UNSENT_BYTES 65536 /* what may wait unsent in the demand socket */
#define MAX_PARTS (2 * QPC_FRAME_PAGES_MAX + 2)

/* --- creation ------------------------------------------------------------------------------ */

static int init_blocks(struct qpc_source *source, const struct qpc_source_config *config,
                       struct qpc_error *error)
{
    for (unsigned i = 0; i < config->block_count; i++) {
        struct qpc_source_block *block = &source->blocks[i];
        block->fd = config->ram_fds[i];
        block->pages = source->block_pages[i] = config->block_pages[i];
        int code = qpc_bits_init(&block->present, block->pages, error);
        if (!code)
            code = qpc_bits_init(&block->sent, block->pages, error);
        if (code)
            return code;
    }
    return QPC_OK;
}

/* Waits on it are not to last longer because somebody sets the clock. */
static void init_changed(pthread_cond_t *changed)
{
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(changed, &attributes);
    pthread_condattr_destroy(&attributes);
}

int qpc_source_create(struct qpc_source **out, const struct qpc_source_config *config,
                      struct qpc_error *error)
{
    struct qpc_source *source = calloc(1, sizeof *source);
    if (!source)
        return qpc_fail(error, QPC_NO_MEMORY, ENOMEM, "page server", 0, 0);
    source->block_count = config->block_count;
    source->push_from_fault = config->push_from_fault;
    source->push_bytes_per_second = config->push_bytes_per_second;
    pthread_mutex_init(&source->lock, NULL);
    init_changed(&source->changed);
    source->blocks = calloc(config->block_count, sizeof *source->blocks);
    source->block_pages = calloc(config->block_count, sizeof *source->block_pages);
    source->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    int code = QPC_OK;
    if (!source->blocks || !source->block_pages)
        code = qpc_fail(error, QPC_NO_MEMORY, ENOMEM, "page server", 0, 0);
    else if (source->stop_fd < 0)
        code = qpc_fail(error, QPC_SYSTEM, errno, "eventfd", 0, 0);
    else
        code = init_blocks(source, config, error);
    if (code) {
        qpc_source_destroy(source);
        return code;
    }
    *out = source;
    return QPC_OK;
}

void qpc_source_destroy(struct qpc_source *source)
{
    for (unsigned i = 0; source->blocks && i < source->block_count; i++) {
        qpc_bits_deinit(&source->blocks[i].present);
        qpc_bits_deinit(&source->blocks[i].sent);
    }
    if (source->stop_fd >= 0)
        close(source->stop_fd);
    qpc_lane_deinit(&source->demand);
    pthread_cond_destroy(&source->changed);
    pthread_mutex_destroy(&source->lock);
    free(source->extents);
    free(source->blocks);
    free(source->block_pages);
    free(source);
}

int qpc_source_set_schedule(struct qpc_source *source, const struct qpc_extent *extents,
                            uint64_t extent_count, struct qpc_error *error)
{
    struct qpc_extent *copy = calloc(extent_count, sizeof *copy);
    if (!copy)
        return qpc_fail(error, QPC_NO_MEMORY, ENOMEM, "schedule", 0, extent_count);
    memcpy(copy, extents, extent_count * sizeof *copy);
    free(source->extents);
    source->extents = copy;
    source->extent_count = extent_count;
    source->at_extent = source->at_page = 0;
    return QPC_OK;
}

/* --- sessions ------------------------------------------------------------------------------ */

void qpc_source_stop(struct qpc_source *source)
{
    pthread_mutex_lock(&source->lock);
    atomic_store(&source->stopping, true);
    pthread_cond_broadcast(&source->changed);
    pthread_mutex_unlock(&source->lock);
    eventfd_write(source->stop_fd, 1);
}

void qpc_source_reset(struct qpc_source *source)
{
    eventfd_t ignored;
    eventfd_read(source->stop_fd, &ignored);
    atomic_store(&source->stopping, false);
    atomic_store(&source->demand_waiting, 0);
    atomic_store(&source->push_done, false);
    source->at_extent = source->at_page = 0;
    source->here = false;
    atomic_store(&source->jump, 0);
    source->push_due_us = 0;
    qpc_lane_deinit(&source->demand);
    atomic_store(&source->hole_pages, 0);
    for (unsigned i = 0; i < source->block_count; i++) {
        qpc_bits_clear_all(&source->blocks[i].sent); /* the handler says what it has */
        source->blocks[i].announced = 0;
    }
}

void qpc_source_counters_read(const struct qpc_source *source, struct qpc_source_counters *out)
{
    *out = (struct qpc_source_counters){
        .requests = source->requests,
        .demand_pages = source->demand_pages,
        .around_pages = source->around_pages,
        .push_pages = source->push_pages,
        .hole_pages = source->hole_pages,
        .zero_pages = source->zero_pages,
        .wire_bytes = source->wire_bytes,
        .push_done = source->push_done,
    };
}

/* The demand lane outlives receive_have: what has arrived behind START is run_demand's. */
static int open_demand(struct qpc_source *source, int lane_fd, struct qpc_error *error)
{
    if (source->demand.buffer && source->demand.fd == lane_fd)
        return QPC_OK;
    qpc_lane_deinit(&source->demand);
    return qpc_lane_init(&source->demand, lane_fd, source->stop_fd, source->block_pages,
                         source->block_count, error);
}

int qpc_source_receive_have(struct qpc_source *source, int lane_fd, int deadline_ms,
                            struct qpc_error *error)
{
    struct qpc_frame frame = {0};
    const uint8_t *payload;
    int code = open_demand(source, lane_fd, error);
    while (!code && frame.type != QPC_FRAME_START) {
        code = qpc_lane_next(&source->demand, &frame, &payload, error);
        if (code == QPC_TIMEOUT && error->error_number == EAGAIN) {
            code = qpc_lane_wait(&source->demand, deadline_ms, error);
            continue;
        }
        if (!code && frame.type == QPC_FRAME_HAVE)
            qpc_bits_set(&source->blocks[frame.block].sent, frame.first_page, frame.page_count);
        else if (!code && frame.type != QPC_FRAME_START)
            code = qpc_fail(error, QPC_PROTOCOL, 0, "frame: HAVE or START expected", frame.type, 0);
    }
    return code;
}

/* --- sending pages ------------------------------------------------------------------------- */

bool qpc_page_is_zero(const uint8_t *page)
{
    const uint64_t *word = (const uint64_t *)(const void *)page;
    for (size_t i = 0; i < PAGE / sizeof *word; i += 8)
        if (word[i] | word[i + 1] | word[i + 2] | word[i + 3] | word[i + 4] | word[i + 5] |
            word[i + 6] | word[i + 7])
            return false;
    return true;
}

static int read_pages(const struct qpc_source_block *block, uint64_t first, uint64_t count,
                      uint8_t *buffer, struct qpc_error *error)
{
    size_t done = 0, length = (size_t)count * PAGE;
    while (done < length) {
        ssize_t got = pread(block->fd, buffer + done, length - done, (off_t)(first * PAGE + done));
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0) /* 0: the file ends before the block does */
            return qpc_fail(error, QPC_SYSTEM, got ? errno : ENODATA, "pread of the source's RAM",
                            first * PAGE + done, length - done);
        done += (size_t)got;
    }
    return QPC_OK;
}

/* A message being put together: headers and pages by turns, one sendmsg. */
struct message {
    uint8_t headers[QPC_FRAME_PAGES_MAX][QPC_FRAME_BYTES];
    struct iovec parts[MAX_PARTS];
    int header_count, part_count;
};

static void add_run(struct message *message, uint32_t block, uint64_t first, uint64_t count,
                    uint8_t *pages)
{
    struct qpc_frame frame = {.type = pages ? QPC_FRAME_DATA : QPC_FRAME_ZERO,
                              .block = (uint16_t)block,
                              .first_page = first,
                              .page_count = count};
    uint8_t *header = message->headers[message->header_count++];
    qpc_frame_encode(&frame, header);
    message->parts[message->part_count++] = (struct iovec){header, QPC_FRAME_BYTES};
    if (pages)
        message->parts[message->part_count++] = (struct iovec){pages, (size_t)count * PAGE};
}

static uint64_t bytes_of(const struct message *message)
{
    uint64_t bytes = 0;
    for (int i = 0; i < message->part_count; i++)
        bytes += message->parts[i].iov_len;
    return bytes;
}

int qpc_source_send(struct qpc_source *source, struct qpc_lane *lane, uint32_t block,
                    uint64_t first, uint64_t count, uint8_t *buffer, struct qpc_sent *sent,
                    struct qpc_error *error)
{
    struct message message;
    message.header_count = message.part_count = 0;
    *sent = (struct qpc_sent){0};
    int code = read_pages(&source->blocks[block], first, count, buffer, error);
    if (code)
        return code;
    for (uint64_t from = 0, end; from < count; from = end) {
        bool is_zero = qpc_page_is_zero(buffer + from * PAGE);
        for (end = from + 1; end < count; end++)
            if (qpc_page_is_zero(buffer + end * PAGE) != is_zero)
                break;
        add_run(&message, block, first + from, end - from, is_zero ? NULL : buffer + from * PAGE);
        sent->zero_pages += is_zero ? end - from : 0;
    }
    sent->bytes = bytes_of(&message);
    atomic_fetch_add(&source->wire_bytes, sent->bytes);
    return qpc_lane_write(lane, message.parts, message.part_count, error);
}

/* --- the demand loop ----------------------------------------------------------------------- */

struct demand {
    struct qpc_source *source;
    struct qpc_lane *lane;
    uint8_t *buffer;
    struct qpc_frame around[AROUND_QUEUE]; /* a ring: what faults bring along, still to be sent */
    unsigned around_first, around_count;
};

/* Where the scan has not been, a hole is a page like any other: pread does not fill it, and it
 * goes out as zeroes. Asking SEEK_DATA here would wait behind the scan for the inode's lock. */
static bool is_hole(const struct qpc_source *source, uint32_t index, uint64_t page)
{
    const struct qpc_source_block *block = &source->blocks[index];
    return page < atomic_load(&block->settled) && !qpc_bits_test(&block->present, page);
}

static int answer_focus(struct demand *demand, const struct qpc_frame *request,
                        struct qpc_error *error)
{
    struct qpc_source *source = demand->source;
    uint64_t page = request->first_page + request->focus;
    struct qpc_sent sent;
    atomic_fetch_add(&source->requests, 1);
    if (is_hole(source, request->block, page)) {
        struct qpc_frame hole = {.type = QPC_FRAME_HOLE,
                                 .block = request->block,
                                 .first_page = page,
                                 .page_count = 1};
        atomic_fetch_add(&source->wire_bytes, QPC_FRAME_BYTES);
        return qpc_lane_write_frame(demand->lane, &hole, error);
    }
    qpc_bits_set(&source->blocks[request->block].sent, page, 1);
    int code = qpc_source_send(source, demand->lane, request->block, page, 1, demand->buffer, &sent,
                               error);
    atomic_fetch_add(&source->demand_pages, 1 - sent.zero_pages);
    return code;
}

static void queue_around(struct demand *demand, const struct qpc_frame *request)
{
    if (request->page_count == 1)
        return;
    if (demand->around_count == AROUND_QUEUE) {
        demand->around_first = (demand->around_first + 1) % AROUND_QUEUE;
        demand->around_count--;
    }
    demand->around[(demand->around_first + demand->around_count++) % AROUND_QUEUE] = *request;
}

/* One run of the oldest extent; a request that came meanwhile goes before the next. */
static int send_some_around(struct demand *demand, struct qpc_error *error)
{
    struct qpc_source *source = demand->source;
    struct qpc_frame *extent = &demand->around[demand->around_first];
    uint64_t end = extent->first_page + extent->page_count;
    struct qpc_sent sent;
    struct qpc_run run = qpc_source_take(source, extent->block, extent->first_page, end);
    if (!run.count) {
        demand->around_first = (demand->around_first + 1) % AROUND_QUEUE;
        demand->around_count--;
        return QPC_OK;
    }
    extent->first_page = run.first + run.count;
    extent->page_count = end - extent->first_page;
    int code = qpc_source_send(source, demand->lane, extent->block, run.first, run.count,
                               demand->buffer, &sent, error);
    atomic_fetch_add(&source->around_pages, run.count - sent.zero_pages);
    return code;
}

static void set_waiting(struct qpc_source *source, unsigned waiting)
{
    if (atomic_exchange(&source->demand_waiting, waiting) == waiting || waiting)
        return;
    pthread_mutex_lock(&source->lock);
    pthread_cond_broadcast(&source->changed);
    pthread_mutex_unlock(&source->lock);
}

/* Answer every request that has arrived, each with its own page first. */
static int answer_requests(struct demand *demand, struct qpc_error *error)
{
    struct qpc_frame request;
    const uint8_t *payload;
    int code;
    while (!(code = qpc_lane_next(demand->lane, &request, &payload, error))) {
        if (request.type != QPC_FRAME_REQUEST)
            return qpc_fail(error, QPC_PROTOCOL, 0, "frame: REQUEST expected", request.type, 0);
        set_waiting(demand->source, 1);
        code = answer_focus(demand, &request, error);
        if (code)
            return code;
        queue_around(demand, &request);
        qpc_source_jump(demand->source, request.block, request.first_page + request.page_count);
    }
    return code == QPC_TIMEOUT && error->error_number == EAGAIN ? QPC_OK : code;
}

int qpc_source_run_demand(struct qpc_source *source, int lane_fd, struct qpc_error *error)
{
    struct demand demand = {.source = source, .lane = &source->demand};
    int code = open_demand(source, lane_fd, error);
    if (!code) /* what faults bring along must not queue before the next fault's page */
        qpc_lane_limit_unsent(demand.lane, UNSENT_BYTES);
    demand.buffer = malloc(QPC_FRAME_PAGES_MAX * PAGE);
    if (!code && !demand.buffer)
        code = qpc_fail(error, QPC_NO_MEMORY, ENOMEM, "page buffer", 0, 0);
    while (!code) {
        code = answer_requests(&demand, error);
        if (code)
            break;
        if (demand.around_count) {
            code = send_some_around(&demand, error);
        } else {
            set_waiting(source, 0);
            code = qpc_lane_wait(demand.lane, -1, error);
        }
    }
    set_waiting(source, 0);
    free(demand.buffer);
    return code;
}
