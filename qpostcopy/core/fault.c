/* The two loops of the userfault handler.
 *
 *   userfaultfd --faults--> run_demand --REQUEST--> page server
 *                               ^------DATA, ZERO------+
 *   push lane ---DATA, ZERO, HOLE, END---> run_push
 *
 * A fault is answered from what is known here if it can be (zero pages, pages
 * placed meanwhile or discarded), and asked for on the demand lane otherwise.
 * Nothing in here waits for one peer while the other has something to say:
 * requests that the lane does not take at once are kept until it does. */
#include <errno.h>
#include <linux/userfaultfd.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "handler.h"

#define MESSAGES 64
#define ANSWER_US 15000000 /* a page server that owes an answer for so long is given up */
#define LOOK_US 1000000    /* how often that is looked at */

/* The demand lane with the requests that it has not taken yet. */
struct demand {
    struct qpc_lane lane;
    uint8_t *unsent;
    size_t unsent_bytes, unsent_room;
    int64_t look_us; /* when the oldest waiter is looked at next */
};

static int send_unsent(struct demand *demand, struct qpc_error *error)
{
    size_t done;
    if (!demand->unsent_bytes)
        return QPC_OK;
    int code = qpc_lane_try_write(&demand->lane, demand->unsent, demand->unsent_bytes, &done, error);
    if (!code) {
        demand->unsent_bytes -= done;
        memmove(demand->unsent, demand->unsent + done, demand->unsent_bytes);
    }
    return code;
}

static int queue_request(struct demand *demand, const struct qpc_frame *request,
                         struct qpc_error *error)
{
    if (demand->unsent_room - demand->unsent_bytes < QPC_FRAME_BYTES) {
        size_t room = demand->unsent_room ? 2 * demand->unsent_room : 64 * QPC_FRAME_BYTES;
        void *grown = realloc(demand->unsent, room);
        if (!grown)
            return qpc_fail(error, QPC_NO_MEMORY, ENOMEM, "requests", 0, room);
        demand->unsent = grown;
        demand->unsent_room = room;
    }
    qpc_frame_encode(request, demand->unsent + demand->unsent_bytes);
    demand->unsent_bytes += QPC_FRAME_BYTES;
    return QPC_OK;
}

/* --- faults -------------------------------------------------------------------------------- */

/* The extent that a fault brings along, within its block. */
static struct qpc_run around(const struct qpc_handler *handler, const struct qpc_block *block,
                             uint64_t page)
{
    uint64_t behind = page < handler->behind_pages ? page : handler->behind_pages;
    uint64_t room = block->pages - page - 1;
    uint64_t ahead = room < handler->ahead_pages ? room : handler->ahead_pages;
    return (struct qpc_run){page - behind, behind + 1 + ahead};
}

/* Zeroes for the page, and for the pages around it that are known to be zero. */
static int answer_zero(struct qpc_handler *handler, uint32_t index, uint64_t page,
                       struct qpc_error *error)
{
    struct qpc_block *block = &handler->blocks[index];
    struct qpc_run extent = around(handler, block, page);
    uint64_t first = page;
    while (first > extent.first && qpc_bits_test(&block->zero, first - 1))
        first--;
    uint64_t end = qpc_bits_next(&block->zero, page, extent.first + extent.count, false);
    return qpc_handler_place(handler, index, first, end - first, NULL, QPC_BY_ZERO, error);
}

static int ask(struct qpc_handler *handler, struct demand *demand, uint32_t index, uint64_t page,
               int64_t read_us, struct qpc_error *error)
{
    if (!demand) /* nobody to ask: the next session raises this fault again */
        return QPC_OK;
    struct qpc_block *block = &handler->blocks[index];
    struct qpc_waiter waiter = {index, page, read_us};
    int code = qpc_handler_add_waiter(handler, waiter, error);
    if (code)
        return code;
    if (qpc_bits_test(&block->placed, page)) { /* a push lane was faster: nobody else settles it */
        qpc_handler_settle_waiters(handler, index, page, 1);
        return qpc_handler_wake(handler, index, page, 1, error);
    }
    /* Claimed: a push lane is placing it this moment, and wakes. */
    if (qpc_bits_test(&block->claimed, page) || !qpc_bits_set(&block->requested, page, 1))
        return QPC_OK;
    struct qpc_run extent = around(handler, block, page);
    struct qpc_frame request = {.type = QPC_FRAME_REQUEST,
                                .block = (uint16_t)index,
                                .focus = (uint32_t)(page - extent.first),
                                .first_page = extent.first,
                                .page_count = extent.count};
    return queue_request(demand, &request, error);
}

/* The first fault on a page that is missing: not those that more threads take meanwhile, nor
 * those on a page that was here already, raced by its copy or discarded since. */
static void trace(struct qpc_handler *handler, uint32_t index, uint64_t page, int64_t read_us)
{
    const struct qpc_block *block = &handler->blocks[index];
    if (!qpc_bits_test(&block->placed, page) && !qpc_bits_test(&block->requested, page))
        qpc_trace_add(&handler->trace, index, page, read_us);
}

