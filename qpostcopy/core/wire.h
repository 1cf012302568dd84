/* What goes over a lane: a hello in each direction, then frames.
 *
 *   page server                                handler
 *        | --- hello OFFER (versions, id, token, lane, blocks) --> |
 *        | <-- hello ACCEPT (one version) | REFUSE_* ------------- |
 *        |                 demand lane only:                       |
 *        | <-- HAVE extent ... HAVE extent, START ---------------- |
 *        | <-- REQUEST extent, focus page ------------------------ |
 *        | --- DATA focus page | ZERO, then the rest around it --> |
 *        |                 push lanes:                             |
 *        | --- HOLE extents (lane 0), DATA, ZERO ..., END -------> |
 *        |                 state lane (since version 2):           |
 *        | --- QEMU's own stream: no frame of ours --------------> |
 *
 * Fixed widths, little endian, zero invalid in every enum. A frame is a header
 * of QPC_FRAME_BYTES; only DATA has a payload, of exactly page_count pages, so
 * there is no second length that could contradict the first. Codec only: no
 * I/O, no state, safe to fuzz. */
#ifndef QPC_WIRE_H
#define QPC_WIRE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "error.h"

/* cdef-begin */
#define QPC_VERSION_LOWEST 1
#define QPC_VERSION_HIGHEST 2
#define QPC_VERSION_STATE 2 /* the first with a state lane */
#define QPC_PAGE_BYTES 4096
#define QPC_FRAME_BYTES 24
#define QPC_FRAME_PAGES_MAX 64 /* of a DATA frame: 256 KiB stay in a core's cache */
#define QPC_BLOCKS_MAX 64
#define QPC_NAME_BYTES 256 /* RAMBlock.idstr of QEMU, its NUL included */
#define QPC_ID_BYTES 96
#define QPC_TOKEN_BYTES 32
#define QPC_HELLO_HEADER_BYTES 16
#define QPC_HELLO_BODY_MAX 32768

enum qpc_frame_type {
    QPC_FRAME_REQUEST = 1, /* handler: send this extent, its focus page first */
    QPC_FRAME_DATA,        /* page server: page_count pages follow */
    QPC_FRAME_ZERO,        /* page server: these pages are all zero bytes */
    QPC_FRAME_HOLE,        /* page server: these pages were never written */
    QPC_FRAME_HAVE,        /* handler: do not send these, they are here */
    QPC_FRAME_START,       /* handler: no more HAVE; begin */
    QPC_FRAME_END,         /* page server: nothing more on this push lane */
    QPC_FRAME_TYPES
};

struct qpc_frame {
    uint8_t type;
    uint16_t block;
    uint32_t focus; /* REQUEST: index of the faulted page within the extent */
    uint64_t first_page;
    uint64_t page_count;
};

enum qpc_lane_kind { QPC_LANE_DEMAND = 1, QPC_LANE_PUSH, QPC_LANE_STATE, QPC_LANE_KINDS };

enum qpc_hello_status {
    QPC_HELLO_OFFER = 1,
    QPC_HELLO_ACCEPT,
    QPC_HELLO_REFUSE_VERSION,
    QPC_HELLO_REFUSE_IDENTITY, /* migration id or token */
    QPC_HELLO_REFUSE_BLOCKS,
    QPC_HELLO_REFUSE_LANE, /* kind or index not expected, or taken */
    QPC_HELLO_STATUSES
};

struct qpc_hello_block {
    uint64_t size_bytes;
    char name[256];
};

struct qpc_hello {
    uint16_t version_lowest;
    uint16_t version_highest;
    uint8_t status;
    uint8_t lane_kind;
    uint16_t lane_index;
    uint32_t page_bytes;
    uint64_t features;
    char migration_id[96];
    uint8_t token[32];
    uint16_t block_count;
    struct qpc_hello_block blocks[64];
};

void qpc_frame_encode(const struct qpc_frame *frame, uint8_t out[24]);

/* QPC_OK, or QPC_PROTOCOL naming the field. Checks the frame against itself and
 * against the sizes of the blocks: after QPC_OK every page of it exists. */
int qpc_frame_decode(const uint8_t in[24], const uint64_t *block_pages, unsigned block_count,
                     struct qpc_frame *frame, struct qpc_error *error);

/* Bytes that follow the hello's header, or QPC_PROTOCOL. `in` has QPC_HELLO_HEADER_BYTES. */
int qpc_hello_body_bytes(const uint8_t *in, size_t *body_bytes, struct qpc_error *error);

/* Header and body into `out` (room: QPC_HELLO_HEADER_BYTES + QPC_HELLO_BODY_MAX); its length. */
size_t qpc_hello_encode(const struct qpc_hello *hello, uint8_t *out);
int qpc_hello_decode(const uint8_t *in, size_t length, struct qpc_hello *hello,
                     struct qpc_error *error);

/* The version two peers agree on, or 0. */
unsigned qpc_version_choose(unsigned lowest, unsigned highest, unsigned peer_lowest,
                            unsigned peer_highest);
/* cdef-end */

/* Payload bytes that follow this frame's header. */
static inline size_t qpc_frame_payload_bytes(const struct qpc_frame *frame)
{
    return frame->type == QPC_FRAME_DATA ? (size_t)frame->page_count * QPC_PAGE_BYTES : 0;
}

#endif
