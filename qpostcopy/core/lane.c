#include "lane.h"

#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "uffd.h"

/* Two of the largest frames: one being parsed, one arriving. */
#define CAPACITY (2u * (QPC_FRAME_BYTES + QPC_FRAME_PAGES_MAX * QPC_PAGE_BYTES))

int qpc_lane_init(struct qpc_lane *lane, int fd, int stop_fd, const uint64_t *block_pages,
                  unsigned block_count, struct qpc_error *error)
{
    *lane = (struct qpc_lane){.fd = fd,
                              .stop_fd = stop_fd,
                              .block_pages = block_pages,
                              .block_count = block_count,
                              .capacity = CAPACITY};
    lane->buffer = malloc(CAPACITY);
    if (!lane->buffer)
        return qpc_fail(error, QPC_NO_MEMORY, ENOMEM, "lane buffer", 0, CAPACITY);
    return QPC_OK;
}

void qpc_lane_deinit(struct qpc_lane *lane)
{
    free(lane->buffer);
    lane->buffer = NULL;
}

int qpc_lane_poll_ms(const struct qpc_lane *lane)
{
    if (!lane->begun_us)
        return -1;
    int64_t waited_ms = (qpc_system_ops.now_us() - lane->begun_us) / 1000;
    return waited_ms >= QPC_STALL_MS ? 0 : (int)(QPC_STALL_MS - waited_ms);
}

int qpc_lane_check_stall(const struct qpc_lane *lane, struct qpc_error *error)
{
    if (!lane->begun_us || qpc_lane_poll_ms(lane) > 0)
        return QPC_OK;
    return qpc_fail(error, QPC_TIMEOUT, ETIMEDOUT, "peer stalled in the middle of a frame", 0,
                    QPC_STALL_MS);
}

/* A whole frame in the buffer? Decodes as soon as the header is there, so that a
 * bad one is refused before its payload is awaited. */
static int parse(struct qpc_lane *lane, struct qpc_frame *frame, const uint8_t **payload,
                 struct qpc_error *error)
{
    size_t have = lane->end - lane->start, need = QPC_FRAME_BYTES;
    if (have >= need) {
        int code = qpc_frame_decode(lane->buffer + lane->start, lane->block_pages,
                                    lane->block_count, frame, error);
        if (code)
            return code;
        need += qpc_frame_payload_bytes(frame);
    }
    if (have < need)
        return qpc_fail(error, QPC_TIMEOUT, EAGAIN, "frame not complete", 0, need - have);
    *payload = lane->buffer + lane->start + QPC_FRAME_BYTES;
    lane->start += need;
    return QPC_OK;
}

static int fill(struct qpc_lane *lane, struct qpc_error *error)
{
    if (lane->capacity - lane->start < lane->capacity / 2) { /* room for a whole frame, always */
        memmove(lane->buffer, lane->buffer + lane->start, lane->end - lane->start);
        lane->end -= lane->start;
        lane->start = 0;
    }
    ssize_t got = recv(lane->fd, lane->buffer + lane->end, lane->capacity - lane->end, MSG_DONTWAIT);
    if (got > 0) {
        lane->end += (size_t)got;
        lane->received_bytes += (uint64_t)got;
        if (!lane->begun_us) /* the clock runs from a frame's first byte to its last */
            lane->begun_us = qpc_system_ops.now_us();
        return QPC_OK;
    }
    if (got == 0)
        return lane->end == lane->start
                   ? qpc_fail(error, QPC_CLOSED, 0, "peer closed the lane", 0, 0)
                   : qpc_fail(error, QPC_CLOSED, 0, "peer closed the lane in the middle of a frame",
                              0, lane->end - lane->start);
    if (errno == EAGAIN || errno == EINTR)
        return qpc_fail(error, QPC_TIMEOUT, EAGAIN, "nothing to read", 0, 0);
    int code = errno == ECONNRESET || errno == ETIMEDOUT || errno == EPIPE ? QPC_CLOSED : QPC_LANE;
    return qpc_fail(error, code, errno, "recv on a lane", 0, 0);
}

int qpc_lane_next(struct qpc_lane *lane, struct qpc_frame *frame, const uint8_t **payload,
                  struct qpc_error *error)
{
    for (;;) {
        int code = parse(lane, frame, payload, error);
        if (code == QPC_OK) /* bytes behind it are the next frame's */
            lane->begun_us = lane->start == lane->end ? 0 : qpc_system_ops.now_us();
        if (code != QPC_TIMEOUT)
            return code;
        if (lane->start == lane->end)
            lane->start = lane->end = 0;
        code = fill(lane, error);
        if (code)
            return code;
    }
}