static int on_fault(struct qpc_handler *handler, struct demand *demand, uint64_t address,
                    int64_t read_us, struct qpc_error *error)
{
    const struct qpc_mapping *mapping = qpc_handler_find(handler, address);
    if (!mapping)
        return qpc_fail(error, QPC_SYSTEM, EFAULT, "fault outside of every RAM block", address, 0);
    uint64_t page = (address - mapping->hva + mapping->offset_bytes) / QPC_PAGE_BYTES;
    struct qpc_block *block = &handler->blocks[mapping->block];
    atomic_fetch_add(&handler->shared->faults, 1);
    trace(handler, mapping->block, page, read_us);
    if (!qpc_bits_test(&block->placed, page) && !qpc_bits_test(&block->zero, page))
        return ask(handler, demand, mapping->block, page, read_us, error);
    int code = qpc_bits_test(&block->placed, page)
                   ? qpc_handler_place_again(handler, mapping->block, page, error)
                   : answer_zero(handler, mapping->block, page, error);
    if (!code) {
        atomic_fetch_add(&handler->shared->local_faults, 1);
        qpc_handler_record_latency(handler, read_us);
    }
    return code;
}

/* Read and answer what faults there are; *some: there were any. */
static int drain_faults(struct qpc_handler *handler, struct demand *demand, bool *some,
                        struct qpc_error *error)
{
    struct uffd_msg messages[MESSAGES];
    ssize_t got = handler->ops->read(handler->uffd, messages, sizeof messages);
    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return QPC_OK;
    if (got < 0)
        return qpc_fail(error, QPC_SYSTEM, errno, "read of the userfaultfd", 0, 0);
    int64_t read_us = handler->ops->now_us();
    for (size_t i = 0; i < (size_t)got / sizeof *messages; i++) {
        if (messages[i].event != UFFD_EVENT_PAGEFAULT) /* we asked for no others */
            continue;
        *some = true;
        int code = on_fault(handler, demand, messages[i].arg.pagefault.address, read_us, error);
        if (code)
            return code;
    }
    return QPC_OK;
}

/* --- the demand lane ----------------------------------------------------------------------- */

/* Known from now on; placed where a thread has asked, as it waits for that. */
static int on_demand_zero(struct qpc_handler *handler, const struct qpc_frame *frame,
                          struct qpc_error *error)
{
    struct qpc_bits *requested = &handler->blocks[frame->block].requested;
    uint64_t page = frame->first_page, end = page + frame->page_count;
    qpc_handler_know_zero(handler, frame->block, page, frame->page_count,
                          frame->type == QPC_FRAME_HOLE);
    for (; (page = qpc_bits_next(requested, page, end, true)) < end; page++) {
        int code = qpc_handler_place(handler, frame->block, page, 1, NULL, QPC_BY_ZERO, error);
        if (code)
            return code;
    }
    return QPC_OK;
}

static int on_demand_frame(struct qpc_handler *handler, const struct qpc_frame *frame,
                           const uint8_t *payload, struct qpc_error *error)
{
    switch (frame->type) {
    case QPC_FRAME_DATA:
        atomic_fetch_add(&handler->shared->demand_bytes, qpc_frame_payload_bytes(frame));
        return qpc_handler_place(handler, frame->block, frame->first_page, frame->page_count,
                                 payload, QPC_BY_DEMAND, error);
    case QPC_FRAME_ZERO:
    case QPC_FRAME_HOLE:
        return on_demand_zero(handler, frame, error);
    default:
        return qpc_fail(error, QPC_PROTOCOL, 0, "frame: type not for the demand lane", frame->type,
                        0);
    }
}

static void count_received(struct qpc_handler *handler, uint64_t bytes)
{
    if (!bytes)
        return;
    atomic_fetch_add(&handler->shared->wire_bytes, bytes);
    atomic_store(&handler->heard, true);
}

/* Take what the lane holds; *some: there was a frame. */
static int drain_lane(struct qpc_handler *handler, struct qpc_lane *lane, bool *some,
                      struct qpc_error *error)
{
    struct qpc_frame frame;
    const uint8_t *payload;
    uint64_t received = lane->received_bytes;
    int code = qpc_lane_next(lane, &frame, &payload, error);
    count_received(handler, lane->received_bytes - received);
    if (code == QPC_TIMEOUT && error->error_number == EAGAIN)
        return qpc_lane_check_stall(lane, error);
    if (code)
        return code;
    *some = true;
    return on_demand_frame(handler, &frame, payload, error);
}

static int check_stop(const struct qpc_handler *handler, struct qpc_error *error)
{
    return atomic_load(&handler->stopping) ? qpc_fail(error, QPC_STOPPED, 0, "asked to stop", 0, 0)
                                           : QPC_OK;
}

/* A page server that is stopped or stuck keeps its connections. Before it has said a word
 * it may be waiting for the switch. */
