/* One lane: a connected stream socket that carries frames in both directions.
 *
 * Nothing here blocks without watching the stop descriptor too, and each frame
 * has QPC_STALL_MS from its first byte to its last, in either direction; a peer
 * that takes longer is given up. File descriptors are borrowed. */
#ifndef QPC_LANE_H
#define QPC_LANE_H

#include <poll.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#include "error.h"
#include "wire.h"

#define QPC_STALL_MS 30000
#define QPC_BATCH_FRAMES 1024

struct qpc_lane {
    int fd;
    int stop_fd; /* readable: leave whatever you do with QPC_STOPPED */
    const uint64_t *block_pages;
    unsigned block_count;
    uint8_t *buffer;
    size_t capacity, start, end; /* bytes [start, end) are read and not yet parsed */
    int64_t begun_us;            /* when the first byte of the present frame came; 0: none */
    uint64_t received_bytes;
};

int qpc_lane_init(struct qpc_lane *lane, int fd, int stop_fd, const uint64_t *block_pages,
                  unsigned block_count, struct qpc_error *error);
void qpc_lane_deinit(struct qpc_lane *lane);

/* The next whole frame, without blocking. QPC_OK: *frame and *payload (valid
 * until the next call); QPC_TIMEOUT with error_number EAGAIN: none yet, see
 * qpc_lane_wait; QPC_CLOSED at a frame's edge; QPC_PROTOCOL; QPC_SYSTEM. */
int qpc_lane_next(struct qpc_lane *lane, struct qpc_frame *frame, const uint8_t **payload,
                  struct qpc_error *error);

/* Block until the lane can be read (QPC_OK), the stop descriptor is (QPC_STOPPED),
 * or `timeout_ms` passed (QPC_TIMEOUT; -1: wait, but not for a stalled frame). */
int qpc_lane_wait(struct qpc_lane *lane, int timeout_ms, struct qpc_error *error);

/* Write all of `parts` (which it changes) or fail. */
int qpc_lane_write(struct qpc_lane *lane, struct iovec *parts, int count, struct qpc_error *error);
int qpc_lane_write_frame(struct qpc_lane *lane, const struct qpc_frame *frame,
                         struct qpc_error *error);

/* Frames without payload, many a write: a fragmented guest has millions of extents. */
struct qpc_batch {
    struct qpc_lane *lane; /* borrowed */
    size_t count;
    uint8_t bytes[QPC_BATCH_FRAMES * QPC_FRAME_BYTES];
};

void qpc_batch_init(struct qpc_batch *batch, struct qpc_lane *lane);
/* Into the batch; if that is full, it is written first. */
int qpc_batch_add(struct qpc_batch *batch, const struct qpc_frame *frame, struct qpc_error *error);
int qpc_batch_flush(struct qpc_batch *batch, struct qpc_error *error);

/* Write what fits at once; *done bytes of it. */
int qpc_lane_try_write(struct qpc_lane *lane, const uint8_t *bytes, size_t length, size_t *done,
                       struct qpc_error *error);

/* Keep no more than this unsent in the socket: what is written next waits for no queue of ours. */
void qpc_lane_limit_unsent(struct qpc_lane *lane, int bytes);

/* How long poll may wait before a stalled frame is due; -1: for ever. */
int qpc_lane_poll_ms(const struct qpc_lane *lane);

/* QPC_TIMEOUT if the frame in progress has stalled for too long. */
int qpc_lane_check_stall(const struct qpc_lane *lane, struct qpc_error *error);

#endif