int qpc_lane_wait(struct qpc_lane *lane, int timeout_ms, struct qpc_error *error)
{
    struct pollfd watch[] = {{lane->fd, POLLIN, 0}, {lane->stop_fd, POLLIN, 0}};
    int stall_ms = qpc_lane_poll_ms(lane);
    if (timeout_ms < 0 || (stall_ms >= 0 && stall_ms < timeout_ms))
        timeout_ms = stall_ms;
    int ready = poll(watch, 2, timeout_ms);
    if (ready < 0 && errno != EINTR)
        return qpc_fail(error, QPC_LANE, errno, "poll on a lane", 0, 0);
    if (ready > 0 && watch[1].revents)
        return qpc_fail(error, QPC_STOPPED, 0, "asked to stop", 0, 0);
    if (ready == 0) {
        int code = qpc_lane_check_stall(lane, error);
        return code ? code : qpc_fail(error, QPC_TIMEOUT, ETIMEDOUT, "peer is silent", 0, 0);
    }
    return QPC_OK;
}

static int wait_writable(struct qpc_lane *lane, int64_t deadline_us, struct qpc_error *error)
{
    struct pollfd watch[] = {{lane->fd, POLLOUT, 0}, {lane->stop_fd, POLLIN, 0}};
    int64_t left_ms = (deadline_us - qpc_system_ops.now_us()) / 1000;
    int ready = poll(watch, 2, left_ms > 0 ? (int)left_ms : 0);
    if (ready < 0 && errno != EINTR)
        return qpc_fail(error, QPC_LANE, errno, "poll on a lane", 0, 0);
    if (ready > 0 && watch[1].revents)
        return qpc_fail(error, QPC_STOPPED, 0, "asked to stop", 0, 0);
    if (ready == 0)
        return qpc_fail(error, QPC_TIMEOUT, ETIMEDOUT, "peer does not read", 0, QPC_STALL_MS);
    return QPC_OK;
}

/* Drop `done` bytes from the front of parts[*first..count). */
static void advance(struct iovec *parts, int *first, int count, size_t done)
{
    while (*first < count && done >= parts[*first].iov_len)
        done -= parts[(*first)++].iov_len;
    if (done) {
        parts[*first].iov_base = (uint8_t *)parts[*first].iov_base + done;
        parts[*first].iov_len -= done;
    }
}

int qpc_lane_write(struct qpc_lane *lane, struct iovec *parts, int count, struct qpc_error *error)
{
    int first = 0;
    int64_t deadline_us = qpc_system_ops.now_us() + QPC_STALL_MS * 1000;
    while (first < count) {
        struct msghdr message = {.msg_iov = parts + first, .msg_iovlen = (size_t)(count - first)};
        ssize_t done = sendmsg(lane->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (done >= 0) {
            advance(parts, &first, count, (size_t)done);
            continue;
        }
        if (errno == EINTR)
            continue;
        if (errno == EPIPE || errno == ECONNRESET || errno == ETIMEDOUT)
            return qpc_fail(error, QPC_CLOSED, errno, "peer closed the lane", 0, 0);
        if (errno != EAGAIN)
            return qpc_fail(error, QPC_LANE, errno, "sendmsg on a lane", 0, 0);
        int code = wait_writable(lane, deadline_us, error);
        if (code)
            return code;
    }
    return QPC_OK;
}

int qpc_lane_try_write(struct qpc_lane *lane, const uint8_t *bytes, size_t length, size_t *done,
                       struct qpc_error *error)
{
    ssize_t sent = send(lane->fd, bytes, length, MSG_DONTWAIT | MSG_NOSIGNAL);
    *done = sent > 0 ? (size_t)sent : 0;
    if (sent >= 0 || errno == EAGAIN || errno == EINTR)
        return QPC_OK;
    int code = errno == EPIPE || errno == ECONNRESET || errno == ETIMEDOUT ? QPC_CLOSED : QPC_LANE;
    return qpc_fail(error, code, errno, "send on a lane", 0, 0);
}

void qpc_lane_limit_unsent(struct qpc_lane *lane, int bytes)
{
    /* Not every stream is TCP: a lane over a unix socket has no such option. */
    (void)setsockopt(lane->fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT, &bytes, sizeof bytes);
}

int qpc_lane_write_frame(struct qpc_lane *lane, const struct qpc_frame *frame,
                         struct qpc_error *error)
{
    uint8_t header[QPC_FRAME_BYTES];
    qpc_frame_encode(frame, header);
    struct iovec part = {header, sizeof header};
    return qpc_lane_write(lane, &part, 1, error);
}

/* --- batches ------------------------------------------------------------------------------- */

void qpc_batch_init(struct qpc_batch *batch, struct qpc_lane *lane)
{
    batch->lane = lane;
    batch->count = 0;
}

int qpc_batch_flush(struct qpc_batch *batch, struct qpc_error *error)
{
    struct iovec part = {batch->bytes, batch->count * QPC_FRAME_BYTES};
    batch->count = 0;
    return part.iov_len ? qpc_lane_write(batch->lane, &part, 1, error) : QPC_OK;
}

int qpc_batch_add(struct qpc_batch *batch, const struct qpc_frame *frame, struct qpc_error *error)
{
    int code = batch->count == QPC_BATCH_FRAMES ? qpc_batch_flush(batch, error) : QPC_OK;
    if (!code)
        qpc_frame_encode(frame, batch->bytes + batch->count++ * QPC_FRAME_BYTES);
    return code;
}