static int check_answers(struct qpc_handler *handler, struct demand *demand,
                         struct qpc_error *error)
{
    int64_t now_us = handler->ops->now_us();
    if (!atomic_load(&handler->heard) || now_us < demand->look_us)
        return QPC_OK;
    demand->look_us = now_us + LOOK_US;
    int64_t oldest_us = qpc_handler_oldest_waiter_us(handler);
    if (!oldest_us || now_us - oldest_us < ANSWER_US)
        return QPC_OK;
    return qpc_fail(error, QPC_TIMEOUT, ETIMEDOUT, "the page server does not answer", 0, 0);
}

/* Faults, the lane in both directions, a stop; `demand` NULL: no lane. */
static int wait_for_any(struct qpc_handler *handler, struct demand *demand, struct qpc_error *error)
{
    short out = demand && demand->unsent_bytes ? POLLOUT : 0;
    struct pollfd watch[] = {{handler->uffd, POLLIN, 0},
                             {handler->stop_fd, POLLIN, 0},
                             {demand ? demand->lane.fd : -1, (short)(POLLIN | out), 0}};
    int timeout_ms = -1;
    if (demand) {
        int frame_ms = qpc_lane_poll_ms(&demand->lane);
        timeout_ms = frame_ms >= 0 && frame_ms < LOOK_US / 1000 ? frame_ms : LOOK_US / 1000;
    }
    if (poll(watch, 3, timeout_ms) < 0 && errno != EINTR)
        return qpc_fail(error, QPC_SYSTEM, errno, "poll in the fault loop", 0, 0);
    if (watch[0].revents & POLLERR) /* no API handshake was done on it */
        return qpc_fail(error, QPC_SYSTEM, EINVAL, "poll of the userfaultfd", 0, 0);
    return QPC_OK;
}

/* One round of the demand loop. */
static int serve(struct qpc_handler *handler, struct demand *demand, struct qpc_error *error)
{
    bool some = false;
    int code;
    if ((code = check_stop(handler, error)) ||
        (code = drain_faults(handler, demand, &some, error)) ||
        (code = send_unsent(demand, error)) ||
        (code = drain_lane(handler, &demand->lane, &some, error)) ||
        (code = check_answers(handler, demand, error)))
        return code;
    return some ? QPC_OK : wait_for_any(handler, demand, error);
}

int qpc_handler_run_demand(struct qpc_handler *handler, int lane_fd, struct qpc_error *error)
{
    struct demand demand = {0};
    int code = qpc_lane_init(&demand.lane, lane_fd, handler->stop_fd, handler->block_pages,
                             handler->block_count, error);
    while (!code)
        code = serve(handler, &demand, error);
    free(demand.unsent);
    qpc_lane_deinit(&demand.lane);
    return code;
}

int qpc_handler_run_local(struct qpc_handler *handler, struct qpc_error *error)
{
    int code = QPC_OK;
    while (!code) {
        bool some = false;
        code = check_stop(handler, error);
        if (!code)
            code = drain_faults(handler, NULL, &some, error);
        if (!code && !some)
            code = wait_for_any(handler, NULL, error);
    }
    return code;
}

/* --- push lanes ---------------------------------------------------------------------------- */

static int on_push_frame(struct qpc_handler *handler, const struct qpc_frame *frame,
                         const uint8_t *payload, struct qpc_error *error)
{
    switch (frame->type) {
    case QPC_FRAME_DATA:
        atomic_fetch_add(&handler->shared->push_bytes, qpc_frame_payload_bytes(frame));
        return qpc_handler_place(handler, frame->block, frame->first_page, frame->page_count,
                                 payload, QPC_BY_PUSH, error);
    case QPC_FRAME_ZERO:
    case QPC_FRAME_HOLE:
        qpc_handler_know_zero(handler, frame->block, frame->first_page, frame->page_count,
                              frame->type == QPC_FRAME_HOLE);
        return QPC_OK;
    default:
        return qpc_fail(error, QPC_PROTOCOL, 0, "frame: type not for a push lane", frame->type, 0);
    }
}

/* QPC_OK: the page server has sent all that it had for this lane. */
int qpc_handler_run_push(struct qpc_handler *handler, int lane_fd, struct qpc_error *error)
{
    struct qpc_lane lane;
    struct qpc_frame frame = {0};
    const uint8_t *payload;
    int code = qpc_lane_init(&lane, lane_fd, handler->stop_fd, handler->block_pages,
                             handler->block_count, error);
    while (!code) {
        uint64_t received = lane.received_bytes;
        code = qpc_lane_next(&lane, &frame, &payload, error);
        count_received(handler, lane.received_bytes - received);
        if (code == QPC_TIMEOUT && error->error_number == EAGAIN) {
            code = qpc_lane_wait(&lane, -1, error);
            continue;
        }
        if (!code && frame.type == QPC_FRAME_END)
            break;
        if (!code)
            code = on_push_frame(handler, &frame, payload, error);
        if (!code)
            code = check_stop(handler, error);
    }
    qpc_lane_deinit(&lane);
    return code;
}
