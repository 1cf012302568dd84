/* Holes: which pages of the source were never written.
 *
 *   block  |---- settled: `present' is right ----|---- not looked at yet ----|
 *           ^ announced: told in this session
 *
 * Found in the order of addresses by a loop of its own, because SEEK_HOLE cannot
 * be told where to stop: in a terabyte without a hole it takes ten seconds, and
 * nobody is to wait for that, the end of a session neither. Whoever comes to a
 * page first takes it for data: then it is read as zeroes, and costs a frame. */
#include "source.h"

/* --- finding ------------------------------------------------------------------------------- */

static int scan_block(struct qpc_source *source, struct qpc_source_block *block,
                      struct qpc_error *error)
{
    struct qpc_run data;
    for (uint64_t from = atomic_load(&block->settled); from < block->pages;
         from = data.first + data.count) {
        if (atomic_load(&source->scan_stopping))
            return qpc_fail(error, QPC_STOPPED, 0, "asked to stop", 0, 0);
        int code = qpc_next_data(block->fd, from, block->pages, &data, error);
        if (code)
            return code;
        if (data.count)
            qpc_bits_set(&block->present, data.first, data.count);
        atomic_store(&block->settled, data.first + data.count);
    }
    return QPC_OK;
}

void qpc_source_stop_scan(struct qpc_source *source) { atomic_store(&source->scan_stopping, true); }

/* The source is stopped: what is found is final, in every session. */
int qpc_source_run_scan(struct qpc_source *source, struct qpc_error *error)
{
    int code = QPC_OK;
    for (unsigned i = 0; i < source->block_count && !code; i++)
        code = scan_block(source, &source->blocks[i], error);
    return code;
}

/* --- telling ------------------------------------------------------------------------------- */

/* What fits the batch of one block's news. */
static int add_holes(struct qpc_source *source, struct qpc_batch *batch, uint32_t index,
                     struct qpc_error *error)
{
    struct qpc_source_block *block = &source->blocks[index];
    uint64_t settled = atomic_load(&block->settled);
    int code = QPC_OK;
    while (!code && block->announced < settled && batch->count < QPC_BATCH_FRAMES) {
        uint64_t hole = qpc_bits_next(&block->present, block->announced, settled, false);
        uint64_t data = qpc_bits_next(&block->present, hole, settled, true);
        struct qpc_frame frame = {.type = QPC_FRAME_HOLE,
                                  .block = (uint16_t)index,
                                  .first_page = hole,
                                  .page_count = data - hole};
        if (frame.page_count)
            code = qpc_batch_add(batch, &frame, error);
        atomic_fetch_add(&source->hole_pages, frame.page_count);
        block->announced = data;
    }
    return code;
}

int qpc_source_announce_holes(struct qpc_source *source, struct qpc_lane *lane, uint64_t *bytes,
                              struct qpc_error *error)
{
    struct qpc_batch batch;
    int code = QPC_OK;
    qpc_batch_init(&batch, lane);
    for (unsigned i = 0; i < source->block_count && !code; i++)
        code = add_holes(source, &batch, i, error);
    *bytes = batch.count * QPC_FRAME_BYTES;
    atomic_fetch_add(&source->wire_bytes, *bytes);
    return code ? code : qpc_batch_flush(&batch, error);
}
