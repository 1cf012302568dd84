/* From one session of lanes to the next, and from one handler to the next: what is
 * taken over, what is forgotten, and what the page server is told. */
#include <sys/eventfd.h>

#include "handler.h"

/* --- taking over --------------------------------------------------------------------------- */

/* Make known what `bits` says; how many pages were not known before. */
static uint64_t know_all_of(struct qpc_block *block, const struct qpc_bits *bits)
{
    uint64_t newly = 0, page = 0, stop;
    for (; (page = qpc_bits_next(bits, page, block->pages, true)) < block->pages; page = stop) {
        stop = qpc_bits_next(bits, page, block->pages, false);
        newly += qpc_bits_set(&block->known, page, stop - page);
    }
    return newly;
}

/* A thread that failed has left claims behind. Only between sessions. */
static void forget_claims(struct qpc_handler *handler)
{
    for (unsigned i = 0; i < handler->block_count; i++)
        qpc_bits_copy(&handler->blocks[i].claimed, &handler->blocks[i].placed);
}

int qpc_handler_adopt(struct qpc_handler *handler, const int *ram_fds, struct qpc_error *error)
{
    struct qpc_handler_shared *shared = handler->shared;
    uint64_t newly = 0;
    for (unsigned i = 0; i < handler->block_count; i++) {
        struct qpc_block *block = &handler->blocks[i];
        int code = qpc_bits_set_data(&block->placed, ram_fds[i], error);
        if (code)
            return code;
        newly += know_all_of(block, &block->placed) + know_all_of(block, &block->zero);
    }
    forget_claims(handler);
    /* A kill falls between a page's bit and its counter: those came by push, most likely. */
    uint64_t counted = shared->hole_pages + shared->zero_pages + shared->push_pages +
                       shared->demand_pages + shared->around_pages;
    uint64_t known = handler->total_pages - handler->remaining_pages + newly;
    if (known > counted)
        atomic_fetch_add(&shared->push_pages, known - counted);
    qpc_handler_count_down(handler, newly);
    return QPC_OK;
}

void qpc_handler_commit(struct qpc_handler *handler)
{
    atomic_store(&handler->committed, true);
    qpc_trace_begin(&handler->trace, handler->ops->now_us());
}

/* --- sessions ------------------------------------------------------------------------------ */

void qpc_handler_stop(struct qpc_handler *handler)
{
    atomic_store(&handler->stopping, true); /* for a loop that is too busy to poll */
    eventfd_write(handler->stop_fd, 1);
}

void qpc_handler_reset(struct qpc_handler *handler)
{
    eventfd_t ignored;
    eventfd_read(handler->stop_fd, &ignored);
    atomic_store(&handler->stopping, false);
    atomic_store(&handler->heard, false);
    for (unsigned i = 0; i < handler->block_count; i++)
        qpc_bits_clear_all(&handler->blocks[i].requested);
    forget_claims(handler);
    pthread_mutex_lock(&handler->waiters_lock);
    handler->waiter_count = 0; /* wake_all raises their faults again */
    pthread_mutex_unlock(&handler->waiters_lock);
}

int qpc_handler_done_fd(const struct qpc_handler *handler) { return handler->done_fd; }

static int add_known(struct qpc_batch *batch, uint16_t index, const struct qpc_bits *known,
                     struct qpc_error *error)
{
    uint64_t page = 0, stop;
    int code = QPC_OK;
    while (!code && (page = qpc_bits_next(known, page, known->pages, true)) < known->pages) {
        stop = qpc_bits_next(known, page, known->pages, false);
        struct qpc_frame have = {.type = QPC_FRAME_HAVE,
                                 .block = index,
                                 .first_page = page,
                                 .page_count = stop - page};
        code = qpc_batch_add(batch, &have, error);
        page = stop;
    }
    return code;
}

int qpc_handler_send_have(struct qpc_handler *handler, int lane_fd, struct qpc_error *error)
{
    struct qpc_lane lane;
    struct qpc_batch batch;
    int code = qpc_lane_init(&lane, lane_fd, handler->stop_fd, handler->block_pages,
                             handler->block_count, error);
    qpc_batch_init(&batch, &lane);
    for (unsigned i = 0; i < handler->block_count && !code; i++)
        code = add_known(&batch, (uint16_t)i, &handler->blocks[i].known, error);
    if (!code)
        code = qpc_batch_add(&batch, &(struct qpc_frame){.type = QPC_FRAME_START}, error);
    if (!code)
        code = qpc_batch_flush(&batch, error);
    qpc_lane_deinit(&lane);
    return code;
}
